"""Fit the codebook with dask-ml on the workers: `hubert.kmeans`. The only file that imports dask_ml.

dask-ml gets k-means++ centroids as its start (its own k-means|| fills most of them at random on speech) and runs Lloyd
over arrays that stay sharded: no machine ever holds all frames.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import ClassVar

import dask.array as da
import numpy as np
import torch
from dask.delayed import delayed
from distributed import worker_client
from torch import Tensor

from hubert.config import KMeansSettings
from hubert.features import read_frames, shard_shape
from hubert.kmeans import CHUNK, KMeansStage, iterate_chunks, mean_variance
from hubert.stage import Figures
from tasks.stage import run_stage


class DaskKMeansStage(KMeansStage):
    """The same stage (same key, same files) with Lloyd's algorithm on the Dask workers."""

    name: ClassVar[str] = KMeansStage.name

    def lloyd(self, centroids: Tensor) -> tuple[Tensor, int]:
        """Refine the first centroids over all shards; returns them with the number of iterations."""
        with worker_client():
            return dask_lloyd(self.shards, centroids, self.kmeans)


def dask_lloyd(shards: Sequence[Path], centroids: Tensor, settings: KMeansSettings) -> tuple[Tensor, int]:
    """Run dask-ml's Lloyd from the given centroids (K, D), with the Dask client of the context.

    dask-ml's tolerance is an absolute squared shift, so the relative one is scaled by the frames' variance first, as
    scikit-learn does.

    Returns:
        centroids (K, D) float32 and the number of iterations.
    """
    from dask_ml.cluster import KMeans  # compiles for seconds; only the worker that runs this needs it

    tolerance = settings.tolerance * mean_variance(lambda: iterate_chunks(shards))
    model = KMeans(len(centroids), init=centroids.numpy(), max_iter=settings.max_iterations, tol=tolerance)
    model.fit(dask_frames(shards).persist())
    return torch.from_numpy(np.asarray(model.cluster_centers_, dtype=np.float32)), int(model.n_iter_)


def dask_frames(shards: Sequence[Path]) -> da.Array:
    """Return all sampled frames (N, D) as one lazy array whose chunks are read by the workers that hold them."""
    load = delayed(load_chunk, pure=True)
    chunks = []
    for path in shards:
        num_frames, dimension = shard_shape(path)
        for start in range(0, num_frames, CHUNK):
            end = min(start + CHUNK, num_frames)
            chunks.append(da.from_delayed(load(path, start, end), (end - start, dimension), np.float32))
    return da.concatenate(chunks)


def load_chunk(path: Path, start: int, end: int) -> np.ndarray:
    """Read frames [start, end) of a shard as (n, D) float32."""
    frames: np.ndarray = read_frames(path, start, end).numpy()
    return frames


def run(stage: KMeansStage) -> Figures:
    """Fit the codebook, by dask-ml unless the recipe asks for torch."""
    if stage.kmeans.backend == "dask":
        stage = DaskKMeansStage(**{field.name: getattr(stage, field.name) for field in fields(stage)})
    return run_stage(stage)
