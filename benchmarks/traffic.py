"""What the code as it stands would launch and move on a GPU, counted without one: python -m benchmarks.traffic

Runs one step of base on tensors that have shapes and no content, as if on a GPU under bfloat16 autocast, and writes down
every operator: FLOP (torch's formulas), bytes (each operator reads its inputs and writes its outputs; views are free).
A part's predicted time is the sum over its operators of the larger of FLOP / rate and bytes / rate, at the shares of the
published rates that are assumed below. A prediction to hold against a measurement, never a measurement.

The sum forgets what stays in the cache between two operators, so it is high where tensors are small, and the time that
Python takes to launch, so it is low where operators are short: their number is printed.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import counting
from benchmarks.ceilings import PUBLISHED, Rates
from benchmarks.counting import Batch, count_parts
from benchmarks.parts import ATTENTION, Inputs, Piece, our_pieces
from hubert import HuBERTPretrain, ops
from hubert.sizes import SIZES, ModelConfig

ASSUMED_PRODUCTS, ASSUMED_MEMORY = 0.65, 0.85  # of the published rates: what large products and copies usually reach
FREE = ("detach", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "lift_fresh", "alias")
IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm}  # torch has no formula for it


@dataclass
class Operators:
    """What some operators did."""

    launches: float = 0.0
    flop: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0


class Recorder(TorchDispatchMode):
    """Adds up all operators that run while it is active."""

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.rates = rates
        self.found = Operators()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and count it."""
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]  # noqa: SLF001
        if getattr(func, "is_view", False) or name in FREE or not tree_leaves(out):
            return out
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        moved = sum(
            min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
            for x in tensors
            if x.device.type == "cuda"
        )
        if not moved:
            return out
        packet = func._overloadpacket  # noqa: SLF001
        formula = flop_registry.get(IN_PLACE.get(packet, packet))
        flop = float(formula(*args, **(kwargs or {}), out_val=out)) if formula else 0.0
        dtype = "bfloat16" if any(x.dtype == torch.bfloat16 for x in tensors) else "float32"
        self.add(Operators(1, flop, moved), dtype)
        return out

    def add(self, done: Operators, dtype: str) -> None:
        """Count an operator with its predicted time."""
        products = done.flop / (ASSUMED_PRODUCTS * self.rates.products[dtype])
        self.found.launches += done.launches
        self.found.flop += done.flop
        self.found.bytes += done.bytes
        self.found.seconds += max(products, done.bytes / (ASSUMED_MEMORY * self.rates.memory))


class _Attention(torch.autograd.Function):
    """One operator forward, one backward: a fused kernel, whatever this machine would choose."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Make tensors without content on a GPU that is not there, under autocast, with a fused attention."""
    attention, kept = ops.attention, (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
    ops.attention = lambda query, key, value, *_: _Attention.apply(query, key, value)
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            yield
    finally:
        ops.attention = attention
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", kept[0])
        torch.set_autocast_dtype("cuda", kept[1])


def record(config: ModelConfig, batch: Batch, rates: Rates) -> dict[str, Operators]:
    """Return what each part of a step does, all repetitions together, forward and backward."""
    found: dict[str, Operators] = {}
    parts = count_parts(config, batch)
    with as_on_a_gpu():
        model = HuBERTPretrain(batch.num_classes, config).train()
        for piece in our_pieces(model, Inputs(model, batch, "cuda", torch.bfloat16)):
            if piece.name != ATTENTION:
                found[piece.name] = _scaled(_run(piece, rates), piece.times)
    scores, part = found[counting.SCORES], parts[counting.SCORES]
    kernel = Recorder(rates)
    kernel.add(Operators(2 * config.num_layers, part.flop, part.bytes), "bfloat16")
    scores.launches += kernel.found.launches
    scores.flop, scores.bytes = scores.flop + part.flop, scores.bytes + part.bytes
    scores.seconds += kernel.found.seconds
    return found


def _run(piece: Piece, rates: Rates) -> Operators:
    with Recorder(rates) as recorder:
        outputs = piece.forward()
        gradients = [torch.empty_like(output) for output in outputs]
        piece.backward(outputs, gradients)
    return recorder.found


def _scaled(done: Operators, times: float) -> Operators:
    return Operators(*(times * value for value in (done.launches, done.flop, done.bytes, done.seconds)))


def main() -> None:
    """Print a row per part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=PUBLISHED, default="h100")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--crops", type=int, default=Batch.crops)
    parser.add_argument("--samples", type=int, default=Batch.samples)
    args = parser.parse_args()
    batch, rates = Batch(args.crops, args.samples), PUBLISHED[args.card]
    parts = count_parts(SIZES[args.size], batch)
    print(
        f"Predicted, not measured: {batch.seconds:.1f} s of audio, bfloat16 autocast, {ASSUMED_PRODUCTS:.0%} of the "
        f"products and {ASSUMED_MEMORY:.0%} of the memory rate {rates.source}\n\n"
        "| part | operators | GB moved | ms as it stands | ms fused |\n|---|---|---|---|---|"
    )
    sums: dict[str, float] = defaultdict(float)
    for name, done in record(SIZES[args.size], batch, rates).items():
        products, moves = parts[name].seconds(rates.products, rates.memory)
        row = {
            "launches": done.launches,
            "gigabytes": done.bytes / 1e9,
            "ms": 1e3 * done.seconds,
            "fused": 1e3 * max(products / ASSUMED_PRODUCTS, moves / ASSUMED_MEMORY),
        }
        print(_line(name, row))
        for key, value in row.items():
            sums[key] += value
    print(_line("together, without the optimizer", sums))


def _line(name: str, row: dict[str, float]) -> str:
    return f"| {name} | {row['launches']:.0f} | {row['gigabytes']:.2f} | {row['ms']:.2f} | {row['fused']:.2f} |"


if __name__ == "__main__":
    main()
