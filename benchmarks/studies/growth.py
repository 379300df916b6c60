"""Measure time and memory of our stages at three sizes each: `python -m benchmarks.studies.growth [--output FILE]`.

Each size is a process of its own, as in `benchmarks.run`. Time has to grow with the audio, and memory must not (k-means holds its
sample). K-means runs over workers, a fixed number of iterations; what it adds per frame says what 17 million frames of 768
dimensions (960 h at 10 %) would take. Shards without work are done twice: in memory, where only our own bookkeeping costs, and
on a disk, which has each receipt flushed. `python -m benchmarks.scale` puts the record into docs/scale.md.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.cases import LAYER, OURS, OVER_WORKERS, Case, inputs_of
from benchmarks.run import WORK, Runner
from benchmarks.scale import render_growth

ITERATIONS = 20


def build_cases() -> list[tuple[float, Case]]:
    """Return each size with its case."""
    cases: list[tuple[float, Case]] = []

    def add(sizes: tuple[float, ...], title: str, stage: str, size_name: str, **options: Any) -> None:
        for size in sizes:
            chosen = {size_name: size, **options}
            case = Case(f"{stage}-{size:g}", title, stage, chosen, sides=(OURS,), repeats=1)
            cases.append((size, case))

    labels = {"layer": LAYER, "dtype": "float32", "kind": "flac"}
    add((10, 20, 40), "units of MFCC, minutes", "units", "minutes", source="mfcc", **labels)
    add((2, 4, 8), f"units of layer {LAYER} of base, minutes", "units", "minutes", source="layer", **labels)
    loader = {"kind": "flac", "minutes": 40, "batch_seconds": 87.5, "workers": 2}
    add((40, 80, 160), "loader, minutes delivered", "loader", "deliver_minutes", **loader)
    for frames in (131_072, 262_144, 524_288):
        settings = {"tolerance": 0.0, "max_iterations": ITERATIONS}
        options = {"frames": f"layer-{frames}", "num_units": 500, "settings": settings}
        title = f"k-means, {ITERATIONS} iterations, 500 units, frames of 768"
        case = Case(f"kmeans-{frames}", title, "kmeans", options, sides=(OVER_WORKERS,), repeats=1, unit="s")
        cases.append((frames, case))
    add((2_500, 5_000, 10_000), "shards without work, in memory", "shards", "num_shards", in_memory=True)
    # Twice: what the kernel takes depends on what the disk did before.
    add((2_500, 5_000, 10_000), "shards without work, on disk", "shards", "num_shards", in_memory=False)
    add((10_000, 5_000, 2_500), "… again, largest first", "shards", "num_shards", in_memory=False)
    return cases


def spec_of(cases: list[Case]) -> dict[str, Any]:
    """Return what has to be prepared: as for `benchmarks.run`, with frames for each size of k-means."""
    frames = {
        case.options["frames"]: int(case.options["frames"].split("-")[1]) for case in cases if case.stage == "kmeans"
    }
    return {**inputs_of([case for case in cases if case.stage != "kmeans"]), "frames": frames}


def row_of(size: float, result: dict[str, Any]) -> dict[str, Any]:
    """Return what one size took."""
    (side,) = result["sides"].values()
    return {
        "title": result["title"],
        "size": size,
        "wall_seconds": round(side["wall_seconds"], 3),
        "cpu_seconds": round(side["cpu_seconds"], 3),
        "peak_bytes": side["peak_bytes"],
        "figures": side["figures"],
    }


def main() -> int:
    """Measure; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=WORK, help="folder for inputs and scratch")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    cases = build_cases()
    runner = Runner(args.work, "cpu", args.threads, Path(sys.executable), None)
    record = machine.describe("cpu", args.threads)
    runner.prepare(spec_of([case for _, case in cases]), "growth")
    results = [(size, runner.measure(case, [], case.repeats)) for size, case in cases]
    failed = [f"{result['title']} {size:g}: {result['errors']}" for size, result in results if result["errors"]]
    if failed:
        print("\n".join(failed), file=sys.stderr)
        return 1
    rows = [row_of(size, result) for size, result in results]
    first, *_, last = [row for row in rows if row["title"].startswith("k-means")]
    # What one more frame costs: the seeding, which is the same for all sizes, is not in it.
    per_frame = (last["cpu_seconds"] - first["cpu_seconds"]) / (last["size"] - first["size"]) / ITERATIONS
    content = {
        "commit": machine.commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": record,
        "rows": rows,
        "cpu_seconds_per_frame_and_iteration": per_frame,
    }
    print(f"\n{render_growth(content)}")
    if args.output:
        args.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
