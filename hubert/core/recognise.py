"""What a file is that is not what was expected: said from its first bytes, for messages of errors."""

import codecs
import json
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from hubert.core.errors import DataError

_START = 4096  # bytes that are looked at
_LARGEST_HEADER = 100_000_000  # bytes that safetensors allows
_POINTER = re.compile(rb"version https://(git-lfs|hawser)\.github\.com/spec/")
_MARKUP = re.compile(rb"<(!doctype|html|head|body|\?xml|error)", re.IGNORECASE)
_ANNEX = re.compile(rb"(\.\./)*(\.git)?/annex/objects/|/annex/objects/")

# What begins with these bytes, and what to do with it.
_COMPRESSED = {
    b"\x1f\x8b": "data compressed by gzip. Fix: unpack it, and name what was in it",
    b"BZh": "data compressed by bzip2. Fix: unpack it, and name what was in it",
    b"\xfd7zXZ": "data compressed by xz. Fix: unpack it, and name what was in it",
}
_BINARY = {
    b"\x28\xb5\x2f\xfd": "data compressed by zstd. Fix: unpack it, and name what was in it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive. Fix: unpack it, and name what was in it",
    b"Rar!": "a RAR archive. Fix: unpack it, and name what was in it",
    b"\x93NUMPY": "an array of numpy (.npy)",
    b"\x89HDF": "an HDF5 file, as Keras and TensorFlow write weights (.h5); those of PyTorch are needed",
    b"GGUF": "a GGUF file, the format of llama.cpp; the weights of PyTorch are needed",
    b"RIFF": "audio (RIFF/WAV)",
    b"fLaC": "audio (FLAC)",
    b"OggS": "audio (Ogg)",
    b"ID3": "audio (MP3)",
    b"%PDF": "a PDF document",
    b"\x7fELF": "a program",
}


def recognise(path: Path, *, may_be_compressed: bool = False) -> str:
    """Return what a file is, if that explains why it cannot be read.

    Args:
        path: of the file.
        may_be_compressed: compression by gzip, bzip2 or xz explains nothing, as the reader undoes it.

    Returns:
        A description that follows "it is", with the fix where there is one: a pointer of git-lfs or git-annex, an empty file,
        a web page, an archive, data of another kind. Empty if nothing is known of it.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_START)
        return _stub(path, start) or _archive(path, start) or _other(start, {} if may_be_compressed else _COMPRESSED)
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error):
        return ""


def recognise_stub(path: Path) -> str:
    """Return what stands for a file that was not fetched: a pointer of git-lfs, a web page of an error, an empty file.

    Returns:
        A description that follows "it is", ending in ". Fix: " and what to do; empty for every other file.
    """
    try:
        with path.open("rb") as file:
            return _stub(path, file.read(_START))
    except OSError:
        return ""


def refuse_stub(path: Path) -> None:
    """Refuse a file that stands for another one, or for none (`recognise_stub`).

    Raises:
        DataError: it is one.
    """
    if what := recognise_stub(path):
        raise DataError(f"{path}: cannot be read: it is {what}")


def is_safetensors(path: Path) -> bool:
    """Return True if a file begins as a safetensors file does: the length of a header, and a JSON object."""
    with path.open("rb") as file:
        return _has_safetensors_header(file.read(_START))


def _has_safetensors_header(start: bytes) -> bool:
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _LARGEST_HEADER


def _stub(path: Path, start: bytes) -> str:
    if not start:
        return "an empty file (0 bytes). Likely cause: a download or copy that was cut off. Fix: fetch it again"
    if _POINTER.match(start):
        size = re.search(rb"^size (\d+)", start, re.MULTILINE)
        real = f" of {int(size[1]):,} bytes" if size else ""
        return (
            f"a pointer of git-lfs ({path.stat().st_size} bytes) that stands for the file{real}, which was not fetched. Fix: "
            "`git lfs install`, then `git lfs pull` in that repository; or download the file itself"
        )
    if _ANNEX.match(start) and len(start) < _START:
        return (
            "a pointer of git-annex that stands for the file, which was not fetched. Fix: `git annex get` (or `datalad get`) "
            "in that repository"
        )
    if _MARKUP.match(start.removeprefix(b"\xef\xbb\xbf").lstrip()):
        return (
            f"a web page ({_excerpt(start)}). Likely cause: the server sent an error or a log-in page in place of the file. "
            "Fix: download the file again, from the address of the file itself"
        )
    if len(start) >= 64 and not start.strip(b"\0"):
        return (
            "a file that begins with zeros only. Likely cause: a download or copy that was cut off. Fix: fetch it again"
        )
    return ""


def _archive(path: Path, start: bytes) -> str:
    """Return that a file is an archive; a zip that `torch.save` wrote is none."""
    kinds: list[tuple[str, bool, Callable[[], list[str]]]] = [
        ("zip", start.startswith(b"PK\x03\x04"), lambda: zipfile.ZipFile(path).namelist()),
        ("tar", tarfile.is_tarfile(path), lambda: tarfile.open(path).getnames()),  # noqa: SIM115  (read at once)
    ]
    for kind, found, names_of in kinds:
        if found:
            names = names_of()
            if any(name.endswith("/data.pkl") for name in names):
                return ""
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            return f"a {kind} archive with {shown or 'nothing in it'}. Fix: unpack it, and name the folder or file that was in it"
    return ""


def _other(start: bytes, compressed: Mapping[bytes, str]) -> str:
    if re.match(rb"Ix[A-Za-z0-9]{2}", start):
        return (
            "an index of faiss. Fix: read it where faiss is installed, and numpy.save the centroids of its quantizer "
            "(faiss.read_index(...).quantizer.reconstruct_n())"
        )
    if start.startswith(b"RIFF") and start[8:12] not in {b"WAVE", b""}:
        return ""
    if _has_safetensors_header(start):
        return "a safetensors file, damaged or cut off. Fix: fetch it again"
    binary = next((what for magic, what in (_BINARY | dict(compressed)).items() if start.startswith(magic)), "")
    if binary or b"\0" in start:
        return binary
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # the last character may be cut
    except UnicodeDecodeError:
        return ""
    if not all(character.isprintable() or character.isspace() for character in text):
        return ""
    kind = "JSON" if _is_json(text) else "text"
    return f"{kind} ({_excerpt(start)}). Likely cause: another file, or a server's message in place of the file"


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except json.JSONDecodeError:
        return False


def _excerpt(start: bytes) -> str:
    return repr(" ".join(start.decode(errors="replace").split())[:80])
