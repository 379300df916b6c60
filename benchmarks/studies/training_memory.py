"""What a training step keeps in a GPU's memory, counted without one: python benchmarks/studies/training_memory.py

What autograd saves in a forward pass is added up on the CPU, under bfloat16 autocast, with what a GPU does otherwise put in
its place: fused attention (which keeps q, k, v, its output and a log-sum-exp), the plain positional convolution, and
LayerNorm in float32. Differences between two lengths and two depths give bytes per frame, per layer and besides.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hubert.core.frames import FRAME_RATE, max_samples
from hubert.model import ops
from hubert.model.hubert import HuBERTPretrain
from hubert.settings.model import SIZES

NUM_UNITS = 500
MICRO_BATCH = {"base": 87.5, "large": 56.25, "xlarge": 22.5}  # seconds: fairseq's dataset.max_tokens
STATE = 16  # bytes per parameter: weight, gradient and AdamW's two moments, float32
CAST = 2  # bytes per parameter: autocast's bfloat16 copy


class FusedAttention(torch.autograd.Function):
    """Saves what a fused kernel saves. There is no backward pass here."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = F.scaled_dot_product_attention(query.float(), key.float(), value.float()).to(query.dtype)
        ctx.save_for_backward(query, key, value, output, torch.empty(query.shape[:3]))
        return output


def as_on_a_gpu() -> None:
    """Replace what is computed otherwise on a GPU."""
    layer_norm = F.layer_norm

    def exact_layer_norm(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return layer_norm(x.float(), *rest, **options)

    def convolution(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
        output = F.conv1d(x.transpose(1, 2), weight, bias, padding=weight.shape[2] // 2, groups=groups)
        return output[:, :, : x.shape[1]].transpose(1, 2)

    F.layer_norm = exact_layer_norm
    ops.positional_conv = convolution
    ops.attention = lambda query, key, value, *_: FusedAttention.apply(query, key, value)


def saved_bytes(size: str, num_layers: int, frames: int, *, checkpointing: bool) -> int:
    """Return the bytes of all storages that a forward pass leaves for the backward pass, weights included."""
    model = HuBERTPretrain(NUM_UNITS, size, num_layers=num_layers, layerdrop=0.0).train()
    model.hubert.transformer.checkpointing = checkpointing
    storages: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    mask = torch.arange(frames)[None] < 0.57 * frames
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        results = model(0.1 * torch.randn(1, max_samples(frames)), mask.long(), mask=mask)
    del results
    return sum(number for number, _ in storages.values())


def main() -> None:
    """Print one line per size, with and without activation checkpointing."""
    as_on_a_gpu()
    for size, seconds in MICRO_BATCH.items():
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in HuBERTPretrain(NUM_UNITS, size).parameters())
        for checkpointing in (False, True):
            found = {
                (depth, frames): saved_bytes(size, depth, frames, checkpointing=checkpointing)
                for depth in (2, 4)
                for frames in (100, 200)
            }
            shallow, deep = ((found[depth, 200] - found[depth, 100]) / 100 for depth in (2, 4))
            layer = (deep - shallow) / 2
            frame = SIZES[size].num_layers * layer + shallow - 2 * layer
            fixed, batch = (STATE + CAST) * parameters, frame * FRAME_RATE * seconds
            print(
                f"{size:6} checkpointing {checkpointing!s:5}: {parameters / 1e6:.1f} M parameters, {fixed / 1e9:.1f} GB; "
                f"{layer / 1e3:.1f} kB per frame and layer, {frame * FRAME_RATE / 1e6:.0f} MB per second of audio, "
                f"{batch / 1e9:.1f} GB in {seconds} s; together {(fixed + batch) / 1e9:.1f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
