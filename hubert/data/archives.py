"""Uncompressed tar and zip archives: which bytes of them are which member, so that nothing is ever unpacked."""

import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hubert.core.errors import DataError, TransientError
from hubert.data.audio_file import is_permanent

ARCHIVE_EXTENSIONS = (".tar", ".zip")

type Member = tuple[str, int, int]  # name, first byte, number of bytes


def list_members(archive: Path, is_wanted: Callable[[str], bool]) -> Iterator[Member]:
    """List the members of an archive, in its order, whose names are wanted: name, first byte, number of bytes.

    Raises:
        DataError: a wanted member is compressed, encrypted, a link or sparse. What else fails, `archive_errors` explains.
    """
    members = _tar_members if archive.name.lower().endswith(".tar") else _zip_members
    return members(archive, is_wanted)


@contextmanager
def archive_errors(archive: Path) -> Iterator[None]:
    """Turn what fails in reading an archive into a DataError (it is damaged or not ours) or a TransientError."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, struct.error) as error:
        raise DataError(
            f"archive {archive} cannot be read ({error}): it is cut, damaged or compressed; copy it again, or pack it as "
            "a plain .tar"
        ) from error
    except OSError as error:
        raise unreadable(f"archive {archive}", error) from error


def unreadable(what: str, error: OSError) -> DataError | TransientError:
    """Build the error of a folder or archive that the system does not let us read."""
    if is_permanent(error):
        return DataError(f"{what} cannot be read ({error.strerror}); change its permissions, or leave it out")
    return TransientError(f"{what} cannot be read ({error.strerror}); the disk or network may recover")


def _tar_members(archive: Path, is_wanted: Callable[[str], bool]) -> Iterator[Member]:
    """Give name, first byte and number of bytes of each wanted member of a tar."""
    with tarfile.open(archive, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it keeps all headers: 1 GB for a million members
            if member.isdir() or not is_wanted(member.name):
                continue
            if not member.isreg() or member.issparse():
                raise DataError(
                    f"archive {archive}: member {member.name!r} is a link or sparse, so its bytes are not in one place; "
                    "pack it again with `tar --dereference --hard-dereference`"
                )
            yield member.name, member.offset_data, member.size


def _zip_members(archive: Path, is_wanted: Callable[[str], bool]) -> Iterator[Member]:
    """Give name, first byte and number of bytes of each wanted member of a zip."""
    with zipfile.ZipFile(archive) as directory, archive.open("rb") as file:
        for member in directory.infolist():
            if member.is_dir() or not is_wanted(member.filename):
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
