"""What a person gives as audio, turned into the rows of a manifest: folders, archives, manifests.

Order is part of the result, since shards are cut along it: a folder's files come sorted by path, an archive's members
as they lie in it, a manifest's rows as they stand. So one more file changes the rows only where it falls.
"""

import os
import re
import struct
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from hubert.core.errors import ConfigError, DataError, TransientError
from hubert.data.audio_file import is_permanent
from hubert.data.manifest import MANIFEST_EXTENSIONS, find_stat, scan_foreign_manifest
from hubert.data.schema import SCHEMA, build_fileid, check_rows, check_unique

AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3", ".opus")
ARCHIVE_EXTENSIONS = (".tar", ".zip")
COMPRESSED_EXTENSIONS = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".tzst", ".7z", ".rar")

MIN_SPEAKERS = 10
MAX_DEPTH = 8
CHUNK_ROWS = 100_000  # rows that become Python objects at once

SPEAKER_RULES = {"auto": None, "none": None, "first": "^([^/]+)/", "parent": "([^/]+)/[^/]+$"}

Row = tuple[Any, ...]


def list_audio(
    sources: Sequence[Path], *, extensions: Sequence[str] = AUDIO_EXTENSIONS, speaker: str = "auto"
) -> pl.LazyFrame:
    """List the audio in all sources, one row each, in the order of the sources.

    Args:
        sources: each one is
            a folder: all audio files below it, and all audio in the tar and zip archives below it. Links to folders
                are followed; a folder that was seen before is not listed again;
            a tar or zip with uncompressed audio, or a single audio file;
            a manifest: `.csv` or `.jsonl` (fileid, path, and optionally num_samples and the schema's other columns),
                fairseq's `.tsv`, `.parquet`. Relative paths are relative to its folder. Unknown columns are ignored.
        extensions: suffixes of audio files, in any case of letters.
        speaker: how the speaker follows from the path under the source (inside the archive, for a member):
            "auto": the folders of the first level that has at least 10 different names: right for
                speaker/chapter/utterance, for subset/speaker/chapter/utterance, and for a flat folder (none);
            "first": the first folder; "parent": the folder that holds the file; "none";
            else a regular expression (of Rust's regex crate) with one group. Speakers that a manifest names stay.

    Returns:
        Rows of the schema. `num_samples` is null where no manifest gives it; `size` and `mtime_ns` are null for files
        that are not there, which verification rejects.

    Raises:
        ConfigError: `speaker` is not a regular expression with one group, or no source is given.
        DataError: a source is missing, unreadable, compressed, or holds no audio; a row is malformed; two rows share
            a fileid or a file.
    """
    if not sources:
        raise ConfigError("no audio: `audio` names no folder, archive or manifest")
    pattern = SPEAKER_RULES.get(speaker) if speaker in SPEAKER_RULES else _check_pattern(speaker)
    suffixes = tuple(suffix.lower() for suffix in extensions)
    parts = []
    for source in sources:
        path = Path(os.path.abspath(source))  # noqa: PTH100  (unlike resolve, it keeps the links as they were given)
        parts.append(_with_speakers(_list_source(path, suffixes), speaker, pattern, path).select(list(SCHEMA)))
    listed = pl.concat(parts)
    check_unique(listed)
    return listed


def _list_source(source: Path, extensions: tuple[str, ...]) -> pl.LazyFrame:
    """List one source: rows of the schema, and `inner`, the path from which the speaker follows if not the fileid."""
    name = source.name.lower()
    if source.is_dir():
        found = _folder_rows(source, extensions)
    elif not source.exists():
        raise DataError(f"audio source {source} does not exist; correct `audio` (it is relative to `data`)")
    elif name.endswith(MANIFEST_EXTENSIONS):
        return scan_foreign_manifest(source).with_columns(inner=pl.lit(None, dtype=pl.String))
    elif name.endswith(ARCHIVE_EXTENSIONS):
        found = _archive_rows(source, None, extensions)
    elif name.endswith(extensions):
        found = iter([_file_row(source.name, str(source))])
    elif name.endswith(COMPRESSED_EXTENSIONS):
        raise DataError(f"{source} is compressed, so no single file in it can be read; unpack it, or pack a plain .tar")
    else:
        known = ", ".join((*extensions, *ARCHIVE_EXTENSIONS, *MANIFEST_EXTENSIONS))
        raise DataError(f"audio source {source}: its suffix is none of {known}; give a folder, archive or manifest")
    rows = _frame(found)
    if rows.is_empty():
        raise DataError(f"no audio in {source}: no file ends in {', '.join(extensions)}; {_hint(source)}")
    check_rows(rows, where=f"audio source {source}")
    return rows.lazy()


def _hint(source: Path) -> str:
    for path in source.rglob("*"):
        if path.name.lower().endswith(COMPRESSED_EXTENSIONS):
            return f"{path} is compressed: unpack it, or pack it as a plain .tar"
    return "give the folder or archive that holds the audio"


# Folders ----------------------------------------------------------------------------------------------------------


def _frame(rows: Iterable[Row]) -> pl.DataFrame:
    """Gather rows (the schema's columns and `inner`), `CHUNK_ROWS` at once as Python objects."""
    schema = pl.Schema({**SCHEMA, "inner": pl.String()})
    parts, chunk = [pl.DataFrame(schema=schema)], []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK_ROWS:
            parts.append(pl.DataFrame(chunk, schema=schema, orient="row"))
            chunk = []
    parts.append(pl.DataFrame(chunk, schema=schema, orient="row"))
    return pl.concat(parts)


def _file_row(name: str, path: str) -> Row:
    """Return the row of a plain file; `name` is its path under the root."""
    stat = find_stat(path)
    size, mtime = (None, None) if stat is None else (stat.st_size, stat.st_mtime_ns)
    return (build_fileid(_text(name)), _text(path), None, None, None, None, None, None, size, mtime, None)


def _text(name: str) -> str:
    """Return a name that is valid text.

    Raises:
        DataError: the bytes on disk are not UTF-8, which no manifest format can hold.
    """
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the name {os.fsencode(name)!r} is not valid UTF-8, so no manifest can hold it; rename it "
            "(`convmv` does whole folders)"
        ) from error
    return name


def _folder_rows(root: Path, extensions: tuple[str, ...]) -> Iterator[Row]:
    """Walk a folder in the order of its paths' parts."""
    seen: set[tuple[int, int]] = set()

    def walk(folder: str, prefix: str) -> Iterator[Row]:
        try:
            status = os.stat(folder)  # noqa: PTH116  (strings: a Path per file would double the time)
            if (status.st_dev, status.st_ino) in seen:
                return
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise _failure(f"folder {folder}", error) from error
        for entry in entries:
            lower, name = entry.name.lower(), prefix + entry.name
            if _is_folder(entry):
                yield from walk(entry.path, name + "/")
            elif lower.endswith(extensions):
                yield _file_row(name, entry.path)
            elif lower.endswith(ARCHIVE_EXTENSIONS):
                yield from _archive_rows(Path(entry.path), name, extensions)

    yield from walk(str(root), "")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself or into a closed folder: if it is named like audio, it is listed and rejected
        return False


def _failure(what: str, error: OSError) -> DataError | TransientError:
    if is_permanent(error):
        return DataError(f"{what} cannot be read ({error.strerror}); change its permissions, or leave it out")
    return TransientError(f"{what} cannot be read ({error.strerror}); the disk or network may recover")


# Archives ---------------------------------------------------------------------------------------------------------


def _archive_rows(archive: Path, name: str | None, extensions: tuple[str, ...]) -> Iterator[Row]:
    """List the audio in a tar or zip; `name` is the archive's path under the root, None if it is the root."""
    path = _text(str(archive))
    members = _tar_members if path.lower().endswith(".tar") else _zip_members
    try:
        status = archive.stat()
        for member, start, size in members(archive, extensions):
            inner = build_fileid(_text(member))
            fileid = inner if name is None else f"{build_fileid(name)}/{inner}"
            yield (fileid, member, None, None, path, start, size, None, status.st_size, status.st_mtime_ns, inner)
    except (tarfile.TarError, zipfile.BadZipFile, struct.error) as error:
        raise DataError(
            f"archive {archive} cannot be read ({error}): it is cut, damaged or compressed; copy it again, or pack it as "
            "a plain .tar"
        ) from error
    except OSError as error:
        raise _failure(f"archive {archive}", error) from error


def _tar_members(archive: Path, extensions: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
    """Give name, first byte and number of bytes of each audio member of a tar."""
    with tarfile.open(archive, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it keeps all headers: 1 GB for a million members
            if member.isdir() or not member.name.lower().endswith(extensions):
                continue
            if not member.isreg() or member.issparse():
                raise DataError(
                    f"archive {archive}: member {member.name!r} is a link or sparse, so its bytes are not in one place; "
                    "pack it again with `tar --dereference --hard-dereference`"
                )
            yield member.name, member.offset_data, member.size


def _zip_members(archive: Path, extensions: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
    """Give name, first byte and number of bytes of each audio member of a zip."""
    with zipfile.ZipFile(archive) as directory, archive.open("rb") as file:
        for member in directory.infolist():
            if member.is_dir() or not member.filename.lower().endswith(extensions):
                continue
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise DataError(
                    f"archive {archive}: member {member.filename!r} is compressed or encrypted, so a part of it cannot be read "
                    "alone; pack it again with `zip -0` (audio hardly shrinks), or as a plain .tar"
                )
            # The local header repeats the name and may carry other extra fields than the directory's.
            file.seek(member.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            yield member.filename, member.header_offset + 30 + name + extra, member.file_size


# Speakers ---------------------------------------------------------------------------------------------------------


def _check_pattern(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
        pl.select(pl.lit("").str.extract(pattern, 1))
    except (re.error, pl.exceptions.ComputeError) as error:
        raise ConfigError(
            f"speaker = {pattern!r} is none of auto, first, parent, none, and no regular expression: {error}"
        ) from error
    if groups != 1:
        raise ConfigError(
            f"speaker = {pattern!r} must have one group, the speaker; it has {groups}. Example: ^[^/]+/([^/]+)/"
        )
    return pattern


def _with_speakers(rows: pl.LazyFrame, rule: str, pattern: str | None, source: Path) -> pl.LazyFrame:
    """Fill in the speakers that no manifest named; "none" drops those, too."""
    if rule == "none":
        return rows.with_columns(speaker=pl.lit(None, dtype=pl.String))
    inner = pl.coalesce("inner", "fileid")
    pattern = _speaker_level(rows, inner) if rule == "auto" else pattern
    if pattern is None:
        return rows
    rows = rows.with_columns(speaker=pl.coalesce("speaker", inner.str.extract(pattern, 1)))
    if rule not in SPEAKER_RULES and rows.select(pl.col("speaker").count()).collect(engine="streaming").item() == 0:
        example = rows.select(inner).head(1).collect().item()
        raise DataError(f"speaker = {rule!r} matches no file of {source}; it is matched with paths such as {example!r}")
    return rows


def _speaker_level(rows: pl.LazyFrame, inner: pl.Expr) -> str | None:
    """Find the first level of folders with enough names to be speakers. Fewer are subsets, years or one `wavs` folder.

    Holding out one of three folders would hold out a third of the data, so such a tree counts as having no speakers.
    """
    for level in range(MAX_DEPTH):
        pattern = f"^(?:[^/]+/){{{level}}}([^/]+)/"
        names = (
            rows.select(inner.str.extract(pattern, 1).alias("name")).unique().collect(engine="streaming").to_series()
        )
        if names.drop_nulls().len() >= MIN_SPEAKERS:
            return pattern
        if names.drop_nulls().is_empty():
            return None
    return None
