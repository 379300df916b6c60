"""What 1k, 60k and 1M hours cost, from measured rates: python -m benchmarks.scale [--check] writes docs/scale.md.

`hubert.runs.plan` counts files, shards, tasks, disk and audio; the rates come from benchmarks/results. A number that nobody has
measured yet is a dash, and the page says what would fill it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import LAYER, OURS, OVER_WORKERS
from benchmarks.page import PROJECT, keep
from benchmarks.table import RESULTS

PAGE = PROJECT / "docs" / "scale.md"
START = "<!-- scale: made by `python -m benchmarks.scale` -->"
END = "<!-- end of scale -->"
GROWTH = PROJECT / "benchmarks" / "results" / "growth.json"
PAPER_FRAMES, PAPER_ITERATIONS = 17_000_000, 100  # a layer's sample of 960 h, and most of Lloyd's iterations
ORCHESTRATION = PROJECT / "benchmarks" / "results" / "orchestration.json"
CORPORA = ((1_000, 8), (60_000, 32), (1_000_000, 32))  # hours of audio, GPUs: a step has 32 micro-batches
LABELLING = "float32"  # features.dtype of the recipe: a test holds the two together
MAX_SHARDS = 10_000  # of a stage: shards grow with the corpus, instead of their number


@dataclass(frozen=True)
class Rates:
    """Measured rates, seconds of audio per second of one core or one GPU; None: not measured."""

    mfcc_units: float | None  # per core
    layer_units: float | None  # per core, whole stage
    layer_gpu: float | None  # per GPU, the encoder alone
    training_gpu: float | None
    training_core: float | None
    kmeans_frames: float | None  # frames fitted per second of one core, the whole fit
    checkpoint_seconds: float | None
    task_overhead: float | None  # share of the work's time
    sources: tuple[str, ...]


def read_rates(paths: list[Path] | None = None, orchestration: Path = ORCHESTRATION) -> Rates:
    """Take the rates from the results."""
    found = {path.stem: json.loads(path.read_text()) for path in (paths or RESULTS) if path.exists()}
    cpu, cuda = found.get("peers-cpu"), found.get("peers-cuda")

    def side(result: dict[str, Any] | None, name: str, which: str = OURS) -> dict[str, Any] | None:
        rows = [] if result is None else result["rows"]
        return next((row["sides"].get(which) for row in rows if row["name"] == name), None)

    def per_core(name: str) -> float | None:
        row = side(cpu, name)
        return row["audio_seconds"] / row["cpu_seconds"] if row else None

    def per_gpu(name: str) -> float | None:
        row = side(cuda, name)
        return row["audio_seconds"] / row["wall_seconds"] if row else None

    # 100 h of MFCC are above `kmeans.local_megabytes`.
    kmeans, checkpoint = side(cpu, "kmeans-mfcc", OVER_WORKERS), side(cpu, "checkpoint")
    overhead = json.loads(orchestration.read_text())["overhead_percent"] if orchestration.exists() else None
    sources = tuple(
        f"`benchmarks/results/{name}.json`: {result['machine']['gpu'] or result['machine']['processor']}, commit "
        f"{result['commit']}, {result['date']}"
        for name, result in found.items()
    )
    return Rates(
        mfcc_units=per_core("units-mfcc"),
        layer_units=per_core(f"units-{LABELLING}"),
        layer_gpu=per_gpu(f"layer-{LABELLING}"),
        training_gpu=per_gpu("step-bfloat16"),
        training_core=per_core("step-bfloat16"),
        kmeans_frames=kmeans["figures"]["num_frames"] / kmeans["cpu_seconds"] if kmeans else None,
        checkpoint_seconds=checkpoint["wall_seconds"] if checkpoint else None,
        task_overhead=overhead,
        sources=sources,
    )


def estimate(hours: float, num_gpus: int, rates: Rates) -> dict[str, Any]:
    """Return what a corpus costs, keyed by what stands at the left of the table."""
    from hubert.core.paths import find_recipe
    from hubert.runs.plan import build_plan
    from hubert.settings.recipe import read_recipe

    shard_hours = max(1.0, hours / MAX_SHARDS)
    overrides = {f"{section}.shard_hours": shard_hours for section in ("data", "features", "units")}
    recipe = read_recipe(find_recipe("librispeech-base"), overrides)
    plan = build_plan(recipe, hours=hours, num_gpus=num_gpus, rate=rates.training_gpu)
    first, second = plan.iterations
    sampled = min(0.1 * hours, recipe.iteration(1).kmeans.sample_hours)
    frames = sampled * 3600 * 100
    labelled = _divide(hours, rates.layer_gpu)
    trained = sum(one.gpu_hours_training for one in plan.iterations) if rates.training_gpu else None
    validated = sum(one.gpu_hours_validation for one in plan.iterations) if rates.training_gpu else None
    stall = sum(one.num_checkpoints for one in plan.iterations) * (rates.checkpoint_seconds or 0) / 3600
    on_gpus = None
    if labelled is not None and trained is not None and validated is not None:
        on_gpus = (labelled + validated + trained / first.busy) / num_gpus + stall
    return {
        "files (rows of the manifest)": plan.num_files,
        "hours per shard": shard_hours,
        "shards, both iterations": sum(stage.num_shards for one in plan.iterations for stage in one.stages),
        "Prefect tasks": plan.num_tasks,
        "disk, GB": plan.bytes / 1e9,
        "… of which checkpoints": sum(
            stage.bytes for one in plan.iterations for stage in one.stages if stage.stage == "train"
        )
        / 1e9,
        "core-hours: units of MFCC": _divide(hours, rates.mfcc_units),
        "core-hours: k-means of MFCC": frames / rates.kmeans_frames / 3600 if rates.kmeans_frames else None,
        f"GPU-hours: units of layer {LAYER}, {LABELLING}": labelled,
        "… or core-hours, without a GPU": _divide(hours, rates.layer_units),
        "GPU-hours: training (250k and 400k steps)": trained,
        "GPU-hours: validation": validated,
        "epochs, both iterations": first.epochs + second.epochs,
        "GPUs": num_gpus,
        "hours on so many GPUs": on_gpus,
        "… of which waiting for checkpoints": stall if rates.checkpoint_seconds else None,
    }


def _divide(hours: float, rate: float | None) -> float | None:
    return hours / rate if rate else None


def render(rates: Rates) -> str:
    """Return the table and where its rates come from."""
    columns = [estimate(hours, gpus, rates) for hours, gpus in CORPORA]
    lines = [
        f"| | {' | '.join(f'{hours:,} h' for hours, _ in CORPORA)} |",
        f"| --- | {' | '.join(['--:'] * len(CORPORA))} |",
    ]
    lines += [f"| {name} | {' | '.join(_write(column[name]) for column in columns)} |" for name in columns[0]]
    measured = {
        "units of MFCC, audio s / s of a core": rates.mfcc_units,
        f"units of a layer, {LABELLING}, audio s / s of a core": rates.layer_units,
        f"features of a layer, {LABELLING}, audio s / s of a GPU": rates.layer_gpu,
        "training step of base, audio s / s of a GPU": rates.training_gpu,
        "training step of base, audio s / s of a core": rates.training_core,
        "k-means, frames / s of a core (the whole fit over workers, 100 units)": rates.kmeans_frames,
        "wait for a checkpoint of base, s": rates.checkpoint_seconds,
        "overhead of Prefect, Dask and Slurm, % of the work": rates.task_overhead,
    }
    lines += ["", "Measured:", "", "| rate | |", "| --- | --: |"]
    lines += [f"| {name} | {_write(value)} |" for name, value in measured.items()]
    lines += ["", *(f"- {source}" for source in rates.sources or ("nothing has been recorded yet: `make bench`",))]
    return "\n".join(lines)


def render_growth(record: dict[str, Any]) -> str:
    """Return the table of `benchmarks.studies.growth`: each stage at three sizes, and what k-means of 960 h would take."""
    lines = [
        "| | size | wall, s | CPU, s | CPU per unit of size, of the smallest's | peak memory, GB |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    smallest: dict[str, float] = {}
    for row in record["rows"]:
        rate = row["cpu_seconds"] / row["size"]
        relative = rate / smallest.setdefault(row["title"], rate)
        lines.append(
            f"| {row['title']} | {row['size']:,g} | {row['wall_seconds']:.1f} | {row['cpu_seconds']:.1f} | {relative:.2f} "
            f"| {row['peak_bytes'] / 1e9:.2f} |"
        )
    per_frame = record["cpu_seconds_per_frame_and_iteration"]
    hours = per_frame * PAPER_FRAMES * PAPER_ITERATIONS / 3600
    machine = record["machine"]
    extrapolated = (
        f"K-means of {PAPER_FRAMES:,} frames of 768 numbers (960 h at 10 %), 500 units: {per_frame * 1e6:.1f} us per frame and\n"
        f"iteration by the difference of the largest and smallest above, so {hours:.1f} core-hours for {PAPER_ITERATIONS}\n"
        "(too much by what is done once: reading, the variance, the figures of the codebook)."
    )
    source = f"- `benchmarks/results/growth.json`: {machine['processor']}, commit {record['commit']}, {record['date']}"
    return "\n".join([*lines, "", extrapolated, "", source])


def _write(value: float | None) -> str:
    if value is None:
        return "-"
    if value and abs(value) < 0.01:
        return "< 0.01"
    if value >= 100 or value == math.floor(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def whole_page() -> str:
    """Return what stands between the page's markers."""
    growth = render_growth(json.loads(GROWTH.read_text())) if GROWTH.exists() else "nothing recorded yet"
    return f"{render(read_rates())}\n\nThree sizes of each stage (`python -m benchmarks.studies.growth`):\n\n{growth}"


def main() -> None:
    """Write or check the page."""
    keep(PAGE, whole_page(), START, END, module="benchmarks.scale")


if __name__ == "__main__":
    main()
