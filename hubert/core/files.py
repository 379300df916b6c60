"""Files written whole or not at all: under a temporary name, flushed to disk, renamed.

A disk that does not take one (full, over a quota or a size limit, gone) is a DiskError. Libraries say it in many ways: an
OSError with its number, Rust's words (`os error 28`: polars, safetensors), or nothing that tells it from a fault of the program
(torch: "iostream error", libsndfile: "System error"). In the last case the disk itself is asked, by writing a little more to
the half-written file.
"""

import errno
import json
import os
import re
import resource
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hubert.core import text
from hubert.core.errors import DiskError, HubertError
from hubert.core.hashing import digest

SEAL = "content_sha256"  # in a JSON file: the hash of everything else in it
RENAMED = {  # figures in the files of older versions
    "masked_loss": "validation_loss",
    "num_dead_units": "num_unused_units",
    "num_empty_units": "num_unused_units",
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
GONE = {errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT}
RUST = re.compile(r"\(os error (\d+)\)")
PROBE = bytes(1 << 20)


@contextmanager
def atomic_write(path: Path, *, size: int = 0) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush it to disk and rename it to `path`.

    Folders work too. An exception (or a kill) leaves `path` as it was.

    Args:
        path: the file or folder.
        size: bytes that it needs, for the message if the disk has less; 0 if not known.

    Raises:
        DiskError: the disk did not take it, in whatever words the library that writes says so.
    """
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        with storing(path, temporary=temporary, size=size):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            for file in [temporary] if temporary.is_file() else [*temporary.rglob("*")]:
                flush(file)
            if temporary.is_dir():
                flush(temporary)
            temporary.rename(path)
    except BaseException:
        with suppress(OSError):  # a disk that is gone: the error that says so must not be lost
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
    """Make the system put a file or folder on disk."""
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


# A disk that refuses ------------------------------------------------------------------------------------------------


@contextmanager
def storing(path: Path, *, temporary: Path | None = None, size: int = 0) -> Iterator[None]:
    """Turn the failure of a write into a DiskError if the disk is its cause; other errors pass.

    Args:
        path: what is written, for the message.
        temporary: where it lies until it is whole; written to in order to ask the disk.
        size: bytes that it needs; 0 if not known.

    Raises:
        DiskError: the disk did not take it; says what is needed and free, and what frees space.
    """
    try:
        yield
    except Exception as error:
        number = error.number if isinstance(error, DiskError) else None
        if not isinstance(error, HubertError):
            number = find_refusal(error) or (_probe(temporary) if temporary is not None else None)
        if number is None:
            raise
        raise DiskError(_explain(path, number, _written(temporary or path), size), number) from error


def find_refusal(error: BaseException) -> int | None:
    """Return the errno by which an error, or one that led to it, says that a disk refused; None if none does."""
    seen: BaseException | None = error
    while seen is not None:
        match = RUST.search(str(seen))
        number = seen.errno if isinstance(seen, OSError) and seen.errno else int(match[1]) if match else None
        if number in FULL | GONE:
            return number
        seen = seen.__cause__ or seen.__context__
    return None


def _probe(path: Path) -> int | None:
    """Write a little more to what is half written; return the errno if the disk refuses it."""
    found = [path] if path.is_file() else [*path.rglob("*")]
    # Not to one that has a second name (`hubert.core.files.link`): that is a finished file of somebody else.
    files = [file for file in found if stat.S_ISREG((status := file.lstat()).st_mode) and status.st_nlink == 1]
    try:
        for file in files or [path.with_name(f"{path.name}.probe")]:
            try:
                with file.open("ab", buffering=0) as stream:
                    if stream.write(PROBE) < len(PROBE):
                        stream.write(PROBE)  # the rest of the disk is taken: now it says why
                    os.fsync(stream.fileno())
            finally:
                if not files:
                    file.unlink(missing_ok=True)
    except OSError as error:
        return find_refusal(error)
    return None


def _written(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _explain(path: Path, number: int, written: int, size: int) -> str:
    """Write the message of a DiskError."""
    folder = next(parent for parent in path.parents if parent.exists())
    message = f"{path} could not be written: {os.strerror(number)}. "
    if number in GONE:
        return (
            f"{message}Likely cause: the disk of {folder}, or the network by which it is reached, fails (see the machine's "
            "log). When it is back, the same command goes on where it was"
        )
    needs = f"It needs {text.size(size)}" if size else f"It needs more than the {text.size(written)} that were written"
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if number == errno.EFBIG and limit != resource.RLIM_INFINITY:
        room = f"this process may write files of {text.size(limit)} at most (`ulimit -f`). Fix: raise that limit"
    elif number == errno.EFBIG:
        room = f"the file system of {folder} takes no file of that size. Fix: another disk for the runs (HUBERT_RUNS)"
    else:
        free = text.size(shutil.disk_usage(folder).free + written)  # the half-written file goes
        quota = ", but your quota there is used up" if number == errno.EDQUOT else ""
        room = (
            f"the disk of {folder} has {free} free{quota}. Fix: free some space (`hubert prune RUN` lists what of a run no "
            "later stage needs, and removes it with --yes)"
        )
    return f"{message}{needs}, and {room}; the same command then goes on where it was"
