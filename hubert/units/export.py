"""Units in the formats that other programs read, streamed from the tables of a finished units stage.

    jsonl   <part>.jsonl     {"fileid": "a/b", "units": [3, 3, 17, ...]} per file; deduplicated: {"fileid", "units", "durations"}
    km      <part>.km        fairseq's labels: a line of units per file
            <part>.tsv       fairseq's manifest: the same files in the same order
            dict.km.txt      fairseq's dictionary: `unit 1` per unit of the codebook
            <part>.durations deduplicated only: a line of durations per file

A duration is the number of frames that a unit is held for; repeating each unit for its duration gives the original back.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt

from hubert.core.errors import DataError
from hubert.core.files import atomic_write
from hubert.data.manifest import scan_manifest, write_manifest
from hubert.units.labels import Table

Format = Literal["jsonl", "km"]
type Integers = npt.NDArray[np.integer]


def deduplicate(units: Integers) -> tuple[Integers, Integers]:
    """Return the units (n,) without repetitions, and for how many frames (n,) each is held."""
    starts = np.flatnonzero(np.diff(units, prepend=-1)) if len(units) else np.empty(0, np.int64)
    return units[starts], np.diff(starts, append=len(units))


def export_units(
    table: Path,
    manifest: Path,
    folder: Path,
    *,
    part: str,
    format: Format,  # noqa: A002  (the option's name)
    deduplicated: bool = False,
) -> list[Path]:
    """Write the units of one part of a run. Memory holds the units of one file; each file is written whole or not at all.

    Args:
        table: the units' table (`UnitsStage.table(part)`).
        manifest: the manifest that the table was made from, for fairseq's `.tsv`.
        folder: where the files go.
        part: their name: `train` or `validation`.
        format: `jsonl` or `km`.
        deduplicated: write runs of a unit as one, with durations.

    Returns:
        The files, the units last.

    Raises:
        DataError: no table, or rows that fairseq's manifest cannot hold (segments, members of archives).
    """
    rows = Table(table)
    if format == "jsonl":
        path = folder / f"{part}.jsonl"
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for fileid, units, durations in _files(rows, deduplicated=deduplicated):
                line = {"fileid": fileid, "units": units.tolist()}
                line |= {"durations": durations.tolist()} if deduplicated else {}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return [path]
    written = [folder / f"{part}.tsv", folder / "dict.km.txt"]
    write_manifest(scan_manifest(manifest), written[0])
    _check_order(rows, written[0])
    with atomic_write(written[1]) as temporary:
        temporary.write_text("".join(f"{unit} 1\n" for unit in range(rows.num_units)))
    if deduplicated:
        written.append(folder / f"{part}.durations")
        with atomic_write(written[-1]) as temporary, temporary.open("w") as file:
            for _, _, durations in _files(rows, deduplicated=True):
                _write_line(file, durations)
    written.append(folder / f"{part}.km")
    with atomic_write(written[-1]) as temporary, temporary.open("w") as file:
        for _, units, _ in _files(rows, deduplicated=deduplicated):
            _write_line(file, units)
    return written


def _files(rows: Table, *, deduplicated: bool) -> Iterator[tuple[str, Integers, Integers]]:
    """Yield fileid, units and durations of each file, in the manifest's order."""
    for row in range(len(rows)):
        units = rows.units(row)
        yield rows.fileid(row), *(deduplicate(units) if deduplicated else (units, np.empty(0, np.int64)))


def _write_line(file: IO[str], values: Integers) -> None:
    file.write(" ".join(map(str, values.tolist())) + "\n")


def _check_order(rows: Table, manifest: Path) -> None:
    """Compare the files of a table with the lines of a `.tsv`: fairseq joins them by their number.

    Raises:
        DataError: they differ; names the first.
    """
    with manifest.open(encoding="utf-8") as file:
        root = file.readline().rstrip("\n")
        row = -1
        for row, line in enumerate(file):
            path = f"{root.rstrip('/')}/{line.split('\t')[0]}"
            if row >= len(rows) or rows.audio_ref(row).path != path:
                raise DataError(
                    f"{manifest}: line {row + 2} is {path}, and the units' table has "
                    f"{rows.audio_ref(row).path if row < len(rows) else 'no file'} there. Likely cause: the manifest is of "
                    "another run. Fix: run `hubert units` again"
                )
    if row + 1 != len(rows):
        raise DataError(f"{manifest}: {row + 1} files, and the units' table has {len(rows)}; run `hubert units` again")
