"""The names that programs give to HuBERT's weights, and the way from theirs to ours and back.

A layout is told by its names alone: whatever stands before them (`module.` of DistributedDataParallel, `model.` of
Lightning, `hubert.` of HubertForCTC, `w2v_encoder.w2v_model.` of fairseq's fine-tuned models) is found and taken off.
Everything here is a function of names and tensors; nothing reads a file.

    fairseq          also s3prl, whose converted checkpoints hold fairseq's state dict under `model_weight`
    torchaudio       Wav2Vec2Model, or HuBERTPretrainModel with `wav2vec2.`, `mask_generator.` and `logit_generator.`
    transformers     HubertModel, HubertForCTC and the other fine-tuned ones
    minimal_hubert   query, key and value are one matrix
    hubert-flows     our own
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubert.core.errors import DataError
from hubert.core.paths import PROJECT
from hubert.model.formats import FORMATS
from hubert.model.formats.released import foreign_part

OWN = FORMATS[0]
ENCODER = "hubert."  # before the encoder's names in a HuBERTPretrain
HEAD = ("mask_embedding", "final_projection.weight", "final_projection.bias", "class_embeddings")

_LAYER = "transformer.layers.{i}."
_ATTENTION = ("attention.query", "attention.key", "attention.value", "attention.output")
_MODULES = (
    "extractor.layers.{i}.conv",
    "extractor.layers.{i}.norm",
    "projection_norm",
    "projection",
    "transformer.pos_conv.conv",
    "transformer.norm",
    *(_LAYER + part for part in (*_ATTENTION, "attention_norm", "ffn_in", "ffn_out", "ffn_norm")),
)
_WEIGHT_NORM = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
_LEAF = r"(?P<leaf>weight|bias|weight_g|weight_v|parametrizations\.weight\.original[01])"
_SHOWN = 3  # names that a message gives of each kind
_SHOWN_LEFT_OUT = 8

_OTHER_CAUSE = "the weights of another kind of model (wav2vec 2.0, WavLM, SpidR), or a part of a HuBERT's only"


@dataclass(frozen=True)
class Layout:
    """Names of one program.

    Args:
        name: of the program.
        modules: its name of each of our encoder's modules, in the order of `_MODULES`; {i} is the number of a layer. A
            name that stands for several of ours holds them one below the other.
        head: its names of `HEAD`, as far as it has them.
        inside: what the encoder's names start with where there is a head beside it.
        others: further names of modules, as (ours, theirs).
        ignored: what else its checkpoints hold that is not of the pretrained model, as a pattern: a fine-tuned model's
            output layer.
    """

    name: str
    modules: tuple[str, ...]
    head: tuple[str, ...]
    inside: str = ""
    others: tuple[tuple[str, str], ...] = ()
    ignored: str = r"(?!)"

    @cached_property
    def patterns(self) -> list[tuple[re.Pattern[str], list[str]]]:
        """A pattern for the names of each module, behind a prefix, and what we call the module (or its parts)."""
        ours: dict[str, list[str]] = {}
        for our_name, name in [*zip(_MODULES, self.modules, strict=True), *self.others]:
            ours.setdefault(name, []).append(our_name)
        return [
            (re.compile(rf"(?P<prefix>(?:\w+\.)*?){re.escape(name).replace(r'\{i\}', r'(?P<i>\d+)')}\.{_LEAF}"), names)
            for name, names in ours.items()
        ]

    def read(self, name: str) -> Iterable[tuple[str, list[str]]]:
        """Yield every (prefix, our names) that a name may stand for."""
        for pattern, modules in self.patterns:
            if match := pattern.fullmatch(name):
                leaf = _WEIGHT_NORM.get(match["leaf"], match["leaf"])
                index = match.groupdict().get("i", "")
                yield match["prefix"], [f"{module.replace('{i}', index)}.{leaf}" for module in modules]

    def write(self, name: str) -> str:
        """Return the program's name of one of our encoder's weights."""
        for module, theirs in zip(_MODULES, self.modules, strict=True):
            if match := re.fullmatch(re.escape(module).replace(r"\{i\}", r"(?P<i>\d+)") + r"\.(?P<leaf>.+)", name):
                return f"{theirs.replace('{i}', match.groupdict().get('i', ''))}.{match['leaf']}"
        raise KeyError(name)


_CONV = ("feature_extractor.conv_layers.{i}.conv", "feature_extractor.conv_layers.{i}.layer_norm")
_FEED_FORWARD = ("layer_norm", "feed_forward.intermediate_dense", "feed_forward.output_dense", "final_layer_norm")
_PROJECTIONS = tuple(f"attention.{part}_proj" for part in ("q", "k", "v", "out"))

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(name=OWN, modules=_MODULES, head=HEAD, inside=ENCODER),
        Layout(
            name="fairseq",
            modules=(
                "feature_extractor.conv_layers.{i}.0",
                "feature_extractor.conv_layers.{i}.2",  # a GroupNorm stands in a Sequential,
                "layer_norm",
                "post_extract_proj",
                "encoder.pos_conv.0",
                "encoder.layer_norm",
                *(f"encoder.layers.{{i}}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
                *(
                    f"encoder.layers.{{i}}.{part}"
                    for part in ("self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")
                ),
            ),
            head=("mask_emb", "final_proj.weight", "final_proj.bias", "label_embs_concat"),
            inside="w2v_model.",
            others=(("extractor.layers.{i}.norm", "feature_extractor.conv_layers.{i}.2.1"),),  # a LayerNorm in two
            ignored=r"proj\.(weight|bias)",
        ),
        Layout(
            name="torchaudio",
            modules=(
                *_CONV,
                "encoder.feature_projection.layer_norm",
                "encoder.feature_projection.projection",
                "encoder.transformer.pos_conv_embed.conv",
                "encoder.transformer.layer_norm",
                *(f"encoder.transformer.layers.{{i}}.{part}" for part in (*_PROJECTIONS, *_FEED_FORWARD)),
            ),
            head=(
                "mask_generator.mask_embedding",
                "logit_generator.final_proj.weight",
                "logit_generator.final_proj.bias",
                "logit_generator.label_embeddings",
            ),
            inside="wav2vec2.",
            ignored=r"(wav2vec2\.)?aux\.(weight|bias)",
        ),
        Layout(
            name="transformers",
            modules=(
                *_CONV,
                "feature_projection.layer_norm",
                "feature_projection.projection",
                "encoder.pos_conv_embed.conv",
                "encoder.layer_norm",
                *(f"encoder.layers.{{i}}.{part}" for part in (*_PROJECTIONS, *_FEED_FORWARD)),
            ),
            head=("masked_spec_embed",),
            inside="hubert.",
            ignored=r"(lm_head|projector|classifier)\.(weight|bias)|layer_weights",
        ),
        Layout(
            name="minimal_hubert",
            modules=(
                *_CONV,
                "feature_projection.0.layer_norm",
                "feature_projection.0.projection",
                "encoder.pos_conv_embed.convs.0",
                "encoder.layer_norm",
                *(
                    f"encoder.layers.{{i}}.{part}"
                    for part in (*("attention.qkv",) * 3, "attention.proj", *_FEED_FORWARD)
                ),
            ),
            head=(
                "mask_embedding",
                "logit_generator.final_proj.weight",
                "logit_generator.final_proj.bias",
                "logit_generator.label_embeddings",
            ),
            ignored=r"logit_generator\.logit_temp|feature_weight",
        ),
    )
}


@dataclass(frozen=True)
class Converted:
    """Weights under our names: of the encoder as `HuBERT` has them, and what there is of a head, in float32."""

    layout: str
    encoder: dict[str, Tensor]
    head: dict[str, Tensor]


def convert(weights: Mapping[str, Tensor], where: str | Path = "state dict") -> Converted:
    """Bring a state dict of any known layout under our names, in float32.

    The output layer of a fine-tuned model is left out. So are other weights that stand beside a whole encoder and not within
    it, such as the `final_proj` of ContentVec; a warning names them.

    Raises:
        DataError: no known layout has these names; says which is nearest, what it misses and what it does not know, and why
            that is, where the names tell it.
    """
    layout, prefix = detect(weights)
    root = prefix.removesuffix(layout.inside)
    heads = dict(zip(layout.head, HEAD, strict=False))
    encoder: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    unexpected = []
    for name, value in weights.items():
        ours = next((names for found, names in layout.read(name) if found == prefix), None)
        head_name = heads.get(name.removeprefix(prefix)) or heads.get(name.removeprefix(root))
        if ours is not None:
            parts = value.float().chunk(len(ours)) if len(ours) > 1 else [value.float()]
            encoder |= {one: part.clone() if len(ours) > 1 else part for one, part in zip(ours, parts, strict=True)}
        elif head_name is not None:
            head[head_name] = value.float()
        elif not re.fullmatch(layout.ignored, name.removeprefix(root)):
            unexpected.append(name)
    missing = [prefix + layout.write(name) for name in _expected_names(encoder) if name not in encoder]
    cause = _find_cause(unexpected, layout, prefix)
    if missing or cause:
        raise DataError(
            f"{where}: expected the weights of a HuBERT in a layout of {', '.join(LAYOUTS)} (s3prl's is fairseq's). "
            f"The nearest is {layout.name}{f' behind {prefix!r}' if prefix else ''}, with {len(encoder) + len(head)} "
            f"of its weights: {list_names('missing', missing)}; {list_names('unexpected', unexpected)}. Likely cause: "
            f"{cause or _OTHER_CAUSE}"
        )
    if unexpected:
        names = ", ".join(unexpected[:_SHOWN_LEFT_OUT]) + (", ..." if len(unexpected) > _SHOWN_LEFT_OUT else "")
        warnings.warn(
            f"{where}: {len(unexpected)} weights stand beside the encoder, which is whole, and are left out: {names}",
            skip_file_prefixes=(str(PROJECT / "hubert"),),  # the line that is shown is the caller's
        )
    return Converted(layout.name, encoder, head)


def _find_cause(unexpected: Sequence[str], layout: Layout, prefix: str) -> str:
    """Return what kind of model the names beside the encoder's belong to; empty if they only stand beside the encoder."""
    if part := foreign_part(unexpected):
        return part
    layer = _LAYER.partition("{")[0]
    read = ((other, ours) for name in unexpected for other, ours in layout.read(name))
    others = {other for other, ours in read if other != prefix and ours[0].startswith(layer)}
    if others:
        places = ", ".join(repr(one) for one in sorted({prefix, *others}))
        return (
            f"several encoders in one file, behind {places} (a student and its teacher, an average). Fix: save the state dict of "
            "the one that is meant"
        )
    inside = {prefix + module.partition(".")[0] for module in layout.modules}
    return _OTHER_CAUSE if any(name.startswith(tuple(f"{one}." for one in inside)) for name in unexpected) else ""


def detect(names: Iterable[str]) -> tuple[Layout, str]:
    """Return the layout that has the most of these names, and what stands before them."""
    counts: Counter[tuple[str, str]] = Counter()
    for name in names:
        for layout in LAYOUTS.values():
            counts.update({(layout.name, prefix) for prefix, _ in layout.read(name)})
    (name, prefix), _ = max(counts.items(), key=lambda one: one[1], default=((OWN, ""), 0))
    return LAYOUTS[name], prefix


def is_own(names: Iterable[str], inside: str = "") -> bool:
    """Return True if names are ours: those of a `HuBERT`, or with `inside` = `ENCODER` those of a `HuBERTPretrain`."""
    own = {module.partition(".")[0] for module in _MODULES}
    return any(
        (name.startswith(inside) and name.removeprefix(inside).partition(".")[0] in own)
        or (bool(inside) and name in HEAD[1:])
        for name in names
    )


def rename(layout: str, encoder: Mapping[str, Tensor], head: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return weights under the names of torchaudio or transformers: the way back of `convert`.

    Args:
        layout: `torchaudio` or `transformers`.
        encoder: all weights of a `HuBERT`.
        head: those of `HEAD`; a layout without a name for one leaves it out. With a head, torchaudio's names are those of
            HuBERTPretrainModel, else those of Wav2Vec2Model.
    """
    found = LAYOUTS[layout]
    inside = found.inside if head and layout == "torchaudio" else ""
    theirs = {inside + found.write(name): value for name, value in encoder.items()}
    return theirs | {name: head[ours] for name, ours in zip(found.head, HEAD, strict=False) if head and ours in head}


def _expected_names(found: Iterable[str]) -> list[str]:
    """Return the names that an encoder has which is as deep as the found names say, and of their kind."""
    names = set(found)
    convs, layers = (
        1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=0)
        for pattern in (r"extractor\.layers\.(\d+)\.", r"transformer\.layers\.(\d+)\.")
    )
    has_bias = any(re.fullmatch(r"extractor\.layers\.\d+\.conv\.bias", name) for name in names)
    norms = convs if any(re.match(r"extractor\.layers\.[1-9]\d*\.norm\.", name) for name in names) else 1
    expected = [f"extractor.layers.{index}.conv.weight" for index in range(convs)]
    expected += [f"extractor.layers.{index}.conv.bias" for index in range(convs if has_bias else 0)]
    plain = [f"extractor.layers.{index}.norm" for index in range(norms)]
    plain += ["projection_norm", "projection", "transformer.norm"]
    plain += [
        part.replace("{i}", str(index)) for index in range(layers) for part in _MODULES if part.startswith(_LAYER)
    ]
    expected += [f"{module}.{leaf}" for module in plain for leaf in ("weight", "bias")]
    return expected + [f"transformer.pos_conv.conv.{leaf}" for leaf in ("bias", *_WEIGHT_NORM.values())]


def list_names(kind: str, names: Sequence[str]) -> str:
    """Return how many names there are of a kind, and the first of them."""
    shown = ", ".join(names[:_SHOWN])
    return f"{len(names)} {kind}{f' ({shown}{", ..." if len(names) > _SHOWN else ""})' if names else ''}"


# What stands around the weights ---------------------------------------------------------------------------------------

_WRAPPERS = ("model", "state_dict", "model_weight", "model_state_dict")  # fairseq and SpidR, Lightning, s3prl, others
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # the first four rows of every fairseq dictionary


def unwrap(content: Mapping[str, Any], where: str | Path = "state dict") -> dict[str, Tensor]:
    """Return the state dict that a file holds, out of the dictionary of a training program around it.

    Raises:
        DataError: there are no tensors in it.
    """
    inner: Any = content
    for _ in range(3):
        wrapper = next((name for name in _WRAPPERS if isinstance(inner.get(name), Mapping)), None)
        if wrapper is None:
            break
        inner = inner[wrapper]
    weights = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    integers = [name for name, value in weights.items() if not value.is_floating_point()]
    if not weights or len(integers) == len(weights):
        names = ", ".join(str(name) for name in list(inner)[:8]) or "nothing"
        raise DataError(
            f"{where}: expected a state dict (names and float tensors), or one under {', '.join(_WRAPPERS)}; found {names}"
        )
    return {name: value for name, value in weights.items() if name not in integers}


def class_rows(rows: int, layout: str, *, symbols: Sequence[str] | None, num_classes: int | None) -> list[int]:
    """Return which rows of a head's embeddings are units, in the order of the units.

    fairseq embeds every entry of its dictionary, and that starts with four entries which are no units (<s>, <pad>, </s>,
    <unk>): K units have K + 4 rows, and unit u lies in row u + 4 if the dictionary is in order. Other programs have a
    row per unit.

    Args:
        rows: number of rows.
        layout: name of the layout.
        symbols: the dictionary, where the checkpoint holds one: the rows of its units are taken, by their number.
        num_classes: K, if known: without a dictionary, exactly K rows are then K units, whoever wrote them.
    """
    if symbols is not None and len(symbols) == rows:
        units = [row for row, symbol in enumerate(symbols) if symbol not in _SPECIAL]
        numbers = {int(symbols[row]): row for row in units if symbols[row].isdecimal()}
        in_order = sorted(numbers) == list(range(len(units)))
        return [numbers[unit] for unit in range(len(units))] if in_order else units
    has_special = layout == "fairseq" and rows > len(_SPECIAL) and num_classes != rows
    return list(range(len(_SPECIAL) * has_special, rows))


def select_classes(
    embeddings: Tensor, layout: str, *, symbols: Sequence[str] | None = None, num_classes: int | None = None
) -> Tensor:
    """Return the embeddings (K, d) of the units, out of all rows of a head; see `class_rows`."""
    rows = class_rows(len(embeddings), layout, symbols=symbols, num_classes=num_classes)
    return embeddings if len(rows) == len(embeddings) and rows == sorted(rows) else embeddings[torch.tensor(rows)]
