"""What a released checkpoint's model is made of: its dimensions from the weights, the rest from the files beside them.

Weights say most: convolutions, widths, depth, the kind of normalisation. What they cannot say comes from what the program
wrote beside them (`transformers_settings`, `fairseq_settings`); failing that, from the published models:

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
from hubert.settings.model import SIZES, ConvLayers, ModelConfig, conv_stack
from hubert.settings.sections import explain

_HEADS = {config.dim: config.num_heads for name, config in SIZES.items() if name != "tiny"}
_HEAD_DIM = 64

Settings = dict[str, Any]


def infer_config(
    weights: Mapping[str, Tensor], settings: Mapping[str, Any], where: str | Path = "state dict"
) -> ModelConfig:
    """Return the configuration of an encoder.

    Args:
        weights: of the encoder, under our names.
        settings: fields of `ModelConfig` that are known from elsewhere; what the weights say themselves wins.
        where: for messages.

    Raises:
        DataError: the dimensions are not a HuBERT's, or the number of heads is not known.
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
        "conv_layers": _add_strides(convs, settings, where),
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


# What programs write beside the weights -------------------------------------------------------------------------------


def transformers_settings(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, where: str | Path
) -> Settings:
    """Return what transformers' config.json and preprocessor_config.json say and weights cannot.

    `do_normalize` counts for models with LayerNorms in the extractor only. For the base kind it is the default of
    transformers' feature extractor and tells nothing: `facebook/hubert-base-ls960` has it true, and fairseq pretrained
    that model on samples as they are (`task.normalize: false`). There the first layer's GroupNorm takes offset and scale
    away again, but for its eps: with random weights the outputs differ by 0.2 % at the usual level (RMS 0.08), and by
    nearly half in near silence (RMS 0.002). What we exported says itself which it is.

    Raises:
        DataError: another kind of model, or one with parts that HuBERT does not have here.
    """
    kind = config.get("model_type", "hubert")
    if kind != "hubert":
        raise DataError(f"{where}: expected a HuBERT (model_type = 'hubert'), found model_type = {kind!r}")
    fixed = {
        "hidden_act": "gelu",
        "feat_extract_activation": "gelu",
        "feat_proj_layer_norm": True,
        "conv_pos_batch_norm": False,
    }
    for name, expected in fixed.items():
        if config.get(name, expected) != expected:
            raise DataError(f"{where}: {name} = {config[name]!r}; this model computes with {name} = {expected!r} only")
    convs = [config.get(name) for name in ("conv_dim", "conv_kernel", "conv_stride")]
    is_base = config.get("feat_extract_norm", "group") == "group"
    settings = _exported(config, where)
    found = {
        "conv_layers": tuple(zip(*convs, strict=False)) if all(isinstance(values, list) for values in convs) else None,
        "num_heads": config.get("num_attention_heads"),
        "layer_norm_first": config.get("do_stable_layer_norm"),
        "layer_norm_eps": config.get("layer_norm_eps"),
        "normalize_waveform": settings.get("normalize_waveform", (preprocessor or {}).get("do_normalize")),
    }
    if is_base and not settings:
        found["normalize_waveform"] = False
    return settings | {name: value for name, value in found.items() if value is not None}


def _exported(config: Mapping[str, Any], where: str | Path) -> Settings:
    """Return our own configuration out of a config.json that `hubert.model.formats.export` wrote; nothing of another's."""
    if "hubert_flows" not in config:
        return {}
    try:
        return ModelConfig.model_validate(config["hubert_flows"]).model_dump()
    except ValidationError as error:
        raise DataError(
            f"{where}: hubert_flows: {explain(error)}; it was edited, or written by another version"
        ) from error


def fairseq_settings(content: Mapping[str, Any]) -> Settings:
    """Return what the configuration inside a checkpoint of fairseq (`cfg`, or `args` of old ones) or s3prl says.

    All of it is of the pretraining, so its regularisation counts too. A fine-tuned model keeps that one in `w2v_args`.
    """
    cfg = _plain(content.get("cfg"))
    fine_tuned = _plain(_plain(cfg.get("model")).get("w2v_args"))
    if fine_tuned:
        cfg = fine_tuned
    args = _plain(content.get("args"))
    model = _plain(content.get("model_cfg")) or _plain(cfg.get("model")) or args
    task = _plain(content.get("task_cfg")) or _plain(cfg.get("task")) or args
    keys = {
        "num_heads": "encoder_attention_heads",
        "layer_norm_first": "layer_norm_first",
        "dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "activation_dropout": "activation_dropout",
        "input_dropout": "dropout_input",
        "layerdrop": "encoder_layerdrop",
        "feature_grad_mult": "feature_grad_mult",
        "logit_temperature": "logit_temp",
    }
    settings = {ours: model.get(theirs) for ours, theirs in keys.items()} | {
        "normalize_waveform": task.get("normalize")
    }
    return {name: value for name, value in settings.items() if isinstance(value, bool | int | float)}


def fairseq_symbols(content: Mapping[str, Any]) -> list[str] | None:
    """Return the entries of the one dictionary of a checkpoint of fairseq or s3prl; None if there is none, or several."""
    dictionaries = content.get("dictionaries_symbols") or _plain(content.get("task_state")).get("dictionaries")
    if not isinstance(dictionaries, list | tuple) or len(dictionaries) != 1:
        return None
    (dictionary,) = dictionaries
    symbols = dictionary if isinstance(dictionary, list | tuple) else _plain(dictionary).get("symbols")
    return [str(symbol) for symbol in symbols] if isinstance(symbols, list | tuple) else None


def _plain(value: Any) -> Mapping[str, Any]:
    """Return a configuration as a mapping, whether it was one, or a Namespace of somebody who unpickled it himself."""
    return value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
