"""What a released checkpoint's model is made of: its dimensions from the weights, the rest from the files beside them.

Weights say most: convolutions, widths, depth, the kind of normalisation. What they cannot say comes from what the program
wrote beside them (`hubert.model.formats.declared`), which must agree with the weights about the rest; failing that, from the
published models:

    heads             12, 16, 16 for widths 768, 1024, 1280; else 64 dimensions each
    layer_norm_first  as in all published models, if the extractor has LayerNorms
    normalisation     of the waveform: likewise
    regularisation    what fairseq pretrains the size with: an export for fine-tuning says nothing about pretraining
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from hubert.core.errors import DataError
from hubert.model.formats.declared import Settings, their_names
from hubert.settings.model import SIZES, ConvLayers, ModelConfig, conv_stack
from hubert.settings.sections import explain

_HEADS = {config.dim: config.num_heads for name, config in SIZES.items() if name != "tiny"}
_HEAD_DIM = 64


def infer_config(
    weights: Mapping[str, Tensor], settings: Mapping[str, Any], where: str | Path = "state dict"
) -> ModelConfig:
    """Return the configuration of an encoder.

    Args:
        weights: of the encoder, under our names.
        settings: fields of `ModelConfig` that a configuration says.
        where: for messages.

    Raises:
        DataError: the dimensions are not a HuBERT's, the configuration says others than the weights have, or the number of
            heads is not known.
    """
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    for name, shape in shapes.items():
        if len(shape) != (3 if ".conv." in name and not name.endswith(".bias") else 2 if _is_matrix(name) else 1):
            raise DataError(
                f"{where}: {name} has shape {shape}, which no HuBERT has; the weights are packed or damaged"
            )
    count = _count_layers(shapes, "extractor.layers.")
    convs = [shapes[f"extractor.layers.{index}.conv.weight"] for index in range(count)]
    width, dim = convs[-1][0], shapes["projection.bias"][0]
    pos_conv = shapes["transformer.pos_conv.conv.parametrizations.weight.original1"]
    has_layer_norm = "extractor.layers.1.norm.weight" in shapes
    measured: Settings = {
        "conv_layers": tuple((shape[0], shape[2]) for shape in convs),  # of which a stride is known later
        "conv_bias": "extractor.layers.0.conv.bias" in shapes,
        "extractor_norm": "layer" if has_layer_norm else "group",
        "dim": dim,
        "num_layers": _count_layers(shapes, "transformer.layers."),
        "ffn_dim": shapes["transformer.layers.0.ffn_in.bias"][0],
        "pos_conv_kernel": pos_conv[2],
        "pos_conv_groups": dim // max(1, pos_conv[1]),
    }
    if shapes["projection.weight"] != (dim, width):
        raise DataError(f"{where}: projection.weight has shape {shapes['projection.weight']}, expected {(dim, width)}")
    _check_agreement(measured, settings, where)
    measured["conv_layers"] = _add_strides(convs, settings, where)
    known: Settings = {
        "num_heads": _HEADS.get(dim) or (None if dim % _HEAD_DIM else dim // _HEAD_DIM),
        "layer_norm_first": has_layer_norm,
        "normalize_waveform": has_layer_norm,
    }
    known |= {name: value for name, value in settings.items() if value is not None}
    if known["num_heads"] is None:
        raise DataError(
            f"{where}: the weights do not say how many heads a width of {dim} has (no published width, and no multiple of "
            f"{_HEAD_DIM}), and there is no configuration beside them. Fix: HuBERT(ModelConfig(...)).load_state_dict(weights)"
        )
    published = _published(measured)
    try:
        return ModelConfig.model_validate(published.model_dump() | known | measured)
    except ValidationError as error:
        raise DataError(f"{where}: these are not the dimensions of a HuBERT: {explain(error)}") from error


def _check_agreement(measured: Mapping[str, Any], settings: Mapping[str, Any], where: str | Path) -> None:
    """Refuse weights that are not those which a configuration describes, such as those of a model that lost a part.

    Raises:
        DataError: they differ; names each field with both values.
    """
    said = {name: settings.get(name) for name in measured}
    if said["conv_layers"]:
        said["conv_layers"] = tuple((channels, kernel) for channels, kernel, _ in said["conv_layers"])
    differing = [name for name, value in said.items() if value is not None and value != measured[name]]
    if differing:
        both = "; ".join(
            f"{name} ({their_names(name)}) is {said[name]} in the configuration and {measured[name]} in the weights"
            for name in differing
        )
        raise DataError(
            f"{where}: the configuration contradicts the weights: {both}. Likely cause: a part of the weights was lost, or "
            "the files belong to different models. Fix: fetch both again from one place"
        )


def _published(measured: Mapping[str, Any]) -> ModelConfig:
    """Return the published size of these dimensions; for others, base or large by their kind."""
    for config in (SIZES["base"], SIZES["large"], SIZES["xlarge"]):
        if all(measured[name] == getattr(config, name) for name in ("extractor_norm", "dim", "num_layers")):
            return config
    return SIZES["large" if measured["extractor_norm"] == "layer" else "base"]


def _is_matrix(name: str) -> bool:
    return name.endswith(".weight") and "norm." not in name


def _count_layers(names: Mapping[str, Any], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


def _add_strides(convs: list[tuple[int, ...]], settings: Mapping[str, Any], where: str | Path) -> ConvLayers:
    """Return (channels, kernel, stride) of each convolution; strides as given, else as every HuBERT has them."""
    kernels = [shape[2] for shape in convs]
    strides = settings.get("conv_layers") and [stride for *_, stride in settings["conv_layers"]]
    if not strides and kernels == [kernel for _, kernel, _ in conv_stack(1)]:
        strides = [stride for *_, stride in conv_stack(1)]
    if not strides or len(strides) != len(kernels):
        raise DataError(
            f"{where}: convolutions of {kernels} samples are not HuBERT's ({[kernel for _, kernel, _ in conv_stack(1)]}), "
            "and no configuration says their strides"
        )
    return tuple((shape[0], shape[2], stride) for shape, stride in zip(convs, strides, strict=True))
