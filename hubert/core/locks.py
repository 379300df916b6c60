"""One process at a time in a stage's folder.

<stage folder>/
    lock        the lock itself: the system releases it when its holder dies, however it dies
    lock.json   pid, host, since: who holds it, for people; a process that was killed leaves it behind
"""

import errno
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from hubert.core.errors import TransientError
from hubert.core.files import read_json, remove, storing, write_record

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def acquire(path: Path, *, wait_seconds: float = -1) -> AcquireReturnProxy[Any]:
    """Lock a file until the end of a `with`; the system releases it when this process ends, however it ends.

    A disk without locks is an error: a mark in their place would outlive its writer, and on another host nobody could tell.

    Args:
        path: the file; made if it is not there.
        wait_seconds: how long to wait for another holder; negative: for ever.

    Raises:
        filelock.Timeout: another process still holds it.
        TransientError: the disk gives no locks, or does not take the file.
    """
    try:
        with storing(path):
            return FileLock(path, fallback_to_soft=False).acquire(timeout=wait_seconds)
    except Timeout:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise TransientError(
            f"the disk of {path.parent} gives no locks ({os.strerror(error.errno)}), by which two processes are kept from "
            "working in one folder. Likely cause: it is NFS whose lock service (lockd, statd) does not run or is not reached, "
            "or a file system that is mounted without flock. Fix: mount it with locks (NFS 4; Lustre: -o flock), or keep runs "
            "and service on another disk (HUBERT_RUNS, HUBERT_SERVICE)"
        ) from error


@contextmanager
def hold(folder: Path, label: str, *, wait_seconds: float = -1, say: Callable[[str], object] = print) -> Iterator[None]:
    """Hold a stage's folder; see `Stage.lock`.

    Raises:
        TransientError: another process still holds it after `wait_seconds` (names that process), or as `acquire`.
    """
    holder = folder / "lock.json"
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = acquire(folder / "lock", wait_seconds=0)
    except Timeout:
        owner = read_json(holder) or {}
        message = f"{label}: process {owner.get('pid')} on {owner.get('host')} is working in {folder}"
        if wait_seconds:
            say(f"{message}; waiting for it")
        try:
            lock = acquire(folder / "lock", wait_seconds=wait_seconds)
        except Timeout as error:
            raise TransientError(f"{message} and did not finish within {wait_seconds:.0f} s") from error
    with lock:
        try:
            write_record(holder, {"pid": os.getpid(), "host": platform.node(), "since": time.time()})
            yield
        finally:
            remove(holder)


def find_holder(folder: Path) -> dict[str, Any] | None:
    """Return `pid, host, since` of the process that holds a stage's folder; None if nobody does.

    A process that was killed leaves `lock.json` behind, but not the lock, so the lock itself is asked.
    """
    holder = read_json(folder / "lock.json")
    if holder is None:
        return None
    try:
        with acquire(folder / "lock", wait_seconds=0):
            return None
    except Timeout:
        return holder
