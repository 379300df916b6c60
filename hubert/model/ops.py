"""The heavy arithmetic of the encoder, in the form that is fast on the machine at hand.

The mathematics is what torch has modules for; only the way to compute it differs, and rounding with it.

    linear           On CPUs with AVX-512, oneDNN's 1x1 convolution multiplies float32 matrices at up to twice the speed
                     of the BLAS behind `F.linear` (460 against 205 GFLOP/s on two cores of an AMD EPYC).
    strided_conv     On frames-by-channels matrices a convolution with a stride is a few matrix products on views of its
                     input, without a copy. `F.conv1d` on channels-by-frames spends its backward pass on reordering.
    positional_conv  128 taps over groups of 12 (tiny) or 48 channels (base) suit no matrix unit; on CPUs a Fourier
                     transform needs a small part of the multiplications, but the transform of wide groups' taps
                     costs as much as the layer itself takes for five utterances, with its backward pass for three.
    attention        torch's fused kernel, except where it is slow: bfloat16 on CPUs, and dropout on CPUs, which it does not
                     know: torch's plain operators then take three times the time and memory of ours.
    dropout          torch draws a number for each element on CPUs; a quarter of a 64-bit number is enough.
    scale_gradient   fairseq's GradMultiply.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()
_FAST_CONV = _HAS_ONEDNN and torch.backends.cpu.get_cpu_capability() == "AVX512"
_MIN_FFT_BATCH, _MIN_FFT_BATCH_FORWARD = 4, 6  # base, 2 cores: benchmarks/results/cpu-speed.md
_MAX_FFT_WIDTH = 32  # of groups that a transform always suits: 18 against 75 ms for tiny's 12 channels, both passes
_MAX_EXPLICIT_FRAMES = 1024  # above this, attention weights of a batch would fill the memory


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + b: (..., D) with a weight (E, D) gives (..., E)."""
    is_suited = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not (_FAST_CONV and is_suited and x.numel()):
        return F.linear(x, weight, bias)
    image = _as_image(x.reshape(-1, x.shape[-1]))
    # A dilation changes nothing for a single tap, but without one torch keeps 1x1 kernels from oneDNN on one thread.
    return _as_rows(F.conv2d(image, weight[:, :, None, None], bias, dilation=2)).view(*x.shape[:-1], weight.shape[0])


def _as_image(rows: Tensor) -> Tensor:
    """View (R, C) as an image (1, C, 1, R) whose pixels are the rows: the layout that oneDNN calls channels last."""
    return rows.view(1, 1, *rows.shape).permute(0, 3, 1, 2)


def _as_rows(image: Tensor) -> Tensor:
    """View an image (1, C, 1, R) as (R, C)."""
    return image.permute(0, 2, 3, 1).reshape(image.shape[3], image.shape[1])


def strided_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Convolve along the rows, without padding: (R, C) with a weight (E, C, k) gives ((R - k) // stride + 1, E).

    Several sequences may lie one after the other in the rows: where their lengths are multiples of all strides, each
    starts where it should after every convolution, and only the windows that reach over its end are to be ignored.

    Samples (C = 1) stay float32 under autocast: as bfloat16, quiet high frequencies would drown in rounding noise.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.shape[1] > 1:
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        output: Tensor = _StridedConv.apply(x.contiguous(), weight, bias, stride)
    return output


class _StridedConv(torch.autograd.Function):
    """See `strided_conv`. The weight's gradient is a matrix product everywhere: oneDNN's takes five times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        if x.device.type == "cpu":
            return _as_rows(F.conv2d(_as_image(x), weight[:, :, None], bias, stride=(1, stride)))
        return _conv_by_products(x, weight, bias, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = _input_gradient(gradient, x, weight, ctx.stride)
        if ctx.needs_input_grad[1]:
            parts = [window.T @ gradient for _, window in _windows(x, weight, ctx.stride)]
            for_weight = torch.cat(parts).view(weight.shape[2], weight.shape[1], weight.shape[0]).permute(2, 1, 0)
        if ctx.needs_input_grad[2]:
            for_bias = gradient.sum(0)
        return for_x, for_weight, for_bias, None


def _windows(x: Tensor, weight: Tensor, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield taps of the weight as (taps C, E), with the rows of x under them as (windows, taps C), `stride` at a time.

    Views whose rows overlap are no legal matrices, so a kernel longer than its stride is cut into parts that are.
    """
    channels, kernel = weight.shape[1], weight.shape[2]
    count = (x.shape[0] - kernel) // stride + 1
    for start in range(0, kernel, stride):
        taps = weight[:, :, start : start + stride]
        width = taps.shape[2] * channels
        # From where x[start:] begins in its storage: asking for that place would break torch.compile's graph.
        yield taps.permute(2, 1, 0).reshape(width, -1), x[start:].as_strided((count, width), (stride * channels, 1))


def _conv_by_products(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    windows = _windows(x, weight, stride)
    taps, window = next(windows)
    output = window @ taps if bias is None else torch.addmm(bias, window, taps)
    for taps, window in windows:
        output.addmm_(window, taps)
    return output


def _input_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    if x.device.type != "cpu":
        return _input_gradient_by_products(gradient, x, weight, stride)
    unseen = x.shape[0] - (gradient.shape[0] - 1) * stride - weight.shape[2]  # rows after the last window
    image = F.conv_transpose2d(_as_image(gradient), weight[:, :, None], stride=(1, stride), output_padding=(0, unseen))
    return _as_rows(image)


def _input_gradient_by_products(gradient: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    result = torch.zeros_like(x)
    for taps, window in _windows(result, weight, stride):
        window.addmm_(gradient, taps.T)
    return result


def positional_conv(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """Convolve frames with `kernel // 2` frames of padding on the left and what keeps their number on the right.

    Args:
        x: (B, F, D) frames.
        weight: (D, D / groups, kernel).
        bias: (D,).
        groups: number of groups of channels that do not see each other.

    Returns:
        (B, F, D), float32 on CPUs.
    """
    if x.device.type != "cpu":
        return _convolve_by_layer(x, weight, bias, groups)
    with torch.autocast("cpu", enabled=False):
        x, weight, bias = x.float(), weight.float(), bias.float()
        enough = _MIN_FFT_BATCH if torch.is_grad_enabled() else _MIN_FFT_BATCH_FORWARD
        if len(x) >= enough or weight.shape[1] < _MAX_FFT_WIDTH:
            return _convolve_by_fft(x, weight, groups) + bias
        return _convolve_by_layer(x, weight, bias, groups)


def _convolve_by_layer(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    output = F.conv1d(x.transpose(1, 2), weight, bias, padding=weight.shape[2] // 2, groups=groups)
    return output[:, :, : x.shape[1]].transpose(1, 2)


def _convolve_by_fft(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Do the padded convolution of (B, F, D) by multiplying spectra.

    On a circle of at least F + kernel / 2 frames, what a window sees beyond either end is the zeros behind the frames.
    """
    batch, num_frames, dim = x.shape
    before = weight.shape[2] // 2
    first = max(before - num_frames + 1, 0)  # taps further out than that see padding only
    weight = weight[:, :, first : before + num_frames]
    before -= first
    width, kernel = weight.shape[1], weight.shape[2]
    size = _fft_size(num_frames + max(before, kernel - 1 - before))
    frames = torch.fft.rfft(x.transpose(1, 2), n=size)  # (B, D, Q)
    # Taps in the order of a true convolution, tap 0 at +before: a layer does not flip its kernel, a spectrum does.
    circle = F.pad(weight.flip(2), (0, size - kernel)).roll(before + 1 - kernel, 2)
    taps = torch.fft.rfft(circle)  # (D, D / groups, Q)
    bins = frames.shape[2]
    left = frames.view(batch, groups, width, bins).permute(3, 1, 0, 2).reshape(bins * groups, batch, width)
    right = taps.view(groups, width, width, bins).permute(3, 0, 2, 1).reshape(bins * groups, width, width)
    product = torch.bmm(left, right).view(bins, groups, batch, width).permute(2, 1, 3, 0).reshape(batch, dim, bins)
    output: Tensor = torch.fft.irfft(product, n=size)
    return output[:, :, :num_frames].transpose(1, 2)


def _fft_size(minimum: int) -> int:
    """Return the smallest 2^a 3^b 5^c that is not below `minimum`: lengths that a Fourier transform is fast at."""
    best = 1 << max(minimum - 1, 0).bit_length()
    power_of_5 = 1
    while power_of_5 < best:
        odd = power_of_5
        while odd < best:
            quotient = -(-minimum // odd)
            best = min(best, odd << max(quotient - 1, 0).bit_length())
            odd *= 3
        power_of_5 *= 5
    return best


def attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, dropout: float) -> Tensor:
    """Attend: softmax(q k^T / sqrt(d)) v over (B, H, F, d), to the keys where `key_mask` (B, 1, 1, F) is True.

    At least one key of each utterance has to be True.
    """
    if _draws_bytes(query, dropout):
        output: Tensor = _DroppedAttention.apply(query, key, value, key_mask, dropout)
        return output
    on_cpu = query.device.type == "cpu"
    slow = on_cpu and query.dtype == torch.bfloat16 and key.shape[2] <= _MAX_EXPLICIT_FRAMES and not dropout
    if not slow:
        return F.scaled_dot_product_attention(query, key, value, key_mask, dropout)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask, float("-inf"))
    return scores.softmax(-1).to(value.dtype) @ value


class _DroppedAttention(torch.autograd.Function):
    """Attention with dropout on its weights, on a CPU: a few heads at a time, whose weights stay in the cache.

    Kept for the backward pass are the weights and a byte for each, instead of three float32 tensors.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, dropout: float) -> Tensor:
        if torch.is_autocast_enabled("cpu"):  # which leaves alone what writes into a given tensor
            query, key, value = (part.to(torch.get_autocast_dtype("cpu")) for part in (query, key, value))
        with torch.autocast("cpu", enabled=False):
            scale = query.shape[-1] ** -0.5
            q, k, v = (query * scale).flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
            masked = None if key_mask is None else ~key_mask.expand(-1, query.shape[1], -1, -1).flatten(0, 1)
            weights = q.new_empty(len(q), q.shape[1], k.shape[1])
            kept = torch.empty(weights.shape, dtype=torch.uint8)
            output = q.new_empty(len(q), q.shape[1], v.shape[2])
            for heads, scores, dropped in _head_groups(weights):
                torch.bmm(q[heads], k[heads].mT, out=scores)
                if masked is not None:
                    scores.masked_fill_(masked[heads], float("-inf"))
                torch.softmax(scores, -1, out=weights[heads])
                for one in kept[heads]:  # by itself, so that what is dropped does not depend on the number of threads
                    _draw_kept(one, dropout)
                torch.mul(weights[heads], kept[heads], out=dropped)
                torch.bmm(dropped, v[heads], out=output[heads])
            ctx.factor = _factor(dropout)
            output *= ctx.factor
        ctx.save_for_backward(q, k, v, weights, kept)
        ctx.scale, ctx.batch = scale, query.shape[:2]
        return output.unflatten(0, ctx.batch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        q, k, v, weights, kept = ctx.saved_tensors
        scaled = gradient.flatten(0, 1) * ctx.factor
        by_query, by_key, by_value = (
            torch.empty_like(part) if needed else None
            for part, needed in zip((q, k, v), ctx.needs_input_grad, strict=False)
        )
        for heads, by_weights, by_scores in _head_groups(weights):
            if by_value is not None:
                dropped = torch.mul(weights[heads], kept[heads], out=by_scores)  # memory that is not needed yet
                torch.bmm(dropped.mT, scaled[heads], out=by_value[heads])
            torch.bmm(scaled[heads], v[heads].mT, out=by_weights)
            by_weights.mul_(kept[heads])
            # More exact than the product of the output and its gradient as the sum that it subtracts: an output is rounded.
            torch._softmax_backward_data(by_weights, weights[heads], -1, q.dtype, grad_input=by_scores)  # noqa: SLF001
            if by_query is not None:
                torch.bmm(by_scores, k[heads], out=by_query[heads])
            if by_key is not None:
                torch.bmm(by_scores.mT, q[heads], out=by_key[heads])
        if by_query is not None:
            by_query *= ctx.scale
        by_query, by_key, by_value = (
            None if part is None else part.unflatten(0, ctx.batch) for part in (by_query, by_key, by_value)
        )
        return by_query, by_key, by_value, None, None


def _head_groups(weights: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield heads that are computed at once, with memory for two values per weight: two heads for each thread.

    Those are 1.8 MB each for 13 s. The memory is always the same, so that it stays in the cache and the system is not asked
    for more.
    """
    size = 2 * torch.get_num_threads()
    first, second = torch.empty_like(weights[:size]), torch.empty_like(weights[:size])
    for start in range(0, len(weights), size):
        count = min(size, len(weights) - start)
        yield slice(start, start + count), first[:count], second[:count]


def dropout(x: Tensor, share: float) -> Tensor:
    """Set a share of the elements to zero, to 1/131,072 on CPUs, and scale the others, so that the mean stays."""
    if not _draws_bytes(x, share):
        return F.dropout(x, share)
    return x * _draw_kept(torch.empty(x.shape, dtype=torch.uint8), share) * _factor(share)


def _draws_bytes(x: Tensor, share: float) -> bool:
    """Return whether dropout is ours: on a CPU, not compiled, and with a share that 16 bits are enough for."""
    return x.device.type == "cpu" and 2**-8 <= share <= 1 - 2**-8 and not torch.compiler.is_compiling()


def _draw_kept(kept: Tensor, share: float) -> Tensor:
    """Fill a contiguous tensor of bytes: 1 where dropout keeps an element, 0 where it drops it.

    torch draws 64 bits for each element on CPUs; here four elements share them.
    """
    drawn = torch.empty(-(-kept.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    threshold = _num_kept(share) - 2**15  # below it lie as many of the 16-bit numbers as are kept
    torch.lt(drawn[: kept.numel()].view(kept.shape), threshold, out=kept.view(torch.bool))
    return kept


def _num_kept(share: float) -> int:
    """Return how many of the 65,536 16-bit numbers stand for an element that is kept."""
    return round((1 - share) * 2**16)


def _factor(share: float) -> float:
    """Return what the kept elements are multiplied by."""
    return 2**16 / _num_kept(share)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x itself, bit for bit, with its gradient multiplied by `factor`."""
    output: Tensor = _ScaleGradient.apply(x, factor)
    return output


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
