"""One process at a time in a stage's folder.

<stage folder>/
    lock        the lock itself: the system releases it when its holder dies, however it dies
    lock.json   pid, host, since: who holds it, for people; a process that was killed leaves it behind
"""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hubert.core.errors import TransientError
from hubert.core.files import read_json, remove, write_record


@contextmanager
def hold(folder: Path, label: str, *, wait_seconds: float = -1, say: Callable[[str], object] = print) -> Iterator[None]:
    """Hold a stage's folder; see `Stage.lock`.

    Raises:
        TransientError: another process still holds it after `wait_seconds`; names that process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / "lock.json"
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = read_json(holder) or {}
        message = f"{label}: process {owner.get('pid')} on {owner.get('host')} is working in {folder}"
        if wait_seconds:
            say(f"{message}; waiting for it")
        try:
            lock.acquire(timeout=wait_seconds)
        except Timeout as error:
            raise TransientError(f"{message} and did not finish within {wait_seconds:.0f} s") from error
    try:
        write_record(holder, {"pid": os.getpid(), "host": platform.node(), "since": time.time()})
        yield
    finally:
        remove(holder)
        lock.release()


def find_holder(folder: Path) -> dict[str, Any] | None:
    """Return `pid, host, since` of the process that holds a stage's folder; None if nobody does.

    A process that was killed leaves `lock.json` behind, but not the lock, so the lock itself is asked.
    """
    holder = read_json(folder / "lock.json")
    if holder is None:
        return None
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return holder
    lock.release()
    return None
