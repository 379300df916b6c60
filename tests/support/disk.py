"""Real refusals of the system: small disks that are full, limits on files, file systems without locks."""

import ctypes
import errno
import platform
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs of a size such as `2m` on a new folder; skips the test without the right to."""
    folder.mkdir(parents=True)
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mount.returncode:
        pytest.skip(f"no right to mount a small disk: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, *, leave: int = 0) -> Path:
    """Fill a disk up, but for `leave` bytes; returns the file that takes the room."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        file.truncate(max(0, file.tell() - leave))
    return ballast


def refuse_locks(number: int) -> None:
    """Let the kernel answer every flock of this process, and of all that it starts, with an error; for good."""
    call = {"x86_64": 73, "aarch64": 32}.get(platform.machine())
    if call is None or platform.system() != "Linux":
        pytest.skip(f"no seccomp filter for {platform.system()} on {platform.machine()}")
    # Load the call's number; if it is flock return the error, else allow it (linux/filter.h, linux/seccomp.h).
    filters = [(0x20, 0, 0, 0), (0x15, 0, 1, call), (0x06, 0, 0, 0x00050000 | number), (0x06, 0, 0, 0x7FFF0000)]
    program = b"".join(struct.pack("=HBBI", *each) for each in filters)
    buffer = ctypes.create_string_buffer(program)
    library = struct.pack("HxxxxxxP", len(filters), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, library, 0, 0):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
        pytest.skip(f"no seccomp filter here: errno {ctypes.get_errno()}")
