"""A manifest's rows: one per utterance, the columns that they have, and the only definition of a `fileid`.

| column | type | meaning |
|---|---|---|
| fileid | str | path under the audio root without suffix, plus `#start-end` for a segment: `build_fileid` |
| path | str | absolute path, or the name of a member of `archive` |
| num_samples | i64 | length at 16 kHz; null before verification |
| offset | i64? | first sample of a segment of a longer file, at 16 kHz |
| archive, byte_offset, byte_size | str?, i64?, i64? | the uncompressed tar or zip, and where the member's bytes are in it |
| speaker | str? | what the split into training and validation keeps together |
| size, mtime_ns | i64? | of the file or archive, by stat; null if it was not there |

Functions take a DataFrame or a LazyFrame. Ten million rows are 2.5 GB as a DataFrame; as a LazyFrame polars streams
them, and all work on them stays below 4 GB (`benchmarks/studies/manifest_scale.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from posixpath import normpath, splitext

import polars as pl

from hubert.core.errors import DataError
from hubert.core.frames import SAMPLE_RATE
from hubert.data.audio_file import AudioRef

type AnyRows = pl.DataFrame | pl.LazyFrame

SCHEMA = pl.Schema(
    {
        "fileid": pl.String(),
        "path": pl.String(),
        "num_samples": pl.Int64(),
        "offset": pl.Int64(),
        "archive": pl.String(),
        "byte_offset": pl.Int64(),
        "byte_size": pl.Int64(),
        "speaker": pl.String(),
        "size": pl.Int64(),
        "mtime_ns": pl.Int64(),
    }
)
REQUIRED = ("fileid", "path", "num_samples")
OPTIONAL = (
    "offset",
    "archive",
    "byte_offset",
    "byte_size",
    "speaker",
)  # beside `REQUIRED`, what a text manifest may say

SEGMENT = r"#\d+-\d+$"
# A fileid becomes a path below a folder of features or of ABX items, so it must be a relative path that stays there.
UNSAFE_FILEID = r"^$|^/|/$|//|(^|/)\.\.?(/|$)|[\x00\n\r]"


# fileid -----------------------------------------------------------------------------------------------------------


def build_fileid(path: str) -> str:
    """Return the fileid of a file from its path under the audio root (POSIX): the path without its suffix.

    For a member of an archive that is its name in the archive; in a folder of archives the archive's own fileid and a
    slash go before it.
    """
    return splitext(normpath(path))[0]


def segment_fileid(fileid: pl.Expr, offset: pl.Expr, num_samples: pl.Expr) -> pl.Expr:
    """Return the fileid of a segment of a file: the file's own with `#start-end`, in samples at 16 kHz."""
    return pl.concat_str(fileid, pl.lit("#"), offset, pl.lit("-"), offset + num_samples)


def recording() -> pl.Expr:
    """Return the expression of the fileid of the file that a row is a segment of (of the row itself, if whole)."""
    whole = pl.col("fileid").str.replace(SEGMENT, "")
    return pl.when(pl.col("offset").is_null()).then(pl.col("fileid")).otherwise(whole)


def place() -> pl.Expr:
    """Return the expression of the file that a row's audio is in: segments of one file have the same, whatever their ids."""
    return pl.concat_str(pl.col("archive", "path").fill_null(""), separator="\x1f")


# Checks -----------------------------------------------------------------------------------------------------------


def conform(rows: AnyRows, *, where: str) -> pl.LazyFrame:
    """Return the rows with the schema's columns in the schema's order; optional ones that are missing are null.

    Raises:
        DataError: `fileid` or `path` is missing, or a column has another type.
    """
    lazy = rows.lazy()
    found = lazy.collect_schema()
    missing = [name for name in ("fileid", "path") if name not in found]
    if missing:
        raise DataError(f"{where} lacks the columns {', '.join(missing)}; it has only {', '.join(found)}")
    wrong = [name for name, kind in SCHEMA.items() if name in found and not _fits(found[name], kind)]
    if wrong:
        detail = ", ".join(f"{name} is {found[name]}, expected {SCHEMA[name]}" for name in wrong)
        raise DataError(f"{where} has columns of wrong types: {detail}")
    return lazy.select(
        pl.col(name).cast(kind) if name in found else pl.lit(None, dtype=kind).alias(name)
        for name, kind in SCHEMA.items()
    )


def _fits(found: pl.DataType, kind: pl.DataType) -> bool:
    return found in {kind, pl.Null} or (kind == pl.Int64 and found.is_integer())


RULES: dict[str, pl.Expr] = {
    "fileid must not be empty": pl.col("fileid").is_null(),
    "fileid must be a relative path without `..`, `.`, empty parts or line ends": pl.col("fileid").str.contains(
        UNSAFE_FILEID
    ),
    "path must not be empty": pl.col("path").is_null() | (pl.col("path") == ""),
    "num_samples must be positive": pl.col("num_samples") <= 0,
    "offset must not be negative": pl.col("offset") < 0,
    "a row with offset (a segment) needs num_samples": pl.col("offset").is_not_null() & pl.col("num_samples").is_null(),
    "archive, byte_offset and byte_size belong together": pl.any_horizontal(
        pl.col("archive").is_null() != pl.col(name).is_null() for name in ("byte_offset", "byte_size")
    ),
    "byte_offset and byte_size must not be negative": (pl.col("byte_offset") < 0) | (pl.col("byte_size") < 0),
}


def check_rows(rows: AnyRows, *, where: str, line_of: Callable[[int], str] | None = None) -> None:
    """Check the values of each row, in one streamed pass.

    Args:
        rows: of the schema.
        where: what they are, for the error.
        line_of: gives where a row (counted from 0) stands in its file, such as "line 12".

    Raises:
        DataError: a row breaks a rule; names the first such row, the rule and how many rows break it.
    """
    lazy = rows.lazy()
    counts = (
        lazy.select(rule.sum().alias(name) for name, rule in RULES.items())
        .collect(engine="streaming")
        .row(0, named=True)
    )
    for name, count in counts.items():
        if count:
            first = lazy.with_row_index("__row").filter(RULES[name]).head(1).collect().row(0, named=True)
            row = first.pop("__row")
            place = f" on {line_of(row)}" if line_of else ""
            shown = {column: value for column, value in first.items() if value is not None}
            raise DataError(
                f"{where}: {name}; {count} rows break this rule, the first{place} is {shown}. Correct or rename them"
            )


def check_unique(rows: AnyRows) -> None:
    """Check that no two rows share a fileid, and that no audio is listed twice.

    Raises:
        DataError: names both files, and what to do.
    """
    place = pl.concat_str(pl.col("archive", "path", "offset").cast(pl.String).fill_null(""), separator="\x1f")
    if pair := _find_pair(rows.lazy(), pl.col("fileid")):
        raise DataError(
            f"two files have the fileid {pair[0]['fileid']!r}: {_place(pair[0])} and {_place(pair[1])}. A fileid is the "
            "path under its folder without suffix, and every later stage finds files by it. Remove one of the two, or "
            "rename it; for several folders with equal names inside, give their common parent folder instead"
        )
    if pair := _find_pair(rows.lazy(), place):
        raise DataError(
            f"{_place(pair[0])} is listed twice, as {pair[0]['fileid']!r} and as {pair[1]['fileid']!r}. "
            "Give each file once: sources must not lie within each other, and a manifest must not repeat a file"
        )


def _find_pair(rows: pl.LazyFrame, key: pl.Expr) -> list[dict[str, object]]:
    """Find two rows with the same key. Compares 8-byte hashes first: ten million strings would take gigabytes."""
    hashes = rows.select(key.hash().alias("hash")).collect(engine="streaming").to_series().sort()
    twice = hashes.filter(hashes == hashes.shift(1)).unique().head(1000)
    if twice.is_empty():
        return []
    suspects = rows.filter(key.hash().is_in(twice.implode())).collect(engine="streaming")
    same = suspects.filter(key.is_duplicated())
    if same.is_empty():
        return []
    first = same.select(key.alias("key")).item(0, 0)
    return same.filter(key == first).head(2).to_dicts()


def _place(row: dict[str, object]) -> str:
    segment = "" if row["offset"] is None else f" from sample {row['offset']}"
    return (f"{row['path']}" if row["archive"] is None else f"{row['archive']} (member {row['path']})") + segment


# Rows in use ------------------------------------------------------------------------------------------------------


def cut_segments(rows: AnyRows, max_segment_seconds: float | None) -> pl.LazyFrame:
    """Cut every row that is longer than `max_segment_seconds` into equal segments of at most that length.

    Segments of one file differ by at most one sample in length; their rows follow each other in place of the file's.
    Needs `num_samples`, so it comes after verification. None cuts nothing.
    """
    lazy = rows.lazy()
    if max_segment_seconds is None:
        return lazy
    longest = int(max_segment_seconds * SAMPLE_RATE)
    length, index, pieces = pl.col("num_samples"), pl.col("piece"), pl.col("pieces")
    begin, end = index * length // pieces, (index + 1) * length // pieces
    start = pl.col("offset").fill_null(0) + begin
    cut = lazy.with_columns(pieces=(length - 1) // longest + 1)
    cut = cut.with_columns(piece=pl.int_ranges(0, pieces)).explode("piece")
    return cut.with_columns(
        fileid=pl.when(pieces > 1).then(segment_fileid(recording(), start, end - begin)).otherwise("fileid"),
        offset=pl.when(pieces > 1).then(start).otherwise("offset"),
        num_samples=end - begin,
    ).select(list(SCHEMA))


def audio_refs(rows: AnyRows, *, chunk: int = 10_000) -> Iterator[AudioRef]:
    """Give the rows as `AudioRef`, in order. Only their columns are read, and `chunk` rows at once become objects.

    A length that is not known yet is 0.
    """
    columns: Sequence[str] = AudioRef._fields
    table = rows.lazy().select(columns).with_columns(pl.col("num_samples").fill_null(0)).collect(engine="streaming")
    for part in table.iter_slices(chunk):
        yield from map(AudioRef._make, part.iter_rows())
