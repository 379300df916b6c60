"""What a person gives as audio, turned into the rows of a manifest: folders, archives, manifests.

Order is part of the result, since shards are cut along it: a folder's files come sorted by path, an archive's members
as they lie in it, a manifest's rows as they stand. So one more file changes the rows only where it falls.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from posixpath import splitext
from typing import Any

import polars as pl

from hubert.core.errors import ConfigError, DataError
from hubert.data.archives import ARCHIVE_EXTENSIONS, archive_errors, list_members, unreadable
from hubert.data.foreign.scan import scan_foreign_manifest
from hubert.data.manifest import MANIFEST_EXTENSIONS, find_stat
from hubert.data.schema import SCHEMA, build_fileid, check_rows, check_unique

FIRST_EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3", ".opus")
# A file of these that lies beside one of the first with the same name is taken for its original or copy.
MORE_EXTENSIONS = (".aif", ".aiff", ".aifc", ".au", ".caf", ".oga", ".rf64", ".sph", ".w64")
AUDIO_EXTENSIONS = (*FIRST_EXTENSIONS, *MORE_EXTENSIONS)
COMPRESSED_EXTENSIONS = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".tzst", ".7z", ".rar")

MIN_SPEAKERS = 10
MAX_DEPTH = 8
CHUNK_ROWS = 100_000  # rows that become Python objects at once

SPEAKER_RULES = {"auto": None, "none": None, "first": "^([^/]+)/", "parent": "([^/]+)/[^/]+$"}

# What macOS adds to a folder, and to a zip that it makes: resource forks, named like the files they belong to.
MACOS_FOLDER, MACOS_PREFIX, MACOS_FILES = "__MACOSX", "._", {".DS_Store", ".localized"}
MACOS, COPIES = "files of macOS", "second copies"  # what `skipped` counts beside suffixes

Row = tuple[Any, ...]


def list_audio(
    sources: Sequence[Path],
    *,
    extensions: Sequence[str] = AUDIO_EXTENSIONS,
    speaker: str = "auto",
    skipped: Counter[str] | None = None,
) -> pl.LazyFrame:
    """List the audio in all sources, one row each, in the order of the sources.

    Args:
        sources: each one is
            a folder: all audio files below it, and all audio in the tar and zip archives below it. Links to folders
                are followed; a folder that was seen before is not listed again;
            a tar or zip with uncompressed audio, or a single audio file;
            a manifest: `.csv` or `.jsonl` (fileid, path, and optionally num_samples and the schema's other columns),
                fairseq's `.tsv`, `.parquet`. Relative paths are relative to its folder. `hubert.data.foreign` says what
                becomes of other columns, and of other programs' manifests.
        extensions: suffixes of audio files, in any case of letters.
        speaker: how the speaker follows from the path under the source (inside the archive, for a member):
            "auto": the folders of the first level that has at least 10 different names: right for
                speaker/chapter/utterance, for subset/speaker/chapter/utterance, and for a flat folder (none);
            "first": the first folder; "parent": the folder that holds the file; "none";
            else a regular expression (of Rust's regex crate) with one group. Speakers that a manifest names stay.
        skipped: counts the files in folders and archives that are not taken: by suffix (`.txt`; "" without one), `MACOS`
            (`._x.wav`, `__MACOSX/`, `.DS_Store`), and `COPIES` (`x.sph` beside `x.wav`).

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
    skipped = Counter() if skipped is None else skipped
    parts = []
    for source in sources:
        path = Path(os.path.abspath(source))  # noqa: PTH100  (unlike resolve, it keeps the links as they were given)
        parts.append(_with_speakers(_list_source(path, suffixes, skipped), speaker, pattern, path).select(list(SCHEMA)))
    listed = pl.concat(parts)
    check_unique(listed)
    return listed


def _list_source(source: Path, extensions: tuple[str, ...], skipped: Counter[str]) -> pl.LazyFrame:
    """List one source: rows of the schema, and `inner`, the path from which the speaker follows if not the fileid."""
    name, left = source.name.lower(), Counter[str]()
    if source.is_dir():
        found = _folder_rows(source, extensions, left)
    elif not source.exists():
        raise DataError(f"audio source {source} does not exist; correct `audio` (it is relative to `data`)")
    elif name.endswith(MANIFEST_EXTENSIONS):
        return scan_foreign_manifest(source).with_columns(inner=pl.lit(None, dtype=pl.String))
    elif name.endswith(ARCHIVE_EXTENSIONS):
        found = _archive_rows(source, None, extensions, left)
    elif name.endswith(extensions):
        found = iter([_file_row(source.name, str(source))])
    elif name.endswith(COMPRESSED_EXTENSIONS):
        raise DataError(f"{source} is compressed, so no single file in it can be read; unpack it, or pack a plain .tar")
    else:
        known = ", ".join((*extensions, *ARCHIVE_EXTENSIONS, *MANIFEST_EXTENSIONS))
        kaldi = (
            "; of a Kaldi wav.scp, write the two columns as fileid,path into a .csv" if name.endswith(".scp") else ""
        )
        raise DataError(
            f"audio source {source}: its suffix is none of {known}; give a folder, archive or manifest{kaldi}"
        )
    rows = _without_copies(_frame(found), left)
    skipped.update(left)
    if rows.is_empty():
        seen = f" (it holds {describe_skipped(left)})" if left else ""
        raise DataError(f"no audio in {source}: no file ends in {', '.join(extensions)}{seen}; {_hint(source)}")
    check_rows(rows, where=f"audio source {source}")
    return rows.lazy()


def _hint(source: Path) -> str:
    for path in source.rglob("*"):
        if path.name.lower().endswith(COMPRESSED_EXTENSIONS):
            return f"{path} is compressed: unpack it, or pack it as a plain .tar"
    return "give the folder or archive that holds the audio"


# What is left out -------------------------------------------------------------------------------------------------


def describe_skipped(skipped: Counter[str], *, num_suffixes: int = 8) -> str:
    """Write the counts of files that were not taken on one line: "100 .m4a, 20 .txt, 50 files of macOS"."""
    suffixes = sorted((-count, name) for name, count in skipped.items() if name not in {MACOS, COPIES})
    shown = [f"{-count:,} {name or 'without a suffix'}" for count, name in suffixes[:num_suffixes]]
    if rest := -sum(count for count, _ in suffixes[num_suffixes:]):
        shown.append(f"{rest:,} of other suffixes")
    return ", ".join([*shown, *(f"{skipped[name]:,} {name}" for name in (MACOS, COPIES) if skipped[name])])


def _count_skipped(name: str, skipped: Counter[str]) -> None:
    """Count a file that is not taken, by its path under the root or in its archive."""
    skipped[MACOS if _is_of_macos(name) else splitext(name.lower())[1]] += 1


def _is_of_macos(name: str) -> bool:
    *folders, last = name.split("/")
    return last.startswith(MACOS_PREFIX) or last in MACOS_FILES or MACOS_FOLDER in folders


def _without_copies(rows: pl.DataFrame, skipped: Counter[str]) -> pl.DataFrame:
    """Leave out `x.sph` where `x.wav` is there, too: the two are one recording, and have one fileid."""
    path = pl.col("path").str.to_lowercase()
    is_later = pl.any_horizontal(path.str.ends_with(suffix) for suffix in MORE_EXTENSIONS)
    later = rows.filter(is_later)["fileid"]
    if later.is_empty():
        return rows
    both = rows.filter(~is_later & pl.col("fileid").is_in(later.implode()))["fileid"]
    skipped.update({COPIES: both.len()} if both.len() else {})
    return rows.filter(~(is_later & pl.col("fileid").is_in(both.implode())))


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


def _folder_rows(root: Path, extensions: tuple[str, ...], skipped: Counter[str]) -> Iterator[Row]:
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
            raise unreadable(f"folder {folder}", error) from error
        for entry in entries:
            lower, name = entry.name.lower(), prefix + entry.name
            if _is_folder(entry):
                yield from walk(entry.path, name + "/")
            elif _is_of_macos(name):
                _count_skipped(name, skipped)
            elif lower.endswith(extensions):
                yield _file_row(name, entry.path)
            elif lower.endswith(ARCHIVE_EXTENSIONS):
                yield from _archive_rows(Path(entry.path), name, extensions, skipped)
            else:
                _count_skipped(name, skipped)

    yield from walk(str(root), "")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself or into a closed folder: if it is named like audio, it is listed and rejected
        return False


# Archives ---------------------------------------------------------------------------------------------------------


def _archive_rows(archive: Path, name: str | None, extensions: tuple[str, ...], skipped: Counter[str]) -> Iterator[Row]:
    """List the audio in a tar or zip; `name` is the archive's path under the root, None if it is the root."""

    def is_wanted(member: str) -> bool:
        if member.lower().endswith(extensions) and not _is_of_macos(member):
            return True
        _count_skipped(member, skipped)
        return False

    path = _text(str(archive))
    with archive_errors(archive):
        status = archive.stat()
        for member, start, size in list_members(archive, is_wanted):
            inner = build_fileid(_text(member))
            fileid = inner if name is None else f"{build_fileid(name)}/{inner}"
            yield (fileid, member, None, None, path, start, size, None, status.st_size, status.st_mtime_ns, inner)


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
