"""What the columns of a table mean: this project's, another program's, and those that would be misunderstood."""

import logging
from pathlib import Path

import polars as pl

from hubert.core.errors import DataError
from hubert.data.foreign.seconds import NEMO, check_durations, from_nemo, with_fileids
from hubert.data.foreign.text import COLUMNS, read_seconds, typed_columns

log = logging.getLogger(__name__)

HUGGING_FACE = "file_name"
SEGMENT_COLUMNS = {  # in small letters, without `_`
    *("start", "end", "stop", "begin", "onset", "starttime", "endtime", "starts", "ends", "segment", "segments"),
    *("segmentstart", "segmentend", "startsec", "endsec", "startseconds", "endseconds", "startms", "endms"),
    *("startsample", "endsample", "startframe", "endframe", "offsetseconds", "offsetsec", "tmin", "tmax", "timestamps"),
}
DURATIONS = ("duration", "duration_seconds", "duration_sec", "duration_s", "dur")
PROGRAMS = {  # columns: whose manifest it is, and what to do with it
    ("recording",): ("Lhotse", "its cuts name recordings, not files: write fileid and path into a .csv"),
    ("recording_id", "sources"): ("Lhotse", "write fileid and path into a .csv"),
    ("id", "audio", "n_frames"): ("fairseq's speech-to-text", "rename `id` to fileid and `audio` to path, as .csv"),
    ("client_id", "sentence"): (
        "Common Voice",
        "give the folder of its clips, or rename `path`'s table to fileid,path as .csv",
    ),
    ("ID", "wav"): ("SpeechBrain", "rename `ID` to fileid and `wav` to path"),
    ("key", "wav"): ("WeNet", "rename `key` to fileid and `wav` to path"),
    ("audio",): ("Hugging Face datasets", "save the audio as files: a manifest names files"),
}


def adapt(rows: pl.LazyFrame, path: Path) -> pl.LazyFrame:
    """Turn a table of whatever columns into one of the schema's columns.

    Raises:
        DataError: columns are missing, or would be misunderstood.
    """
    found = list(rows.collect_schema())
    if "path" not in found and NEMO in found:
        refuse_segments(rows, found, path)
        return from_nemo(rows, path)
    if "path" not in found and HUGGING_FACE in found and "fileid" not in found:
        refuse_segments(rows, found, path)
        return with_fileids(rows.select(path=pl.col(HUGGING_FACE)).collect(), path).lazy()
    if missing := [name for name in ("fileid", "path") if name not in found]:
        raise DataError(
            f"manifest {path} lacks the columns {', '.join(missing)}; it has {listed(found)}.{guess(found)} Needed are fileid "
            "(a name of the row's own) and path; num_samples and offset (samples at 16 kHz) and speaker may follow"
        )
    if not {"offset", "num_samples"} <= set(found):
        refuse_segments(rows, found, path)
    duration = next((name for name in found if name.lower() in DURATIONS), None)
    ignored = [name for name in found if name not in {*COLUMNS, duration, "size", "mtime_ns"}]
    if ignored:
        log.info("manifest %s: columns that are not used: %s", path, listed(ignored))
    table = typed_columns(rows, path)
    return table if duration is None else check_durations(table, read_seconds(rows, duration, path), path)


def listed(names: list[str]) -> str:
    """Return names of columns, for people."""
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"


def guess(found: list[str]) -> str:
    """Return a sentence about the program whose columns these are; empty if they are none's."""
    for columns, (program, advice) in PROGRAMS.items():
        if set(columns) <= set(found):
            return f" It looks like a manifest of {program}: {advice}."
    return ""


def refuse_segments(rows: pl.LazyFrame, found: list[str], path: Path) -> None:
    """Refuse columns that mean a part of the file, unless they are empty."""
    named = [name for name in found if name.lower().replace("_", "").replace(" ", "") in SEGMENT_COLUMNS]
    if not named:
        return
    used = rows.select(pl.col(named).is_not_null().any()).collect(engine="streaming").row(0, named=True)
    if columns := [name for name in named if used[name]]:
        raise DataError(
            f"manifest {path}: the columns {', '.join(columns)} seem to mean a part of each file, in units that they do not "
            f"name, and the whole file would be used; it has {listed(found)}. Give segments as offset and num_samples, in "
            "samples at 16 kHz (seconds x 16,000), with a fileid for each; or remove the columns if they mean something else"
        )
