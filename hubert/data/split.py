"""What is drawn from a manifest, and how it is cut: validation, the k-means sample, shards, digests.

Every choice is a comparison of a row's own hash with a threshold, never a draw from a random generator, so that adding
files to a corpus leaves the choices about the old ones alone. The hash is BLAKE2b: the same in every version of Python
and polars, on every machine.
"""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import polars as pl

from hubert.core.errors import ConfigError, DataError
from hubert.core.frames import SAMPLE_RATE
from hubert.data.schema import AnyRows, place

type Hashes = npt.NDArray[np.uint64]

SPAN = 2.0**64
CHUNK_STRINGS = 100_000  # strings that are hashed as Python objects at once
BYTES_PER_SAMPLE = {".wav": 2.0, ".flac": 1.0}  # guesses for planning, before lengths are known; others: 0.5


def stable_hash(strings: pl.Series, seed: int) -> Hashes:
    """Hash each string with a seed: (n,) uint64, uniform over all 64 bits. One million take about 0.8 s.

    It is BLAKE2b with an 8-byte digest, read as little-endian, over the seed in decimal digits, a zero byte and the
    string in UTF-8. The strings must not be null.
    """
    prefix = f"{seed}\0".encode()
    texts = strings.cast(pl.Binary)
    found = np.empty(len(texts), dtype=np.uint64)
    for start in range(0, len(texts), CHUNK_STRINGS):
        part = texts.slice(start, CHUNK_STRINGS).to_list()
        digests = b"".join([hashlib.blake2b(prefix + text, digest_size=8).digest() for text in part])
        found[start : start + len(part)] = np.frombuffer(digests, dtype="<u8")
    return found


def _row_hashes(rows: AnyRows, text: pl.Expr, *, purpose: str, seed: int = 0) -> Hashes:
    """Hash an expression of each row, streamed. The purpose keeps, say, the sample independent of the split."""
    hashed = pl.concat_str(pl.lit(f"{purpose}\0"), text).map_batches(
        lambda strings: pl.Series(stable_hash(strings, seed)), return_dtype=pl.UInt64, is_elementwise=True
    )
    return rows.lazy().select(hashed.alias("hash")).collect(engine="streaming").to_series().to_numpy()


def _column(rows: AnyRows, values: pl.Expr) -> npt.NDArray[np.int64]:
    return rows.lazy().select(values.cast(pl.Int64)).collect(engine="streaming").to_series().to_numpy()


def _take[Rows: (pl.DataFrame, pl.LazyFrame)](rows: Rows, mask: npt.NDArray[np.bool_]) -> Rows:
    """Return the rows where `mask` (n,) is true, in order; of a LazyFrame a LazyFrame that still streams."""
    if isinstance(rows, pl.DataFrame):
        return rows.filter(pl.Series(mask))
    row = pl.col("__row").map_batches(
        lambda numbers: pl.Series(mask[numbers.to_numpy()]), return_dtype=pl.Boolean, is_elementwise=True
    )
    return rows.with_row_index("__row").filter(row).drop("__row")


# Validation -------------------------------------------------------------------------------------------------------


def split_manifest[Rows: (pl.DataFrame, pl.LazyFrame)](
    rows: Rows, *, validation_fraction: float = 0.01, min_validation_files: int = 20, seed: int = 0
) -> tuple[Rows, Rows]:
    """Split into training and validation, all files of a speaker on one side; without speakers, all segments of a file.

    A group (speaker, else file) is held out if its hash lies in the lowest `validation_fraction` of all hashes. If that
    gives fewer than `min_validation_files` rows, the groups of the next lowest hashes follow until there are enough.

    So adding files never moves a file from training to validation, and what lies below the fraction's threshold stays
    in validation. Only groups that the minimum had brought there go back to training, when groups of lower hashes join
    the corpus. (When files are removed, the minimum can bring further groups into validation.)

    Returns:
        (training, validation), in the manifest's order, lazy if `rows` is.

    Raises:
        DataError: validation would be more than half of the rows: there are too few files or speakers.
    """
    file = pl.when(pl.col("offset").is_null()).then("f\0" + pl.col("fileid")).otherwise("p\0" + place())
    group = pl.when(pl.col("speaker").is_null()).then(file).otherwise("s\0" + pl.col("speaker"))
    hashes = _row_hashes(rows, group, purpose="split", seed=seed)
    held = hashes < validation_fraction * SPAN
    if held.sum() < min_validation_files and len(hashes) >= min_validation_files:
        held = hashes <= np.partition(hashes, min_validation_files - 1)[min_validation_files - 1]
    if held.sum() < min_validation_files or 2 * held.sum() > len(hashes):
        raise DataError(
            f"validation would hold {held.sum()} of {len(hashes)} files (validation_fraction = {validation_fraction}, "
            f"min_validation_files = {min_validation_files}); it must have the minimum and at most half. There are too "
            "few files, or speakers too large to be held out as a whole. Lower min_validation_files, set "
            '`speaker = "none"`, or give a folder of its own as `validation`'
        )
    return _take(rows, ~held), _take(rows, held)


def select_sample[Rows: (pl.DataFrame, pl.LazyFrame)](
    rows: Rows, *, fraction: float = 0.1, max_hours: float = 100.0, min_files: int = 20, seed: int = 0
) -> Rows:
    """Select the utterances whose frames are clustered: those whose hash lies in the lowest `fraction` of all hashes.

    If they last longer than `max_hours`, only the lowest hashes that fit are kept. If they are fewer than `min_files`,
    the next lowest follow; the minimum also wins over `max_hours`. All rows are taken if there are fewer.

    Returns:
        The selected rows in the manifest's order, lazy if `rows` is. When files are added, the old ones stay selected
        except those of the highest hashes, which `max_hours` may push out or the minimum may no longer need.

    Raises:
        ConfigError: the settings select nothing.
    """
    hashes = _row_hashes(rows, pl.col("fileid"), purpose="sample", seed=seed)
    lengths = _column(rows, pl.col("num_samples"))
    count = max(int((hashes < fraction * SPAN).sum()), min(min_files, len(hashes)))
    lowest = np.argsort(hashes, kind="stable")[:count]
    fitting = int(np.searchsorted(np.cumsum(lengths[lowest]), max_hours * 3600 * SAMPLE_RATE, side="right"))
    chosen = lowest[: max(fitting, min(min_files, count))]
    if len(chosen) == 0:
        raise ConfigError(
            f"sample_fraction = {fraction}, sample_hours = {max_hours} and min_sample_files = {min_files} select none "
            f"of {len(hashes)} files; raise one of them"
        )
    mask = np.zeros(len(hashes), dtype=np.bool_)
    mask[chosen] = True
    return _take(rows, mask)


# Shards -----------------------------------------------------------------------------------------------------------


def plan_shards(rows: AnyRows, *, hours_per_shard: float) -> list[tuple[int, int]]:
    """Cut the rows, in order, into shards of about `hours_per_shard`: [(first row, row after the last), ...].

    A shard ends at the first row beyond half of the target whose hash says so. The chance is the row's share of the
    other half, so a shard lasts the target on average; at twice the target it ends in any case. The cuts thus depend on
    the rows around them: a file that is added or removed changes its own shard and, seldom, the next few, until an old
    cut is met again. All other shards keep their rows, so their finished work is found again.

    Where `num_samples` is null, the length is guessed from the bytes.
    """
    if hours_per_shard <= 0:
        raise ConfigError(f"shard_hours = {hours_per_shard} must be positive")
    target = max(2, round(hours_per_shard * 3600 * SAMPLE_RATE))
    lengths = _column(rows, _estimated_samples())
    hashes = _row_hashes(rows, pl.col("fileid"), purpose="shard")
    ends = np.cumsum(lengths)
    willing = np.flatnonzero(hashes / SPAN < lengths / (target / 2))
    cuts, before = [0], 0
    while cuts[-1] < len(ends):
        half, twice = np.searchsorted(ends, (before + target // 2, before + 2 * target))
        position = np.searchsorted(willing, half)
        last = min(willing[position] if position < len(willing) else len(ends), twice, len(ends) - 1)
        cuts.append(int(last) + 1)
        before = int(ends[last])
    return list(pairwise(cuts))


def _estimated_samples() -> pl.Expr:
    path = pl.col("path").str.to_lowercase()
    per_sample = pl.lit(0.5)
    for suffix, size in BYTES_PER_SAMPLE.items():
        per_sample = pl.when(path.str.ends_with(suffix)).then(size).otherwise(per_sample)
    return pl.coalesce("num_samples", pl.coalesce("byte_size", "size") / per_sample, pl.lit(0))


# Digests ----------------------------------------------------------------------------------------------------------


def _content_hashes(rows: AnyRows, more: Sequence[str] = ()) -> Hashes:
    values = pl.col("size", "mtime_ns", "offset", "byte_offset", "num_samples", *more).cast(pl.String).fill_null("")
    return _row_hashes(rows, pl.concat_str("fileid", values, separator="\x1f"), purpose="content")


def _mix(hashes: Hashes) -> Hashes:
    """Scramble 64 bits (the finaliser of SplitMix64), so that two sums over one set tell more than one."""
    mixed = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _digest(count: int, total: np.uint64, mixed: np.uint64) -> str:
    return hashlib.blake2b(f"{count} {total} {mixed}".encode(), digest_size=16).hexdigest()


def manifest_digest(rows: AnyRows, *more: str) -> str:
    """Return 32 hex digits that stand for the rows' fileid, size, mtime_ns, offset, byte_offset and num_samples.

    Independent of the order of the rows, of all other columns but those named in `more`, and of versions: the hashes of
    the rows are added up.
    """
    hashes = _content_hashes(rows, more)
    return _digest(len(hashes), hashes.sum(dtype=np.uint64), _mix(hashes).sum(dtype=np.uint64))


def shard_digests(rows: AnyRows, shards: list[tuple[int, int]], *more: str) -> list[str]:
    """Return `manifest_digest` of each shard, in one pass over all rows."""
    hashes = _content_hashes(rows, more)
    mixed = _mix(hashes)
    return [
        _digest(end - start, hashes[start:end].sum(dtype=np.uint64), mixed[start:end].sum(dtype=np.uint64))
        for start, end in shards
    ]
