"""Time each part of a training step, forward and backward, beside its floor: python -m benchmarks.studies.step_parts

    python -m benchmarks.studies.step_parts --device cuda --rates benchmarks/results/ceilings-cuda.json
    python -m benchmarks.studies.step_parts --device cpu --size tiny --no-reference

A layer's parts are timed once and multiplied by how often a step does them; the last layer computes masked frames only.
The sum is compared with the whole step, whose backward pass also adds up gradients. Inputs are not cleared from the
caches between two calls: in a step, too, what was just written is read again.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies import counting
from benchmarks.studies.ceilings import (
    PUBLISHED,
    Rates,
    add_batch_options,
    batch_of,
    floors,
    measure_copies,
    measure_product,
    read_rates,
    write,
)
from benchmarks.studies.counting import Batch, Part, count_parts
from benchmarks.studies.parts import STEP, Inputs, Piece, our_pieces, step_of, torchaudio_pieces, update_of
from hubert.model.hubert import HuBERTPretrain
from hubert.settings.model import SIZES, ModelConfig

WARM_UP = 3


class Marks:
    """Moments of a repetition: the GPU's own events, read when all repetitions are done; or the clock of a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.found: list[list[Any]] = []

    def start(self) -> None:
        """Begin another repetition."""
        self.found.append([])
        self.mark()

    def mark(self) -> None:
        """Note the moment at which the device has done what was asked for so far."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.found[-1].append(event)
        else:
            self.found[-1].append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Return the median time between the first and the second mark, the second and the third, ..."""
        if self.cuda:
            torch.cuda.synchronize()
        spans = [
            [a.elapsed_time(b) if self.cuda else 1e3 * (b - a) for a, b in itertools.pairwise(marks)]
            for marks in self.found
        ]
        return [statistics.median(column) for column in zip(*spans, strict=True)]


def time_piece(piece: Piece, device: str, *, repeats: int, bf16: bool) -> tuple[float, float]:
    """Return the milliseconds of one forward and one backward pass."""
    gradients: list[Tensor] = []
    marks = Marks(device)
    for number in range(WARM_UP + repeats):
        if number == WARM_UP:
            marks = Marks(device)
        marks.start()
        with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
            outputs = piece.forward()
        marks.mark()
        if not gradients:
            gradients = [torch.randn_like(output) for output in outputs]
        piece.backward(outputs, gradients)
        marks.mark()
        del outputs
    forward, backward = marks.milliseconds()
    return forward, backward


def time_call(call: Callable[[], None], device: str, repeats: int) -> float:
    """Return the milliseconds of a call that has its own backward pass, or none."""
    for _ in range(WARM_UP):
        call()
    marks = Marks(device)
    for _ in range(repeats):
        marks.start()
        call()
        marks.mark()
    return marks.milliseconds()[0]


def quick_rates(parts: dict[str, Part], device: str) -> Rates:
    """Measure what the floors need by one product of the feed-forward part and one copy."""
    product = parts[counting.FEED_FORWARD].products[0]
    rates = {name: measure_product(product, name, device, 0.1) for name in ("bfloat16", "float32")}
    return Rates(f"of {product.name} on {device}", rates, measure_copies(device, 0.1)[0])


def measure(
    size: str | ModelConfig, batch: Batch, device: str, *, repeats: int, bf16: bool, reference: bool
) -> list[dict[str, Any]]:
    """Return a row per part: milliseconds of one call, how often it happens, and torchaudio's."""
    torch.manual_seed(0)
    model = HuBERTPretrain(batch.num_classes, size, layerdrop=0.0).to(device).train()
    inputs = Inputs(model, batch, device, torch.bfloat16 if bf16 else torch.float32)
    pieces = our_pieces(model, inputs)
    theirs = torchaudio_pieces(inputs) if reference else {}
    rows: list[dict[str, Any]] = []
    for piece in pieces:
        forward, backward = time_piece(piece, device, repeats=repeats, bf16=bf16)
        row = {"part": piece.name, "forward_ms": forward, "backward_ms": backward, "times": piece.times}
        row["ms"] = piece.times * (forward + backward)
        if other := theirs.get(piece.name):
            row["torchaudio_ms"] = other.times * sum(time_piece(other, device, repeats=repeats, bf16=bf16))
        rows.append(row)
    del pieces, theirs
    update = update_of(model)
    for name, call in ((counting.OPTIMIZER, update), (STEP, step_of(model, inputs, update, bf16=bf16))):
        rows.append({"part": name, "times": 1.0, "ms": time_call(call, device, repeats)})
    return rows


def add_floors(rows: list[dict[str, Any]], parts: dict[str, Part], rates: Rates) -> None:
    """Put the floor of each part, and the sum of all for the whole step, into its row."""
    found = {row["part"]: row["floor_ms"] for row in floors(parts, rates)}
    found[STEP] = sum(found.values())
    for row in rows:
        if row["part"] in found:
            row["floor_ms"] = found[row["part"]]


def render(rows: list[dict[str, Any]], batch: Batch, rates: Rates) -> str:
    """Return the table."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    lines = [
        f"Milliseconds per step of {batch.seconds:.1f} s of audio; floors of bfloat16 arithmetic by rates {rates.source}",
        "",
        "| part | forward | backward | times | in a step | floor | times the floor | torchaudio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        floor = row.get("floor_ms")
        lines.append(
            f"| {row['part']} | {number(row.get('forward_ms'))} | {number(row.get('backward_ms'))} | {row['times']:.2f} "
            f"| {number(row['ms'])} | {number(floor)} | {'-' if not floor else format(row['ms'] / floor, '.1f')} "
            f"| {number(row.get('torchaudio_ms'))} |"
        )
    step = next(row["ms"] for row in rows if row["part"] == STEP)
    parts = sum(row["ms"] for row in rows if "floor_ms" in row and row["part"] != STEP)
    lines += ["", f"Sum of the parts: {parts:.3f} ms. {1e3 * batch.seconds / step:.1f} s of audio per second."]
    return "\n".join(lines)


def main() -> None:
    """Time the parts, print them beside their floors, and write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_batch_options(parser)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--rates", type=Path, help="what benchmarks.studies.ceilings wrote; default: a quick measurement"
    )
    parser.add_argument("--published", choices=PUBLISHED, help="floors by the maker's figures of a card")
    parser.add_argument("--no-reference", action="store_true", help="skip torchaudio")
    parser.add_argument("--output", type=Path, help="write JSON")
    args = parser.parse_args()
    batch = batch_of(args, small=args.device == "cpu")
    parts = count_parts(SIZES[args.size], batch)
    rows = measure(
        args.size,
        batch,
        args.device,
        repeats=args.repeats,
        bf16=args.precision == "bf16",
        reference=not args.no_reference,
    )
    if args.rates:
        rates = read_rates(args.rates)
    else:
        rates = PUBLISHED[args.published] if args.published else quick_rates(parts, args.device)
    add_floors(rows, parts, rates)
    print(render(rows, batch, rates))
    if args.output:
        result = {"size": args.size, "precision": args.precision, "batch": asdict(batch), "rates": asdict(rates)}
        write(args.output, result | {"parts": rows}, "benchmarks.studies.step_parts", args.device)


if __name__ == "__main__":
    main()
