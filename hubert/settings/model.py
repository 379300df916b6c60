"""The model's dimensions, and the arithmetic of its frames.

`SIZES` holds the published models (paper, table I) with the regularisation that fairseq pretrains them with
(`examples/hubert/config/pretrain/hubert_{base_librispeech,large_librivox,xlarge_librivox}.yaml`), and `tiny`, which
learns something within minutes on a CPU.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hubert.core.errors import ConfigError
from hubert.core.frames import HOP, RECEPTIVE_FIELD
from hubert.settings.sections import explain

ConvLayers = tuple[tuple[int, int, int], ...]


def conv_stack(channels: int) -> ConvLayers:
    """Return HuBERT's seven convolutions, (channels, kernel, stride) each: a frame of 400 samples every 320."""
    return ((channels, 10, 5), *((channels, 3, 2),) * 4, *((channels, 2, 2),) * 2)


class ModelConfig(BaseModel):
    """What a HuBERT is made of. The defaults are the base model; the fairseq key stands in brackets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    conv_layers: ConvLayers = Field(
        default=conv_stack(512), description="(channels, kernel, stride) of each convolution [conv_feature_layers]"
    )
    conv_bias: bool = Field(default=False, description="whether the convolutions have a bias [conv_bias]")
    extractor_norm: Literal["group", "layer"] = Field(
        default="group",
        description="group: the first convolution is normalised per channel over time; "
        "layer: each convolution over its channels [extractor_mode: default | layer_norm]",
    )
    dim: int = Field(default=768, ge=1, description="width of the transformer [encoder_embed_dim]")
    num_layers: int = Field(default=12, ge=1, description="transformer layers [encoder_layers]")
    num_heads: int = Field(default=12, ge=1, description="attention heads [encoder_attention_heads]")
    ffn_dim: int = Field(default=3072, ge=1, description="width of the feed-forward part [encoder_ffn_embed_dim]")
    pos_conv_kernel: int = Field(default=128, ge=1, description="frames under the positional convolution [conv_pos]")
    pos_conv_groups: int = Field(default=16, ge=1, description="groups of the positional convolution [conv_pos_groups]")
    layer_norm_first: bool = Field(
        default=False, description="normalise before each part, not after it [layer_norm_first]"
    )
    layer_norm_eps: float = Field(
        default=1e-5,
        gt=0,
        description="added to the variance in the transformer's LayerNorms [no key in fairseq: 1e-5]",
    )
    dropout: float = Field(default=0.1, ge=0, lt=1, description="after attention, feed-forward and positions [dropout]")
    attention_dropout: float = Field(
        default=0.1, ge=0, lt=1, description="on the attention weights [attention_dropout]"
    )
    activation_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="inside the feed-forward part [activation_dropout]"
    )
    input_dropout: float = Field(default=0.1, ge=0, lt=1, description="on the transformer's input [dropout_input]")
    layerdrop: float = Field(
        default=0.05, ge=0, lt=1, description="chance to skip a layer in training [encoder_layerdrop]"
    )
    feature_grad_mult: float = Field(
        default=0.1, ge=0, le=1, description="factor on the gradient into the convolutions [feature_grad_mult]"
    )
    final_dim: int = Field(default=256, ge=1, description="dimension in which frames meet class embeddings [final_dim]")
    logit_temperature: float = Field(default=0.1, gt=0, description="divisor of the cosine similarities [logit_temp]")
    normalize_waveform: bool = Field(
        default=False,
        description="scale each utterance to mean 0 and variance 1 inside the forward pass [task.normalize]",
    )

    @model_validator(mode="after")
    def _dimensions_fit(self) -> Self:
        if self.dim % self.num_heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of num_heads ({self.num_heads})")
        if self.dim % self.pos_conv_groups:
            raise ValueError(f"dim ({self.dim}) must be a multiple of pos_conv_groups ({self.pos_conv_groups})")
        if not self.conv_layers or any(min(layer) < 1 for layer in self.conv_layers):
            raise ValueError(
                f"conv_layers must be (channels, kernel, stride) of at least 1 each, found {self.conv_layers}"
            )
        field, hop = 1, 1
        for _, kernel, stride in self.conv_layers:
            field, hop = field + (kernel - 1) * hop, hop * stride
        if (field, hop) != (RECEPTIVE_FIELD, HOP):
            raise ValueError(
                f"conv_layers make a frame of {field} samples every {hop}; units, labels and evaluation count on "
                f"{RECEPTIVE_FIELD} every {HOP}: change the channels only"
            )
        return self


_LARGE = ModelConfig(
    extractor_norm="layer",
    dim=1024,
    num_layers=24,
    num_heads=16,
    ffn_dim=4096,
    layer_norm_first=True,
    dropout=0.0,
    attention_dropout=0.0,
    input_dropout=0.0,
    layerdrop=0.0,
    feature_grad_mult=1.0,
    final_dim=768,
    normalize_waveform=True,
)

SIZES: dict[str, ModelConfig] = {
    "base": ModelConfig(),
    "large": _LARGE,
    "xlarge": _LARGE.model_copy(update={"dim": 1280, "num_layers": 48, "ffn_dim": 5120, "final_dim": 1024}),
    # Short trainings underfit, so nothing is dropped; that also keeps the attention on the fast CPU kernel.
    "tiny": ModelConfig(
        conv_layers=conv_stack(64),
        dim=192,
        num_layers=4,
        num_heads=4,
        ffn_dim=768,
        final_dim=64,
        dropout=0.0,
        attention_dropout=0.0,
        input_dropout=0.0,
        layerdrop=0.0,
    ),
}


def build_config(size: str | ModelConfig, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return the configuration of a size (or a given one) with single fields replaced.

    Raises:
        ConfigError: the size or a field does not exist, or the values do not fit together.
    """
    if isinstance(size, str):
        if size not in SIZES:
            raise ConfigError(f"model size {size!r} does not exist; sizes: {', '.join(SIZES)}")
        size = SIZES[size]
    if not overrides:
        return size
    try:
        return ModelConfig.model_validate(size.model_dump() | dict(overrides))
    except ValidationError as error:
        raise ConfigError(f"model configuration: {explain(error)}") from error


def total_stride(conv_layers: ConvLayers) -> int:
    """Return the number of samples between two frames of a stack of convolutions."""
    return math.prod(stride for _, _, stride in conv_layers)
