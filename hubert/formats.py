"""Checkpoints on disk. Our own is a folder with two files:

config.json          {"format": "hubert-flows", "architecture": "HuBERT" | "HuBERTPretrain",
                      "num_classes": K (HuBERTPretrain only), "model": {the fields of ModelConfig}}
model.safetensors    the weights in float32 under the names of the module's state dict; those of the encoder start
                     with "hubert." where there is a head
"""

import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hubert.config import explain
from hubert.errors import ConfigError, DataError
from hubert.paths import atomic_write, read_json, write_json
from hubert.sizes import ModelConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_FORMAT = "hubert-flows"
_ENCODER = "hubert."
_HEAD = ("mask_embedding", "final_projection.", "class_embeddings")


def write_folder(folder: str | Path, model: nn.Module, config: ModelConfig, num_classes: int | None = None) -> None:
    """Write a model's configuration and weights; each file is written whole or not at all, the configuration last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_write(folder / WEIGHTS_FILE) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    head = {} if num_classes is None else {"num_classes": num_classes}
    architecture = {"format": _FORMAT, "architecture": "HuBERT" if num_classes is None else "HuBERTPretrain"}
    write_json(folder / CONFIG_FILE, {**architecture, **head, "model": config.model_dump(mode="json")})


def read_folder(folder: str | Path) -> tuple[ModelConfig, int | None, dict[str, Tensor]]:
    """Return configuration, number of classes (None without a head) and weights of a folder of ours.

    Raises:
        ConfigError: a Hub id or URL; this version loads folders.
        DataError: the folder or one of its files is missing, damaged or something else.
    """
    path = Path(folder)
    if not path.is_dir():
        name = str(folder)
        if "://" in name or (re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.is_dir()):
            raise ConfigError(
                f"{name} is no folder here; this version of hubert loads its own checkpoint folders only, "
                "not Hugging Face ids or URLs"
            )
        raise DataError(f"{name}: expected a checkpoint folder with {CONFIG_FILE} and {WEIGHTS_FILE}, found no folder")
    content = read_json(path / CONFIG_FILE)
    if content is None:
        raise DataError(
            f"{path / CONFIG_FILE}: expected a JSON object, found nothing readable; the folder is no checkpoint"
        )
    if content.get("format") != _FORMAT or not isinstance(content.get("model"), dict):
        raise DataError(
            f"{path / CONFIG_FILE}: expected a checkpoint of this project (format = {_FORMAT!r}), found format = "
            f"{content.get('format')!r}; checkpoints of other programs cannot be loaded by this version"
        )
    try:
        config = ModelConfig.model_validate(content["model"])
    except ValidationError as error:
        raise DataError(
            f"{path / CONFIG_FILE}: {explain(error)}; it was edited, or written by another version"
        ) from error
    try:
        weights = load_file(path / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path / WEIGHTS_FILE}: expected the weights of a checkpoint: {error}") from error
    num_classes = content.get("num_classes")
    return (
        config,
        None if num_classes is None else int(num_classes),
        {name: value.float() for name, value in weights.items()},
    )


def encoder_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's part of a checkpoint's weights, under the names that `HuBERT` has for them."""
    return {name.removeprefix(_ENCODER): value for name, value in weights.items() if not name.startswith(_HEAD)}


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
    """Return the released checkpoints by size: their Hugging Face id, fairseq URL and training data."""
    fairseq = "https://dl.fbaipublicfiles.com/hubert"
    return {
        "base": {
            "huggingface": "facebook/hubert-base-ls960",
            "fairseq": f"{fairseq}/hubert_base_ls960.pt",
            "data": "LibriSpeech, 960 hours",
        },
        "large": {
            "huggingface": "facebook/hubert-large-ll60k",
            "fairseq": f"{fairseq}/hubert_large_ll60k.pt",
            "data": "Libri-Light, 60,000 hours",
        },
        "xlarge": {
            "huggingface": "facebook/hubert-xlarge-ll60k",
            "fairseq": f"{fairseq}/hubert_xtralarge_ll60k.pt",
            "data": "Libri-Light, 60,000 hours",
        },
    }
