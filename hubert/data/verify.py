"""Checking every file before anything is computed from it: what is unusable is named, counted and left out."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import polars as pl

from hubert.core.errors import DataError
from hubert.data.audio import MIN_SAMPLES, AudioInfo, inspect_audio
from hubert.data.audio_file import AudioError, AudioRef, location
from hubert.data.manifest import find_stat
from hubert.data.schema import SCHEMA, conform

REJECTED_SCHEMA = pl.Schema({"path": pl.String(), "fileid": pl.String(), "reason": pl.String()})
NUM_NAMED = 10  # rejected files that an error names

type Place = tuple[str | None, str, int | None]
type Finding = tuple[AudioInfo | str, int | None, int | None]


def verify_rows(
    rows: pl.DataFrame,
    *,
    verify: Literal["decode", "header"] = "decode",
    resample: bool = False,
    min_samples: int = MIN_SAMPLES,
    max_workers: int = 1,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Check one shard of a manifest; in any process, and nothing is written.

    Each file is checked once, however many of its segments are in the shard.

    Args:
        rows: rows of the schema, as `list_audio` gives them.
        verify: "decode" decodes every file once; "header" believes the headers.
        resample: accept other sample rates and several channels, which are converted on reading.
        min_samples: the least length of a row, in samples at 16 kHz.
        max_workers: threads; decoding runs outside of Python's lock.

    Returns:
        The usable rows, with `num_samples` (at 16 kHz) and the `size` and `mtime_ns` of the file that was checked; and
        the rejected ones, `REJECTED_SCHEMA`: path, fileid and a reason such as "wrong sample rate: 8000 Hz, ...".

    Raises:
        TransientError: the disk failed; the whole shard is worth another try.
    """
    table = conform(rows, where="the rows to verify").collect()
    records = table.to_dicts()
    refs: dict[Place, AudioRef] = {}
    for record in records:
        refs.setdefault(_place(record), _whole(record))

    def check(ref: AudioRef) -> Finding:
        status = find_stat(ref.archive or ref.path)
        size, mtime = (None, None) if status is None else (status.st_size, status.st_mtime_ns)
        try:
            info = inspect_audio(ref, decode=verify == "decode", resample=resample, min_samples=min_samples)
        except AudioError as error:
            return error.reason, size, mtime
        return info, size, mtime

    with ThreadPoolExecutor(max_workers) as pool:
        findings = dict(zip(refs, pool.map(check, refs.values()), strict=True))
    good, rejected = [], []
    for record in records:
        finding, size, mtime = findings[_place(record)]
        reason = finding if isinstance(finding, str) else _mismatch(record, finding.num_samples, min_samples)
        if reason is not None:
            rejected.append((location(_whole(record)), record["fileid"], reason))
        elif not isinstance(finding, str):
            length = finding.num_samples if record["offset"] is None else record["num_samples"]
            good.append({**record, "num_samples": length, "size": size, "mtime_ns": mtime})
    return pl.DataFrame(good, schema=SCHEMA), pl.DataFrame(rejected, schema=REJECTED_SCHEMA, orient="row")


def _place(record: dict[str, object]) -> Place:
    return record["archive"], record["path"], record["byte_offset"]  # type: ignore[return-value]


def _whole(record: dict[str, object]) -> AudioRef:
    """Return the whole file that a row is (a segment of)."""
    fields = {name: record[name] for name in ("fileid", "path", "archive", "byte_offset", "byte_size")}
    return AudioRef(**fields, num_samples=0)  # type: ignore[arg-type]


def _mismatch(record: dict[str, object], length: int, min_samples: int) -> str | None:
    """Compare what a manifest says about a row with the length of its file, in samples at 16 kHz."""
    said, offset = record["num_samples"], record["offset"]
    if offset is None:
        if said in {None, length}:
            return None
        return f"wrong length: the manifest says {said} samples at 16 kHz, the file has {length}"
    end = offset + said  # type: ignore[operator]
    if end > length:
        return f"wrong length: the segment ends at sample {end} (16 kHz), the file at {length}"
    if said < min_samples:  # type: ignore[operator]
        return f"too short: {said} samples at 16 kHz, at least {min_samples} needed"
    return None


def count_reasons(rejected: pl.DataFrame) -> dict[str, int]:
    """Count the kinds of reasons (what stands before the colon), the most frequent first."""
    kinds = Counter(reason.partition(":")[0] for reason in rejected["reason"])
    return dict(kinds.most_common())


def check_rejected(rejected: pl.DataFrame, *, num_total: int, max_rejected: float) -> None:
    """Stop if too large a share of the files is unusable, or all of them.

    Raises:
        DataError: names the first files, why, and the setting `max_rejected`.
    """
    share = rejected.height / num_total if num_total else 1.0
    if share <= max_rejected and rejected.height < num_total:
        return
    named = [f"  {row['path']}: {row['reason']}" for row in rejected.head(NUM_NAMED).iter_rows(named=True)]
    more = [f"  and {rejected.height - NUM_NAMED} more"] if rejected.height > NUM_NAMED else []
    kinds = ", ".join(f"{count} {kind}" for kind, count in count_reasons(rejected).items())
    lines = "\n".join([*named, *more])
    raise DataError(
        f"{rejected.height} of {num_total} files cannot be used ({share:.2%}; {kinds}); at most max_rejected = "
        f"{max_rejected} ({max_rejected:.2%}) may be:\n{lines}\nRemove or repair them, or raise `max_rejected` under "
        "[data] to go on without them. Wrong sample rates and channels are converted with `resample = true`."
    )
