"""Writing frames to a safetensors file bit by bit, so that memory does not grow with what is written.

safetensors' own writer wants all of a tensor at once: 276 MB for an hour of a base model's layer, whatever the length of
the pieces that it was computed in. The format is simple: the length of a JSON header (8 bytes), the header, the values.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hubert.core.errors import DataError

_NAMES = {torch.float32: "F32", torch.float16: "F16"}


class FrameWriter:
    """A file with the tensor `frames` (num_frames, D), filled in any order; D is that of the first frames.

    Args:
        path: of the file, which is replaced.
        num_frames: how many frames it will have.
        dtype: float32 or float16; frames are converted.

    Raises:
        DataError: on leaving the context, if fewer or more frames were written.
    """

    def __init__(self, path: Path, num_frames: int, dtype: torch.dtype) -> None:
        self._path = path
        self._num_frames = num_frames
        self._dtype = dtype
        self._dimension = 0
        self._written = 0
        self._start = 0
        self._file = path.open("wb")

    def write(self, position: int, frames: Tensor) -> None:
        """Write frames (n, D), on any device, as frames [position, position + n) of the file.

        Raises:
            DataError: they do not fit into the file, or have another dimension than those before.
        """
        if not self._start:
            self._begin(frames.shape[1])
        if position < 0 or position + len(frames) > self._num_frames or frames.shape[1] != self._dimension:
            raise DataError(
                f"{self._path}: expected frames of dimension {self._dimension} within 0 to {self._num_frames}, found "
                f"{tuple(frames.shape)} for frame {position}"
            )
        self._file.seek(self._start + position * self._dimension * self._dtype.itemsize)
        self._file.write(frames.to("cpu", self._dtype).contiguous().numpy().data)
        self._written += len(frames)

    def _begin(self, dimension: int) -> None:
        self._dimension = dimension
        shape = [self._num_frames, dimension]
        size = math.prod(shape) * self._dtype.itemsize
        tensor = {"dtype": _NAMES[self._dtype], "shape": shape, "data_offsets": [0, size]}
        header = json.dumps({"frames": tensor}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._start = self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._written != self._num_frames:
            raise DataError(f"{self._path}: expected {self._num_frames} frames, {self._written} were written")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path}: expected frames that `hubert features` wrote: {error}. Likely cause: a fault of the disk. "
            "Fix: remove it and run `hubert features` again, which makes it anew"
        ) from error


def frame_counts(shards: Sequence[Path]) -> list[int]:
    """Return the number of frames of each feature shard, from the files' headers."""
    return [shard_shape(path)[0] for path in shards]


def shard_shape(path: Path) -> tuple[int, int]:
    """Return (number of frames, dimension) of a feature shard from its header."""
    with _opened(path) as file:
        num_frames, dimension = file.get_slice("frames").get_shape()
    return num_frames, dimension


def read_frames(path: Path, start: int = 0, end: int | None = None) -> Tensor:
    """Read frames [start, end) of a feature shard as (N, D) float32; only they are read from disk."""
    with _opened(path) as file:
        frames: Tensor = file.get_slice("frames")[start:end]
    return frames.float()
