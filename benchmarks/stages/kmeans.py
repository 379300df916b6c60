"""A codebook from frames that are on disk, and its mean squared distance to all of them, computed alike for both.

Options: frames (name of the prepared frames), num_units, settings (ours: others of `kmeans` than the defaults).
"""

from benchmarks.measure import Outcome, Run, use_threads


def _distance(run: Run, centroids) -> float:
    """Return the mean squared distance of all frames to their nearest centroid, in float64."""
    import numpy as np

    centroids = np.asarray(centroids, np.float64)
    total, count = 0.0, 0
    frames = np.load(run.inputs / f"frames-{run.options['frames']}" / "all.npy", mmap_mode="r")
    for start in range(0, len(frames), 20_000):
        chunk = frames[start : start + 20_000].astype(np.float64)
        distances = (chunk**2).sum(1)[:, None] - 2 * chunk @ centroids.T + (centroids**2).sum(1)
        total += float(distances.min(1).sum())
        count += len(chunk)
    return total / count


def _outcome(run: Run, centroids) -> Outcome:
    import numpy as np

    frames = len(np.load(run.inputs / f"frames-{run.options['frames']}" / "all.npy", mmap_mode="r"))
    return Outcome(figures={"mean_squared_distance": _distance(run, centroids), "num_frames": frames})


def _ours(run: Run, fit, **settings) -> Outcome:  # noqa: ANN003
    """Time `fit(stage)`, the whole stage."""
    use_threads(run)
    import dask_ml.cluster  # noqa: F401
    import sklearn.cluster  # noqa: F401  (the other side imports it before its time is taken, too)

    from hubert.settings.sections import KMeansSettings
    from hubert.units.codebook import Codebook
    from hubert.units.kmeans import KMeansStage
    from tools.given_stages import frames_in

    folder = run.inputs / f"frames-{run.options['frames']}"
    chosen = KMeansSettings(num_units=run.options["num_units"], **run.options.get("settings", {}), **settings)
    stage = KMeansStage(parent=run.scratch, sample=frames_in([folder / "shard.safetensors"]), kmeans=chosen)
    with run.clock:
        fit(stage)
    return _outcome(run, Codebook.load(stage.path).centroids)


def ours(run: Run) -> Outcome:
    """By the recipes' default: dask-ml, in this process up to `kmeans.local_megabytes` of frames."""
    from tasks.local import fit_codebook

    return _ours(run, fit_codebook)


def ours_over_workers(run: Run) -> Outcome:
    """As frames above `kmeans.local_megabytes` are fitted: dask-ml on Dask workers, which run already."""
    import importlib
    from contextlib import nullcontext

    from tasks.kmeans import with_dask
    from tasks.local import connected

    with connected("local") as client:
        client.run(importlib.import_module, "dask_ml.cluster")
        return _ours(run, lambda stage: with_dask(stage, lambda: nullcontext(client)).run(), local_megabytes=0)


def ours_by_torch(run: Run) -> Outcome:
    """By `kmeans.backend = "torch"`, in this process."""
    from tasks.local import fit_codebook

    return _ours(run, fit_codebook, backend="torch")


def peer(run: Run) -> Outcome:
    """Its stage: all frames into one file, MiniBatchKMeans, the score."""
    use_threads(run)
    import joblib
    from minimal_hubert.kmeans import fit_kmeans

    with run.clock:
        found = fit_kmeans(
            run.inputs / f"frames-{run.options['frames']}" / "files",
            run.options["num_units"],
            seed=0,
            tmpdir=run.scratch,
        )
        joblib.dump(found, run.scratch / "kmeans.joblib")
    return _outcome(run, found.cluster_centers_)


SIDES = {
    "ours": ours,
    "minimal-hubert": peer,
    "ours over workers": ours_over_workers,
    "ours by torch": ours_by_torch,
}
