"""Files of joblib (what scikit-learn's models are kept in), read without running anything that is in them.

    [compressed as a whole: zlib, gzip, bz2, xz, lzma]
    pickle … NumpyArrayWrapper(dtype, shape, order) │ 1 byte n │ n bytes of padding │ the array's bytes │ … pickle goes on

So an array lies between two instructions of the pickle, behind the one that fills its wrapper (joblib >= 0.10).
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

from hubert.core.errors import DataError, HubertError
from hubert.core.recognise import recognise
from hubert.model.formats.inert import ARRAY_WRAPPER, StandIn, plain_dtype, rebuild_array, to_plain
from hubert.model.formats.unpickle import DataUnpickler

LARGEST = 1 << 32  # bytes after decompression: 20,000 units of 1,280 numbers are 0.1 GB

_DECOMPRESSORS: dict[bytes, Callable[[], Any]] = {
    b"\x78": zlib.decompressobj,
    b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ": lzma.LZMADecompressor,
    b"\x5d\x00": lzma.LZMADecompressor,
}


def load_joblib(path: str | Path) -> tuple[Any, str]:
    """Read what `joblib.dump` wrote, also a plain pickle.

    Returns:
        what it holds as plain data (an estimator is the dict of its attributes), and the name of its class ("" if it is none).

    Raises:
        DataError: the file is missing, damaged or of another kind, or holds something that is not known to be data, such as a
            function to call. Nothing of the file has run then.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = JoblibUnpickler(_decompressed(file), path).load()
        return to_plain(content, path), content.name if isinstance(content, StandIn) else ""
    except HubertError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a file of joblib, found none") from error
    except Exception as error:  # a damaged or hostile pickle ends in whatever error its instructions lead to
        if what := recognise(path, may_be_compressed=True):
            raise DataError(f"{path}: expected a file of joblib (nothing of it was run); it is {what}") from error
        raise DataError(
            f"{path}: cannot be read as a file of joblib ({type(error).__name__}: {str(error)[:200]}). Likely cause: a broken "
            "download, another kind of file, joblib before 0.10, or a file that was made to run a program; nothing of it was "
            "run. Fix: fetch it again, or load it where you trust it and numpy.save(..., kmeans.cluster_centers_)"
        ) from error


def _decompressed(file: IO[bytes]) -> IO[bytes]:
    """Return a file as it was before compression, in memory.

    Raises:
        ValueError: it ends too early, or is larger than any codebook.
    """
    start = file.read(6)
    file.seek(0)
    make = next((make for magic, make in _DECOMPRESSORS.items() if start.startswith(magic)), None)
    if make is None:
        return file
    content = io.BytesIO()
    decompressor = make()
    while not decompressor.eof:
        block = file.read(1 << 16)
        if not block:
            raise ValueError("the compressed data end too early")
        content.write(decompressor.decompress(block))
        if content.tell() > LARGEST:
            raise ValueError(f"more than {LARGEST:,} bytes after decompression")
    content.seek(0)
    return content


class JoblibUnpickler(DataUnpickler):
    """Reads the arrays that joblib puts between the instructions of a pickle."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, path)
        self.file = file

    def load_build(self) -> None:
        """Give an object its state; behind the state of a wrapper follows its array."""
        super().load_build()
        wrapper = self.stack[-1]
        if wrapper.name == ARRAY_WRAPPER:
            self.stack[-1] = self._read_array(wrapper.state)

    def _read_array(self, state: dict[str, Any]) -> Any:
        dtype = plain_dtype(state["dtype"])
        shape = tuple(int(length) for length in state["shape"])
        if state.get("numpy_array_alignment_bytes") is not None:
            self._read(self._read(1)[0])
        count = 1
        for length in shape:
            count *= length
        return rebuild_array(self._read(count * dtype.itemsize), dtype, shape, state["order"])

    def _read(self, size: int) -> bytes:
        if not 0 <= size <= LARGEST:
            raise ValueError(f"an array of {size:,} bytes")
        content = self.file.read(size)
        if len(content) != size:
            raise ValueError(f"the file ends within an array of {size:,} bytes")
        return content

    dispatch: ClassVar[dict[int, Any]] = DataUnpickler.dispatch | {ord("b"): load_build}  # BUILD
