"""ABX item files: reading, matching to the manifest, splitting, and which frames an item has.

An item file (ZeroSpeech 2021) lists the occurrences of the phones (or triphones) that are compared, one a line:

    #file onset offset #phone prev-phone next-phone speaker
    1688-142285-0000 0.5100 0.5700 DH SIL EH 1688

In memory it is a polars frame with the columns `fileid, onset_ns, offset_ns, phone, prev_phone, next_phone, speaker`.
Times are integer nanoseconds: whether a frame's centre lies inside an item is decided on exact numbers, because ends
of phones often fall exactly between two frames.
"""

import csv
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path

import numpy as np
import polars as pl

from hubert.core.errors import DataError
from hubert.core.files import atomic_write
from hubert.data.match import NANOSECONDS, match_fileids, require_unambiguous

HEADER = ("#file", "onset", "offset", "#phone", "prev-phone", "next-phone", "speaker")
SCHEMA = {
    "fileid": pl.String,
    "onset_ns": pl.Int64,
    "offset_ns": pl.Int64,
    "phone": pl.String,
    "prev_phone": pl.String,
    "next_phone": pl.String,
    "speaker": pl.String,
}
# An item may end a little after the last frame: a window of 400 samples does not fit into the last 25 ms of a file,
# and aligners round. More than this means that the frame rate or the file is not the one that the items describe.
MAX_OVERRUN_SECONDS = 0.1


def read_items(path: Path, fileids: Iterable[str] | None = None) -> pl.DataFrame:
    """Read an item file; with `fileids`, replace each `#file` by the fileid that `match_fileids` finds for it.

    Fields are separated by spaces (or tabs); one that contains a space is in double quotes, as `write_item` does it.
    Further columns are allowed and left out.

    Returns:
        A frame with the columns of `SCHEMA`, in the file's order.

    Raises:
        DataError: not an item file, a line that cannot be read, or files that match no fileid or several.
    """
    rows = list(_read_rows(path))
    if not rows:
        raise DataError(f"{path}: the item file has a header and no items")
    items = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    return items if fileids is None else _to_fileids(items, fileids, path)


def write_item(path: Path, items: pl.DataFrame) -> None:
    """Write items in the ZeroSpeech format; `read_items` gives the same frame back.

    Raises:
        DataError: a field is empty, which the format cannot express.
    """
    columns = ("fileid", "phone", "prev_phone", "next_phone", "speaker")
    empty = {name: count for name in columns if (count := int((items[name] == "").sum()) + items[name].null_count())}
    if empty:
        raise DataError(
            f"{path}: an item file cannot express empty fields; found {empty}. Fix: name silence, for example SIL"
        )
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=" ", lineterminator="\n")
        writer.writerow(HEADER)
        for fileid, onset, offset, *labels in items.select(*SCHEMA).iter_rows():
            writer.writerow([fileid, _seconds(onset), _seconds(offset), *labels])


def split_items(items: pl.DataFrame, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Split items into two halves that share no file: choose a layer on the first, report the second.

    Both halves stay valid ABX tasks: the files of each speaker are taken in the order of a hash of seed and fileid,
    and each goes to the half that has fewer of that speaker's items so far, so every speaker with two or more files
    is in both halves. The result depends on the seed and the set of files, not on the order of the lines.

    Raises:
        DataError: all items are in one file.
    """
    files = items.group_by("fileid").agg(pl.col("speaker").mode().min(), pl.len().alias("num_items")).rows()
    files.sort(key=lambda row: hashlib.sha256(f"{seed}\0{row[0]}".encode()).digest())
    by_speaker: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    totals = [0, 0]
    second: set[str] = set()
    for fileid, speaker, num_items in files:
        counts = by_speaker[speaker]
        half = int((counts[1], totals[1]) < (counts[0], totals[0]))
        counts[half] += num_items
        totals[half] += num_items
        if half:
            second.add(fileid)
    in_second = items["fileid"].is_in(second)
    if not 0 < len(second) < len(files):
        raise DataError(f"items of {len(files)} file(s) cannot be split into halves; expected at least two files")
    return items.filter(~in_second), items.filter(in_second)


def item_frames(items: pl.DataFrame, frame_rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the first frame and the frame past the last one of every item, int64, shape (items,).

    ZeroSpeech's rule (as in fastabx): frame j stands for the time (j + 0.5) / frame_rate, and an item has the frames
    whose time lies in [onset, offset]. The centre of HuBERT's window j is 2.5 ms later than that (7.5 ms for MFCC);
    the rule is kept because published figures were made with it.
    """
    rate = Fraction(str(frame_rate))
    unit = 2 * rate.denominator * NANOSECONDS
    half = rate.denominator * NANOSECONDS
    onset, offset = (items[name].to_numpy() * (2 * rate.numerator) - half for name in ("onset_ns", "offset_ns"))
    return -(-onset // unit), offset // unit + 1


@dataclass(frozen=True)
class ItemCheck:
    """Which items cannot be scored, and why: boolean masks of shape (items,).

    An item that lasts less than a frame (no frame's time lies inside) is too short. An item of which a frame is
    missing, mostly the last phone of a file, is beyond the end; it is left out whole, never shortened.
    """

    too_short: np.ndarray
    beyond_end: np.ndarray

    def __or__(self, other: "ItemCheck") -> "ItemCheck":
        """Return what cannot be scored in one or the other representation; each item has one reason."""
        too_short = self.too_short | other.too_short
        return ItemCheck(too_short, (self.beyond_end | other.beyond_end) & ~too_short)

    @property
    def usable(self) -> np.ndarray:
        """Return the mask of the items that can be scored."""
        usable: np.ndarray = ~(self.too_short | self.beyond_end)
        return usable


def check_items(items: pl.DataFrame, num_frames: Mapping[str, int], frame_rate: float, *, source: str) -> ItemCheck:
    """Find the items that do not have all their frames in features of `num_frames[fileid]` frames.

    `source` names the features in errors.

    Raises:
        DataError: a file has no features, or items end more than `MAX_OVERRUN_SECONDS` after a file's last frame.
    """
    names = items["fileid"].unique(maintain_order=True).to_list()
    missing = [name for name in names if name not in num_frames]
    if missing:
        raise DataError(
            f"{source}: no features of {len(missing)} of {len(names)} files that the items name, first {missing[:3]}. "
            "Fix: extract the features of all files in the item file"
        )
    start, end = item_frames(items, frame_rate)
    available = items["fileid"].replace_strict(num_frames, return_dtype=pl.Int64).to_numpy()
    far = np.flatnonzero(end - available > MAX_OVERRUN_SECONDS * frame_rate)
    if len(far):
        row = int(far[0])
        raise DataError(
            f"{source}: {len(far)} of {len(items)} items end more than {MAX_OVERRUN_SECONDS} s "
            f"after their file's last frame, first {items['fileid'][row]!r}: it needs frame {end[row] - 1}, found "
            f"{available[row]} frames at {frame_rate:g} Hz. "
            "Likely cause: another frame rate, cut audio, or an item file of other audio"
        )
    too_short = end <= start
    return ItemCheck(too_short, (end > available) & ~too_short)


def _read_rows(path: Path) -> Iterator[tuple[str, int, int, str, str, str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected an item file, found nothing there") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected an item file in UTF-8, found other bytes ({error})") from error
    delimiter = "\t" if "\t" in lines[0] else " "
    header = _fields(lines[0], delimiter)
    absent = [name for name in HEADER if name not in header]
    if absent:
        raise DataError(f"{path}: expected an item file with the header {' '.join(HEADER)!r}, found no column {absent}")
    column = {name: header.index(name) for name in HEADER}
    for number, line in enumerate(lines[1:], 2):
        try:
            fields = _fields(line, delimiter)
        except csv.Error as error:
            raise DataError(
                f"{path}: line {number}: {error}; a field with a quote must be quoted, the quote doubled"
            ) from error
        if not fields:
            continue
        if len(fields) != len(header):
            raise DataError(
                f"{path}: line {number}: expected {len(header)} fields, found {len(fields)}: {fields}; "
                "a field with a space must be in double quotes"
            )
        file, onset, offset, phone, before, after, speaker = (fields[column[name]] for name in HEADER)
        start, end = _nanoseconds(onset), _nanoseconds(offset)
        if start is None or end is None or not 0 <= start < end:
            raise DataError(
                f"{path}: line {number}: expected 0 <= onset < offset in seconds, found {onset!r}, {offset!r}"
            )
        yield file, start, end, phone, before, after, speaker


def _fields(line: str, delimiter: str) -> list[str]:
    line = line.rstrip("\r")
    if '"' in line:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=delimiter == " ", strict=True))
    fields = line.split(delimiter)
    return [field for field in fields if field] if delimiter == " " else fields if line else []


def _to_fileids(items: pl.DataFrame, fileids: Iterable[str], path: Path) -> pl.DataFrame:
    match = match_fileids(items["fileid"].unique().to_list(), fileids)
    require_unambiguous(match, path)
    if match.missing:
        total = len(match.found) + len(match.missing)
        raise DataError(
            f"{path}: {len(match.missing)} of {total} files of the item file are not in the manifest, "
            f"first {match.missing[:3]}. Expected each #file to equal a fileid or the end of one. "
            "Likely cause: other audio, names with a suffix (.wav), or files that were rejected "
            "when the manifest was built. Fix: the item file, or `abx.audio`"
        )
    return items.with_columns(pl.col("fileid").replace_strict(match.found, return_dtype=pl.String))


def _nanoseconds(seconds: str) -> int | None:
    try:
        return int((Decimal(seconds) * NANOSECONDS).to_integral_value())
    except (InvalidOperation, ValueError, OverflowError):  # not a number; NaN; infinity
        return None


def _seconds(nanoseconds: int) -> str:
    return format(Decimal(nanoseconds).scaleb(-9).normalize(), "f")
