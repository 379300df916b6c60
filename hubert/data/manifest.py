"""Manifests on disk: the service's own (parquet), and those that people bring along or take away.

| suffix | read | written |
|---|---|---|
| `.parquet` | fileid, path, and any other columns of the schema | all columns, in small row groups |
| `.csv`, `.jsonl` | the same | fileid, path, num_samples, and the optional columns that say something |
| `.tsv` | fairseq's: the audio's folder on a line, then `path<TAB>num_samples`; also slices | the same, whole files |

`read_manifest` and `scan_manifest` open what `write_manifest` wrote as parquet; `foreign.scan_foreign_manifest` opens
anything in the table, resolves its paths and looks up each file. All of it streams.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from hubert.core.errors import ConfigError, DataError, TransientError, first_line
from hubert.core.files import atomic_write
from hubert.core.outputs import check_files
from hubert.data.audio_file import is_permanent
from hubert.data.schema import OPTIONAL, REQUIRED, SCHEMA, AnyRows, conform

MANIFEST_EXTENSIONS = (".csv", ".jsonl", ".tsv", ".parquet")
ROW_GROUP = 1 << 16  # rows: a shard's part of a manifest is read without the rest


# The service's own ------------------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path, stage: str) -> Iterator[None]:
    """Name the parquet file that cannot be read, and the stage that makes it again.

    Raises:
        DataError: it is missing, or no parquet.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; `hubert {stage}` makes it") from error
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"{path} is not a parquet file, or is damaged ({first_line(error)}). Likely cause: a fault of the disk or a power "
            f"failure. Fix: remove it and run `hubert {stage}` again, which makes it anew"
        ) from error


def read_parquet(path: Path, stage: str) -> pl.DataFrame:
    """Read a parquet file that a stage wrote; the stage is named if it cannot be read.

    Raises:
        DataError: from `reading`.
    """
    with reading(path, stage):
        return pl.read_parquet(path, glob=False)


def scan_manifest(path: Path) -> pl.LazyFrame:
    """Open a manifest that `write_manifest` wrote as parquet, without reading its rows.

    The file is hashed at the first call of a process: the keys of stages depend on its rows.

    Raises:
        DataError: it is missing, no parquet, not what its stage wrote, or its columns are not the schema's.
    """
    check_files([path])
    with reading(path, "manifest"):
        rows = pl.scan_parquet(path, glob=False)
        found = rows.collect_schema()
    if found != SCHEMA:
        wrong = [f"{name} is {found.get(name, 'missing')}" for name, kind in SCHEMA.items() if found.get(name) != kind]
        wrong += [f"{name} is unknown" for name in found if name not in SCHEMA]
        expected = ", ".join(f"{name} {kind}" for name, kind in SCHEMA.items())
        raise DataError(
            f"manifest {path}: {', '.join(wrong) or 'the order of the columns differs'}; expected {expected}. "
            "It was written by something else; give it as the data, to be checked and converted by `hubert manifest`"
        )
    return rows


def read_manifest(path: Path, *, start: int = 0, end: int | None = None) -> pl.DataFrame:
    """Read rows [start, end) of a manifest that `write_manifest` wrote as parquet; a shard's rows cost a row group.

    All of ten million rows take 2.5 GB: read a part, or stream with `scan_manifest`.

    Raises:
        DataError: as `scan_manifest`.
    """
    rows = scan_manifest(path).slice(start, None if end is None else max(0, end - start))
    with reading(path, "manifest"):
        return rows.collect()


# What people take away --------------------------------------------------------------------------------------------


def write_manifest(rows: AnyRows, path: Path) -> None:
    """Write a manifest atomically, in the format that the suffix names, streaming.

    `.parquet` holds every column. `.csv` and `.jsonl` hold fileid, path, num_samples and those optional columns that
    say something. `.tsv` is fairseq's: a line with the common folder, then `path<TAB>num_samples`; it cannot hold
    segments, members of archives, or names with tabs.

    Raises:
        ConfigError: the suffix names no format.
        DataError: the rows lack columns, there are none, or the format cannot hold them.
    """
    lazy = conform(rows, where=f"the table for manifest {path}")
    if path.suffix not in {".parquet", ".csv", ".jsonl", ".tsv"}:
        raise ConfigError(
            f"manifest {path}: suffix {path.suffix!r} names no format; use .parquet, .csv, .jsonl or .tsv"
        )
    said = lazy.select(pl.len().alias("rows"), pl.col(OPTIONAL).count()).collect(engine="streaming").row(0, named=True)
    if said["rows"] == 0:
        raise DataError(f"manifest {path} would have no rows: no audio is left to write down")
    columns = [*REQUIRED, *(name for name in OPTIONAL if said[name])]
    root = _common_folder(lazy, path) if path.suffix == ".tsv" else ""
    with atomic_write(path) as temporary:
        match path.suffix:
            case ".parquet":
                lazy.sink_parquet(temporary, row_group_size=ROW_GROUP)
            case ".csv":
                lazy.select(columns).sink_csv(temporary)
            case ".jsonl":
                lazy.select(columns).sink_ndjson(temporary)
            case _:
                relative = pl.col("path").str.slice(len(root.rstrip("/")) + 1)
                with temporary.open("wb") as file:
                    file.write(f"{root}\n".encode())
                    table = lazy.select(relative, "num_samples")
                    table.sink_csv(file, include_header=False, separator="\t", quote_style="never")


def _common_folder(rows: pl.LazyFrame, path: Path) -> str:
    """Return the deepest folder that holds all files, for the first line of fairseq's format."""
    paths = pl.col("path")
    extent = rows.select(
        (pl.col("offset").is_not_null() | pl.col("archive").is_not_null()).sum().alias("parts"),
        paths.str.contains(r"[\t\n\r]").sum().alias("odd"),
        pl.col("num_samples").null_count().alias("unknown"),
        paths.min().alias("first"),
        paths.max().alias("last"),
    )
    found = extent.collect(engine="streaming").row(0, named=True)
    if found["parts"] or found["odd"] or found["unknown"]:
        raise DataError(
            f"manifest {path}: fairseq's .tsv holds whole files of known length with plain names, but {found['parts']} "
            f"rows are segments or members of archives, {found['odd']} have tabs or line ends in their path, and "
            f"{found['unknown']} no length; write .parquet, .csv or .jsonl"
        )
    # What the least and the greatest string have in common, all strings between them have.
    return os.path.commonpath([os.path.dirname(found[name]) for name in ("first", "last")])  # noqa: PTH120


# The files that a manifest names ----------------------------------------------------------------------------------


def find_stat(path: str) -> os.stat_result | None:
    """Return a file's stat; None if it is not there or not ours (a dangling link, say), which verification reports.

    Raises:
        TransientError: the disk failed.
    """
    try:
        return os.stat(path)  # noqa: PTH116  (strings: a Path per file would double the time)
    except OSError as error:
        if is_permanent(error):
            return None
        raise TransientError(f"the state of {path} cannot be read ({error.strerror}); the disk may recover") from error
