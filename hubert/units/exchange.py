"""Codebooks of other programs in, and ours out: scikit-learn's joblib files, numpy's, safetensors.

fairseq, textless and minimal_hubert keep a codebook as a scikit-learn estimator in a joblib file. It says nothing about
the features that it was fitted on, and centroids without those facts are noise. So `import_codebook` demands them, as a
`FeatureSource`, and from then on the codebook refuses features of another source like one of our own.
"""

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hubert.core.errors import ConfigError, DataError
from hubert.core.files import atomic_write
from hubert.core.hashing import file_digest
from hubert.features.source import FeatureSource
from hubert.model.formats.joblib_file import load_joblib
from hubert.units.codebook import Codebook

Format = Literal["joblib", "safetensors"]
CENTROIDS = "cluster_centers_"  # scikit-learn's name


def import_codebook(path: str | Path, source: FeatureSource) -> Codebook:
    """Read the centroids of another program, without running anything that is in the file.

    Args:
        path: `.npy` (K, D), `.safetensors` with one such table, else a joblib file (or pickle) of an estimator with
            `cluster_centers_`, compressed or not.
        source: the features that it was fitted on: MFCC, or layer, convention and arithmetic of which weights. Nothing in the
            file says it, so nothing can check it but the number of dimensions.

    Returns:
        A codebook with float32 centroids; a float64 file is rounded. Its metadata name the source, and the file under `imported`.

    Raises:
        DataError: the file is missing, damaged, holds no centroids or more than data, or they do not fit the source.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: expected a codebook (.npy, .safetensors or a file of joblib), found no file")
    centroids, kind = _read_centroids(path)
    if centroids.ndim != 2 or centroids.dtype.kind != "f" or len(centroids) < 2:
        raise DataError(
            f"{path}: expected centroids (K, D) of floats with K >= 2, found {centroids.shape} {centroids.dtype}"
        )
    if not np.isfinite(centroids).all():
        rows = np.flatnonzero(~np.isfinite(centroids).all(1))
        raise DataError(f"{path}: centroids {rows[:5].tolist()} are not finite; the fit had diverged, make a new one")
    source.check_dimension(centroids.shape[1], path)
    metadata = {
        "source": source.identity,
        "frame_rate": source.frame_rate,
        "num_units": len(centroids),
        "checkpoint": source.checkpoint,
        "imported": {
            "file": path.name,
            "sha256": file_digest(path),
            "class": kind,
            "dtype": centroids.dtype.newbyteorder("=").name,
        },
    }
    return Codebook(torch.from_numpy(centroids.astype(np.float32)), metadata)


def _read_centroids(path: Path) -> tuple[npt.NDArray[Any], str]:
    """Return the centroids of a file and the class that they were an attribute of ("" for none)."""
    if path.suffix == ".npy":
        try:
            return np.load(path, allow_pickle=False), ""
        except (ValueError, EOFError) as error:
            raise DataError(f"{path}: expected an array of numbers that numpy.save wrote: {error}") from error
    if path.suffix == ".safetensors":
        try:
            tables = {name: value for name, value in load_file(path).items() if value.ndim == 2}
        except SafetensorError as error:
            raise DataError(f"{path}: expected a safetensors file: {error}") from error
        if len(tables) != 1:
            raise DataError(f"{path}: expected one table of centroids (K, D), found {sorted(tables) or 'none'}")
        return next(iter(tables.values())), ""
    content, kind = load_joblib(path)
    centroids = content.get(CENTROIDS) if isinstance(content, dict) else content
    if not isinstance(centroids, np.ndarray):
        found = f"a {kind or type(content).__name__}" + (
            f" with {sorted(map(str, content))[:20]}" if isinstance(content, dict) else ""
        )
        raise DataError(
            f"{path}: expected an estimator with {CENTROIDS} (KMeans or MiniBatchKMeans, fitted), found {found}"
        )
    return centroids, kind


def export_codebook(codebook: Codebook, path: Path, form: Format) -> None:
    """Write a codebook for other programs; atomic.

    `joblib` is a fitted `sklearn.cluster.MiniBatchKMeans`, what fairseq's and textless' tools load: `predict` gives our
    units, and `hubert_metadata` holds what the codebook knows of itself. An imported one keeps the dtype in which it came:
    `predict` wants frames of that type. `safetensors` is our own file.

    Raises:
        ConfigError: there is no such format.
    """
    if form not in get_args(Format):
        raise ConfigError(f"format {form!r}: expected one of {', '.join(get_args(Format))}")
    if form == "safetensors":
        codebook.save(path)
        return
    import joblib  # with scikit-learn a second of import time

    estimator = to_scikit_learn(codebook)
    with atomic_write(path) as temporary:
        joblib.dump(estimator, temporary)


def to_scikit_learn(codebook: Codebook) -> Any:
    """Return a fitted `MiniBatchKMeans` with the codebook's centroids."""
    import warnings

    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    dtype = dict(codebook.metadata.get("imported", {})).get("dtype", "float32")
    centroids = codebook.centroids.numpy().astype(dtype if dtype in {"float32", "float64"} else "float32")
    estimator = MiniBatchKMeans(len(centroids), init=centroids, n_init=1, max_iter=1, reassignment_ratio=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal centroids: two units that share their frames
        estimator.fit(centroids)  # scikit-learn sets whatever its version counts as fitted
    estimator.cluster_centers_ = centroids
    # The file goes to other machines: no array of ours as a parameter, and no number of threads of this one.
    estimator.set_params(init="k-means++", max_iter=100)
    estimator._n_threads = 1  # noqa: SLF001  (kept in the file by scikit-learn)
    estimator.hubert_metadata = dict(codebook.metadata)
    return estimator
