"""What a pickle may hold here, and what stands in for it: data with a name, never a class that is imported.

fairseq, s3prl and scikit-learn files mix tensors with objects of their own classes: settings, dictionaries, estimators.
None of these classes is needed to read what the objects hold. So each of them becomes a `StandIn`, which keeps the
arguments and the state that the file gives it and does nothing with them, and `to_plain` turns those into dicts, lists,
strings, numbers and arrays. A name that is not known to be data is refused: a function such as `os.system` has no state
to read, and what it would do is the reason why a pickle from outside must not be obeyed.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from hubert.core.errors import DataError

# Packages whose classes are data here. A class is told from a function by its capital: `fairseq.…` names both.
FAMILIES = ("fairseq", "omegaconf", "s3prl", "sklearn", "typing")
CLASS_NAME = re.compile(r"_*[A-Z]\w*(\._*[A-Z]\w*)*")

NUMPY_SCALAR = {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}
NUMPY_ARRAY = {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
NUMPY_BUFFER = {"numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"}
ARRAY_WRAPPER = "joblib.numpy_pickle.NumpyArrayWrapper"
PATHS = {
    f"pathlib{module}.{name}"
    for module in ("", "._local")
    for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
}
TYPES = {"bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "set", "str", "tuple"}
KNOWN = {
    "argparse.Namespace",
    "operator.getitem",  # `List[int]` is written as getitem(List, int)
    "builtins.type",  # and the type of None as type(None)
    "numpy.dtype",
    "numpy.ndarray",
    # the state of a random generator, which estimators keep
    "numpy.random.__RandomState_ctor",
    "numpy.random._pickle.__randomstate_ctor",
    "numpy.random._pickle.__bit_generator_ctor",
    "numpy.random._mt19937.MT19937",
    "numpy.random._pcg64.PCG64",
    ARRAY_WRAPPER,
    *NUMPY_SCALAR,
    *NUMPY_ARRAY,
    *NUMPY_BUFFER,
    *PATHS,
    *(f"builtins.{name}" for name in TYPES),
    *(f"numpy.{name}" for name in ("bool_", "float16", "float32", "float64", "int32", "int64", "str_")),
}
PLAIN_DTYPE = re.compile(r"[biufcSU?]\d*")  # numbers and text; no objects, no structures


class StandIn:
    """An object of a class that is not imported. `name` is that of the class, as the file gives it."""

    __slots__ = ("args", "state")
    name: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Self:
        """Keep the arguments that the class, or the function that rebuilds its objects, would have been called with."""
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        """Keep the state. Having this method, unpicklers set no attribute of the object themselves."""
        self.state = state


def is_data(name: str) -> bool:
    """Return True if a name of a pickle (`module.class`) is known to be data, for which a `StandIn` can be put."""
    family = next((family for family in FAMILIES if name.startswith(f"{family}.")), None)
    if family is None:
        return name in KNOWN
    parts = name.split(".")
    first = next((number for number, part in enumerate(parts) if part.lstrip("_")[:1].isupper()), len(parts))
    return bool(CLASS_NAME.fullmatch(".".join(parts[first:])))


def stand_in(name: str) -> type[StandIn]:
    """Return a new class of stand-ins for a name. It is made for one file, so what that file does to it ends with it."""
    return type("StandIn", (StandIn,), {"__slots__": (), "name": name})


def refusal(path: Path, name: str) -> DataError:
    """Return the error for a file that asks for a global that is not known to be data."""
    return DataError(
        f"{path}: refused: it asks for `{name}`, and loading it would import and call that. Expected tensors, numbers, text and "
        "the settings of fairseq, s3prl or scikit-learn. Nothing of it was run. Likely cause: the file holds objects of "
        "somebody's own classes, or was made to run a program. Fix: on a machine where you trust the file, load it there "
        "and save only what is needed: torch.save(model.state_dict(), ...), or numpy.save(..., kmeans.cluster_centers_)"
    )


# Stand-ins as plain data ------------------------------------------------------------------------------------------


def to_plain(value: Any, path: Path) -> Any:
    """Replace every stand-in in what was read from `path` by plain data; tensors and arrays stay as they are.

    A namespace, a dictionary of fairseq and every other object become the dict of their attributes, omegaconf's
    containers the dicts and lists that they hold, its nodes, enums and numpy's scalars their value, paths and classes
    their name.

    Raises:
        DataError: an object contains itself, or an array is not what it says.
    """
    try:
        return _Simplifier()(value)
    except RecursionError as error:
        raise DataError(f"{path}: its objects are nested too deeply; it is no checkpoint and no codebook") from error
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise DataError(f"{path}: an object in it is not what its class holds: {error}; the file is damaged") from error


class _Simplifier:
    """One walk over a graph of objects; what occurs twice is converted once."""

    def __init__(self) -> None:
        self.done: dict[int, tuple[Any, Any]] = {}  # by id; the object is kept, so that its id is not given to another
        self.open: set[int] = set()

    def __call__(self, value: Any) -> Any:
        if isinstance(value, type) and issubclass(value, StandIn):
            return value.name
        if not isinstance(value, (dict, list, tuple, set, frozenset, StandIn)):
            return value
        key = id(value)
        if key not in self.done:
            if key in self.open:
                raise ValueError("it contains itself")
            self.open.add(key)
            self.done[key] = (value, self.convert(value))
            self.open.discard(key)
        return self.done[key][1]

    def convert(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self.key(name): self(item) for name, item in value.items()}
        if isinstance(value, (set, frozenset)):
            return {self.key(item) for item in value}
        if isinstance(value, list):
            return [self(item) for item in value]
        if isinstance(value, tuple):
            # A named tuple such as torch.Size stays what it is.
            return value if type(value) is not tuple else tuple(self(item) for item in value)
        return self.object(value)

    def key(self, value: Any) -> Any:
        plain = self(value)
        return plain if isinstance(plain, (str, int, float, bool, bytes, tuple, type(None))) else str(plain)

    def object(self, value: StandIn) -> Any:
        if value.name in NUMPY_SCALAR | NUMPY_ARRAY | NUMPY_BUFFER | {"numpy.dtype"}:
            return self.numpy(value)
        if value.name in PATHS:
            return str(Path(*value.args))
        state = value.state
        if (
            isinstance(state, tuple)
            and len(state) == 2
            and all(part is None or isinstance(part, dict) for part in state)
        ):
            state = {**(state[0] or {}), **(state[1] or {})}  # attributes in __dict__, and in slots
        if isinstance(state, dict):
            if value.name.startswith("omegaconf."):
                # `_metadata` says which classes it may hold and `_parent` leads back up: neither is content.
                return self(state["_content"] if "_content" in state else state.get("_val"))
            return self(state)
        if state is not None:
            return self(state)
        return self(value.args[0] if len(value.args) == 1 else value.args)

    def numpy(self, value: StandIn) -> Any:
        if value.name == "numpy.dtype":
            return plain_dtype(value)
        if value.name in NUMPY_SCALAR:
            dtype, content = value.args
            return np.frombuffer(content, plain_dtype(dtype), count=1)[0].item()
        if value.name in NUMPY_BUFFER:
            content, dtype, shape, order = value.args
        else:
            *_, shape, dtype, is_fortran, content = value.state
            order = "F" if is_fortran else "C"
        return rebuild_array(content, plain_dtype(dtype), shape, order)


def plain_dtype(value: Any) -> np.dtype[Any]:
    """Return the data type that a stand-in of `numpy.dtype` describes.

    Raises:
        ValueError: it is none, or one of objects or structures: those hold pickles of their own.
    """
    if not isinstance(value, StandIn) or value.name != "numpy.dtype":
        raise ValueError(f"expected a data type of numbers, found {value!r:.60}")
    code = value.args[0]
    if not isinstance(code, str) or not PLAIN_DTYPE.fullmatch(code):
        raise ValueError(f"expected a data type of numbers, found {code!r:.60}")
    order = value.state[1] if isinstance(value.state, tuple) and len(value.state) > 1 else "="
    return np.dtype(code).newbyteorder(">" if order == ">" else "<" if order == "<" else "=")


def rebuild_array(content: Any, dtype: np.dtype[Any], shape: Any, order: Any) -> npt.NDArray[Any]:
    """Return an array of its own memory, in the machine's byte order, from bytes.

    Raises:
        ValueError: the bytes do not fit the shape.
    """
    if not isinstance(content, (bytes, bytearray)):
        raise ValueError(f"expected the bytes of an array, found {type(content).__name__}")  # noqa: TRY004
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if order == "F" else "C")
    return array.astype(dtype.newbyteorder("="), order="K", copy=True)


def plain_dict(*_: Any) -> dict[Any, Any]:
    """Make an empty dict, whatever a subclass of dict is made with: a default factory is a thing to call."""
    return {}


# Subclasses of dict whose items the file sets one by one, and what is made instead.
DICTS: dict[str, Callable[..., dict[Any, Any]]] = {"collections.defaultdict": plain_dict}
