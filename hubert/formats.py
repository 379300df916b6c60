"""Checkpoints on disk: our own folder, written and read, and every other released form, read.

config.json          {"format": "hubert-flows", "architecture": "HuBERT" | "HuBERTPretrain",
                      "num_classes": K (HuBERTPretrain only), "model": {the fields of ModelConfig}}
model.safetensors    the weights in float32 under the names of the module's state dict; those of the encoder start
                     with "hubert." where there is a head

`hubert.layouts` knows the names of other programs' weights, `hubert.dimensions` what their models are made of, and
`hubert.export` writes their formats.
"""

import re
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
        ConfigError, TransientError: from `hubert.hub.locate`, for what is not here.
        DataError: the folder or file is missing, damaged or something else.
    """
    path = Path(name).expanduser()
    if not path.exists() and is_remote(name):
        from hubert.hub import locate

        path = locate(str(name), revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    if path.is_dir():
        return read_folder(path, str(name))
    if not path.is_file():
        raise DataError(
            f"{name}: expected a checkpoint folder with {CONFIG_FILE} and {WEIGHTS_FILE}, or a file of weights (.pt, .pth, "
            ".bin, .safetensors); found nothing there. A Hub id has one slash (facebook/hubert-base-ls960)"
        )
    if path.name in WEIGHT_FILES and (path.parent / CONFIG_FILE).exists():
        return read_folder(path.parent, str(name), path)
    return read_file(path, str(name))


def is_remote(name: str | Path) -> bool:
    """Say whether a name that is no path here is a URL or a Hub id: `owner/name`, of no owner that is a folder here."""
    if isinstance(name, Path):
        return False
    return "://" in name or (re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and not Path(name).parent.is_dir())


def read_folder(folder: Path, where: str, weights: Path | None = None) -> Pretrained:
    """Read a folder with a config.json of ours or of transformers, or with weights only.

    Args:
        folder: the folder.
        where: for messages.
        weights: the file of weights to read; None: the first of `WEIGHT_FILES` that is there.

    Raises:
        DataError: one of the files is missing, damaged or something else.
    """
    content = read_json(folder / CONFIG_FILE)
    named = (content or {}).get("weights")  # in a folder for torchaudio; files of an older export may lie beside
    names = [named, *WEIGHT_FILES] if named in WEIGHT_FILES else WEIGHT_FILES
    weights = weights or next((folder / name for name in names if (folder / name).exists()), None)
    if content is None and (weights is None or (folder / CONFIG_FILE).exists()):
        raise DataError(
            f"{folder / CONFIG_FILE}: expected a JSON object, found nothing readable; the folder is no checkpoint"
        )
    content = content or {}
    own = _own_config(folder, content) if content.get("format") == OWN else None
    if weights is None:
        raise DataError(
            f"{folder / WEIGHTS_FILE}: expected the weights of a checkpoint, found none of {', '.join(WEIGHT_FILES)}"
        )
    if own is not None:
        return _read_own(where, weights, own, content.get("num_classes"))
    if "model_type" not in content and "hubert_flows" not in content:  # such as minimal_hubert's {"size": "base"}
        return read_file(weights, where)
    settings = transformers_settings(content, read_json(folder / PREPROCESSOR_FILE), folder / CONFIG_FILE)
    return _assemble(where, convert(_read_tensors(weights), weights), settings)


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
        shards = (read_json(path) or {}).get("weight_map")
        if not isinstance(shards, dict) or any(Path(str(name)).name != name for name in shards.values()):
            raise DataError(f"{path}: expected a weight_map from names to files beside it")
        parts = [_read_tensors(path.parent / name) for name in sorted(set(shards.values()))]
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
