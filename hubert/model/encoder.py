"""The parts of HuBERT between the waveform and the last layer: convolutions, positions, transformer.

Shapes: B utterances, T samples, F frames, C channels of the convolutions, D width of the transformer. `lengths` are the
true numbers of samples of padded utterances, or None where nothing is padded.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from hubert.core.frames import num_frames
from hubert.model import ops
from hubert.settings.model import ModelConfig, total_stride

EPS = 1e-5  # of the normalisations in the extractor; the transformer has its own in ModelConfig


class Linear(nn.Linear):
    """`nn.Linear`, computed by `ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the base class names it so)
        """Map (..., in_features) to (..., out_features)."""
        return ops.linear(input, self.weight, self.bias)


def keep_products_in_bfloat16(model: nn.Module) -> None:
    """Round the weights of the linear maps to bfloat16 for good, as autocast would for each batch: the same values.

    Autocast's copies last for one batch at most, so each would cost a pass over all weights. Not for training.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.bfloat16()


def draw_normal(weight: Tensor, std: float) -> None:
    """Draw random weights, unless these are only places for weights that are about to be loaded.

    (Asked for random numbers on the meta device torch imports its compiler: 1 to 2 s for each process that loads a model.)
    """
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


def draw_kaiming(weight: Tensor) -> None:
    """Draw the weights (E, C, k) of a convolution as Kaiming normal with gain sqrt(2), as `draw_normal` does."""
    draw_normal(weight, math.sqrt(2 / weight[0].numel()))


class ConvLayer(nn.Module):
    """A convolution of the extractor: strided, normalised over its channels or not at all, GELU."""

    def __init__(self, conv: nn.Conv1d, norm: nn.LayerNorm | None) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm
        draw_kaiming(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows (R, in_channels) of concatenated sequences to (R', channels)."""
        x = ops.strided_conv(x, self.conv.weight, self.conv.bias, self.conv.stride[0])
        return F.gelu(x if self.norm is None else self.norm(x))


class TimeNormConvLayer(nn.Module):
    """The base model's first convolution: strided, each channel normalised over an utterance's time, GELU.

    A channel's mean and variance over time follow from the mean and the covariance of the windows that it looks at, and
    normalising is then another weight of the same convolution: w (scale / std) and a shift. A bias of the convolution moves
    the mean by as much as the output, and is gone: it is kept with the weights and not computed. So the model's largest
    activation is written only once, and statistics over true lengths cost nothing extra. The covariance is taken in
    float64, as a filter may remove most of the energy of its windows.
    """

    def __init__(self, conv: nn.Conv1d, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm
        draw_kaiming(conv.weight)

    def forward(self, waveforms: Tensor, lengths: Sequence[int]) -> Tensor:
        """Map float32 (B, T), T a multiple of the stride, to rows (B T / stride, C) of concatenated utterances."""
        channels, _, kernel = self.conv.weight.shape
        stride, device = self.conv.stride[0], waveforms.device.type
        with torch.autocast(device, enabled=False):
            samples = F.pad(waveforms.reshape(-1), (0, kernel - stride))
            windows = samples.unfold(0, kernel, stride).reshape(len(waveforms), -1, kernel)
            mean, covariance = _window_statistics(windows, [(length - kernel) // stride + 1 for length in lengths])
            filters = self.conv.weight[:, 0].double()  # (C, k)
            variance = torch.einsum("ci,bij,cj->bc", filters, covariance, filters).clamp(min=0)
            scale = self.norm.weight / torch.sqrt(variance + EPS)  # (B, C)
            shift = self.norm.bias - scale * (mean @ filters.T)
            # The shift is the weight of a column of ones: cheaper than adding it to the largest tensor of the model.
            weights = torch.cat([filters * scale[:, :, None], shift[:, :, None]], 2).float()  # (B, C, k + 1)
            x = F.pad(windows, (0, 1), value=1.0) @ weights.transpose(1, 2)
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return F.gelu(x).view(-1, channels)


def _window_statistics(windows: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return mean (B, k) and covariance (B, k, k), in float64, of the first `counts` windows of each row (B, W, k)."""
    exact = windows.double()
    number = torch.tensor(counts, dtype=torch.float64).to(exact.device, non_blocking=True)[:, None]
    valid = torch.arange(windows.shape[1], device=exact.device) < number  # (B, W)
    exact = exact * valid[:, :, None]
    mean = exact.sum(1) / number
    covariance = exact.transpose(1, 2) @ exact / number[:, :, None] - mean[:, :, None] * mean[:, None]
    return mean, covariance


class FeatureExtractor(nn.Module):
    """Seven convolutions from samples to frames (paper, section III-A).

    The utterances lie one after the other in one long sequence, each padded to a multiple of the total stride, so
    every convolution is a plain matrix product over all of them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.total_stride = total_stride(config.conv_layers)
        self.layers = nn.ModuleList()
        in_channels = 1
        for channels, kernel, stride in config.conv_layers:
            conv = nn.Conv1d(in_channels, channels, kernel, stride, bias=config.conv_bias)
            if config.extractor_norm == "group" and not self.layers:
                self.layers.append(TimeNormConvLayer(conv, nn.GroupNorm(channels, channels, eps=EPS)))
            else:
                self.layers.append(
                    ConvLayer(conv, nn.LayerNorm(channels, eps=EPS) if config.extractor_norm == "layer" else None)
                )
            in_channels = channels

    def forward(self, waveforms: Tensor, lengths: Sequence[int] | None) -> Tensor:
        """Map (B, T) to (B, F, C). Frames beyond an utterance's length hold finite numbers without meaning."""
        batch, samples = waveforms.shape
        first, *rest = self.layers
        padded = F.pad(waveforms.float(), (0, -samples % self.total_stride))
        if isinstance(first, TimeNormConvLayer):
            x = first(padded, lengths or [samples] * batch)
        else:
            x = first(padded.reshape(-1, 1))
        for layer in rest:
            x = layer(x)
        steps = padded.shape[1] // self.total_stride
        x = F.pad(
            x, (0, 0, 0, batch * steps - x.shape[0])
        )  # the last window of the last utterance reaches over its end
        return x.view(batch, steps, -1)[:, : num_frames(samples)]


class PositionalConv(nn.Module):
    """Relative positions: a grouped convolution over frames, with weight normalisation per tap (wav2vec 2.0).

    With an even kernel the output looks at one frame more in the past than in the future.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        conv = nn.Conv1d(config.dim, config.dim, config.pos_conv_kernel, groups=config.pos_conv_groups)
        if conv.weight.is_meta:
            # `weight_norm` takes a norm: on the meta device that imports half of the compiler, too. Until weights are loaded
            # these are zeros on the CPU (50 MB in the largest model), whose norm is no number.
            conv.weight = nn.Parameter(torch.zeros(conv.weight.shape, device="cpu"))
        else:
            draw_normal(conv.weight, math.sqrt(4 / (config.pos_conv_kernel * config.dim)))
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.conv = weight_norm(conv, dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, F, D) to (B, F, D)."""
        return F.gelu(ops.positional_conv(x, self.conv.weight, self.conv.bias, self.conv.groups))


class Dropout(nn.Dropout):
    """torch's module with `ops.dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of a tensor of any shape while training."""
        return ops.dropout(x, self.p) if self.training else x


class Attention(nn.Module):
    """Multi-head self-attention without a mask among frames."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.query = Linear(config.dim, config.dim)
        self.key = Linear(config.dim, config.dim)
        self.value = Linear(config.dim, config.dim)
        self.output = Linear(config.dim, config.dim)

    def forward(self, x: Tensor, key_mask: Tensor | None, frames: Tensor | None) -> Tensor:
        """Map (B, F, D) to (B, F, D), or to (N, D) at `frames`, indices into the B F frames."""
        shape = (*x.shape[:2], self.num_heads, -1)
        query, key, value = (part(x).view(shape).transpose(1, 2) for part in (self.query, self.key, self.value))
        attended = ops.attention(query, key, value, key_mask, self.dropout if self.training else 0.0)
        output: Tensor = self.output(take(attended.transpose(1, 2).reshape(x.shape), frames))
        return output


def take(x: Tensor, frames: Tensor | None) -> Tensor:
    """Return (B, F, D) as it is, or its rows (N, D) at `frames`, indices into the B F frames."""
    return x if frames is None else x.flatten(0, 1).index_select(0, frames)


class Layer(nn.Module):
    """Attention and feed-forward, each with a residual sum and a LayerNorm before it (large, xlarge) or after it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_first = config.layer_norm_first
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        self.ffn_in = Linear(config.dim, config.ffn_dim)
        self.ffn_out = Linear(config.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)
        self.activation_dropout = Dropout(config.activation_dropout)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the layer's output and its feed-forward part before the residual sum.

        Both are (B, F, D), or (N, D) with `frames`: the last layer of a training step computes only the frames that
        the loss looks at.
        """
        attended = self.attention(self.attention_norm(x) if self.norm_first else x, key_mask, frames)
        x = take(x, frames) + self.dropout(attended)
        if not self.norm_first:
            x = self.attention_norm(x)
        hidden = self.activation_dropout(F.gelu(self.ffn_in(self.ffn_norm(x) if self.norm_first else x)))
        ffn = self.ffn_out(hidden)
        x = x + self.dropout(ffn)
        return (x if self.norm_first else self.ffn_norm(x)), ffn


class Transformer(nn.Module):
    """Positions and layers. `norm` stands before the layers (base) or after the last one (large, xlarge).

    With `checkpointing` a training step keeps only each layer's input and computes the layer again in the backward
    pass, with the same random numbers: the same loss and gradients, bit for bit, for a third more multiplications.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.checkpointing = False
        self.norm_first = config.layer_norm_first
        self.layerdrop = config.layerdrop
        self.pos_conv = PositionalConv(config)
        self.norm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                draw_normal(module.weight, 0.02)
                nn.init.zeros_(module.bias)

    def embed(self, x: Tensor) -> Tensor:
        """Add positions to the projected features (B, F, D): what the first layer reads."""
        x = x + self.pos_conv(x)
        embedded: Tensor = self.dropout(x if self.norm_first else self.norm(x))
        return embedded

    def forward(self, x: Tensor, key_mask: Tensor | None = None, frames: Tensor | None = None) -> Tensor:
        """Map projected features (B, F, D) to the output (B, F, D), or (N, D) at `frames`.

        In training each layer is skipped with probability `layerdrop`. The choice comes from torch's CPU generator, so
        that no device has to be waited for; a skipped layer's weights get no gradient at all (None, not zero).
        """
        x = self.embed(x)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            wanted = frames if index == last else None
            if self.training and self.layerdrop and torch.rand(()).item() < self.layerdrop:
                x = take(x, wanted)
            elif self.checkpointing and torch.is_grad_enabled():
                x, _ = checkpoint(layer, x, key_mask, wanted, use_reentrant=False)
            else:
                x, _ = layer(x, key_mask, wanted)
        return self.norm(x) if self.norm_first else x
