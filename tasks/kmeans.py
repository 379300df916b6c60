"""Fit the codebook with dask-ml on the workers: `hubert.units.kmeans`. The only file that imports dask_ml.

dask-ml gets k-means++ centroids as its start (its own k-means|| fills most of them at random on speech) and runs Lloyd
over arrays that stay sharded: no machine ever holds all frames. A sample that is small enough for one process
(`kmeans.local_megabytes`) stays there: between workers the messages and bookkeeping of an iteration cost more than its
arithmetic (benchmarks/results/cpu-speed.md, by `python benchmarks/studies/cpu_speed.py kmeans`).
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import torch
from dask.base import compute
from dask.delayed import delayed
from dask.system import CPU_COUNT
from distributed import worker_client
from torch import Tensor

from hubert.core.machine import one_thread
from hubert.core.stage import Figures
from hubert.features.frames_file import read_frames, shard_shape
from hubert.settings.sections import KMeansSettings
from hubert.units.codebook import CHUNK_FRAMES, nearest_centroids
from hubert.units.kmeans import KMeansStage
from tasks.stage import run_stage

if TYPE_CHECKING:
    import dask.array as da

Connect = Callable[[], AbstractContextManager[Any]]  # makes a Dask client, the current one within its context

MOMENT_ROWS = 2048  # frames that are float64 at a time: 13 MB of 768 dimensions


def dask_lloyd(
    shards: Sequence[Path],
    centroids: Tensor,
    settings: KMeansSettings,
    connect: Connect,
) -> tuple[Tensor, int]:
    """Run dask-ml's Lloyd from the given centroids (K, D): in this process if the frames are few, else on the workers.

    Both compute the same chunks in the same way and add them up in the same order: the centroids are the same bits.
    dask-ml's tolerance is an absolute squared shift, so the relative one is scaled by the frames' variance first, as
    scikit-learn does.

    Args:
        shards: the feature files.
        centroids: the first ones.
        settings: when to stop, and how many frames are few.
        connect: makes a Dask client that is the current one within its context; called only for many frames.

    Returns:
        centroids (K, D) float32 and the number of iterations.
    """
    kmeans = dask_kmeans()
    frames = dask_frames(shards)
    with threads_here() if frames.nbytes <= settings.local_megabytes * 1e6 else connect():
        frames = frames.persist()
        tolerance = settings.tolerance * dask_variance(frames)
        model = kmeans(len(centroids), init=centroids.numpy(), max_iter=settings.max_iterations, tol=tolerance)
        model.fit(frames)
        return torch.from_numpy(np.asarray(model.cluster_centers_, dtype=np.float32)), int(model.n_iter_)


@cache
def dask_kmeans() -> Any:
    """Import dask-ml's KMeans, with `search` in the place of its own search for the rest of the process.

    dask-ml has no parameter for that; it looks the search up by a name in its module. Replaced once and never put back,
    as fits may run at once in the threads of a worker, and no other file uses dask-ml.

    Raises:
        RuntimeError: dask-ml has no such name.
    """
    from dask_ml.cluster import k_means  # compiles for seconds; only the worker that runs this needs it

    if not hasattr(k_means, "pairwise_distances_argmin_min"):
        raise RuntimeError(
            "dask-ml's k-means has no pairwise_distances_argmin_min; is another version of it installed?"
        )
    k_means.pairwise_distances_argmin_min = search
    return k_means.KMeans


@contextmanager
def threads_here() -> Iterator[None]:
    """Let Dask compute by threads of this process, on all cores that it may use, and torch by one thread in each.

    Those are the cores of its affinity and cgroup, and no more than Slurm gave the task: without cgroups Slurm does not
    hold a process to them.
    """
    cores = min(CPU_COUNT, int(os.environ.get("SLURM_CPUS_PER_TASK") or CPU_COUNT))
    with dask.config.set(scheduler="threads", num_workers=cores), one_thread():
        yield


def search(
    frames: "da.Array",
    centroids: np.ndarray,
    metric: str = "euclidean",
    metric_kwargs: Mapping[str, Any] | None = None,  # noqa: ARG001  (dask-ml gives it: the squared distance)
) -> tuple["da.Array", "da.Array"]:
    """Return the nearest centroid for each frame, lazily, in the place of dask-ml's own search, and zeros as distances.

    dask-ml has scikit-learn search, which multiplies in float64 and takes two to three times as long, and sends the centroids
    with each chunk's task; here they are a value of their own (500 of 768 numbers are 1.5 MB, and 17 million frames 260
    chunks). It wants distances only for `inertia_`, after the last iteration; ours are measured on the final centroids
    (`hubert.units.kmeans.codebook_figures`), so a pass over the frames is spared.

    Args:
        frames: (N, D) float32 in chunks of whole frames.
        centroids: (K, D).
        metric: the only one.
        metric_kwargs: not needed.
    """
    import dask.array as da

    if metric != "euclidean":
        raise ValueError(f"k-means needs the metric euclidean, found {metric}; another version of dask-ml?")
    shared = delayed(centroids.astype(np.float32), traverse=False)
    units = [
        da.from_delayed(delayed(chunk_units)(chunk, shared), (size,), np.int64)
        for chunk, size in zip(frames.to_delayed().ravel(), frames.chunks[0], strict=True)
    ]
    return da.concatenate(units), da.zeros(len(frames), chunks=frames.chunks[0])


def chunk_units(frames: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return the nearest centroid (N,) of each frame."""
    units: np.ndarray = nearest_centroids(torch.from_numpy(frames), torch.from_numpy(centroids)).numpy()
    return units


def dask_variance(frames: "da.Array") -> float:
    """Return the variance of the frames, averaged over the dimensions: `hubert.units.kmeans.mean_variance` of a Dask array.

    Each chunk becomes three rows of numbers where it lies, and they are added up here in the order of the chunks. Dask's
    own `var` of float64 frames holds several float64 copies of a chunk per thread.
    """
    moments = [delayed(chunk_moments)(chunk) for chunk in frames.to_delayed().ravel()]
    count, total, squares = (sum(parts) for parts in zip(*compute(*moments), strict=True))
    return float((squares / count - np.square(total / count)).mean())


def chunk_moments(frames: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Return the number of frames (N, D) and the sums of their values and squares (D,), in float64, a few MB at a time."""
    total, squares = np.zeros(frames.shape[1]), np.zeros(frames.shape[1])
    for start in range(0, len(frames), MOMENT_ROWS):
        block = frames[start : start + MOMENT_ROWS].astype(np.float64)
        total += block.sum(axis=0)
        squares += np.square(block, out=block).sum(axis=0)
    return len(frames), total, squares


def dask_frames(shards: Sequence[Path]) -> "da.Array":
    """Return all sampled frames (N, D) as one lazy array whose chunks are read by the workers that hold them."""
    import dask.array as da  # it imports numba and SciPy: a second of each flow's start, and few flows get here

    load = delayed(load_chunk, pure=True)
    chunks = []
    for path in shards:
        num_frames, dimension = shard_shape(path)
        for start in range(0, num_frames, CHUNK_FRAMES):
            end = min(start + CHUNK_FRAMES, num_frames)
            chunks.append(da.from_delayed(load(path, start, end), (end - start, dimension), np.float32))
    return da.concatenate(chunks)


def load_chunk(path: Path, start: int, end: int) -> np.ndarray:
    """Read frames [start, end) of a shard as (n, D) float32."""
    frames: np.ndarray = read_frames(path, start, end).numpy()
    return frames


def with_dask(stage: KMeansStage, connect: Connect) -> KMeansStage:
    """Return the stage with Lloyd's algorithm by dask-ml, unless the recipe asks for torch: same key, same files."""
    return replace(stage, lloyd=partial(dask_lloyd, connect=connect)) if stage.kmeans.backend == "dask" else stage


def run(stage: KMeansStage) -> Figures:
    """Fit the codebook with the surrounding flow's workers."""
    return run_stage(with_dask(stage, worker_client))
