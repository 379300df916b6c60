"""A device's rates, and by them the least time of each part of a training step: python -m benchmarks.studies.ceilings

    python -m benchmarks.studies.ceilings --device cuda --output benchmarks/results/ceilings-cuda.json
    python -m benchmarks.studies.ceilings --published h100        # no device: predicted from the maker's figures

Measured: products of the shapes that the step has, forward and backward, in each number format; copies in the device's
memory and to it. The floor of a part is the larger of FLOP / the fastest product and bytes / the copy rate
(`benchmarks.studies.counting`).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.studies.counting import Batch, Part, Product, count_parts
from hubert.settings.model import SIZES

FORMATS = ("bfloat16", "float16", "tf32", "float32")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
SMALL = Batch(crops=1, samples=64_000)  # for CPUs


@dataclass
class Rates:
    """FLOP per second of each number format, bytes per second of copies, and where they come from."""

    source: str
    products: dict[str, float]
    memory: float  # read and written bytes together
    to_device: float | None = None
    shapes: list[dict[str, Any]] = field(default_factory=list)


# NVIDIA's data sheets of the SXM cards, dense; PCIe 5.0 x16 in one direction.
_HOPPER = {"bfloat16": 989.4e12, "float16": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12}
PUBLISHED = {
    "h100": Rates("published, not measured: H100 SXM", _HOPPER, 3.35e12, 64e9),
    "h200": Rates("published, not measured: H200 SXM", _HOPPER, 4.8e12, 64e9),
}


def seconds_of(call: Callable[[], object], device: str, least_seconds: float) -> float:
    """Return the time of a call: the shortest of four rounds, which take `least_seconds` together or one call each.

    On a GPU by its own events around a whole round, so the launches of later calls overlap with the earlier ones.
    """
    call()
    count = 1
    while (found := _round(call, device, count)) < least_seconds / 5:
        count = max(2 * count, round(count * least_seconds / 4 / max(found, 1e-6)))
    return min(_round(call, device, count) for _ in range(4)) / count


def _round(call: Callable[[], object], device: str, count: int) -> float:
    """Return the seconds of `count` calls, one after the other."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - begin


def measure_product(product: Product, number_format: str, device: str, least_seconds: float) -> float:
    """Return the FLOP per second of one product (of up to 64 beside each other, where there are many)."""
    dtype = DTYPES[number_format]
    beside = min(product.count, 64) if product.rows * product.columns < 2**22 else 1
    shapes = ((product.rows, product.inner), (product.inner, product.columns))
    left, right = (
        torch.randn((beside, *shape) if beside > 1 else shape, device=device, dtype=dtype) for shape in shapes
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if number_format == "tf32" else "highest")
    try:
        seconds = seconds_of(lambda: torch.matmul(left, right), device, least_seconds)
    finally:
        torch.set_float32_matmul_precision(before)
    return beside * product.flop / product.count / seconds


def measure_copies(device: str, least_seconds: float) -> tuple[float, float | None]:
    """Return bytes per second: read and written in the device's memory, and brought to it from page-locked memory."""
    size = COPY_BYTES[device]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    memory = 2 * size / seconds_of(lambda: target.copy_(source), device, least_seconds)
    if device != "cuda":
        return memory, None
    host = torch.ones(size // 4, pin_memory=True)
    return memory, size / seconds_of(lambda: target.copy_(host, non_blocking=True), device, least_seconds)


def measure_rates(
    device: str, parts: dict[str, Part], formats: tuple[str, ...], *, least_seconds: float = 0.1
) -> Rates:
    """Measure all products of a step, forward and backward; a format's rate is that of its fastest product."""
    shapes = []
    for part in parts.values():
        for forward in part.products:
            for product in (forward, *forward.backward()):
                found = {name: measure_product(product, name, device, least_seconds) for name in formats}
                shapes.append({"part": part.name, **asdict(product), "rates": found})
    best = {name: max(shape["rates"][name] for shape in shapes) for name in formats}
    memory, to_device = measure_copies(device, least_seconds)
    return Rates(f"measured on {device}", best, memory, to_device, shapes)


def read_rates(path: Path) -> Rates:
    """Return the rates of an earlier call's --output."""
    return Rates(**json.loads(path.read_text())["rates"])


def floors(parts: dict[str, Part], rates: Rates) -> list[dict[str, Any]]:
    """Return one row per part: FLOP, bytes, the least milliseconds of each, and which one counts."""
    rows = []
    for part in parts.values():
        products, moves = part.seconds(rates.products, rates.memory)
        rows.append(
            {
                "part": part.name,
                "forward_flop": sum(part.forward.values()),
                "backward_flop": sum(part.backward.values()),
                "bytes": part.bytes,
                "product_ms": 1e3 * products,
                "memory_ms": 1e3 * moves,
                "floor_ms": 1e3 * max(products, moves),
            }
        )
    return rows


def render(rows: list[dict[str, Any]], rates: Rates, batch: Batch) -> str:
    """Return the floors as a table, with sums."""
    found = ", ".join(f"{name} {rate / 1e12:.4g} TFLOP/s" for name, rate in rates.products.items())
    to_device = f"; to the device {rates.to_device / 1e9:.3g} GB/s" if rates.to_device else ""
    shape = f"{batch.crops} crops of {batch.samples} samples, {batch.seconds:.1f} s, {batch.frames} frames"
    columns = ("forward_flop", "backward_flop", "bytes", "product_ms", "memory_ms", "floor_ms")
    total = {"part": "together", **{name: sum(row[name] for row in rows) for name in columns}}
    lines = [
        f"Rates {rates.source}: {found}; memory {rates.memory / 1e9:.4g} GB/s{to_device}",
        f"Batch: {shape}, {batch.masked} of them masked, {batch.num_classes} classes",
        "",
        "| part | GFLOP forward | GFLOP backward | MB | products, ms | memory, ms | floor, ms |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['part']} | {row['forward_flop'] / 1e9:.1f} | {row['backward_flop'] / 1e9:.1f} | {row['bytes'] / 1e6:.0f} "
            f"| {row['product_ms']:.3f} | {row['memory_ms']:.3f} | {row['floor_ms']:.3f} |"
            for row in [*rows, total]
        ),
    ]
    lines += ["", f"At the floors: {1e3 * batch.seconds / total['floor_ms']:.0f} s of audio per second."]
    if rates.to_device:
        ms = 1e3 * 4 * batch.crops * batch.samples / rates.to_device
        lines[-1] += f" Audio as float32 reaches the device in {ms:.2f} ms, as int16 in {ms / 2:.2f} ms."
    return "\n".join(lines)


def add_batch_options(parser: argparse.ArgumentParser) -> None:
    """Let the user say which model and which batch."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--crops", type=int, help="default: 11 on a GPU, 1 on a CPU")
    parser.add_argument("--samples", type=int, help="of each crop; default: 254400 on a GPU, 64000 on a CPU")
    parser.add_argument("--classes", type=int, default=500)


def batch_of(args: argparse.Namespace, *, small: bool) -> Batch:
    """Return the batch that the user named, or a default."""
    default = SMALL if small else Batch()
    return Batch(args.crops or default.crops, args.samples or default.samples, args.classes)


def write(path: Path, result: dict[str, Any], module: str, device: str) -> None:
    """Write a result as JSON, with the machine, the commit and the command."""
    head = {
        "command": f"python -m {module} {' '.join(sys.argv[1:])}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": machine.commit(),
        "machine": machine.describe(device, torch.get_num_threads()),
    }
    path.write_text(json.dumps(head | result, indent=1) + "\n")


def main() -> None:
    """Measure or look up the rates, print the floors, and write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_batch_options(parser)
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, help="default: all on a GPU; no tf32, float16 on a CPU"
    )
    parser.add_argument("--least-seconds", type=float, default=0.1, help="that each product is measured for")
    parser.add_argument("--published", choices=PUBLISHED, help="measure nothing: the maker's figures of a card")
    parser.add_argument("--output", type=Path, help="write JSON")
    args = parser.parse_args()
    if args.published and args.output:
        parser.error("--output is for what was measured: leave out --published")
    batch = batch_of(args, small=args.device == "cpu" and not args.published)
    parts = count_parts(SIZES[args.size], batch)
    formats = tuple(args.formats or (FORMATS if args.device == "cuda" else ("bfloat16", "float32")))
    if not args.published and not {"bfloat16", "float32"} <= set(formats):
        parser.error("the floors need bfloat16 and float32 among --formats")
    rates = (
        PUBLISHED[args.published]
        if args.published
        else measure_rates(args.device, parts, formats, least_seconds=args.least_seconds)
    )
    rows = floors(parts, rates)
    for shape in rates.shapes:
        found = ", ".join(f"{name} {rate / 1e12:.4g}" for name, rate in shape["rates"].items())
        print(f"{shape['rows']:>7} x {shape['inner']:>6} x {shape['columns']:>6}  {shape['name']}: {found} TFLOP/s")
    print(render(rows, rates, batch))
    if args.output:
        result = {"size": args.size, "batch": asdict(batch), "rates": asdict(rates), "floors": rows}
        write(args.output, result, "benchmarks.studies.ceilings", args.device)


if __name__ == "__main__":
    main()
