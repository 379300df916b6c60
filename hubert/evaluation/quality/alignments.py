"""Phone alignments: which phone is spoken when, read from item files, CSV or TSV tables, and TextGrids.

A table has a header with the columns `fileid, start, end, phone` (times in seconds), or their synonyms `file` or
`#file`, `onset`, `offset`, `#phone`; further columns are left out. Files are matched to the manifest's fileids as
those of ABX item files are (`hubert.data.match.match_fileids`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from hubert.core.errors import DataError
from hubert.core.frames import RECEPTIVE_FIELD, SAMPLE_RATE
from hubert.data.match import NANOSECONDS, match_fileids, require_unambiguous
from hubert.evaluation.abx.items import read_items
from hubert.evaluation.quality.textgrid import read_textgrid

SYNONYMS = {
    "fileid": ("fileid", "file", "#file"),
    "start": ("start", "onset"),
    "end": ("end", "offset"),
    "phone": ("phone", "#phone"),
}
MAX_OVERLAP_SECONDS = 0.001  # ends that were rounded on their own


@dataclass(frozen=True)
class Alignments:
    """Phones with their times.

    `frame` has the columns `fileid, start, end, phone` (seconds), in the order of fileid and start. `num_unmatched`
    files were left out because the manifest does not have them.
    """

    frame: pl.DataFrame
    num_unmatched: int = 0
    phones: tuple[str, ...] = field(init=False)
    _rows: Mapping[str, tuple[int, int]] = field(init=False, repr=False)
    _starts: np.ndarray = field(init=False, repr=False)
    _ends: np.ndarray = field(init=False, repr=False)
    _indices: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Index the frame: rows by file, times as integer nanoseconds, phones as numbers."""
        frame = self.frame.select("fileid", "start", "end", "phone").sort("fileid", "start", "end")
        phones = frame["phone"].unique().sort()
        numbers = pl.Series(range(len(phones)), dtype=pl.Int32)
        indices = frame["phone"].replace_strict(phones, numbers, return_dtype=pl.Int32)
        files = frame.group_by("fileid", maintain_order=True).len()
        edges = np.cumsum([0, *files["len"].to_list()]).tolist()
        derived = {
            "frame": frame,
            "phones": tuple(phones.to_list()),
            "_rows": dict(zip(files["fileid"].to_list(), pairwise(edges), strict=True)),
            "_starts": np.rint(frame["start"].to_numpy() * NANOSECONDS).astype(np.int64),
            "_ends": np.rint(frame["end"].to_numpy() * NANOSECONDS).astype(np.int64),
            "_indices": indices.to_numpy(),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def __contains__(self, fileid: str) -> bool:
        """Return True if a file has an alignment."""
        return fileid in self._rows

    def __len__(self) -> int:
        """Return the number of aligned files."""
        return len(self._rows)

    def end_seconds(self, fileid: str) -> float:
        """Return the end of a file's last phone, in seconds."""
        first, last = self._rows[fileid]
        return float(self._ends[first:last].max()) / NANOSECONDS

    def phones_at_frames(self, fileid: str, num_frames: int, frame_rate: float, *, offset: int = 0) -> np.ndarray:
        """Return the phone at each frame, as an index into `phones`, -1 where there is none; (num_frames,) int32.

        A frame has the phone at the centre of its window of 400 samples: frame j of audio that starts at sample
        `offset` of the file is centred at (offset + 200 + j x 16000 / frame_rate) / 16000 s. A phone has the times
        start <= t < end.
        """
        first, last = self._rows[fileid]
        starts, ends, indices = self._starts[first:last], self._ends[first:last], self._indices[first:last]
        samples = offset + RECEPTIVE_FIELD / 2 + np.arange(num_frames) * (SAMPLE_RATE / frame_rate)
        centres = np.rint(samples * (NANOSECONDS / SAMPLE_RATE)).astype(np.int64)
        row = np.searchsorted(starts, centres, side="right") - 1
        inside = (row >= 0) & (centres < ends[row])
        return np.where(inside, indices[row], np.int32(-1))


def read_alignments(path: Path, fileids: Iterable[str] | None = None, *, tier: str = "phones") -> Alignments:
    """Read alignments: a `.item` file, a `.csv` or `.tsv` table, a `.TextGrid`, or a folder of TextGrids.

    With `fileids`, names are replaced by the fileids that they match. Files that the manifest does not have are left
    out and counted: alignments often cover a whole corpus of which a run uses a part.

    Args:
        path: the file or folder. In a folder, a TextGrid's name is its path in the folder, without suffix.
        fileids: of the manifest.
        tier: name of the TextGrids' interval tier; `speaker - phones` also counts as `phones` if it is the only one.

    Raises:
        DataError: an unknown kind of file, missing columns, times that are not 0 <= start < end, phones of a file that
            overlap, a name that fits several fileids, or no file that the manifest has.
    """
    frame = _read_frame(path, tier)
    if frame.is_empty():
        raise DataError(f"{path}: no phones found; expected at least one row of fileid, start, end, phone")
    _check_rows(path, frame)
    num_unmatched = 0
    if fileids is not None:
        match = match_fileids(frame["fileid"].unique().to_list(), fileids)
        require_unambiguous(match, path)
        if not match.found:
            raise DataError(
                f"{path}: none of {len(match.missing)} files is in the manifest, first {match.missing[:3]}. Expected "
                "names that equal a fileid or the end of one. Likely cause: "
                "alignments of other audio, or names with a suffix"
            )
        num_unmatched = len(match.missing)
        frame = frame.filter(pl.col("fileid").is_in(list(match.found)))
        frame = frame.with_columns(pl.col("fileid").replace_strict(match.found, return_dtype=pl.String))
    alignments = Alignments(frame, num_unmatched)
    _check_overlaps(path, alignments.frame)
    return alignments


class Place(NamedTuple):
    """Where a row's phones are: under which name, from which sample on (None: the row is all that the name stands for)."""

    name: str
    offset: int | None
    num_samples: int


def aligned_rows(rows: pl.DataFrame, alignments: Alignments) -> pl.Series:
    """Return, for each row, True if it, or the recording that it is a segment of, has an alignment."""
    names = rows.select("fileid", "recording").iter_rows()
    return pl.Series([fileid in alignments or whole in alignments for fileid, whole in names], dtype=pl.Boolean)


def places(rows: pl.DataFrame, alignments: Alignments) -> list[Place]:
    """Return where the phones of each aligned row are: under its own fileid, else in those of its recording."""
    columns = rows.select("fileid", "recording", "offset", "num_samples").iter_rows()
    return [
        Place(fileid, None, num_samples) if fileid in alignments else Place(whole, offset, num_samples)
        for fileid, whole, offset, num_samples in columns
    ]


def _read_frame(path: Path, tier: str) -> pl.DataFrame:
    suffix = path.suffix.lower()
    if not path.exists():
        raise DataError(f"{path}: expected phone alignments, found nothing there")
    if path.is_dir() or suffix == ".textgrid":
        return _read_textgrids(path, tier)
    if suffix == ".item":
        items = read_items(path)
        onset, offset = (items[name].to_numpy() / NANOSECONDS for name in ("onset_ns", "offset_ns"))
        return items.select("fileid", start=pl.Series(onset), end=pl.Series(offset), phone="phone")
    if suffix not in {".csv", ".tsv"}:
        raise DataError(
            f"{path}: expected a .item, .csv, .tsv or .TextGrid file, or a folder of TextGrids, found {suffix!r}"
        )
    try:  # names and phones stay text ("1688", "nan"); quotes are letters in a TSV
        table = pl.read_csv(
            path,
            separator="\t" if suffix == ".tsv" else ",",
            quote_char=None if suffix == ".tsv" else '"',
            infer_schema=False,
            glob=False,
        )
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: expected a {suffix[1:].upper()} table in UTF-8 with a header, found: {error}"
        ) from error
    return _name_columns(path, table)


def _name_columns(path: Path, table: pl.DataFrame) -> pl.DataFrame:
    chosen = {}
    for name, synonyms in SYNONYMS.items():
        present = [synonym for synonym in synonyms if synonym in table.columns]
        if len(present) != 1:
            raise DataError(f"{path}: expected one column of {'/'.join(synonyms)}, found {present or table.columns}")
        chosen[name] = present[0]
    times = [
        pl.col(chosen[name]).str.strip_chars().cast(pl.Float64, strict=False).alias(name) for name in ("start", "end")
    ]
    return table.select(
        pl.col(chosen["fileid"]).alias("fileid"), *times, pl.col(chosen["phone"]).fill_null("").alias("phone")
    )


def _read_textgrids(path: Path, tier: str) -> pl.DataFrame:
    if path.is_dir():
        root = path
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() == ".textgrid")
        if not files:
            raise DataError(f"{path}: expected a folder with *.TextGrid files, found none")
    else:
        root, files = path.parent, [path]
    frames = []
    for file in files:
        intervals = read_textgrid(file, tier)
        fileid = file.relative_to(root).with_suffix("").as_posix()
        schema = {"start": pl.Float64, "end": pl.Float64, "phone": pl.String}
        frame = pl.DataFrame(intervals, schema=schema, orient="row")
        frames.append(frame.select(pl.lit(fileid).alias("fileid"), "start", "end", "phone"))
    return pl.concat(frames)


def _check_rows(path: Path, frame: pl.DataFrame) -> None:
    named = pl.col("fileid").str.len_bytes() > 0
    times = pl.col("start").is_between(0, pl.col("end"), closed="left") & pl.col("end").is_finite()
    bad = frame.filter(~(named & times).fill_null(value=False))  # what is not a number was read as null
    if len(bad):
        raise DataError(
            f"{path}: {len(bad)} of {len(frame)} rows do not have a fileid and 0 <= start < end in seconds, "
            f"first {bad.row(0, named=True)}"
        )


def _check_overlaps(path: Path, frame: pl.DataFrame) -> None:
    before = frame.select(pl.all().shift(1).over("fileid").name.suffix("_before"))
    overlap = pl.col("end_before") - pl.col("start") > MAX_OVERLAP_SECONDS
    bad = pl.concat([frame, before], how="horizontal").filter(overlap)
    if len(bad):
        raise DataError(
            f"{path}: {len(bad)} phones start before the one before them has ended, first {bad.row(0, named=True)}. "
            "Expected one phone at a time. Likely cause: a triphone item file (use the phoneme one), "
            "or two fileids for one file"
        )
