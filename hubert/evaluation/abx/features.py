"""The features that ABX scores, on disk: all frames of a representation in one tensor, and the files that they are of.

<folder>/
    frames.safetensors     `frames` (N, D), the files one after the other
    files.json             fileid -> number of frames, in that order
"""

from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hubert.core.errors import DataError
from hubert.core.files import read_json, write_json
from hubert.features.frames_file import FrameWriter


class FeatureWriter:
    """Writes the features of files, in pieces and in any order, as a folder that `FeatureFolder` reads.

    Args:
        folder: made if it is not there.
        num_frames: of each file, by its fileid.
        dtype: float32 or float16; features are converted.

    Raises:
        DataError: on leaving the context, if frames are missing; on writing, if they do not fit.
    """

    def __init__(self, folder: Path, num_frames: Mapping[str, int], dtype: torch.dtype) -> None:
        write_json(folder / "files.json", num_frames)
        self._bounds = _bounds(num_frames)
        self._frames = FrameWriter(folder / "frames.safetensors", sum(num_frames.values()), dtype)

    def write(self, fileid: str, features: Tensor, *, start: int = 0) -> None:
        """Write features (n, D), on any device, as the file's frames from `start` on."""
        self._frames.write(self._bounds[fileid][0] + start, features)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._frames.__exit__(kind, error, trace)


class FeatureFolder(Mapping[str, Tensor]):
    """The features of files, read one file at a time: fileid -> (F, D).

    Raises:
        DataError: the folder is not one that `FeatureWriter` has finished.
    """

    def __init__(self, folder: Path) -> None:
        num_frames = read_json(folder / "files.json")
        if not num_frames:
            raise DataError(f"{folder}: expected features (files.json, frames.safetensors), found no features")
        self._bounds = _bounds(num_frames)
        path = folder / "frames.safetensors"
        try:
            self._frames = safe_open(path, framework="pt").get_slice("frames")
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{path}: expected a safetensors file, found: {error}. Fix: write the features again"
            ) from error

    def __getitem__(self, fileid: str) -> Tensor:
        start, end = self._bounds[fileid]
        frames: Tensor = self._frames[start:end]
        return frames

    def __iter__(self) -> Iterator[str]:
        return iter(self._bounds)

    def __len__(self) -> int:
        return len(self._bounds)

    def num_frames(self, fileid: str) -> int:
        """Return the number of frames of a file without reading them."""
        start, end = self._bounds[fileid]
        return end - start


def _bounds(num_frames: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return the first frame of each file in the tensor, and the one after its last."""
    ends = accumulate(num_frames.values())
    return {fileid: (end - count, end) for (fileid, count), end in zip(num_frames.items(), ends, strict=True)}
