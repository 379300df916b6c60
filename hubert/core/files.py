"""Files written whole or not at all: under a temporary name, flushed to disk, renamed."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hubert.core.hashing import digest

SEAL = "content_sha256"  # in a JSON file: the hash of everything else in it
RENAMED = {  # figures in the files of older versions
    "masked_loss": "validation_loss",
    "num_dead_units": "num_unused_units",
    "num_empty_units": "num_unused_units",
}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush it to disk and rename it to `path`.

    Folders work too. An exception (or a kill) leaves `path` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        yield temporary
        for file in [temporary] if temporary.is_file() else [*temporary.rglob("*")]:
            flush(file)
        if temporary.is_dir():
            flush(temporary)
        temporary.rename(path)
    except BaseException:
        remove(temporary)
        raise
    flush(path.parent)


def link(source: Path, target: Path) -> None:
    """Give a finished file a second name (or a copy, where the disk has no hard links)."""
    with atomic_write(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copy2(source, temporary)
            flush(temporary)


def flush(path: Path) -> None:
    """Ask the system to put a file or folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> int:
    """Remove a file or folder if it is there; return the bytes that it held."""
    if path.is_dir() and not path.is_symlink():
        size = sum(remove(child) for child in path.iterdir())
        path.rmdir()
        return size
    if not path.exists() and not path.is_symlink():
        return 0
    size = path.lstat().st_size
    path.unlink(missing_ok=True)
    return size


def folder_size(path: Path) -> int:
    """Return the bytes of all files below a folder; files that vanish meanwhile count as 0."""
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                total += (Path(directory) / name).lstat().st_size
            except FileNotFoundError:
                continue
    return total


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, with a hash of its content: `read_json` takes a changed one for unreadable."""
    write_json(path, seal(content))


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON-like content with its hash under `SEAL`."""
    plain = json.loads(json.dumps(content, default=str))
    return {**plain, SEAL: digest(plain)}


def unseal(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return content without the hash that `seal` added; None if it does not fit. Content without one is taken as it is."""
    plain = {name: value for name, value in content.items() if name != SEAL}
    return plain if SEAL not in content or content[SEAL] == digest(plain) else None


def rename(content: Any) -> Any:
    """Return JSON-like content in which every figure has the name of this version, in nested objects and lists too."""
    if isinstance(content, dict):
        return {RENAMED.get(name, name): rename(value) for name, value in content.items()}
    return [rename(value) for value in content] if isinstance(content, list) else content


def look_again(folder: Path) -> None:
    """Open a folder: a machine on a shared disk (NFS) may remember for a minute that a name is not there, until it does."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        next(entries, None)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if the file is missing, none (half of one, say), or not what `write_record` wrote."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return unseal(content) if isinstance(content, dict) else None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
