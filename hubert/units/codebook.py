"""The codebook: centroids, where they come from, and the nearest one of each frame."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hubert.core.errors import ConfigError, DataError
from hubert.core.files import atomic_write
from hubert.core.hashing import digest
from hubert.core.outputs import check_files
from hubert.core.recognise import recognise
from hubert.features.source import FeatureSource, describe_source
from hubert.settings.sections import KMeansSettings

CHUNK_FRAMES = 1 << 16  # frames that are read at once: (65,536, 768) float32 are 201 MB
SEARCH_FRAMES = (
    1 << 10
)  # frames whose distances are searched at once on a CPU: (1,024, 500) float32 are 2 MB, near its caches


@dataclass(frozen=True)
class Codebook:
    """Centroids (K, D) float32 and where they come from (features, checkpoint, layer, convention, seed, distance)."""

    centroids: Tensor
    metadata: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.centroids)

    @property
    def frame_rate(self) -> int:
        """Frames per second of the features that it labels."""
        return int(self.metadata["frame_rate"])

    def assign(self, features: Tensor) -> Tensor:
        """Return the nearest centroid (N,) int64 of each frame (N, D), by squared Euclidean distance."""
        return nearest_centroids(features, self.centroids.to(features.device))

    @property
    def content_digest(self) -> str:
        """Hash of the centroids and of what they were made from, wherever the file lies and came from."""
        centroids = hashlib.sha256(self.centroids.float().contiguous().numpy().tobytes()).hexdigest()
        return digest([centroids, list(self.centroids.shape), self.metadata["source"]])

    def check_source(self, source: FeatureSource) -> None:
        """Refuse features that the codebook was not made from.

        Raises:
            DataError: kind, weights, layer, convention or arithmetic differ; names both.
        """
        own = self.metadata["source"]
        if own != source.identity:
            raise DataError(
                f"the codebook was made from {describe_source(own)}, the features are {describe_source(source.identity)}; "
                "units of another source are noise: use the checkpoint and layer that the codebook names, or fit a new one"
            )

    def save(self, path: Path) -> None:
        """Write centroids and metadata to one safetensors file."""
        with atomic_write(path) as temporary:
            save_file(
                {"centroids": self.centroids.contiguous()}, temporary, {"codebook": json.dumps(dict(self.metadata))}
            )

    @classmethod
    def load(cls, path: Path) -> "Codebook":
        """Read a codebook.

        Raises:
            DataError: the file is missing, none of ours, not what the stage wrote, or its centroids are no table of finite
                numbers.
        """
        check_files([path])
        try:
            opened = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            said = f"it is {what}" if (what := recognise(path)) else str(error)
            raise DataError(
                f"{path}: expected a codebook of ours: {said}. If `hubert kmeans` wrote it, it is damaged: remove it, and that "
                "makes it again. `hubert codebook import` makes one of another program's file"
            ) from error
        with opened as file:
            header = file.metadata() or {}
            if "codebook" not in header or "centroids" not in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                raise DataError(
                    f"{path}: expected a codebook of ours with `centroids` and its metadata, found {list(file.keys())}; "
                    "`hubert codebook import` makes one of another program's file"
                )
            centroids, metadata = file.get_tensor("centroids"), json.loads(header["codebook"])
        if centroids.ndim != 2 or not centroids.is_floating_point():
            raise DataError(
                f"{path}: expected centroids (K, D) of floats, found {tuple(centroids.shape)} {centroids.dtype}; it was edited"
            )
        check_centroids(centroids, path)
        return cls(centroids.float(), metadata)


def check_centroids(centroids: Tensor, where: Path) -> None:
    """Refuse centroids that are not finite: no frame is nearest to them, or all are.

    Raises:
        DataError: names the first of them.
    """
    rows = (~centroids.isfinite().all(1)).nonzero()[:, 0]
    if len(rows):
        raise DataError(
            f"{where}: {len(rows)} of {len(centroids)} centroids, {rows[:5].tolist()} are not finite as float32; the fit had "
            "diverged, make a new one"
        )


@dataclass(frozen=True)
class GivenCodebook:
    """A codebook that the recipe names instead of fitting one: as it was named, where it lies, the digest of its content."""

    name: str
    path: str
    digest: str


@torch.no_grad()
def nearest_centroids(frames: Tensor, centroids: Tensor) -> Tensor:
    """Return the index (N,) int64 of the nearest of the centroids (K, D) float32 for each frame (N, D).

    The nearest by squared Euclidean distance has the least |c|^2 / 2 - x c, so one float32 matrix product finds it, after the
    centroids' mean has been taken from both: frames may lie far from zero. On a CPU it is searched in blocks that stay in the
    cache, by NumPy's argmin, which is twice as fast as torch's; together that takes a third to a half of the time of
    scikit-learn's search, which multiplies in float64 (benchmarks/results/cpu-speed.md).
    """
    mean = centroids.float().mean(0)
    offsets = (centroids.double() - mean.double()).float()
    half = offsets.square().sum(1) / 2
    directions = offsets.T.contiguous()
    units = torch.empty(len(frames), dtype=torch.int64, device=frames.device)
    on_cpu = frames.device.type == "cpu"
    size = SEARCH_FRAMES if on_cpu else CHUNK_FRAMES
    with torch.autocast(frames.device.type, enabled=False):
        for block, found in zip(frames.split(size), units.split(size), strict=True):
            distances = torch.addmm(half, block.float() - mean, directions, alpha=-1)
            if on_cpu:
                np.argmin(distances.numpy(), axis=1, out=found.numpy())
            else:
                torch.argmin(distances, dim=1, out=found)
    return units


def read_given(path: Path, num_units: int, source: FeatureSource) -> Codebook:
    """Read the codebook that a recipe names, instead of one that is fitted.

    Raises:
        DataError: it is none, has another number of units, was made from other features, or has another dimension.
    """
    codebook = Codebook.load(path)
    if len(codebook) != num_units:
        raise DataError(
            f"{path}: {len(codebook)} units, and kmeans.num_units is {num_units}; set kmeans.num_units = {len(codebook)}"
        )
    codebook.check_source(source)
    source.check_dimension(codebook.centroids.shape[1], path)
    return codebook


def settle_codebook(
    kmeans: KMeansSettings, source: FeatureSource, data: Path, before: GivenCodebook | None = None
) -> GivenCodebook | None:
    """Look up the codebook that the recipe names; None if it is fitted.

    Args:
        kmeans: the settings.
        source: what is clustered.
        data: a relative name is relative to it, or to its folder if it is a file.
        before: what an earlier call returned. If the file has gone since, that still holds: a finished stage has its content.

    Raises:
        ConfigError: there is no such file.
        DataError: it is no codebook, or does not fit the settings or what is clustered.
    """
    name = kmeans.codebook
    if not name:
        return None
    path = (data if data.is_dir() else data.parent) / Path(name).expanduser()
    if not path.exists():
        if before is not None and before.name == name:
            return before
        raise ConfigError(
            f"kmeans.codebook = {name!r}: {path} does not exist; expected a codebook of ours, which `hubert codebook import` "
            "makes of others"
        )
    codebook = read_given(path, kmeans.num_units, source)
    return GivenCodebook(name, str(path), codebook.content_digest)
