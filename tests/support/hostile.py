"""Files that run a program when they are unpickled, and classes of fairseq's names: for the tests of what refuses them."""

import contextlib
import os
import pickle  # noqa: TID251  (writes what the tests read)
import subprocess
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Call:
    """Pickles as a call: unpickling it calls the function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.parts = (function, args)

    def __reduce__(self) -> tuple:
        return self.parts


def payloads(marker: Path) -> dict[str, Call]:
    """Return objects whose unpickling creates the file `marker`, by different functions."""
    name = str(marker)
    return {
        "open": Call(open, name, "w"),
        "os.system": Call(os.system, f"touch '{name}'"),
        "eval": Call(eval, f"open({name!r}, 'w').close()"),
        "exec": Call(exec, f"open({name!r}, 'w').close()"),
        "subprocess": Call(subprocess.check_call, ["touch", name]),
        "path": Call(Path.touch, marker),
    }


@contextlib.contextmanager
def fairseq_classes() -> Iterator[types.SimpleNamespace]:
    """Give classes under fairseq's and omegaconf's names, as a machine has that writes such checkpoints; then remove them."""
    modules = {}

    def define(module: str, name: str) -> type:
        parts = module.split(".")
        for count in range(1, len(parts) + 1):
            path = ".".join(parts[:count])
            modules.setdefault(path, types.ModuleType(path))
        made = type(name, (), {"__module__": module})
        setattr(modules[module], name, made)
        return made

    found = types.SimpleNamespace(
        Dictionary=define("fairseq.data.dictionary", "Dictionary"),
        Config=define("fairseq.tasks.hubert_pretraining", "HubertPretrainingConfig"),
        DictConfig=define("omegaconf.dictconfig", "DictConfig"),
        ListConfig=define("omegaconf.listconfig", "ListConfig"),
        AnyNode=define("omegaconf.nodes", "AnyNode"),
        Metadata=define("omegaconf.base", "ContainerMetadata"),
    )
    sys.modules.update(modules)
    try:
        yield found
    finally:
        for name in modules:
            del sys.modules[name]


def dictionary(classes: types.SimpleNamespace, num_units: int, **more: Any) -> Any:
    """Return a dictionary as fairseq has it for units: four special symbols, then the units."""
    made = classes.Dictionary()
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *map(str, range(num_units))]
    vars(made).update(symbols=symbols, count=[1] * len(symbols), nspecial=4, unk_word="<unk>", **more)
    vars(made)["indices"] = {symbol: index for index, symbol in enumerate(symbols)}
    return made


def omegaconf(classes: types.SimpleNamespace, content: Any, parent: Any = None) -> Any:
    """Return plain data as omegaconf's containers, which know their parents, as the real ones do."""
    if isinstance(content, (dict, list)):
        made = (classes.DictConfig if isinstance(content, dict) else classes.ListConfig)()
        items = content.items() if isinstance(content, dict) else enumerate(content)
        inner = {key: omegaconf(classes, value, made) for key, value in items}
        metadata = classes.Metadata()
        vars(metadata).update(ref_type=Any, object_type=dict, key_type=Any, element_type=int, flags={"struct": True})
        vars(made).update(_metadata=metadata, _parent=parent, _flags_cache=None)
        vars(made)["_content"] = inner if isinstance(content, dict) else list(inner.values())
        return made
    made = classes.AnyNode()
    vars(made).update(_metadata=classes.Metadata(), _parent=parent, _val=content)
    return made


def fairseq_checkpoint(classes: types.SimpleNamespace, weights: Any, **in_dictionary: Any) -> dict[str, Any]:
    """Return what fairseq saves: weights among settings and dictionaries."""
    settings = {"model": {"encoder_layers": 2, "label_rate": 50.0}, "task": {"labels": ["km"], "data": None}}
    config = classes.Config()
    vars(config).update(labels=["km"], sample_rate=16_000)
    return {
        "args": Namespace(arch="hubert", encoder_layers=2, path=Path("/checkpoint")),
        "cfg": omegaconf(classes, settings),
        "model": weights,
        "task_state": {"dictionaries": [dictionary(classes, 12, **in_dictionary)], "config": config},
        "extra_state": {"epoch": 3},
    }


def unsafe_load(content: bytes) -> None:
    """Unpickle as Python does by default, whatever that runs."""
    with contextlib.suppress(Exception):
        pickle.loads(content)  # noqa: S301  (shows that a payload is one)
