"""Torch checkpoints of other programs, read without running anything that is in them.

A pickle is a program: it names functions and has them called. `load_torch` reads a file with torch's `weights_only`
unpickler, which knows tensors only, and gives it a stand-in for every class of fairseq, omegaconf and s3prl that the
file names (`hubert.model.formats.inert`). What a file names is read first, from the list of its instructions: one name
that is not known to be data, and the file is refused before the first of them is obeyed. Pickles that torch did not
write are read by an unpickler of our own, `DataUnpickler`, with the same stand-ins.
"""

import io
import pickle  # noqa: TID251  (the machine that `DataUnpickler` takes the dangerous instructions out of)
import pickletools
import re
import threading
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

from hubert.core.errors import DataError, HubertError, first_line
from hubert.core.recognise import recognise
from hubert.model.formats.inert import DICTS, StandIn, is_data, refusal, stand_in, to_plain

ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled: the first of five pickles
NUM_LEGACY_PICKLES = 5  # magic number, protocol, system, the object, the keys of its tensors

# What torch's unpickler knows by itself: tensors and the containers around them. It decides; this is for the message.
TORCH_KNOWS = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)"
    r"|torch(\.[a-z_]+)*\.\w*(Tensor|Storage)|torch\.nn\.parameter\.Parameter|torch\.(Size|device|bool|bfloat16)"
    r"|torch\.(q?u?int|float|complex|bits)\d\w*|torch\._(utils|tensor)\._rebuild_\w+|torch\.serialization\._get_layout"
)
_loading = threading.Lock()  # torch's list of stand-ins is one for the whole process


def load_torch(path: str | Path) -> dict[str, Any]:
    """Read a dict that `torch.save` wrote, as `load_object` does.

    Raises:
        DataError: as there, or it is no dict.
    """
    content = load_object(path)
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: expected a dict (of weights, or of weights and settings), found {type(content).__name__}; "
            "save the model's state dict: torch.save(model.state_dict(), ...)"
        )
    return content


def is_torch_file(path: Path) -> bool:
    """Return True if a file begins as those of `torch.save` do: a zip (numpy's .npz are zips, too) or the older format."""
    with path.open("rb") as file:
        return file.read(len(LEGACY)).startswith((ZIP, LEGACY))


def load_object(path: str | Path) -> Any:
    """Read what `torch.save` wrote (zip or the older format), or a bare pickle of numpy arrays; tensors on the CPU.

    Objects that are no tensors come back as plain data: `args` of fairseq as a dict, a `Dictionary` as its attributes
    (`symbols`, `count`, `indices`, ...), omegaconf's containers as dicts and lists. See `hubert.model.formats.inert.to_plain`.

    Raises:
        DataError: the file is missing, damaged or no checkpoint, or holds something that is not known to be data, such as a
            function to call. Nothing of the file has run then.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(len(LEGACY))
            if start.startswith(ZIP):
                content = _load_with_torch(path, scan_globals(_zipped_pickle(path), 1))
            elif start == LEGACY:
                file.seek(0)
                content = _load_with_torch(path, scan_globals(file, NUM_LEGACY_PICKLES))
            else:
                file.seek(0)
                content = DataUnpickler(file, path).load()
        return to_plain(content, path)
    except HubertError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a checkpoint file, found none") from error
    except Exception as error:  # a damaged or hostile pickle ends in whatever error its instructions lead to
        if what := recognise(path):
            raise DataError(
                f"{path}: expected weights, as torch.save or safetensors write them (nothing of it was run); it is {what}"
            ) from error
        said = first_line(error, after="WeightsUnpickler error: ")  # without torch's advice to run the file
        raise DataError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {said}). Expected what torch.save "
            "wrote, with its default protocol. Likely cause: a broken download, another kind of file, or one that was made to "
            "run a program; nothing of it was run. Fix: fetch it again, or save only the state dict on a machine where you "
            "trust the file"
        ) from error


def _load_with_torch(path: Path, names: set[str]) -> Any:
    """Load a file with torch's restricted unpickler, after a look at the names that it asks for."""
    replaced: list[tuple[Callable[..., Any], str]] = []
    for name in sorted(names):
        if TORCH_KNOWS.fullmatch(name):
            continue
        if name in DICTS:
            replaced.append((DICTS[name], name))
        elif is_data(name):
            replaced.append((stand_in(name), name))
        else:
            raise refusal(path, name)
    # The open file, not its path: of a path torch believes the suffix .safetensors.
    with _loading, torch.serialization.safe_globals(list(replaced)), path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _zipped_pickle(path: Path) -> io.BytesIO:
    """Return the pickle in a zip of torch's.

    Raises:
        DataError: it is a TorchScript program, or no file of torch's.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            raise DataError(
                f"{path}: expected weights, found a TorchScript program, which holds code. Save its state dict where you "
                "trust it: torch.save(torch.jit.load(...).state_dict(), ...)"
            )
        found = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            what = recognise(path) or f"a zip file with {names[:5]}"
            raise DataError(f"{path}: expected a file that torch.save wrote; it is {what}")
        return io.BytesIO(archive.read(found[0]))


def scan_globals(file: IO[bytes], num_pickles: int) -> set[str]:
    """Return the names (`module.name`) that some pickles in a row ask for, without obeying any instruction.

    It says what to refuse and what to replace. It is no safeguard by itself: what it misses, the unpickler refuses.
    """
    found = set()
    for _ in range(num_pickles):
        texts: list[str] = []  # the newest ones pushed: a STACK_GLOBAL takes two of them
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in {"GLOBAL", "INST"}:
                module, name = str(argument).split(" ", 1)
                found.add(full_name(module, name))
            elif opcode.name == "STACK_GLOBAL":
                found.add(full_name(*texts[-2:]) if len(texts) > 1 else "a name that is put together at run time")
            elif isinstance(argument, str):
                texts = [*texts[-1:], argument]
    return found


def full_name(module: str, name: str) -> str:
    """Return `module.name`; what Python 2 named otherwise, as the older protocols do, under its present name."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


# Pickles that torch did not write ---------------------------------------------------------------------------------

_DATA = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST EMPTY_DICT DICT EMPTY_SET FROZENSET GET BINGET "
    "LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL"
)


class DataUnpickler(pickle._Unpickler):  # noqa: SLF001  (the one in Python: in C no instruction can be replaced)
    """Reads a pickle in which every object is a `StandIn`.

    Its table holds the instructions that push plain data, and its own versions of those that name, make and fill objects:
    a name becomes a new class of stand-ins and is never imported, only such a class can be called, only a stand-in has a
    state, and items go into lists, dicts and sets only. Instructions that are not in the table are refused.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    readline: Callable[[], bytes]

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, encoding="latin1")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name.

        Raises:
            DataError: the name is not known to be data.
        """
        found = full_name(module, name)
        if found in {"collections.OrderedDict", *DICTS, "_codecs.encode", "copyreg._reconstructor"} or is_data(found):
            return stand_in(found)
        raise refusal(self.path, found)

    def make(self, kind: Any, args: Any) -> Any:
        """Return what a class of stand-ins gives for some arguments."""
        if not (isinstance(kind, type) and issubclass(kind, StandIn) and isinstance(args, tuple)):
            raise ValueError(f"a call of something that is no class: {kind!r:.60}")  # noqa: TRY004  (one error for all)
        if kind.name == "collections.OrderedDict":
            return OrderedDict(*args)
        if kind.name in DICTS:
            return DICTS[kind.name]()
        if kind.name in {"builtins.set", "builtins.frozenset"}:  # where the protocol has no instruction for it
            return set(*args)
        if kind.name == "_codecs.encode":  # how bytes are written where the protocol has none
            return str(args[0]).encode("latin1")
        if kind.name == "copyreg._reconstructor":  # how objects are made where the protocol has no instruction for it
            return self.make(args[0], ())
        return kind(*args)

    def load_reduce(self) -> None:
        """Call: REDUCE, and NEWOBJ, which differs in nothing here."""
        args = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], args)

    def load_inst(self) -> None:
        """Name and call in one instruction, of the first protocol."""
        module, name = self.readline()[:-1].decode("ascii"), self.readline()[:-1].decode("ascii")
        args = tuple(self.pop_mark())
        self.append(self.make(self.find_class(module, name), args))

    def load_build(self) -> None:
        """Give an object its state."""
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, StandIn):
            raise ValueError(f"a state for a {type(target).__name__}, which has none")  # noqa: TRY004  (one error for all)
        target.__setstate__(state)

    def load_appends(self) -> None:
        """Put items into a list."""
        items = self.pop_mark()
        self._target(list).extend(items)

    def load_append(self) -> None:
        """Put one item into a list."""
        item = self.stack.pop()
        self._target(list).append(item)

    def load_setitems(self) -> None:
        """Put items into a dict."""
        items = self.pop_mark()
        self._target(dict, OrderedDict).update(zip(items[::2], items[1::2], strict=True))

    def load_setitem(self) -> None:
        """Put one item into a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self._target(dict, OrderedDict)[key] = value

    def load_additems(self) -> None:
        """Put items into a set."""
        items = self.pop_mark()
        self._target(set).update(items)

    def _target(self, *kinds: type) -> Any:
        if type(self.stack[-1]) not in kinds:
            raise ValueError(f"items for a {type(self.stack[-1]).__name__}, expected a {kinds[0].__name__}")
        return self.stack[-1]

    def load_refused(self) -> None:
        """Refuse an instruction that no file of ours needs: registered extensions, persistent ids, buffers from outside."""
        raise ValueError("an instruction that plain data do not need")

    dispatch: ClassVar[dict[int, Any]] = dict.fromkeys(range(256), load_refused) | {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]  # noqa: SLF001
        for name in _DATA.split()
    }
    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.INST[0]: load_inst,
        pickle.BUILD[0]: load_build,
        pickle.APPENDS[0]: load_appends,
        pickle.APPEND[0]: load_append,
        pickle.SETITEMS[0]: load_setitems,
        pickle.SETITEM[0]: load_setitem,
        pickle.ADDITEMS[0]: load_additems,
    }
