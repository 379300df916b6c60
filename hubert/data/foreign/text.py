"""Values that stand as text in a manifest, and where: types, seconds, paths, line numbers."""

import csv
from pathlib import Path

import polars as pl

from hubert.core.errors import DataError
from hubert.data.schema import OPTIONAL, REQUIRED, SCHEMA

COLUMNS = (*REQUIRED, *OPTIONAL)


def below(folder: pl.Expr, path: pl.Expr) -> pl.Expr:
    """Return the expression of a path that is relative to `folder`, which ends in a slash, unless it is absolute."""
    return pl.when(path.str.starts_with("/")).then(path).otherwise(folder + path)


def line_of(path: Path, row: int) -> str:
    """Return where a row (from 0) stands in a manifest, for people. Read only when something is wrong."""
    if path.suffix.lower() == ".parquet":
        return f"row {row + 1}"
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        if path.suffix.lower() == ".csv":
            reader = csv.reader(file)
            lines = (reader.line_num for _ in reader)  # an empty line is a row, too
            return f"line {next((line for number, line in enumerate(lines) if number == row + 1), row + 2)}"
        lines = (number for number, line in enumerate(file, start=1) if line.strip())
        wanted = row + (path.suffix.lower() == ".tsv")
        return f"line {next((line for number, line in enumerate(lines) if number == wanted), wanted + 1)}"


def typed_columns(rows: pl.LazyFrame, path: Path) -> pl.LazyFrame:
    """Turn text into the schema's types; columns that the schema does not know are dropped.

    Raises:
        DataError: text in a column of integers; names the first, and its line.
    """
    kinds = rows.collect_schema()
    known = [name for name in kinds if name in COLUMNS]
    for name in known:
        if SCHEMA[name] == pl.Int64 and kinds[name] == pl.String:
            value = pl.col(name)
            wrong = value.is_not_null() & value.cast(pl.Int64, strict=False).is_null()
            bad = rows.with_row_index("__row").filter(wrong).select("__row", name).head(1).collect()
            if bad.height:
                raise DataError(
                    f"manifest {path}: {name} must be an integer, found {bad.item(0, 1)!r} on {line_of(path, bad.item(0, 0))}"
                    + ("; it counts samples at 16 kHz (seconds x 16,000)" if name in {"num_samples", "offset"} else "")
                )
    return rows.select(pl.col(name).cast(SCHEMA[name]) if kinds[name] == pl.String else pl.col(name) for name in known)


def read_seconds(rows: pl.LazyFrame, name: str, path: Path) -> list[float | None]:
    """Read a column of seconds.

    Raises:
        DataError: a value is no number, or negative.
    """
    text = rows.select(name).collect().to_series()
    values = text.cast(pl.Float64, strict=False)
    wrong = (values.is_null() & text.is_not_null()) | (values < 0) | values.is_nan() | values.is_infinite()
    if wrong.any():
        row = wrong.fill_null(False).arg_max() or 0
        raise DataError(f"manifest {path}: {name} must be seconds, found {text[row]!r} on {line_of(path, row)}")
    return values.to_list()
