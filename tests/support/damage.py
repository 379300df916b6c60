"""Ways in which a file is not any more what was written."""

import os
from collections.abc import Callable
from pathlib import Path


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def fill_with_nul(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "halved": halve,
    "NUL": fill_with_nul,
    "one flipped bit": flip_a_bit,
    "removed": Path.unlink,
}
SILENT = ("NUL", "one flipped bit")  # what a disk does to a file: size and times stay


def damage(path: Path, how: str, *, keep_times: bool = False) -> None:
    """Damage a file; `keep_times`: without a trace in its times."""
    before = path.stat()
    DAMAGES[how](path)
    if keep_times and path.exists():
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
