"""Checkpoints on disk: our own folder, written and read, and every other released format, read.

config.json          {"format": "hubert-flows", "architecture": "HuBERT" | "HuBERTPretrain",
                      "num_classes": K (HuBERTPretrain only), "model": {the fields of ModelConfig}}
model.safetensors    the weights in float32 under the names of the module's state dict; those of the encoder start
                     with "hubert." where there is a head

`hubert.model.formats.layouts` knows the names of other programs' weights, `hubert.model.formats.dimensions` what their
models are made of, `hubert.model.formats.declared` what their configurations say, and `hubert.model.formats.export` writes
their formats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hubert.core.errors import DataError
from hubert.core.recognise import is_safetensors, recognise
from hubert.model.formats.declared import fairseq_settings, fairseq_symbols, transformers_settings
from hubert.model.formats.dimensions import infer_config
from hubert.model.formats.files import (
    CONFIG_FILE,
    PREPROCESSOR_FILE,
    WEIGHT_FILES,
    WEIGHTS_FILE,
    indexed_files,
    lies_in_folder,
    read_object,
    read_settings,
    read_weight_map,
    refuse_part,
    weight_files,
)
from hubert.model.formats.layouts import (
    ENCODER,
    HEAD,
    OWN,
    Converted,
    convert,
    detect,
    list_names,
    select_classes,
    unwrap,
)
from hubert.settings.model import ModelConfig
from hubert.settings.sections import explain


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


# Reading --------------------------------------------------------------------------------------------------------------


def read_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    normalize_waveform: bool | None = None,
) -> Pretrained:
    """Read a checkpoint: a folder of ours or of transformers, a file of weights of any known layout, a Hub id, a URL.

    `normalize_waveform` is what the caller knows of the model's training; None: as the checkpoint's files say.

    Raises:
        ConfigError, TransientError: from `hubert.model.formats.hub.locate`, for a name that is no path here.
        DataError: the folder or file is missing, damaged or something else.
    """
    path = Path(name).expanduser()
    if isinstance(name, str) and not path.exists():
        from hubert.model.formats.hub import locate

        path = locate(name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    if not path.exists():
        raise DataError(
            f"{name}: expected a checkpoint folder with {CONFIG_FILE} and {WEIGHTS_FILE}, or a file of weights (.pt, .pth, "
            ".bin, .safetensors); found nothing there"
        )
    if path.is_dir() or lies_in_folder(path):
        found = read_folder(path, str(name), quiet=normalize_waveform is not None)
    else:
        found = read_file(path, str(name))
    if normalize_waveform is None:
        return found
    return replace(found, config=found.config.model_copy(update={"normalize_waveform": normalize_waveform}))


def read_folder(checkpoint: Path, where: str, *, quiet: bool = False) -> Pretrained:
    """Read a folder with a config.json of ours or of transformers, or with weights only.

    Args:
        checkpoint: the folder, or the one of its files of weights to read.
        where: for messages.
        quiet: do not warn where preprocessor_config.json's word on normalisation is not followed.

    Raises:
        DataError: one of the files is missing, damaged or something else, config.json asks for a program, or contradicts the
            weights.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    content, files = read_settings(checkpoint), weight_files(checkpoint)
    if content is None and not files:
        raise DataError(
            f"{folder / CONFIG_FILE}: expected a JSON object, found no file; the folder is no checkpoint. A file of weights of "
            "another name is given by its own path"
        )
    content = content or {}
    own = own_config(folder, content) if content.get("format") == OWN else None
    if not files:
        raise DataError(
            f"{folder / WEIGHTS_FILE}: expected the weights of a checkpoint, found none of {', '.join(WEIGHT_FILES)}"
        )
    weights = files[0]
    if own is not None:
        return _read_own(where, weights, own, content.get("num_classes"))
    if "model_type" not in content and "hubert_flows" not in content:  # such as minimal_hubert's {"size": "base"}
        return read_file(weights, where)
    preprocessor = read_object(folder / PREPROCESSOR_FILE)
    settings = transformers_settings(content, preprocessor, folder / CONFIG_FILE, quiet=quiet)
    return _assemble(where, convert(_read_tensors(weights), weights), settings)


def own_config(folder: Path, content: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration of a model of ours, out of the content of its config.json.

    Raises:
        DataError: it is none.
    """
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
    refuse_part(path)
    if path.name.endswith(".index.json"):
        return _assemble(where, convert(_read_tensors(path), path), {})
    content = _read_content(path)
    weights = unwrap(content, path)
    # Before the names are looked at: what a configuration says is the truer reason why a model is refused.
    settings = fairseq_settings(content, path) if detect(weights)[0].name == "fairseq" else {}
    return _assemble(where, convert(weights, path), settings, fairseq_symbols(content))


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
    content = _read_parts(path) if path.name.endswith(".index.json") else _read_content(path)
    return unwrap(content, path)


def _read_parts(index: Path) -> dict[str, Tensor]:
    """Read the files that an index names.

    Raises:
        DataError: a file holds other weights than the index says; names them.
    """
    listed = read_weight_map(index)
    weights: dict[str, Tensor] = {}
    for file in indexed_files(index):
        part = _read_content(file)
        wanted = {name for name, holder in listed.items() if holder == file.name}
        lost, surplus = sorted(wanted - set(part)), sorted(set(part) - wanted)
        if lost or surplus:
            raise DataError(
                f"{file}: expected the {len(wanted)} weights that {index.name} lists for it, found {len(part)}: "
                f"{list_names('missing', lost)}; {list_names('not listed', surplus)}. Likely cause: parts of different models or "
                "downloads. Fix: fetch the index and all its parts again"
            )
        weights |= part
    return weights


def _read_content(path: Path) -> dict[str, Any]:
    """Read one file, whatever its suffix says: safetensors, or what `torch.save` wrote."""
    from hubert.model.formats.unpickle import is_torch_file, load_torch

    if not is_safetensors(path) and (path.suffix != ".safetensors" or is_torch_file(path)):
        return load_torch(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        what = recognise(path)
        said = f"it is {what}" if what else f"{error}. Likely cause: a broken download. Fix: fetch it again"
        raise DataError(f"{path}: expected weights as safetensors writes them; {said}") from error


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
