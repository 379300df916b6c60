"""Rows whose length or place is given in seconds: NeMo's manifests, and a `duration` beside this project's columns.

The files' headers are read, since only they tell a whole file from a part of it.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl

from hubert.core.errors import DataError, TransientError
from hubert.core.frames import SAMPLE_RATE
from hubert.data.audio import converted_length
from hubert.data.audio_file import AudioError, AudioRef, open_audio
from hubert.data.foreign.text import line_of, read_seconds
from hubert.data.schema import build_fileid, conform

NEMO = "audio_filepath"
TOLERANCE = SAMPLE_RATE // 20  # samples: durations are rounded, and of an MP3 they may count its padding
NUM_READERS = 8


def check_durations(rows: pl.LazyFrame, seconds: list[float | None], path: Path) -> pl.LazyFrame:
    """Write down the durations that are not the files' as `num_samples`, so that verification rejects those rows."""
    table = conform(rows, where=f"manifest {path}").collect()
    open_rows = table["num_samples"].is_null() & table["offset"].is_null()
    numbers = [row for row, is_open in enumerate(open_rows) if is_open and seconds[row] is not None]
    refs = []
    for row in numbers:
        archive, name = table["archive"][row], table["path"][row] or ""
        place = (_resolve(path, name), None) if archive is None else (name, _resolve(path, archive))
        refs.append(AudioRef("", place[0], 0, None, place[1], table["byte_offset"][row], table["byte_size"][row]))
    told = table["num_samples"].to_list()
    for row, length in zip(numbers, _lengths(refs), strict=True):
        said = round((seconds[row] or 0) * SAMPLE_RATE)
        if length is not None and abs(said - length) > TOLERANCE:
            told[row] = max(1, said)
    return table.with_columns(num_samples=pl.Series(told, dtype=pl.Int64)).lazy()


def from_nemo(rows: pl.LazyFrame, path: Path) -> pl.LazyFrame:
    """Take NeMo's rows: `audio_filepath`, and `offset` and `duration` in seconds, which name a segment of the file."""
    found = list(rows.collect_schema())
    table = rows.select(path=pl.col(NEMO)).collect()
    nothing: list[float | None] = [None] * table.height
    starts = read_seconds(rows, "offset", path) if "offset" in found else nothing
    durations = read_seconds(rows, "duration", path) if "duration" in found else nothing
    refs = [AudioRef("", _resolve(path, name or ""), 0) for name in table["path"]]
    offsets: list[int | None] = []
    lengths: list[int | None] = []
    for row, length in enumerate(_lengths(refs)):
        start, seconds = starts[row] or 0.0, durations[row]
        first = round(start * SAMPLE_RATE)
        end = None if seconds is None else round((start + seconds) * SAMPLE_RATE)
        if length is not None and (end is None or abs(end - length) <= TOLERANCE):
            end = length
        if length is not None and end is not None and end <= first:
            raise DataError(
                f"manifest {path}: offset {starts[row]} and duration {seconds} leave nothing of {table['path'][row]} "
                f"({length / SAMPLE_RATE:.2f} s), on {line_of(path, row)}"
            )
        is_whole = length is None or end is None or (first == 0 and end == length)
        offsets.append(None if is_whole else first)
        lengths.append(length if is_whole or end is None else end - first)
    integers = {"offset": offsets, "num_samples": lengths}
    table = table.with_columns(pl.Series(name, values, dtype=pl.Int64) for name, values in integers.items())
    speaker = next((name for name in ("speaker", "speaker_id") if name in found), None)
    if speaker is not None:
        table = table.with_columns(speaker=rows.select(pl.col(speaker).cast(pl.String)).collect().to_series())
    return with_fileids(table, path).lazy()


def with_fileids(table: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Name rows after their paths under the manifest's folder, or under the files' common one if some lie elsewhere."""
    places = [_resolve(path, name or "") for name in table["path"]]
    root = str(path.parent)
    if not all(place.startswith(f"{root}/") for place in places):
        root = os.path.commonpath([os.path.dirname(place) for place in (min(places), max(places))])  # noqa: PTH120
    names = [build_fileid(os.path.relpath(place, root)) for place in places]
    if "offset" in table.columns:
        spans = zip(names, table["offset"], table["num_samples"], strict=True)
        names = [name if start is None else f"{name}#{start}-{start + length}" for name, start, length in spans]
    return table.with_columns(fileid=pl.Series(names, dtype=pl.String))


def _lengths(refs: list[AudioRef]) -> list[int | None]:
    """Return the length of each file by its header, in samples at 16 kHz; None if it cannot be opened."""

    def length(ref: AudioRef) -> int | None:
        try:
            with open_audio(ref) as sound:
                return converted_length(sound.frames, sound.samplerate)
        except (AudioError, TransientError):
            return None  # which verification reports

    with ThreadPoolExecutor(NUM_READERS) as pool:
        return list(pool.map(length, refs))


def _resolve(path: Path, name: str) -> str:
    return os.path.normpath(path.parent / name)
