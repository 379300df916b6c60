"""Manifests on disk: the service's own (parquet), and those that people bring along or take away.

| suffix | read | written |
|---|---|---|
| `.parquet` | fileid, path, and any other columns of the schema | all columns, in small row groups |
| `.csv`, `.jsonl` | the same | fileid, path, num_samples, and the optional columns that say something |
| `.tsv` | fairseq's: the audio's folder on a line, then `path<TAB>num_samples` | the same |

`read_manifest` and `scan_manifest` open what `write_manifest` wrote as parquet; `scan_foreign_manifest` opens anything
in the table, resolves its paths and looks up each file. All of it streams.
"""

import glob
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from hubert.core.errors import ConfigError, DataError, TransientError, first_line
from hubert.core.files import atomic_write
from hubert.core.outputs import check_files
from hubert.data.audio_file import is_permanent
from hubert.data.schema import OPTIONAL, REQUIRED, SCHEMA, AnyRows, build_fileid, check_rows, conform

MANIFEST_EXTENSIONS = (".csv", ".jsonl", ".tsv", ".parquet")
ROW_GROUP = 1 << 16  # rows: a shard's part of a manifest is read without the rest
TEXT_COLUMNS = {name: SCHEMA[name] for name in (*REQUIRED, *OPTIONAL)}
STAT = pl.Struct({"size": pl.Int64, "mtime_ns": pl.Int64})


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


# What people bring ------------------------------------------------------------------------------------------------


def scan_foreign_manifest(path: Path) -> pl.LazyFrame:
    """Open a manifest of any format: absolute paths, checked types and values, size and time of every file.

    Relative paths are relative to the manifest's folder (`.tsv`: to the folder on its first line). A file that is not
    there has null `size` and `mtime_ns`. Columns that the schema does not know are ignored.

    Raises:
        DataError: it cannot be read, has no rows, lacks columns, or a value breaks a rule.
    """
    where = f"manifest {path}"
    readers: dict[str, Callable[[Path], pl.LazyFrame]] = {
        ".csv": _scan_csv,
        ".jsonl": _scan_jsonl,
        ".tsv": _scan_fairseq,
        ".parquet": lambda path: pl.scan_parquet(path, glob=False),
    }
    try:
        rows = conform(readers[path.suffix.lower()](path), where=where)
        if rows.select("fileid").head(1).collect().is_empty():
            raise DataError(f"{where} has no rows")
        check_rows(rows, where=where)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise DataError(f"{where} cannot be read as {path.suffix}: {error}") from error
    folder = pl.lit(f"{path.parent}/")
    rows = rows.with_columns(
        path=pl.when(pl.col("archive").is_null()).then(_below(folder, pl.col("path"))).otherwise("path"),
        archive=_below(folder, pl.col("archive")),
    )
    stat = pl.coalesce("archive", "path").map_batches(_stat_all, return_dtype=STAT, is_elementwise=True)
    # Not `unnest`: polars would then look the files up for every query, also for one that asks for fileids only.
    size, mtime_ns = (pl.col("stat").struct.field(name).alias(name) for name in STAT.to_schema())
    return rows.with_columns(stat=stat).with_columns(size, mtime_ns).select(list(SCHEMA))


def _below(folder: pl.Expr, path: pl.Expr) -> pl.Expr:
    return pl.when(path.str.starts_with("/")).then(path).otherwise(folder + path)


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


def _stat_all(paths: pl.Series) -> pl.Series:
    """Stat each path; the rows of one archive follow each other and need one call."""
    sizes: list[int | None] = []
    times: list[int | None] = []
    last, status = "", None
    for path in paths.to_list():
        if path != last:
            last, status = path, find_stat(path)
        sizes.append(None if status is None else status.st_size)
        times.append(None if status is None else status.st_mtime_ns)
    return pl.DataFrame({"size": sizes, "mtime_ns": times}, schema=STAT.to_schema()).to_struct("stat")


def _scan_csv(path: Path) -> pl.LazyFrame:
    return _typed(pl.scan_csv(path, infer_schema=False, glob=False), path)


def _scan_jsonl(path: Path) -> pl.LazyFrame:
    return pl.scan_ndjson(glob.escape(str(path)), schema=TEXT_COLUMNS)  # polars would read brackets as a pattern


def _scan_fairseq(path: Path) -> pl.LazyFrame:
    with path.open(encoding="utf-8") as file:
        root, first = file.readline().rstrip("\r\n"), file.readline().rstrip("\r\n")
    if not root or "\t" in root or first.count("\t") != 1:
        raise DataError(
            f"manifest {path}: expected fairseq's format, the audio's folder on the first line and then "
            f"`path<TAB>num_samples`, found the lines {root!r} and {first!r}; a table with column names must be .csv "
            "(commas) or .jsonl"
        )
    rows = pl.scan_csv(
        path,
        separator="\t",
        quote_char=None,
        has_header=False,
        skip_lines=1,
        new_columns=["path", "num_samples"],
        infer_schema=False,
        glob=False,
    )
    fileid = pl.col("path").map_batches(_fileids, return_dtype=pl.String, is_elementwise=True)
    return _typed(rows.with_columns(fileid=fileid, path=_below(pl.lit(f"{path.parent / root}/"), pl.col("path"))), path)


def _fileids(paths: pl.Series) -> pl.Series:
    return pl.Series([None if path is None else build_fileid(path) for path in paths.to_list()], dtype=pl.String)


def _typed(rows: pl.LazyFrame, path: Path) -> pl.LazyFrame:
    """Turn text into the schema's types; columns that the schema does not know are dropped.

    Raises:
        DataError: text in a column of integers; names the first.
    """
    known = [name for name in rows.collect_schema() if name in TEXT_COLUMNS]
    for name in known:
        value = pl.col(name)
        if TEXT_COLUMNS[name] == pl.Int64:
            bad = rows.filter(value.is_not_null() & value.cast(pl.Int64, strict=False).is_null()).head(1).collect()
            if bad.height:
                row = bad.row(0, named=True)
                raise DataError(f"manifest {path}: {name} must be an integer, found {row[name]!r} in the row {row}")
    return rows.select(pl.col(name).cast(TEXT_COLUMNS[name]) for name in known)
