"""fairseq's .tsv: the audio's folder on the first line, then `path<TAB>num_samples`; paths may be slices."""

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from hubert.core.errors import DataError, TransientError
from hubert.data.archives import ARCHIVE_EXTENSIONS, archive_errors, list_members
from hubert.data.foreign.columns import guess
from hubert.data.foreign.text import below, line_of, typed_columns
from hubert.data.schema import SCHEMA, build_fileid

SLICE = r"^(.+):(\d+):(\d+)$"


def scan_fairseq(path: Path) -> pl.LazyFrame:
    """Open a .tsv of fairseq as rows of the schema, paths made absolute.

    Raises:
        DataError: it is something else, or a slice does not say its units.
    """
    with path.open(encoding="utf-8") as file:
        root, first = file.readline().rstrip("\r\n"), file.readline().rstrip("\r\n")
    if not root or "\t" in root or first.count("\t") != 1:
        raise DataError(
            f"manifest {path}: expected fairseq's format, the audio's folder on the first line and then "
            f"`path<TAB>num_samples`, found the lines {root!r} and {first!r}.{guess(root.split(chr(9)))} A table with column "
            "names must be .csv (commas) or .jsonl"
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
    rows = typed_columns(rows, path)
    folder = pl.lit(f"{path.parent / root}/")
    if rows.select(pl.col("path").str.contains(SLICE).any()).collect(engine="streaming").item():
        return _with_slices(rows, path, folder)
    fileid = pl.col("path").map_batches(_fileids, return_dtype=pl.String, is_elementwise=True)
    return rows.with_columns(fileid=fileid, path=below(folder, pl.col("path")))


def _fileids(paths: pl.Series) -> pl.Series:
    return pl.Series([None if path is None else build_fileid(path) for path in paths.to_list()], dtype=pl.String)


def _with_slices(rows: pl.LazyFrame, path: Path, folder: pl.Expr) -> pl.LazyFrame:
    """Take rows of which some are slices: `x.zip:byte_offset:byte_size`, or `x.wav:offset:num_samples`.

    A member of an archive has the fileid that the archive's own listing would give it.

    Raises:
        DataError: a slice of an audio file is not as long as the second column says, so its units are others.
    """
    head, start, count = (pl.col("path").str.extract(SLICE, group) for group in (1, 2, 3))
    is_archive = pl.any_horizontal(head.str.to_lowercase().str.ends_with(suffix) for suffix in ARCHIVE_EXTENSIONS)
    table = rows.select(
        "num_samples",
        source=pl.coalesce(head, "path"),
        start=start.cast(pl.Int64),
        count=count.cast(pl.Int64),
        is_member=is_archive.fill_null(value=False),
    ).collect()
    absolute = table.select(below(folder, pl.col("source"))).to_series()
    names = {archive: _names_by_offset(Path(archive)) for archive in absolute.filter(table["is_member"]).unique()}
    values = []
    for row, (samples, source, first, size, is_member) in enumerate(table.iter_rows()):
        place = absolute[row]
        if is_member:
            member = names[place].get((first, size), f"{first}-{size}")
            fileid = f"{build_fileid(source)}/{build_fileid(member)}"
            values.append((fileid, member, samples, None, place, first, size))
        elif first is None:
            values.append((build_fileid(source), place, samples, None, None, None, None))
        elif size == samples:
            fileid = f"{build_fileid(source)}#{first}-{first + size}"
            values.append((fileid, place, samples, first, None, None, None))
        else:
            raise DataError(
                f"manifest {path}: {source}:{first}:{size} on {line_of(path, row)} is a slice of an audio file, so it must "
                f"be `offset:num_samples` in samples at 16 kHz, with the same length in the second column, found {samples}"
            )
    columns = ("fileid", "path", "num_samples", "offset", "archive", "byte_offset", "byte_size")
    return pl.LazyFrame(values, schema={name: SCHEMA[name] for name in columns}, orient="row")


def _names_by_offset(archive: Path) -> dict[tuple[int, int], str]:
    """Return the names of an archive's members by first byte and size; none if it cannot be read, which checking says."""

    def members() -> Iterator[tuple[tuple[int, int], str]]:
        for name, start, size in list_members(archive, lambda _: True):
            yield (start, size), name

    try:
        with archive_errors(archive):
            return dict(members())
    except (DataError, TransientError):
        return {}
