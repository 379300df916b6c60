"""Codebooks of other programs in, and ours out: scikit-learn's joblib files, numpy's, torch's, safetensors.

fairseq, textless and minimal_hubert keep a codebook as a scikit-learn estimator in a joblib file. It says nothing about
the features that it was fitted on, and centroids without those facts are noise. So `import_codebook` demands them, as a
`FeatureSource`, and from then on the codebook refuses features of another source like one of our own.
"""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hubert.core.errors import ConfigError, DataError
from hubert.core.files import atomic_write
from hubert.core.hashing import file_digest
from hubert.core.recognise import is_safetensors, recognise
from hubert.features.source import FeatureSource
from hubert.model.formats.joblib_file import load_joblib
from hubert.model.formats.unpickle import is_torch_file, load_object
from hubert.units.codebook import Codebook, check_centroids

Format = Literal["joblib", "safetensors"]
CENTROIDS = "cluster_centers_"  # scikit-learn's name
_NAMES = ("centroids", "centers", "centres", "cluster_centers", "cluster_centres", "codebook")  # other programs' names
_FORMS = ".npy, .npz, .safetensors, what torch.save wrote, or a file of joblib"
_NPY = b"\x93NUMPY"


def import_codebook(path: str | Path, source: FeatureSource) -> Codebook:
    """Read the centroids of another program, without running anything that is in the file.

    Args:
        path: a table (K, D) of floats as numpy (.npy), torch.save or safetensors write it, alone or in a dict or .npz where it is
            the only one, or is called `centroids`, `centers` or `cluster_centers_`; or a joblib file (or pickle) of an estimator
            with `cluster_centers_`, compressed or not. The file's content counts, not its suffix.
        source: the features that it was fitted on: MFCC, or layer, convention and arithmetic of which weights. Nothing in the
            file says it, so nothing can check it but the number of dimensions.

    Returns:
        A codebook with float32 centroids; float64 is rounded. Its metadata name the source, and the file under `imported`.

    Raises:
        DataError: the file is missing, damaged, holds no centroids or more than data, or they do not fit the source.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: expected a codebook ({_FORMS}), found no file")
    content, kind = _read_content(path)
    table = _pick_table(content, kind, path)
    dtype, centroids = _as_array(table)
    if centroids.ndim != 2 or centroids.dtype.kind != "f" or len(centroids) < 2 or not centroids.shape[1]:
        raise DataError(f"{path}: expected centroids (K, D) of floats with K >= 2, found {centroids.shape} {dtype}")
    with np.errstate(over="ignore"):
        rounded = torch.from_numpy(centroids.astype(np.float32))
    check_centroids(rounded, path)
    source.check_dimension(centroids.shape[1], path)
    metadata = {
        "source": source.identity,
        "frame_rate": source.frame_rate,
        "num_units": len(centroids),
        "checkpoint": source.checkpoint,
        "imported": {"file": path.name, "sha256": file_digest(path), "class": kind, "dtype": dtype},
    }
    return Codebook(rounded, metadata)


def _read_content(path: Path) -> tuple[Any, str]:
    """Return what a file holds, told by its content, and the class that it is an object of ("" for none)."""
    start = path.open("rb").read(len(_NPY))
    if is_safetensors(path) or (path.suffix == ".safetensors" and not is_torch_file(path)):
        try:
            return load_file(path), ""
        except SafetensorError as error:
            said = f"it is {what}" if (what := recognise(path)) else str(error)
            raise DataError(f"{path}: expected a safetensors file; {said}") from error
    is_npz = zipfile.is_zipfile(path) and all(name.endswith(".npy") for name in zipfile.ZipFile(path).namelist())
    if start == _NPY or is_npz or path.suffix in {".npy", ".npz"}:
        try:
            content = np.load(path, allow_pickle=False)
            return (dict(content) if is_npz else content), ""
        except (ValueError, EOFError, OSError) as error:
            said = f"it is {what}" if start != _NPY and (what := recognise(path)) else str(error)
            raise DataError(f"{path}: expected an array of numbers that numpy.save wrote; {said}") from error
    if is_torch_file(path):
        return load_object(path), ""
    return load_joblib(path)


def _pick_table(content: Any, kind: str, path: Path) -> Any:
    """Return the one table of what a file holds that is its centroids: an array or a tensor.

    Raises:
        DataError: there is none, or it is not clear which of several it is.
    """
    if isinstance(content, np.ndarray | Tensor):
        return content
    arrays = dict(_arrays("", content)) if isinstance(content, Mapping) else {}
    for names in ([CENTROIDS], _NAMES):
        named = [name for name in arrays if name.rpartition(".")[2].lower() in names]
        if len(named) == 1:
            return arrays[named[0]]
        if named or kind:  # of an estimator nothing else is its centroids
            break
    tables = [] if kind or named else [name for name, value in arrays.items() if value.ndim == 2 and _is_float(value)]
    if len(tables) == 1:
        return arrays[tables[0]]
    if arrays and not kind:
        shapes = ", ".join(f"{name} {tuple(value.shape)} {value.dtype}" for name, value in list(arrays.items())[:8])
        raise DataError(
            f"{path}: expected one table of centroids (K, D) of floats, found {shapes}. Fix: save that table alone: numpy.save"
        )
    inside = f" with {sorted(map(str, content))[:20]}" if isinstance(content, Mapping) else ""
    raise DataError(
        f"{path}: expected centroids, or an estimator with {CENTROIDS} (KMeans or MiniBatchKMeans, fitted), found a "
        f"{kind or type(content).__name__}{inside}"
    )


def _arrays(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield all arrays and tensors inside dicts, with the names that lead to them, joined by dots."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _arrays(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, np.ndarray | Tensor):
        yield name, value


def _is_float(value: Any) -> bool:
    return value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind == "f"


def _as_array(table: Any) -> tuple[str, npt.NDArray[Any]]:
    """Return the name of a table's dtype, and the table as an array; what numpy has no type for (bfloat16) as float32."""
    if not isinstance(table, Tensor):
        return table.dtype.newbyteorder("=").name, table
    table = table.detach().cpu()
    known = {torch.float16, torch.float32, torch.float64}
    exact = table.float() if table.is_floating_point() and table.dtype not in known else table
    return str(table.dtype).removeprefix("torch."), exact.numpy()


def export_codebook(codebook: Codebook, path: Path, format: Format) -> None:  # noqa: A002  (the option's name)
    """Write a codebook for other programs; atomic.

    `joblib` is a fitted `sklearn.cluster.MiniBatchKMeans`, what fairseq's and textless' tools load: `predict` gives our
    units, and `hubert_metadata` holds what the codebook knows of itself. An imported one keeps the dtype in which it came:
    `predict` wants frames of that type. `safetensors` is our own file.

    Raises:
        ConfigError: there is no such format.
    """
    if format not in get_args(Format):
        raise ConfigError(f"format {format!r}: expected one of {', '.join(get_args(Format))}")
    if format == "safetensors":
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
