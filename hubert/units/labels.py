"""The trainer's view of a labelled manifest: flat arrays on disk, mapped into memory, no object per file.

    <table>/
        table.json             counts, frame rate, number of units, the codebook's key, whether audio is converted
        units.npy              (U,) uint16, the units of all files one after the other; file i: unit_offsets[i:i+2]
        unit_offsets.npy       (n + 1,) int64
        num_samples.npy        (n,) int64, at 16 kHz
        segment_start.npy      (n,) int64, samples; -1: the file is not a segment of a longer one
        archive.npy            (n,) int32, index into archives.json; -1: a plain file
        byte_offset.npy        (n,) int64, place of a member in its archive; -1: a plain file
        byte_size.npy          (n,) int64
        size.npy, mtime_ns.npy (n,) int64, of the file or archive that was labelled; tables of older versions lack them
        fileid_hash.npy        (n,) uint64: every random draw about a file is seeded by it, never by its row
        paths.npy, path_offsets.npy, fileids.npy, fileid_offsets.npy     utf-8 bytes and their bounds

A process that opens the table of 10 million files holds a few hundred bytes; the pages are shared by all processes of
the machine. Only numpy is needed, so a training node needs neither polars nor parquet.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from hubert.core.errors import DataError
from hubert.core.files import atomic_write, read_json, remove
from hubert.core.frames import SAMPLE_RATE, IntArray, num_units_of
from hubert.core.hashing import hash_fileids
from hubert.data.audio_file import AudioRef

FORMAT = 1
AGAIN = "it is damaged: remove the folder {} and run `hubert units` again, which makes it anew"
HEADER = 128  # bytes of the header of a .npy file with one axis: numpy leaves room for any length

Chunk = Mapping[str, Iterable[Any]]


class _Column:
    """A .npy file that grows: values are appended, and the header, which holds their number, is written at the end."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._file: BinaryIO = path.open("wb")
        self._write_header()

    def append(self, values: npt.ArrayLike) -> None:
        array = np.ascontiguousarray(values, dtype=self.dtype)
        self._file.write(array.data)
        self.length += len(array)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class _TableWriter:
    """Appends chunks of rows to the columns; holds one chunk and the names of the archives in memory."""

    def __init__(self, folder: Path, stack: ExitStack, *, frame_rate: int, num_units: int) -> None:
        def column(name: str, dtype: npt.DTypeLike) -> _Column:
            return stack.enter_context(_Column(folder / f"{name}.npy", dtype))

        self.frame_rate = frame_rate
        self.num_units = num_units
        self.units = column("units", np.uint16)
        self.unit_offsets = column("unit_offsets", np.int64)
        self.num_samples = column("num_samples", np.int64)
        self.segment_start = column("segment_start", np.int64)
        self.archive = column("archive", np.int32)
        self.byte_offset = column("byte_offset", np.int64)
        self.byte_size = column("byte_size", np.int64)
        self.size = column("size", np.int64)
        self.mtime_ns = column("mtime_ns", np.int64)
        self.fileid_hash = column("fileid_hash", np.uint64)
        self.texts = {
            name: (column(f"{name}s", np.uint8), column(f"{name}_offsets", np.int64)) for name in ("path", "fileid")
        }
        for offsets in (self.unit_offsets, *(offsets for _, offsets in self.texts.values())):
            offsets.append([0])
        self.archives: dict[str, int] = {}
        self.total_samples = 0

    def append(self, chunk: Chunk) -> None:
        fileids = [str(fileid) for fileid in chunk["fileid"]]
        num_samples = _integers(chunk, "num_samples", len(fileids))
        flat, counts = self._flat_units(fileids, chunk["units"], num_samples)
        self.unit_offsets.append(self.units.length + np.cumsum(counts))
        self.units.append(flat)
        self.num_samples.append(num_samples)
        self.segment_start.append(_integers(chunk, "offset", len(fileids)))
        self.byte_offset.append(_integers(chunk, "byte_offset", len(fileids)))
        self.byte_size.append(_integers(chunk, "byte_size", len(fileids)))
        self.size.append(_integers(chunk, "size", len(fileids)))
        self.mtime_ns.append(_integers(chunk, "mtime_ns", len(fileids)))
        archives = chunk.get("archive", [None] * len(fileids))
        self.archive.append(
            [-1 if name is None else self.archives.setdefault(str(name), len(self.archives)) for name in archives]
        )
        self.fileid_hash.append(hash_fileids(fileids))
        self._append_text("fileid", fileids)
        self._append_text("path", [str(path) for path in chunk["path"]])
        self.total_samples += int(num_samples.sum())

    def _append_text(self, name: str, values: list[str]) -> None:
        encoded = [value.encode() for value in values]
        text, offsets = self.texts[name]
        offsets.append(text.length + np.cumsum([len(value) for value in encoded], dtype=np.int64))
        text.append(np.frombuffer(b"".join(encoded), dtype=np.uint8))

    def _flat_units(
        self, fileids: list[str], units: Iterable[Any], num_samples: IntArray
    ) -> tuple[npt.NDArray[Any], IntArray]:
        """Concatenate the units of a chunk; check their number and range."""
        arrays = [np.asarray([] if row is None else row) for row in units]
        counts = np.array([len(row) for row in arrays], dtype=np.int64)
        if len(arrays) != len(fileids):
            raise DataError(
                f"a chunk of {len(fileids)} files came with {len(arrays)} lists of units; every file needs its own"
            )
        expected = num_units_of(num_samples, self.frame_rate)
        for row in np.flatnonzero(counts != expected)[:1]:
            raise DataError(
                f"{fileids[row]}: {num_samples[row]} samples give {expected[row]} units at {self.frame_rate} Hz, found "
                f"{counts[row]}. Likely cause: the units were made from another version of the file or at another frame rate. "
                "Fix: run `hubert manifest` and `hubert units` again"
            )
        flat = np.concatenate([np.empty(0, np.uint16), *arrays])
        wrong = np.flatnonzero((flat < 0) | (flat >= self.num_units))
        if len(wrong):
            row = int(np.searchsorted(np.cumsum(counts), wrong[0], side="right"))
            raise DataError(
                f"{fileids[row]}: found unit {flat[wrong[0]]}, expected 0 to {self.num_units - 1}. Likely cause: the units come "
                "from a larger codebook. Fix: label the files again with the codebook of this iteration"
            )
        return flat, counts


def _integers(chunk: Chunk, name: str, length: int) -> IntArray:
    """Return a column with -1 for nulls; a column that the chunk lacks is all null."""
    values = chunk.get(name, [None] * length)
    return np.array([-1 if value is None else value for value in values], dtype=np.int64)


def write_table(
    path: Path, chunks: Iterable[Chunk], *, frame_rate: int, num_units: int, codebook: str, resample: bool = False
) -> None:
    """Write a table from chunks of rows, one after the other: memory holds one chunk. Atomic; a table at `path` is replaced.

    Args:
        path: folder of the table.
        chunks: mappings from the manifest's column names, and `units`, to their values in order (lists, arrays or
            polars columns); `offset`, `archive`, `byte_offset`, `byte_size`, `size` and `mtime_ns` may be absent or hold
            None.
        frame_rate: of the units, in Hz (50, or 100 for MFCC).
        num_units: size of the codebook; each unit is below it.
        codebook: key of the codebook, kept for the record.
        resample: whether the audio is converted to 16 kHz mono on reading.

    Raises:
        DataError: a file has not as many units as its samples give, or a unit that the codebook has not; names it.
    """
    with atomic_write(path) as temporary:
        temporary.mkdir()
        with ExitStack() as stack:
            writer = _TableWriter(temporary, stack, frame_rate=frame_rate, num_units=num_units)
            for chunk in chunks:
                writer.append(chunk)
        (temporary / "archives.json").write_text(json.dumps(list(writer.archives), ensure_ascii=False))
        content = {
            "format": FORMAT,
            "num_files": writer.num_samples.length,
            "num_units_total": writer.units.length,
            "hours": writer.total_samples / SAMPLE_RATE / 3600,
            "frame_rate": frame_rate,
            "num_units": num_units,
            "codebook": codebook,
            "resample": resample,
        }
        (temporary / "table.json").write_text(json.dumps(content, indent=1) + "\n")
        if path.exists():
            remove(path)  # a process that still reads the old table keeps its mapping of it


class Table:
    """A labelled manifest on disk. `len(table)` files; arrays as in the module's picture.

    Raises:
        DataError: the folder holds no table, one of another format, or columns that do not fit together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = read_json(folder / "table.json")
        if content is None or content.get("format") != FORMAT:
            raise DataError(
                f"{folder}: expected a table of format {FORMAT} (table.json), found {content and content.get('format')}; "
                "`hubert units` writes it"
            )
        self.frame_rate = int(content["frame_rate"])
        self.num_units = int(content["num_units"])
        self.codebook = str(content["codebook"])
        self.resample = bool(content["resample"])
        self.hours = float(content["hours"])
        self._length = int(content["num_files"])
        self.num_samples: IntArray = self._column("num_samples", self._length)
        self.fileid_hash: npt.NDArray[np.uint64] = self._column("fileid_hash", self._length)
        self.unit_offsets: IntArray = self._column("unit_offsets", self._length + 1)
        self._units: npt.NDArray[np.uint16] = self._column("units", int(content["num_units_total"]))

    def __len__(self) -> int:
        return self._length

    def units(self, row: int) -> npt.NDArray[np.uint16]:
        """Return the units (U,) uint16 of a file, at `frame_rate` Hz."""
        return self._units[self.unit_offsets[row] : self.unit_offsets[row + 1]]

    def fileid(self, row: int) -> str:
        """Return the fileid of a row."""
        return self._text("fileid", row)

    def audio_ref(self, row: int) -> AudioRef:
        """Return where the audio of a row lies, and what its file was like when it was labelled."""
        member = int(self._archive[row])
        return AudioRef(
            fileid=self.fileid(row),
            path=self._text("path", row),
            num_samples=int(self.num_samples[row]),
            offset=_optional(self._segment_start[row]),
            archive=None if member < 0 else self._archives[member],
            byte_offset=_optional(self._byte_offset[row]),
            byte_size=_optional(self._byte_size[row]),
            size=None if self._size is None else _optional(self._size[row]),
            mtime_ns=None if self._mtime_ns is None else _optional(self._mtime_ns[row]),
        )

    @cached_property
    def _archives(self) -> list[str]:
        path = self.folder / "archives.json"
        try:
            names: list[str] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: {error}; {AGAIN.format(self.folder)}") from error
        return names

    @cached_property
    def _archive(self) -> npt.NDArray[np.int32]:
        return self._column("archive", self._length)

    @cached_property
    def _segment_start(self) -> IntArray:
        return self._column("segment_start", self._length)

    @cached_property
    def _byte_offset(self) -> IntArray:
        return self._column("byte_offset", self._length)

    @cached_property
    def _byte_size(self) -> IntArray:
        return self._column("byte_size", self._length)

    @cached_property
    def _size(self) -> IntArray | None:
        return self._later_column("size")

    @cached_property
    def _mtime_ns(self) -> IntArray | None:
        return self._later_column("mtime_ns")

    def _later_column(self, name: str) -> IntArray | None:
        """Return a column that tables of older versions lack, or None."""
        return self._column(name, self._length) if (self.folder / f"{name}.npy").exists() else None

    @cached_property
    def _texts(self) -> dict[str, tuple[npt.NDArray[np.uint8], IntArray]]:
        return {
            name: (self._column(f"{name}s"), self._column(f"{name}_offsets", self._length + 1))
            for name in ("path", "fileid")
        }

    def _text(self, name: str, row: int) -> str:
        text, offsets = self._texts[name]
        return text[offsets[row] : offsets[row + 1]].tobytes().decode()

    def _column(self, name: str, length: int | None = None) -> npt.NDArray[Any]:
        path = self.folder / f"{name}.npy"
        try:
            # numpy cannot map a file without data, so an empty column is read. A plain view of the mapping, since every
            # access to a `memmap` object costs a microsecond more.
            array: npt.NDArray[Any] = np.load(path, mmap_mode="r" if path.stat().st_size > HEADER else None).view(
                np.ndarray
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: cannot be read as a column of the table ({error}); {AGAIN.format(self.folder)}"
            ) from error
        if length is not None and array.shape != (length,):
            raise DataError(
                f"{path}: expected {length} values as table.json says, found {array.shape}; {AGAIN.format(self.folder)}"
            )
        return array


def _optional(value: np.int64) -> int | None:
    return None if value < 0 else int(value)
