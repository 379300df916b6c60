"""The codebook: k-means++ centroids of a sample, refined by Lloyd's algorithm over all sampled frames.

The default settings of dask-ml's k-means|| find 44 of 100 centres on speech and fill up the rest at random, so the
first centroids come from k-means++ on a bounded sample (`choose_seeds`), whoever runs Lloyd: torch here, in one
process, or dask-ml on the cluster's workers (`tasks/kmeans.py`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hubert.core.errors import DataError
from hubert.core.hashing import digest, file_digest
from hubert.core.stage import Figures, Receipt, Spec, Stage
from hubert.features.chunks import ChunkRule
from hubert.features.frames_file import frame_counts, read_frames, shard_shape
from hubert.features.source import FeatureSource
from hubert.features.stage import FeaturesStage
from hubert.settings.sections import KMeansSettings
from hubert.units.codebook import CHUNK_FRAMES, Codebook, GivenCodebook, nearest_centroids, read_given

Chunks = Callable[[], Iterable[Tensor]]
# Feature shards, first centroids (K, D) and settings -> centroids (K, D) float32 and the number of iterations.
Lloyd = Callable[[Sequence[Path], Tensor, KMeansSettings], tuple[Tensor, int]]


def draw_frames(shards: Sequence[Path], num_frames: int, seed: int) -> Tensor:
    """Draw frames (n, D) uniformly without replacement over all shards; n = min(num_frames, all)."""
    counts = frame_counts(shards)
    total = sum(counts)
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(num_frames, total), replace=False))
    starts = np.cumsum([0, *counts])
    parts = []
    for path, start, end in zip(shards, starts, starts[1:], strict=False):
        inside = drawn[(drawn >= start) & (drawn < end)] - start
        if len(inside):
            parts.append(read_frames(path)[torch.from_numpy(inside)])
    return torch.cat(parts)


def choose_seeds(frames: Tensor, num_units: int, seed: int) -> Tensor:
    """Choose first centroids (K, D) by k-means++ (scikit-learn's, greedy over 2 + log K candidates).

    Raises:
        DataError: fewer frames than units.
    """
    from sklearn.cluster import kmeans_plusplus  # slow import, needed once per codebook

    if len(frames) < num_units:
        raise DataError(
            f"{num_units} units need at least as many frames, found {len(frames)}; "
            "the sample is too small: raise kmeans.sample_fraction or lower kmeans.num_units"
        )
    # Of float32 frames it makes a float64 copy for every centroid that it draws: 24 instead of 5 s for 500 of 768 numbers.
    centres, _ = kmeans_plusplus(frames.double().numpy(), num_units, random_state=seed)
    return torch.from_numpy(centres).float()


def torch_lloyd(chunks: Chunks, centroids: Tensor, *, max_iterations: int, tolerance: float) -> tuple[Tensor, int]:
    """Run Lloyd's algorithm in this process (on the GPU if there is one).

    A cluster that loses all its frames keeps its place. Memory is one chunk of frames and of distances.

    Args:
        chunks: called once per iteration; gives the frames in chunks (n, D) float32.
        centroids: the first ones (K, D).
        max_iterations: most iterations.
        tolerance: stop when the squared shift of all centroids together is at most this times the frames' variance.

    Returns:
        centroids (K, D) float32 and the number of iterations.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limit = tolerance * mean_variance(chunks)
    centroids = centroids.to(device)
    iteration = 0
    while iteration < max_iterations:
        iteration += 1
        sums = torch.zeros(centroids.shape, dtype=torch.float64, device=device)
        counts = torch.zeros(len(centroids), dtype=torch.float64, device=device)
        for chunk in (chunk.to(device) for chunk in chunks()):
            units = nearest_centroids(chunk, centroids)
            sums.index_add_(0, units, chunk.double())
            counts += torch.bincount(units, minlength=len(centroids))
        moved = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centroids.double()).float()
        if float((moved - centroids).square().sum()) <= limit:
            break  # as dask-ml: the move that is small enough is not made
        centroids = moved
    return centroids.cpu(), iteration


def lloyd_in_process(shards: Sequence[Path], centroids: Tensor, settings: KMeansSettings) -> tuple[Tensor, int]:
    """Run `torch_lloyd` over feature shards; returns centroids (K, D) float32 and the number of iterations."""
    return torch_lloyd(
        lambda: iterate_chunks(shards),
        centroids,
        max_iterations=settings.max_iterations,
        tolerance=settings.tolerance,
    )


def mean_variance(chunks: Chunks) -> float:
    """Return the variance of the frames, averaged over the dimensions: what Lloyd's tolerance is relative to."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for chunk in (chunk.double() for chunk in chunks()):
        count, total, squares = count + len(chunk), total + chunk.sum(0), squares + chunk.square().sum(0)
    return float((squares / count - (total / count).square()).mean())


def codebook_figures(shards: Sequence[Path], codebook: Codebook) -> Figures:
    """Measure a codebook on the frames it was made from.

    `mean_squared_distance` is the mean over frames of the squared distance to the nearest centroid, `usage_perplexity` is
    exp of the entropy of the units' frequencies.
    """
    counts = torch.zeros(len(codebook), dtype=torch.int64)
    total = 0.0
    for chunk in iterate_chunks(shards):
        units = codebook.assign(chunk)
        counts += torch.bincount(units, minlength=len(codebook))
        total += float((chunk - codebook.centroids[units]).square().sum(dtype=torch.float64))
    share = counts[counts > 0] / counts.sum()
    return {
        "mean_squared_distance": total / int(counts.sum()),
        "num_unused_units": int((counts == 0).sum()),
        "usage_perplexity": float((-(share * share.log()).sum()).exp()),
        "num_frames": int(counts.sum()),
    }


def iterate_chunks(shards: Sequence[Path]) -> Iterator[Tensor]:
    """Yield the frames of all shards in chunks (n, D) float32 of bounded size."""
    for path in shards:
        num_frames, _ = shard_shape(path)
        for start in range(0, num_frames, CHUNK_FRAMES):
            yield read_frames(path, start, start + CHUNK_FRAMES)


@dataclass(kw_only=True)
class KMeansStage(Stage):
    """Fit the codebook on the sampled frames, or take over the one that the recipe names (`given`)."""

    name: ClassVar[str] = "kmeans"
    counted: ClassVar[str] = "codebooks"
    parent: Path
    sample: FeaturesStage
    kmeans: KMeansSettings
    given: GivenCodebook | None = None
    lloyd: Lloyd = lloyd_in_process  # not in the key: `tasks.kmeans.dask_lloyd` finds the same codebook on Dask workers

    @property
    def source(self) -> FeatureSource:
        """What is clustered."""
        return self.sample.source

    @cached_property
    def shards(self) -> list[Path]:
        """The files that hold the sampled frames."""
        return self.sample.shards()

    def settings(self) -> dict[str, Any]:
        if self.given:
            return {}
        # How the utterances were drawn shows in the features' key.
        sampling = {"sample_fraction", "sample_hours", "min_sample_files"}
        return {name: value for name, value in self.kmeans.key_settings().items() if name not in sampling}

    def inputs(self) -> dict[str, str]:
        return {"codebook": self.given.digest} if self.given else {"features": self.sample.key}

    def make_plan(self) -> list[Spec]:
        return [{"num_units": self.kmeans.num_units}]

    def reads(self) -> list[Path]:
        return self.shards

    def work(self, spec: Spec) -> tuple[list[Path], Figures]:
        if self.given:
            given = read_given(Path(self.given.path), self.kmeans.num_units, self.source)
            if given.content_digest != self.given.digest:
                raise DataError(
                    f"{self.given.path}: another codebook than when this iteration was settled; restore it, or settle the "
                    f"iteration again (--set kmeans.codebook={self.given.name}), which makes other units"
                )
            figures = codebook_figures(self.shards, given)  # how well it fits the features of this corpus
            given.save(self.path)
            return [self.path], figures
        seed = self.kmeans.seed
        seeds = choose_seeds(draw_frames(self.shards, self.kmeans.seeding_frames, seed), spec["num_units"], seed)
        centroids, num_iterations = self.lloyd(self.shards, seeds, self.kmeans)
        figures = codebook_figures(self.shards, Codebook(centroids, {})) | {"num_iterations": num_iterations}
        metadata = {
            "source": self.source.identity,
            "frame_rate": self.source.frame_rate,
            "num_units": len(centroids),
            "seed": seed,
            "checkpoint": self.source.checkpoint,
            # In the key of the features where it matters; noted in any case.
            **({} if self.source.is_mfcc else {"chunks": ChunkRule.of(self.sample.features).to_dict()}),
            **figures,
        }
        Codebook(centroids, metadata).save(self.path)
        return [self.path], figures

    def finish(self, receipts: list[Receipt]) -> tuple[list[Path], Figures]:
        return [], {**receipts[0].figures, "num_units": self.kmeans.num_units, "sha256": file_digest(self.path)}

    @property
    def path(self) -> Path:
        """The codebook's file."""
        return self.folder / "codebook.safetensors"

    @property
    def codebook_key(self) -> str:
        """What units depend on: how the codebook was made, not the bytes (times in a header must not matter)."""
        return digest([self.key, self.source.identity])
