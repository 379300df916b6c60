"""Where audio lies, and how it is opened: a file, or bytes of an uncompressed tar or zip, which is never unpacked.

Whatever fails on the way becomes an `AudioError` (the file is unusable, with a short reason) or a `TransientError`
(the disk or network failed, and may recover).
"""

import errno
import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import soundfile

from hubert.core.errors import DataError, TransientError
from hubert.core.recognise import recognise_stub

BUFFER = 1 << 16  # bytes read at once where the bytes themselves are looked at
SYSTEM_ERROR = 2  # libsndfile's code for "ask the operating system"


class AudioRef(NamedTuple):
    """Where a stretch of audio is, and how long: one row of a manifest."""

    fileid: str
    path: str  # of the file, or the name of the member of `archive`
    num_samples: int  # at 16 kHz
    offset: int | None = None  # first sample of a segment of a longer file, at 16 kHz; None: the whole file
    archive: str | None = None  # an uncompressed tar or zip
    byte_offset: int | None = None  # where the member's bytes begin in the archive
    byte_size: int | None = None
    size: int | None = None  # of the file or archive when the manifest was built; None: not compared
    mtime_ns: int | None = None


class AudioError(DataError):
    """A file cannot be used. `reason` is short and starts with its kind: "wrong sample rate: 8000 Hz ..."."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


def location(ref: AudioRef) -> str:
    """Return where the audio lies, for people."""
    return ref.path if ref.archive is None else f"{ref.archive} (member {ref.path})"


def unusable(ref: AudioRef, reason: str, advice: str) -> AudioError:
    """Build the error that names the file, why it cannot be used, and what to do."""
    return AudioError(f"{ref.fileid!r}: {location(ref)} is unusable: {reason}. {advice}", reason)


class FileSlice(io.RawIOBase):
    """`size` bytes of a file from `start`, as a file of its own. Reads nothing but what it is asked for.

    libsndfile calls it from C, where an exception would be printed and lost, so a failed read is kept in `error` and
    answered as the end of the file.
    """

    def __init__(self, path: str, start: int, size: int) -> None:
        super().__init__()
        self.error: OSError | None = None
        self.size = size
        self._start, self._position = start, 0
        self._descriptor = os.open(path, os.O_RDONLY)

    def missing_bytes(self) -> int:
        """Return how many bytes the underlying file is too short for this slice."""
        return max(0, self._start + self.size - os.fstat(self._descriptor).st_size)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position within the slice, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position within the slice, in bytes, and return it."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the position on and return the number of bytes read, 0 at the end."""
        view = memoryview(buffer).cast("B")
        view = view[: max(0, min(len(view), self.size - self._position))]
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self._descriptor, [view[done:]], self._start + self._position + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            self.error = error
        self._position += done
        return done

    def close(self) -> None:
        """Close the underlying file."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()


class Sound(soundfile.SoundFile):
    """A file read forwards. soundfile else seeks after each read to where it already is, and MP3 loses track."""

    def seekable(self) -> bool:
        """Return False, to keep `read` from seeking; `seek` works all the same, if `can_seek`."""
        return False

    @property
    def can_seek(self) -> bool:
        """Whether libsndfile says that `seek` works: not in telephone codecs (GSM 6.10, G.721, NMS)."""
        return bool(super().seekable())


@contextmanager
def open_audio(ref: AudioRef) -> Iterator[Sound]:
    """Open a file or member, and turn whatever fails until it is closed into an AudioError or TransientError."""
    part: FileSlice | None = None
    opened = False
    _check_unchanged(ref)
    try:
        if ref.archive is not None:
            part = _open_member(ref)
        elif ref.path.lower().endswith(".raw"):
            raise unusable(ref, "not audio: a raw file has no header that says what it holds", "Convert it to flac.")
        with Sound(ref.path if part is None else part) as sound:
            opened = True
            yield sound
    except (soundfile.LibsndfileError, AudioError) as error:
        if part is not None and part.error is not None:
            raise _unreadable(ref, part.error) from error
        if isinstance(error, soundfile.LibsndfileError):
            raise _diagnosis(ref, error, opened=opened) from error
        raise
    finally:
        if part is not None:
            part.close()


@contextmanager
def open_bytes(ref: AudioRef) -> Iterator[tuple[BinaryIO, int]]:
    """Open the bytes of a file or member, and give their number too.

    Raises:
        AudioError: it is not there, not ours, or its archive was cut.
        TransientError: the disk failed.
    """
    try:
        part = FileSlice(ref.path, 0, os.stat(ref.path).st_size) if ref.archive is None else _open_member(ref)  # noqa: PTH116
    except OSError as error:
        raise _unreadable(ref, error) from error
    with part:
        try:
            yield io.BufferedReader(part, BUFFER), part.size
        except AudioError as error:
            if part.error is not None:  # what could not be read was taken for missing
                raise _unreadable(ref, part.error) from error
            raise
        if part.error is not None:
            raise _unreadable(ref, part.error)


def _check_unchanged(ref: AudioRef) -> None:
    """Compare the size and time of the file or archive with the manifest's; whatever it holds now, it was not checked."""
    if ref.size is None and ref.mtime_ns is None:
        return
    try:
        status = os.stat(ref.archive or ref.path)  # noqa: PTH116  (strings: this is done for every crop)
    except OSError as error:
        raise _unreadable(ref, error) from error
    if ref.size not in {None, status.st_size}:
        reason = f"changed: it had {ref.size} bytes when the manifest was built, it has {status.st_size}"
    elif ref.mtime_ns not in {None, status.st_mtime_ns}:
        was, now = (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at / 1e9)) for at in (ref.mtime_ns, status.st_mtime_ns)
        )
        reason = f"changed: it was last written at {was} when the manifest was built, and again at {now}"
    else:
        return
    raise unusable(ref, reason, "Put the old file back (`cp -p` keeps its time), or build the manifest again.")


def _open_member(ref: AudioRef) -> FileSlice:
    if ref.archive is None or ref.byte_offset is None or ref.byte_size is None:
        raise unusable(ref, "no position: the manifest lacks archive, byte_offset or byte_size", "Build it again.")
    try:
        part = FileSlice(ref.archive, ref.byte_offset, ref.byte_size)
    except OSError as error:
        raise _unreadable(ref, error) from error
    if missing := part.missing_bytes():
        part.close()
        reason = f"changed: the archive ends {missing} bytes before the member does"
        raise unusable(ref, reason, "It was cut or replaced after the manifest was built; build the manifest again.")
    return part


def _diagnosis(ref: AudioRef, error: soundfile.LibsndfileError, *, opened: bool) -> DataError | TransientError:
    """Return what is behind an error of libsndfile, which names a missing file and a bad disk alike."""
    detail = error.error_string.rstrip(".")
    if opened and error.code == SYSTEM_ERROR:
        return TransientError(f"{ref.fileid!r}: reading {location(ref)} failed ({detail}); the disk may recover")
    if opened:
        return unusable(ref, f"truncated or damaged: {detail}", "Copy or convert it again, or leave it out.")
    if ref.archive is None:
        try:
            with Path(ref.path).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
        except OSError as problem:
            return _unreadable(ref, problem)
    else:
        size = ref.byte_size or 0
    if size == 0:
        return unusable(ref, "empty: 0 bytes", "Copy or convert it again, or leave it out.")
    if error.code == SYSTEM_ERROR:
        return TransientError(f"{ref.fileid!r}: opening {location(ref)} failed ({detail}); the disk may recover")
    what, _, fix = recognise_stub(Path(ref.path)).partition(". Fix: ") if ref.archive is None else ("", "", "")
    if what:
        return unusable(ref, f"not audio: {what}", f"{fix[:1].upper()}{fix[1:]}.")
    return unusable(ref, f"not audio: {detail}", "It is damaged, or its name does not say what it is; leave it out.")


def is_permanent(error: OSError) -> bool:
    """Return True if a failed call tells about the file (not there, not ours, a link to itself), not about the disk."""
    return isinstance(
        error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
    ) or error.errno in {errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}


def _unreadable(ref: AudioRef, error: OSError) -> DataError | TransientError:
    """A file that is not there or not ours is a fact about the data; any other system error may pass."""
    detail = error.strerror or str(error)
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return unusable(ref, f"missing: {detail}", "It was moved after it was listed; build the manifest again.")
    if is_permanent(error):
        return unusable(ref, f"unreadable: {detail}", "Change its permissions, or leave it out.")
    return TransientError(f"{ref.fileid!r}: reading {location(ref)} failed ({detail}); the disk or network may recover")
