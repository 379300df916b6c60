"""Files of a checkpoint folder: their names, which of them hold the weights, and our own format written."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from hubert.core.errors import DataError
from hubert.core.files import atomic_write, read_json, write_json
from hubert.core.recognise import recognise
from hubert.model.formats.layouts import OWN
from hubert.settings.model import ModelConfig

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
WEIGHTS_FILE = "model.safetensors"
TORCHAUDIO_FILE = "model.pt"  # what we export for torchaudio
WEIGHT_FILES = (
    WEIGHTS_FILE,
    f"{WEIGHTS_FILE}.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    TORCHAUDIO_FILE,
)


def write_folder(folder: str | Path, model: nn.Module, config: ModelConfig, num_classes: int | None = None) -> None:
    """Write a model's configuration and weights; each file is written whole or not at all, the configuration last."""
    folder = Path(folder)
    write_weights(folder / WEIGHTS_FILE, model.state_dict())
    head = {} if num_classes is None else {"num_classes": num_classes}
    architecture = {"format": OWN, "architecture": "HuBERT" if num_classes is None else "HuBERTPretrain"}
    write_json(folder / CONFIG_FILE, {**architecture, **head, "model": config.model_dump(mode="json")})


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights as safetensors; the file is written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    with atomic_write(path) as temporary:
        save_file(content, temporary, metadata={"format": "pt"})


def weight_files(checkpoint: Path) -> list[Path]:
    """Return the files that a checkpoint's weights are read from: one, or an index and the files that it names.

    This is the one rule of what is loaded: `read_pretrained` reads these files and `hubert.model.weights` hashes them.

    Args:
        checkpoint: a folder, of which the file counts that its config.json names (`weights`, in a folder for torchaudio:
            files of an older export may lie beside), else the first of `WEIGHT_FILES` that is there; or a file, which is
            taken as it is.

    Returns:
        The files; none if the folder has none of `WEIGHT_FILES`.

    Raises:
        DataError: config.json is damaged or asks for a program; the index is damaged, or a file that it names is missing; one
            part of several was named.
    """
    content = read_settings(checkpoint) or {}
    chosen = checkpoint
    if checkpoint.is_dir():
        named = content.get("weights")
        names = [named, *WEIGHT_FILES] if named in WEIGHT_FILES else WEIGHT_FILES
        chosen = checkpoint / next((name for name in names if (checkpoint / name).is_file()), WEIGHTS_FILE)
    if not chosen.is_file():
        return []
    refuse_part(chosen)
    return [chosen, *indexed_files(chosen)]


def refuse_part(file: Path) -> None:
    """Refuse one part of weights that were written in several: its layers alone would pass for a smaller model.

    Raises:
        DataError: the file's name says that it is one.
    """
    match = re.search(r"-(\d{5})-of-(\d{5})\.\w+$", file.name)
    if match and int(match[2]) > 1:
        raise DataError(
            f"{file}: expected all weights of a model; by its name this is part {int(match[1])} of {int(match[2])}. Fix: give "
            "the folder with all parts, or the file that ends in .index.json"
        )


def refuse_programs(folder: Path, where: str) -> None:
    """Refuse a folder whose configuration asks for classes of its own, which are programs in it.

    Raises:
        DataError: `auto_map` in its config.json; names the classes.
    """
    classes = (read_json(folder / CONFIG_FILE) or {}).get("auto_map")
    if classes:
        raise DataError(
            f"{where}: its config.json asks for code of its own (auto_map: {json.dumps(classes)[:200]}), which is "
            "never run here. Likely cause: the model is no plain HuBERT. Fix: if it is one, copy its weights and config.json "
            "to a folder, remove `auto_map` there, and give that folder"
        )


def lies_in_folder(file: Path) -> bool:
    """Return True if a file of weights is described by the config.json beside it."""
    return file.name in WEIGHT_FILES and (file.parent / CONFIG_FILE).exists()


def read_settings(checkpoint: Path) -> dict[str, Any] | None:
    """Return the content of a checkpoint's config.json; None if it has none.

    Raises:
        DataError: it is no JSON object, or asks for a program.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if not (folder / CONFIG_FILE).exists() or (folder != checkpoint and not lies_in_folder(checkpoint)):
        return None
    content = read_object(folder / CONFIG_FILE)
    refuse_programs(folder, str(folder))
    return content


def read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object of a checkpoint's folder; None if there is no such file.

    Raises:
        DataError: it is something else.
    """
    content = read_json(path)
    if content is None and path.exists():
        raise DataError(f"{path}: expected a JSON object; it is {recognise(path) or 'something else, or damaged'}")
    return content


def indexed_files(path: Path) -> list[Path]:
    """Return the files that an index names; none for another file.

    Raises:
        DataError: the index is damaged, points out of its folder or to an index, or a file that it names is missing.
    """
    if not path.name.endswith(".index.json"):
        return []
    files = [path.parent / name for name in sorted(set(read_weight_map(path).values()))]
    for file in files:
        if file.suffix == ".json" or not file.is_file():
            raise DataError(f"{file}: expected a file of weights, which {path.name} names, found none; copy all parts")
    return files


def read_weight_map(index: Path) -> dict[str, str]:
    """Return which file holds each weight, as an index says.

    Raises:
        DataError: it is damaged, or points out of its folder.
    """
    names = (read_object(index) or {}).get("weight_map")
    if not isinstance(names, dict) or not names or any(Path(str(name)).name != name for name in names.values()):
        raise DataError(f"{index}: expected a weight_map from names to files beside it")
    return names
