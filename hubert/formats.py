"""Checkpoints on disk: our own folder, written and read, and every other released form, read.

config.json          {"format": "hubert-flows", "architecture": "HuBERT" | "HuBERTPretrain",
                      "num_classes": K (HuBERTPretrain only), "model": {the fields of ModelConfig}}
model.safetensors    the weights in float32 under the names of the module's state dict; those of the encoder start
                     with "hubert." where there is a head

`hubert.layouts` knows the names of other programs' weights, `hubert.dimensions` what their models are made of, and
`hubert.export` writes their formats.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hubert.config import explain
from hubert.dimensions import fairseq_settings, fairseq_symbols, infer_config, transformers_settings
from hubert.errors import DataError
from hubert.layouts import ENCODER, HEAD, OWN, Converted, convert, select_classes, unwrap
from hubert.paths import atomic_write, read_json, write_json
from hubert.sizes import ModelConfig

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


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint that was read.

    Args:
        where: the path or name that it was asked for by.
        config: of the model.
        encoder: its weights under our names.
        head: what there is of a head: all of `HEAD`, the mask embedding only, or nothing.
        layout: name of the layout that the weights had.
        symbols: entries of fairseq's dictionary, one per row of the class embeddings.
    """

    where: str
    config: ModelConfig
    encoder: dict[str, Tensor]
    head: dict[str, Tensor] = field(default_factory=dict)
    layout: str = OWN
    symbols: Sequence[str] | None = None

    def whole_head(self, num_classes: int | None) -> dict[str, Tensor] | None:
        """Return the head with one class embedding per unit (`layouts.class_rows`); None if there is no whole one."""
        if any(name not in self.head for name in HEAD):
            return None
        rows = self.head["class_embeddings"]
        classes = select_classes(rows, self.layout, symbols=self.symbols, num_classes=num_classes)
        return self.head | {"class_embeddings": classes}


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


# Reading --------------------------------------------------------------------------------------------------------------


def read_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Pretrained:
    """Read a checkpoint: a folder of ours or of transformers, a file of weights of any known layout, a Hub id, a URL.

    Raises:
        ConfigError, TransientError: from `hubert.hub.locate`, for a name that is no path here.
        DataError: the folder or file is missing, damaged or something else.
    """
    path = Path(name).expanduser()
    if isinstance(name, str) and not path.exists():
        from hubert.hub import locate

        path = locate(name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    if not path.exists():
        raise DataError(
            f"{name}: expected a checkpoint folder with {CONFIG_FILE} and {WEIGHTS_FILE}, or a file of weights (.pt, .pth, "
            ".bin, .safetensors); found nothing there"
        )
    if path.is_dir() or _lies_in_folder(path):
        return read_folder(path, str(name))
    return read_file(path, str(name))


def read_folder(checkpoint: Path, where: str) -> Pretrained:
    """Read a folder with a config.json of ours or of transformers, or with weights only.

    Args:
        checkpoint: the folder, or the one of its files of weights to read.
        where: for messages.

    Raises:
        DataError: one of the files is missing, damaged or something else, or config.json asks for a program.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    content, files = _read_settings(checkpoint), weight_files(checkpoint)
    if content is None and not files:
        raise DataError(
            f"{folder / CONFIG_FILE}: expected a JSON object, found no file; the folder is no checkpoint. A file of weights of "
            "another name is given by its own path"
        )
    content = content or {}
    own = _own_config(folder, content) if content.get("format") == OWN else None
    if not files:
        raise DataError(
            f"{folder / WEIGHTS_FILE}: expected the weights of a checkpoint, found none of {', '.join(WEIGHT_FILES)}"
        )
    weights = files[0]
    if own is not None:
        return _read_own(where, weights, own, content.get("num_classes"))
    if "model_type" not in content and "hubert_flows" not in content:  # such as minimal_hubert's {"size": "base"}
        return read_file(weights, where)
    settings = transformers_settings(content, read_json(folder / PREPROCESSOR_FILE), folder / CONFIG_FILE)
    return _assemble(where, convert(_read_tensors(weights), weights), settings)


def weight_files(checkpoint: Path) -> list[Path]:
    """Return the files that a checkpoint's weights are read from: one, or an index and the files that it names.

    This is the one rule of what is loaded: `read_pretrained` reads these files and `hubert.origins` hashes them.

    Args:
        checkpoint: a folder, of which the file counts that its config.json names (`weights`, in a folder for torchaudio:
            files of an older export may lie beside), else the first of `WEIGHT_FILES` that is there; or a file, which is
            taken as it is.

    Returns:
        The files; none if the folder has none of `WEIGHT_FILES`.

    Raises:
        DataError: config.json is damaged or asks for a program; the index is damaged, or a file that it names is missing.
    """
    content = _read_settings(checkpoint) or {}
    chosen = checkpoint
    if checkpoint.is_dir():
        named = content.get("weights")
        names = [named, *WEIGHT_FILES] if named in WEIGHT_FILES else WEIGHT_FILES
        chosen = checkpoint / next((name for name in names if (checkpoint / name).is_file()), WEIGHTS_FILE)
    return [chosen, *_indexed_files(chosen)] if chosen.is_file() else []


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


def _lies_in_folder(file: Path) -> bool:
    """Say whether a file of weights is described by the config.json beside it."""
    return file.name in WEIGHT_FILES and (file.parent / CONFIG_FILE).exists()


def _read_settings(checkpoint: Path) -> dict[str, Any] | None:
    """Return the content of a checkpoint's config.json; None if it has none.

    Raises:
        DataError: it is no JSON object, or asks for a program.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if not (folder / CONFIG_FILE).exists() or (folder != checkpoint and not _lies_in_folder(checkpoint)):
        return None
    content = read_json(folder / CONFIG_FILE)
    if content is None:
        raise DataError(
            f"{folder / CONFIG_FILE}: expected a JSON object, found nothing readable; the folder is no checkpoint"
        )
    refuse_programs(folder, str(folder))
    return content


def _indexed_files(path: Path) -> list[Path]:
    """Return the files that an index names; none for another file.

    Raises:
        DataError: the index is damaged, points out of its folder or to an index, or a file that it names is missing.
    """
    if not path.name.endswith(".index.json"):
        return []
    names = (read_json(path) or {}).get("weight_map")
    if not isinstance(names, dict) or not names or any(Path(str(name)).name != name for name in names.values()):
        raise DataError(f"{path}: expected a weight_map from names to files beside it")
    files = [path.parent / name for name in sorted(set(names.values()))]
    for file in files:
        if file.suffix == ".json" or not file.is_file():
            raise DataError(f"{file}: expected a file of weights, which {path.name} names, found none; copy all parts")
    return files


def _own_config(folder: Path, content: Mapping[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.model_validate(content.get("model"))
    except ValidationError as error:
        raise DataError(
            f"{folder / CONFIG_FILE}: {explain(error)}; it was edited, or written by another version"
        ) from error


def _read_own(where: str, path: Path, config: ModelConfig, num_classes: Any) -> Pretrained:
    weights = {name: value.float() for name, value in _read_tensors(path).items()}
    if num_classes is None:
        return Pretrained(where, config, weights)
    encoder = {name.removeprefix(ENCODER): value for name, value in weights.items() if name not in HEAD}
    head = {name: weights[name] for name in HEAD if name in weights}
    if len(head) < len(HEAD) or len(head["class_embeddings"]) != num_classes:
        raise DataError(
            f"{path}: expected a head of {num_classes} classes ({', '.join(HEAD)}), as {CONFIG_FILE} says; found "
            f"{ {name: tuple(value.shape) for name, value in head.items()} or 'none' }; the files belong to different models"
        )
    return Pretrained(where, config, encoder, head)


def read_file(path: Path, where: str) -> Pretrained:
    """Read a file of weights alone: safetensors, or what `torch.save` wrote, of which no code runs.

    Raises:
        DataError: damaged, something else, or of no known layout.
    """
    if path.name.endswith((".safetensors", ".index.json")):
        return _assemble(where, convert(_read_tensors(path), path), {})
    from hubert.unpickle import load_torch

    content = load_torch(path)
    converted = convert(unwrap(content, path), path)
    settings = fairseq_settings(content) if converted.layout == "fairseq" else {}
    return _assemble(where, converted, settings, fairseq_symbols(content))


def _assemble(
    where: str, converted: Converted, settings: Mapping[str, Any], symbols: Sequence[str] | None = None
) -> Pretrained:
    head = converted.head
    if "final_projection.bias" in head:
        settings = {**settings, "final_dim": head["final_projection.bias"].shape[0]}
    config = infer_config(converted.encoder, settings, where)
    return Pretrained(where, config, converted.encoder, head, converted.layout, symbols)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict from one file, or from the files that an index (transformers' shards) names."""
    if path.name.endswith(".index.json"):
        parts = [_read_tensors(file) for file in _indexed_files(path)]
        return {name: value for part in parts for name, value in part.items()}
    if path.suffix != ".safetensors":
        from hubert.unpickle import load_torch

        return unwrap(load_torch(path), path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: expected the weights of a checkpoint: {error}") from error


def fill(model: nn.Module, weights: Mapping[str, Tensor], where: str | Path) -> None:
    """Put weights into a model; they must be exactly the model's. A model on the meta device takes the tensors over.

    Raises:
        DataError: weights are missing, unknown or of another shape; names the first of them.
    """
    expected = {name: value.shape for name, value in model.state_dict().items()}
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected]
    wrong = [name for name in expected if name in weights and weights[name].shape != expected[name]]
    if missing or unknown or wrong:
        parts = [("missing", missing), ("unknown", unknown), ("of another shape", wrong)]
        found = "; ".join(f"{len(names)} {kind}, such as {names[0]}" for kind, names in parts if names)
        raise DataError(f"{where}: the weights do not fit {CONFIG_FILE}: {found}; the files belong to different models")
    model.load_state_dict(dict(weights), assign=True)


def known_huberts() -> dict[str, dict[str, str]]:
    """Return the released checkpoints by size: Hugging Face id, the URLs of fairseq and torchaudio, training data."""
    fairseq, torchaudio = "https://dl.fbaipublicfiles.com/hubert", "https://download.pytorch.org/torchaudio/models"
    large = "Libri-Light, 60,000 hours"
    return {
        size: {
            "huggingface": f"facebook/hubert-{size}-{data}",
            "fairseq": f"{fairseq}/hubert_{name}_{data}.pt",
            "torchaudio": f"{torchaudio}/hubert_fairseq_{size}_{data}.pth",
            "data": text,
        }
        for size, name, data, text in (
            ("base", "base", "ls960", "LibriSpeech, 960 hours"),
            ("large", "large", "ll60k", large),
            ("xlarge", "xtralarge", "ll60k", large),
        )
    }
