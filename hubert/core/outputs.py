"""Whether the files of a stage are as they were written: there, of the size, and with the sha256 that was recorded.

A file is hashed when it is written, and again before a stage reads it. In between its size is looked at, and its time: a
file that was written to after its record is hashed before anything relies on it. sha256 is what processors compute fastest
of the standard library's hashes (`benchmarks/studies/hashing.py`).
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hubert.core.errors import DataError
from hubert.core.files import folder_size, read_json, remove, write_record
from hubert.core.hashing import file_digest
from hubert.core.locks import hold

Sizes = dict[str, int]
Hashes = dict[str, str]

STAGE_FOLDER = re.compile(r"(?P<stage>[a-z]+)-[0-9a-f]{8}")
MAX_NAMED = 5  # changed files in an error
MAX_THREADS = 8  # hashing releases the interpreter's lock

_hashed: dict[str, tuple[tuple[int, ...], str]] = {}  # by path: its stat, and its hash in this process


@dataclass(frozen=True)
class Change:
    """An output that is not what was written. `found` is empty if the file is missing."""

    folder: Path
    name: str
    expected: str
    found: str

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self.folder / self.name

    def describe(self) -> str:
        """Return what was expected and what was found, as a sentence without its end."""
        if not self.found:
            return f"{self.path} is missing, which {self.folder.name} wrote"
        return (
            f"{self.path} is not what was written: expected sha256 {self.expected[:12]}…, found {self.found[:12]}…. Likely "
            "cause: a fault of the disk, a power failure, or another program that wrote there"
        )

    def stage(self) -> str:
        """Return the name of the stage that wrote the file."""
        match = STAGE_FOLDER.fullmatch(self.folder.name)
        return match["stage"] if match else self.folder.name


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    return folder_size(path) if path.is_dir() else path.stat().st_size


def all_there(folder: Path, outputs: Mapping[str, int]) -> bool:
    """Return True if every output is in the folder with its size."""
    try:
        return all(size(folder / name) == wanted and (folder / name).exists() for name, wanted in outputs.items())
    except FileNotFoundError:
        return False


def sha256(path: Path) -> str:
    """Return the sha256 of a file. A process hashes it once, unless its size, times or place on disk change."""
    stat = path.stat()
    state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    known = _hashed.get(str(path))
    if known is None or known[0] != state:
        known = _hashed[str(path)] = (state, file_digest(path))
    return known[1]


def hash_outputs(folder: Path, outputs: Iterable[Path]) -> Hashes:
    """Return the sha256 of each file by its name in `folder`; of an output that is a folder, of each file in it."""
    files = [file for output in outputs for file in _files(output)]
    return {file.relative_to(folder).as_posix(): found for file, found in zip(files, _hash_all(files), strict=True)}


def find_changes(folder: Path, hashes: Mapping[str, str], *, since_ns: int | None = None) -> list[Change]:
    """Return the files of `hashes` that are missing or have another content.

    Args:
        folder: what the names are relative to.
        hashes: sha256 by name.
        since_ns: hash only files that were written to after this time, in ns (None: all).
    """
    names = [name for name in hashes if since_ns is None or _changed_at(folder / name) > since_ns]
    found = _hash_all([folder / name for name in names])
    return [
        Change(folder, name, hashes[name], now) for name, now in zip(names, found, strict=True) if now != hashes[name]
    ]


def check_files(paths: Iterable[Path]) -> list[Path]:
    """Hash files that stages have written, before they are read; files of no finished stage are passed over.

    Args:
        paths: files, and folders that are outputs as a whole.

    Returns:
        The folders of stages that an older version finished: it recorded no hashes.

    Raises:
        DataError: a file is missing, or not what its stage wrote. It was removed, so that its stage makes it again.
    """
    changes: list[Change] = []
    unknown = []
    for folder, names in _by_stage(paths).items():
        hashes = (read_json(folder / "done.json") or {}).get("hashes")
        if hashes is None:
            unknown.append(folder)
        else:
            changes += find_changes(folder, {name: found for name, found in hashes.items() if is_of(name, names)})
    if not changes:
        return unknown
    for change in changes:
        remove(change.path)
    stages = ", ".join(f"`hubert {name} RUN`" for name in dict.fromkeys(change.stage() for change in changes))
    raise DataError(
        f"{'; '.join(change.describe() for change in changes[:MAX_NAMED])}"
        f"{f'; and {len(changes) - MAX_NAMED} more' if len(changes) > MAX_NAMED else ''}. What changed was removed. "
        f"Fix: run the same flow again, or {stages} and then this command: that makes it again, and nothing else"
    )


def prune_outputs(folder: Path, names: Iterable[str]) -> int:
    """Remove outputs of a finished stage that are not needed any more; return the bytes freed.

    The stage stays done: `done.json` first moves them from `outputs` to `pruned`, so a kill in between loses nothing.
    Whoever needs them again sets `accepts_pruned = False` and runs the stage: it then does those shards again.

    Raises:
        DataError: the stage is not done, or has no such outputs.
        TransientError: a process is working in the folder.
    """
    with hold(folder, folder.name, wait_seconds=0):
        content = read_json(folder / "done.json")
        names = list(names)
        known = {} if content is None else {**content["outputs"], **content.get("pruned", {})}
        if content is None or not set(names) <= set(known):
            raise DataError(f"{folder}: expected a finished stage with the outputs {names}; nothing was removed")
        pruned = {**content.get("pruned", {}), **{name: known[name] for name in names}}
        kept = {name: size for name, size in content["outputs"].items() if name not in pruned}
        write_record(folder / "done.json", {**content, "outputs": kept, "pruned": pruned})
        return sum(remove(folder / name) for name in names)


def is_of(name: str, outputs: Collection[str]) -> bool:
    """Return True if a file is one of some outputs, or lies in one that is a folder."""
    return name in outputs or any(str(parent) in outputs for parent in PurePosixPath(name).parents)


def _by_stage(paths: Iterable[Path]) -> dict[Path, set[str]]:
    """Return the names of files and folders by the folder of the finished stage that they are in; others are left out."""
    found: dict[Path, set[str]] = {}
    for path in paths:
        folder = next((parent for parent in path.parents if (parent / "done.json").exists()), None)
        if folder is not None:
            found.setdefault(folder, set()).add(path.relative_to(folder).as_posix())
    return found


def time_ns(path: Path) -> int:
    """Return when a file was last written to, in ns; 0 if it is missing."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _changed_at(path: Path) -> int:
    return time_ns(path) or 2**63  # a missing file counts as changed


def _files(output: Path) -> list[Path]:
    return sorted(path for path in output.rglob("*") if path.is_file()) if output.is_dir() else [output]


def _hash_all(files: list[Path]) -> list[str]:
    if len(files) < 2:
        return [_hash_or_nothing(path) for path in files]
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        return list(threads.map(_hash_or_nothing, files))


def _hash_or_nothing(path: Path) -> str:
    try:
        return sha256(path)
    except (FileNotFoundError, NotADirectoryError):
        return ""
