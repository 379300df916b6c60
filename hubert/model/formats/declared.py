"""What the configurations beside other programs' weights say, in our terms, and which of it this model cannot compute.

transformers writes config.json and preprocessor_config.json; fairseq keeps `cfg` (`args` in old files) in the checkpoint,
s3prl `model_cfg` and `task_cfg`. What the weights say too is compared with them: `hubert.model.formats.dimensions`.
"""

import ast
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hubert.core.errors import DataError
from hubert.core.frames import FRAME_RATE, SAMPLE_RATE
from hubert.core.paths import PROJECT
from hubert.model.formats.released import BATCH_NORM_25_HZ, trained_normalized
from hubert.settings.model import ModelConfig
from hubert.settings.sections import explain

Settings = dict[str, Any]

# Our names, and those of transformers and fairseq.
_TRANSFORMERS = {
    "num_layers": "num_hidden_layers",
    "dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "conv_bias": "conv_bias",
    "extractor_norm": "feat_extract_norm",
    "layer_norm_first": "do_stable_layer_norm",
    "layer_norm_eps": "layer_norm_eps",
    "pos_conv_kernel": "num_conv_pos_embeddings",
    "pos_conv_groups": "num_conv_pos_embedding_groups",
}
_FAIRSEQ = {
    "num_layers": "encoder_layers",
    "dim": "encoder_embed_dim",
    "ffn_dim": "encoder_ffn_embed_dim",
    "num_heads": "encoder_attention_heads",
    "conv_bias": "conv_bias",
    "layer_norm_first": "layer_norm_first",
    "pos_conv_kernel": "conv_pos",
    "pos_conv_groups": "conv_pos_groups",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "input_dropout": "dropout_input",
    "layerdrop": "encoder_layerdrop",
    "feature_grad_mult": "feature_grad_mult",
    "logit_temperature": "logit_temp",
}
_EXTRACTOR_MODES = {"default": "group", "layer_norm": "layer"}

# What this model computes with; any other value makes another model.
_TRANSFORMERS_FIXED = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
    "add_adapter": False,
}
_FAIRSEQ_FIXED = {
    "activation_fn": "gelu",
    "layer_type": "transformer",
    "pos_conv_depth": 1,
    "conv_pos_batch_norm": False,
    "attn_type": "",
    "pos_enc_type": "abs",
}
_OTHER_MODELS = re.compile(r"wav2vec|w2v|data2vec|wavlm|unispeech|spidr|dinosr|bestrq", re.IGNORECASE)


def _refuse_other_values(config: Mapping[str, Any], fixed: Mapping[str, Any], where: str | Path) -> None:
    for name, expected in fixed.items():
        found = config.get(name)
        if found is None or found == expected:
            continue
        cause = f": {BATCH_NORM_25_HZ}" if name == "conv_pos_batch_norm" else ""
        raise DataError(f"{where}: {name} = {found!r}; this model computes with {name} = {expected!r} only{cause}")


def _refuse_other_rate(rate: Any, name: str, where: str | Path) -> None:
    if isinstance(rate, int | float) and rate != SAMPLE_RATE:
        raise DataError(f"{where}: {name} = {rate}: the model is for audio at {rate} Hz; here it is {SAMPLE_RATE} Hz")


# transformers ---------------------------------------------------------------------------------------------------------


def transformers_settings(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, where: str | Path, *, quiet: bool = False
) -> Settings:
    """Return what transformers' config.json and preprocessor_config.json say.

    `do_normalize` counts for models with LayerNorms in the extractor, and for the base models that are known to have been
    trained so (`hubert.model.formats.released`). For others of the base kind it tells nothing: it is the default of
    transformers' feature extractor. `facebook/hubert-base-ls960` has it true, and fairseq pretrained that model on samples
    as they are (`task.normalize: false`). There the first layer's GroupNorm takes offset and scale away again, but for its
    eps: with random weights the outputs differ by 0.2 % at the usual level (RMS 0.08), and by nearly half in near silence
    (RMS 0.002). Where it is not followed and the training is not known, a warning says so. What we exported says itself
    which it is.

    Args:
        config: content of config.json.
        preprocessor: content of preprocessor_config.json; None if there is none.
        where: path of config.json; the name of the model may stand in it.
        quiet: leave the warning out.

    Raises:
        DataError: another kind of model, one with parts that HuBERT does not have here, or a configuration that contradicts
            itself.
    """
    kind = config.get("model_type", "hubert")
    if kind != "hubert":
        raise DataError(f"{where}: expected a HuBERT (model_type = 'hubert'), found model_type = {kind!r}")
    _refuse_other_values(config, _TRANSFORMERS_FIXED, where)
    _refuse_other_rate((preprocessor or {}).get("sampling_rate"), "preprocessor_config.json: sampling_rate", where)
    exported = _exported(config, where)
    found = {ours: config.get(theirs) for ours, theirs in _TRANSFORMERS.items()}
    found = {"conv_layers": _transformers_convs(config, where)} | {
        name: value for name, value in found.items() if value is not None
    }
    found = {name: value for name, value in found.items() if value is not None}
    if differing := [name for name in found if name in exported and found[name] != exported[name]]:
        name = differing[0]
        theirs = _TRANSFORMERS.get(name, "conv_dim, conv_kernel, conv_stride")
        raise DataError(
            f"{where}: {theirs} = {found[name]}, and hubert_flows.{name} = {exported[name]} in the same file: it was edited. "
            "Fix: write the same value in both places"
        )
    if exported:
        return exported | found
    told = (preprocessor or {}).get("do_normalize")
    if found.get("extractor_norm") != "layer":
        told = _base_normalization(
            told, f"{Path(where).absolute()} {config.get('_name_or_path', '')}", where, quiet=quiet
        )
        told = told if "extractor_norm" in found else None  # unknown: the weights' kind decides
    return found if told is None else found | {"normalize_waveform": told}


def _base_normalization(told: Any, names: str, where: str | Path, *, quiet: bool) -> bool:
    """Return whether a base model was trained on normalised audio, with a warning where the file's word is not followed."""
    known = trained_normalized(names)
    if known is None and told and not quiet:
        warnings.warn(
            f"{where}: preprocessor_config.json says do_normalize = true, which is not followed: transformers writes it for base "
            "models that were trained on samples as they are, too (facebook/hubert-base-ls960). If this model was trained on "
            "normalised audio, say normalize_waveform = true (False: samples as they are, without this warning): "
            "HuBERT.from_pretrained(..., normalize_waveform=True), or features.normalize_waveform for a teacher",
            skip_file_prefixes=(str(PROJECT / "hubert"),),  # the line that is shown is the caller's
        )
    return bool(known and told is not False)


def _transformers_convs(config: Mapping[str, Any], where: str | Path) -> tuple[tuple[Any, ...], ...] | None:
    names = ("conv_dim", "conv_kernel", "conv_stride")
    values: list[Any] = [config.get(name) for name in names]
    if not all(isinstance(value, list | tuple) for value in values):
        return None
    lengths = {name: len(value) for name, value in zip(names, values, strict=True)}
    if "num_feat_extract_layers" in config:
        lengths["num_feat_extract_layers"] = config["num_feat_extract_layers"]
    if len(set(lengths.values())) > 1:
        raise DataError(f"{where}: expected as many values in each of {', '.join(names)}, found {lengths}")
    return tuple(zip(*values, strict=True))


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


# fairseq --------------------------------------------------------------------------------------------------------------


def fairseq_settings(content: Mapping[str, Any], where: str | Path = "checkpoint") -> Settings:
    """Return what the configuration inside a checkpoint of fairseq (`cfg`, or `args` of old ones) or s3prl says.

    All of it is of the pretraining, so its regularisation counts too. A fine-tuned model keeps that one in `w2v_args`.

    Raises:
        DataError: another kind of model, or one with parts that HuBERT does not have here.
    """
    cfg = _plain(content.get("cfg")) or _plain(content.get("args"))
    cfg = _plain(_plain(cfg.get("model")).get("w2v_args")) or _plain(cfg.get("w2v_args")) or cfg
    model = _plain(content.get("model_cfg")) or _plain(cfg.get("model")) or cfg
    task = _plain(content.get("task_cfg")) or _plain(cfg.get("task")) or cfg
    kind = model.get("_name") or model.get("arch")
    if isinstance(kind, str) and _OTHER_MODELS.search(kind):
        raise DataError(f"{where}: expected a HuBERT, found a model of fairseq's kind {kind!r} (cfg.model._name)")
    where = f"{where}: its configuration (cfg)"
    _refuse_other_values({name: _text(model.get(name)) for name in _FAIRSEQ_FIXED}, _FAIRSEQ_FIXED, where)
    _refuse_other_rate(task.get("sample_rate"), "task.sample_rate", where)
    for name, labels in (("model", model.get("label_rate")), ("task", task.get("label_rate"))):
        if isinstance(labels, int | float) and labels > 0 and labels % FRAME_RATE:
            raise DataError(
                f"{where}: {name}.label_rate = {labels:g}: the model was trained on {labels:g} labels a second, no whole number "
                f"for each of {FRAME_RATE} frames; models of other frames than 20 ms (mHuBERT at 25 Hz) cannot be loaded"
            )
    settings = {ours: model.get(theirs) for ours, theirs in _FAIRSEQ.items()}
    settings |= {"normalize_waveform": task.get("normalize")}
    found: Settings = {name: value for name, value in settings.items() if isinstance(value, bool | int | float)}
    mode = _text(model.get("extractor_mode"))
    if mode is not None:
        if mode not in _EXTRACTOR_MODES:
            raise DataError(f"{where}: extractor_mode = {mode!r}; expected one of {', '.join(_EXTRACTOR_MODES)}")
        found["extractor_norm"] = _EXTRACTOR_MODES[mode]
    convs = model.get("conv_feature_layers")
    return found if convs is None else found | {"conv_layers": _fairseq_convs(convs, where)}


def _text(value: Any) -> Any:
    """Return an enum that was read as another type than a string as the string that fairseq compares it with."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _fairseq_convs(value: Any, where: str) -> tuple[tuple[int, int, int], ...]:
    """Return the layers that `conv_feature_layers` says, such as "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"."""
    try:
        layers = _evaluate(ast.parse(value.strip(), mode="eval").body) if isinstance(value, str) else value
        return tuple((int(channels), int(kernel), int(stride)) for channels, kernel, stride in layers)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(
            f"{where}: conv_feature_layers = {str(value)[:200]!r}; expected fairseq's list of (channels, kernel, stride)"
        ) from error


def _evaluate(node: ast.expr) -> Any:
    """Return the value of lists and tuples of integers, joined by + and repeated by *; nothing else is an expression here."""
    match node:
        case ast.Constant(value=int()):
            return node.value
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_evaluate(part) for part in parts]
        case ast.BinOp(op=ast.Add()):
            left, right = _evaluate(node.left), _evaluate(node.right)
            if isinstance(left, list) and isinstance(right, list):
                return left + right
        case ast.BinOp(op=ast.Mult()):
            parts, times = _evaluate(node.left), _evaluate(node.right)
            if isinstance(parts, list) and isinstance(times, int) and len(parts) * times <= _MOST_LAYERS:
                return parts * times
    raise ValueError(f"not a list of layers: {ast.unparse(node)[:80]}")


_MOST_LAYERS = 100


def fairseq_symbols(content: Mapping[str, Any]) -> list[str] | None:
    """Return the entries of the one dictionary of a checkpoint of fairseq or s3prl; None if there is none, or several."""
    dictionaries = content.get("dictionaries_symbols") or _plain(content.get("task_state")).get("dictionaries")
    if not isinstance(dictionaries, list | tuple) or len(dictionaries) != 1:
        return None
    (dictionary,) = dictionaries
    symbols: Sequence[Any] | Any = (
        dictionary if isinstance(dictionary, list | tuple) else _plain(dictionary).get("symbols")
    )
    return [str(symbol) for symbol in symbols] if isinstance(symbols, list | tuple) else None


def _plain(value: Any) -> Mapping[str, Any]:
    """Return a configuration as a mapping, whether it was one, or a Namespace of somebody who unpickled it himself."""
    return value if isinstance(value, Mapping) else getattr(value, "__dict__", {})


def their_names(name: str) -> str:
    """Return what transformers and fairseq call a field of ours."""
    if name == "conv_layers":
        return "conv_dim, conv_kernel, conv_stride; conv_feature_layers"
    if name == "extractor_norm":
        return "feat_extract_norm; extractor_mode"
    return "; ".join(dict.fromkeys(names[name] for names in (_TRANSFORMERS, _FAIRSEQ) if name in names))
