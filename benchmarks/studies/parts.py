"""The parts of a training step as functions that can be called alone, ours and torchaudio's: what `step_parts` times.

The names are those of `benchmarks.studies.counting`, so that each time stands beside its floor, and a test compares each count
with what torch counts while the function runs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.studies import counting
from benchmarks.studies.counting import Batch
from hubert.core.frames import num_frames
from hubert.model import ops
from hubert.model.encoder import TimeNormConvLayer
from hubert.model.hubert import HuBERTPretrain, mean_square
from hubert.training.distributed import Gradients
from hubert.training.masks import span_mask

ATTENTION = "attention, all of it"  # for torchaudio, which does not divide it; no part of the sum
STEP = "the whole step"


@dataclass
class Piece:
    """A part of a step: a function of nothing, how often a step does it, and what its gradients go to."""

    name: str
    call: Callable[[], Any]  # a tensor or several; None where there is no backward pass
    times: float = 1.0
    leaves: list[Tensor] = field(default_factory=list)

    def forward(self) -> tuple[Tensor, ...]:
        """Return the outputs that have gradients."""
        outputs = self.call()
        return () if outputs is None else (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def backward(self, outputs: tuple[Tensor, ...], gradients: list[Tensor]) -> None:
        """Compute the gradients of all leaves, and drop them."""
        if self.leaves:
            torch.autograd.grad(outputs, self.leaves, gradients)


class Inputs:
    """Random tensors of a batch, as the parts of a step meet them under autocast."""

    def __init__(self, model: HuBERTPretrain, batch: Batch, device: str, dtype: torch.dtype) -> None:
        self.config, self.batch, self.device, self.dtype = model.config, batch, device, dtype
        self.frames = num_frames(batch.samples)
        self.rows = counting.conv_rows(model.config, batch)
        self.waveforms = 0.1 * torch.randn(batch.crops, batch.samples, device=device)
        self.labels = torch.randint(batch.num_classes, (batch.crops, self.frames))
        self.mask = span_mask(batch.crops, self.frames, seed=0)

    def short(self, *shape: int) -> Tensor:
        """An activation in the step's number format, with a gradient."""
        return torch.randn(shape, device=self.device, dtype=self.dtype, requires_grad=True)

    def long(self, *shape: int) -> Tensor:
        """The residual stream: LayerNorm's output stays float32 under autocast."""
        return torch.randn(shape, device=self.device, requires_grad=True)


def our_pieces(model: HuBERTPretrain, inputs: Inputs) -> list[Piece]:
    """Return the parts of our step, in the order of the forward pass, with the optimizer."""
    config, batch = inputs.config, inputs.batch
    hubert, transformer = model.hubert, model.hubert.transformer
    first, *convs = hubert.extractor.layers
    layer = transformer.layers[0]
    share = batch.masked / batch.frames  # of the last layer
    sequence = (batch.crops, inputs.frames, config.dim)

    padded = F.pad(inputs.waveforms, (0, -batch.samples % hubert.extractor.total_stride))
    rows = inputs.short(inputs.rows[0], config.conv_layers[0][0])
    features = inputs.short(*sequence[:2], config.conv_layers[-1][0])
    mask = inputs.mask.to(inputs.device)
    positions, stream, attended = inputs.short(*sequence), inputs.long(*sequence), inputs.short(*sequence)
    branch, flat = inputs.short(*sequence), [inputs.short(*sequence) for _ in range(3)]
    # With frames to compute, the last layer's output has no batch dimension.
    last = inputs.long(batch.masked, config.dim)
    targets = torch.randint(batch.num_classes, (batch.masked,), device=inputs.device)

    def first_conv() -> Tensor:
        if isinstance(first, TimeNormConvLayer):
            return first(padded, [batch.samples] * batch.crops)
        return first(padded.reshape(-1, 1))

    def other_convs() -> Tensor:
        x = rows
        for conv in convs:
            x = conv(x)
        return x

    def scores() -> Tensor:
        heads = (x.view(*sequence[:2], config.num_heads, -1).transpose(1, 2) for x in flat)
        return ops.attention(*heads, None, layer.attention.dropout)

    def feed_forward() -> Tensor:
        return layer.ffn_out(layer.activation_dropout(F.gelu(layer.ffn_in(stream))))

    def loss() -> tuple[Tensor, Tensor]:
        return model._predict(last, targets)[0], mean_square(features, None)  # noqa: SLF001

    attention = layer.attention
    three = [attention.query, attention.key, attention.value]
    layers = config.num_layers
    head = [*model.final_projection.parameters(), model.class_embeddings]
    return [
        Piece(counting.FIRST_CONV, first_conv, 1, [*first.parameters()]),
        Piece(counting.CONVS, other_convs, 1, [rows, *_weights(convs)]),
        Piece(
            counting.PROJECTION,
            lambda: hubert._project(features, None, mask, model.mask_embedding)[0],  # noqa: SLF001
            1,
            [features, model.mask_embedding, *_weights([hubert.projection_norm, hubert.projection])],
        ),
        Piece(
            counting.POSITIONS,
            lambda: transformer.pos_conv(positions),
            1,
            [positions, *transformer.pos_conv.parameters()],
        ),
        Piece(
            counting.QUERY_KEY_VALUE,
            lambda: [part(stream) for part in three],
            layers,
            [stream, *_weights(three)],
        ),
        Piece(counting.SCORES, scores, layers, flat),
        Piece(
            counting.ATTENTION_OUTPUT,
            lambda: attention.output(attended),
            layers - 1 + share,
            [attended, *attention.output.parameters()],
        ),
        Piece(
            counting.FEED_FORWARD,
            feed_forward,
            layers - 1 + share,
            [stream, *_weights([layer.ffn_in, layer.ffn_out])],
        ),
        Piece(
            counting.NORMS,
            lambda: layer.attention_norm(stream + layer.dropout(branch)),
            2 * (layers - 1 + share) + 1,
            [stream, branch, *layer.attention_norm.parameters()],
        ),
        Piece(counting.LOSS, loss, 1, [last, features, *head]),
        Piece(
            ATTENTION,
            lambda: attention(stream, None, None),
            layers - 1 + share,
            [stream, *attention.parameters()],
        ),
    ]


def update_of(model: HuBERTPretrain) -> Callable[[], None]:
    """Return what follows the backward pass: norm, AdamW, and gradients of zero, as in `hubert.training.trainer`."""
    gradients = Gradients(model.parameters(), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def update() -> None:
        gradients.norm()
        optimizer.step()
        gradients.zero()

    return update


def step_of(model: HuBERTPretrain, inputs: Inputs, update: Callable[[], None], *, bf16: bool) -> Callable[[], None]:
    """Return a whole step: forward, backward, update."""
    waveforms = inputs.waveforms

    def step() -> None:
        with torch.autocast(inputs.device, torch.bfloat16, enabled=bf16):
            losses, outputs = model(waveforms, inputs.labels, mask=inputs.mask)
        (losses.sum() / inputs.batch.masked + 10 * outputs["feature_penalty"]).backward()
        update()

    return step


def torchaudio_pieces(inputs: Inputs) -> dict[str, Piece]:
    """Return torchaudio's modules for the parts that it has as modules, by name; random weights."""
    from benchmarks.studies.model_step import build_torchaudio

    config, batch = inputs.config, inputs.batch
    reference = build_torchaudio(config, batch.num_classes).to(inputs.device).train()
    encoder = reference.wav2vec2.encoder
    first, *convs = reference.wav2vec2.feature_extractor.conv_layers
    layer = encoder.transformer.layers[0]
    sequence = (batch.crops, inputs.frames, config.dim)
    waveforms = inputs.waveforms[:, None]
    steps = (batch.samples - config.conv_layers[0][1]) // config.conv_layers[0][2] + 1
    channels = inputs.short(batch.crops, config.conv_layers[0][0], steps)
    features = inputs.short(*sequence[:2], config.conv_layers[-1][0])
    positions, stream = inputs.short(*sequence), inputs.long(*sequence)

    def other_convs() -> Tensor:
        x = channels
        for conv in convs:
            x, _ = conv(x, None)
        return x

    share = config.num_layers  # it computes all frames in all layers
    positional = encoder.transformer.pos_conv_embed
    pieces = [
        Piece(counting.FIRST_CONV, lambda: first(waveforms, None)[0], 1, [*first.parameters()]),
        Piece(counting.CONVS, other_convs, 1, [channels, *_weights(convs)]),
        Piece(
            counting.PROJECTION,
            lambda: encoder.feature_projection(features),
            1,
            [features, *encoder.feature_projection.parameters()],
        ),
        Piece(counting.POSITIONS, lambda: positional(positions), 1, [positions, *positional.parameters()]),
        Piece(ATTENTION, lambda: layer.attention(stream)[0], share, [stream, *layer.attention.parameters()]),
        Piece(
            counting.FEED_FORWARD,
            lambda: layer.feed_forward(stream),
            share,
            [stream, *layer.feed_forward.parameters()],
        ),
    ]
    return {piece.name: piece for piece in pieces}


def _weights(modules: Iterable[torch.nn.Module]) -> list[Tensor]:
    return [parameter for module in modules for parameter in module.parameters()]
