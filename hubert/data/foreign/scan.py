"""Opening a manifest of any format, with the size and time of every file that it names."""

from collections.abc import Callable
from functools import partial
from glob import escape
from pathlib import Path

import polars as pl

from hubert.core.errors import DataError
from hubert.data.foreign.columns import adapt
from hubert.data.foreign.fairseq import scan_fairseq
from hubert.data.foreign.text import below, line_of
from hubert.data.manifest import find_stat
from hubert.data.schema import SCHEMA, check_rows, conform

STAT = pl.Struct({"size": pl.Int64, "mtime_ns": pl.Int64})


def scan_foreign_manifest(path: Path) -> pl.LazyFrame:
    """Open a manifest of any format: absolute paths, checked types and values, size and time of every file.

    Relative paths are relative to the manifest's folder (`.tsv`: to the folder on its first line). A file that is not
    there has null `size` and `mtime_ns`.

    Raises:
        DataError: it cannot be read, has no rows, lacks columns, has columns that would be misunderstood, or a value
            breaks a rule. It names the manifest, the line, and what was found.
    """
    where = f"manifest {path}"
    readers: dict[str, Callable[[Path], pl.LazyFrame]] = {
        ".csv": lambda path: adapt(pl.scan_csv(path, infer_schema=False, glob=False), path),
        ".jsonl": lambda path: adapt(scan_jsonl(path), path),
        ".tsv": scan_fairseq,
        ".parquet": lambda path: adapt(pl.scan_parquet(path, glob=False), path),
    }
    try:
        rows = conform(readers[path.suffix.lower()](path), where=where)
        if rows.select("fileid").head(1).collect().is_empty():
            raise DataError(f"{where} has no rows")
        check_rows(rows, where=where, line_of=partial(line_of, path))
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise DataError(f"{where} cannot be read as {path.suffix}: {error}") from error
    folder = pl.lit(f"{path.parent}/")
    rows = rows.with_columns(
        path=pl.when(pl.col("archive").is_null()).then(below(folder, pl.col("path"))).otherwise("path"),
        archive=below(folder, pl.col("archive")),
    )
    stat = pl.coalesce("archive", "path").map_batches(_stat_all, return_dtype=STAT, is_elementwise=True)
    # Not `unnest`: polars would then look the files up for every query, also for one that asks for fileids only.
    size, mtime_ns = (pl.col("stat").struct.field(name).alias(name) for name in STAT.to_schema())
    return rows.with_columns(stat=stat).with_columns(size, mtime_ns).select(list(SCHEMA))


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


def scan_jsonl(path: Path) -> pl.LazyFrame:
    """Open JSON lines, all simple values as text."""
    name = escape(str(path))  # polars would read brackets as a pattern
    if path.stat().st_size == 0:
        return pl.LazyFrame(schema={"fileid": pl.String, "path": pl.String})
    found = pl.scan_ndjson(name, infer_schema_length=None).collect_schema()
    return pl.scan_ndjson(name, schema={name: kind if kind.is_nested() else pl.String for name, kind in found.items()})
