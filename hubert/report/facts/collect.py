"""What came out of an iteration, gathered from the files of its stages: the content of `report.json`.

Only `done.json`, `metrics.jsonl` and the stages' own tables are read: no server, and no stage is run. ABX and quality
may be absent, and so may single figures that an older version of a stage did not write; what is absent is None here
and a dash on the page.
"""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from hubert.core.files import folder_size, read_json
from hubert.core.paths import RunFolder
from hubert.core.stage import CPU, read_jobs

Findings = dict[str, Any]
Row = dict[str, Any]

FORMAT = 1
MFCC = 0  # the "layer" of the baseline
STAGES = ("manifest", "features", "kmeans", "units", "train", "validate", "abx", "quality")
NO_OUTCOME = dict.fromkeys(("checkpoint", "sha256", "step", "layer", "rule", "why"))
TRAINING = ("steps", "seconds", "audio_hours", "slurm_jobs", "device", "world_size")
MAX_REJECTED = 20  # rejected files that the page names
CLOCK_SECONDS = 5.0  # two machines' clocks may differ by that
CHUNK = 1 << 24  # units counted at once
PACKAGES = (
    "torch",
    "torchaudio",
    "numpy",
    "polars",
    "scikit-learn",
    "fastabx",
    "safetensors",
    "soundfile",
    "prefect",
    "dask",
    "dask-ml",
    "mlflow",
)


def collect(
    *,
    run: Path,
    number: int,
    resolved: Mapping[str, Any],
    stages: Mapping[str, Path],
    outcome: Mapping[str, Any] | None,
    previous: Row | None,
) -> Findings:
    """Gather everything that the page of one iteration says, as JSON-like values.

    Args:
        run: the run's folder.
        number: of the iteration, from 1.
        resolved: what the iteration was asked to do (`hubert.runs.pipeline.Resolved`).
        stages: name and folder of each finished stage.
        outcome: the chosen checkpoint and layer (`hubert.evaluation.choice.Outcome`); None while the iteration is not finished.
        previous: the row of the previous iteration in the table that compares iterations.

    Returns:
        Shares (accuracy, purity, PNMI) from 0 to 1; ABX error rates in per cent; losses and entropies in nats; times in
        seconds; sizes in bytes.
    """
    done = {name: read_json(stages[name] / "done.json") or {} for name in STAGES if name in stages}
    figures = {name: done.get(name, {}).get("figures", {}) for name in STAGES}
    unfinished = outcome is None
    outcome = NO_OUTCOME if outcome is None else outcome
    layers = layer_table(figures["abx"], figures["quality"], outcome)
    rows = [stage_row(name, stages[name], content) for name, content in done.items() if content]
    return {
        "format": FORMAT,
        "run": run.name,
        "iteration": number,
        "unfinished": unfinished,
        "recipe": resolved.get("recipe_name", ""),
        "description": resolved.get("recipe", {}).get("description", ""),
        "data": resolved.get("data", ""),
        "source": describe_source(resolved.get("source", {}))
        | {"why": resolved.get("chosen", ""), "by": resolved.get("chosen_by", "")},
        "outcome": dict(outcome),
        "baseline": baseline_row(layers, figures["quality"], resolved.get("source", {})),
        "previous": previous,
        "row": iteration_row(number, layers, figures["validate"], outcome),
        "layers": layers,
        "checkpoints": checkpoint_table(figures["validate"], figures["abx"], outcome),
        "abx": {name: figures["abx"].get(name) for name in ("item", "num_dropped_items", "before_residual")},
        "units": {part: figures["units"].get(part) for part in ("train", "validation")},
        "phones": figures["quality"].get("units"),
        "data_figures": data_figures(figures["manifest"]),
        "rejected": rejected_files(stages.get("manifest")),
        "training": {name: figures["train"].get(name) for name in TRAINING}
        | {"folder": stages["train"].name if "train" in stages else None},
        "hashes": hashes_of(done, outcome, resolved.get("source", {})),
        "stages": rows,
        "hosts": hosts_of(done),
        "environment": environment(gpus_of(done)),
        "resolved": dict(resolved),
    }


def describe_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """Say what an iteration clustered: MFCC, or a layer of a checkpoint."""
    checkpoint = source.get("checkpoint") or ""
    layer = source.get("layer") or MFCC
    name = f"layer {layer} of {Path(checkpoint).name}" if checkpoint else "MFCC"
    return {"name": name, "checkpoint": checkpoint, "sha256": source.get("sha256", ""), "layer": layer}


def layer_table(abx: Mapping[str, Any], quality: Mapping[str, Any], outcome: Mapping[str, Any]) -> list[Row]:
    """Return one row for MFCC and one for each layer of the chosen checkpoint, with what was measured of it.

    `abx_*` is the rate that is reported, `selection_*` the one that chose the layer (other items, if the recipe says so).
    """
    scored = {row["layer"]: row for row in abx.get("rows", ()) if row["step"] in (None, outcome["step"])}
    clustered = {row["layer"]: row for row in quality.get("layers", ())}
    rows = []
    for layer in sorted({*scored, *clustered}):
        rates, units = scored.get(layer, {}), clustered.get(layer, {})
        reported, selection = rates.get("reported", {}), rates.get("selection", {})
        every = rates.get("all", {})
        rows.append(
            {
                "layer": layer,
                "name": "MFCC" if layer == MFCC else f"layer {layer}",
                "chosen": layer == outcome["layer"],
                "abx_within": reported.get("within"),
                "abx_across": reported.get("across"),
                "abx_items": reported.get("items"),
                "num_items": reported.get("num_items", every.get("num_items")),
                "num_cells": reported.get("num_cells", every.get("num_cells")),
                "selection_within": selection.get("within"),
                "selection_across": selection.get("across"),
                "selection_items": selection.get("items"),
                "pnmi": units.get("pnmi"),
                "pnmi_units": units.get("num_units"),
                "phone_purity": units.get("phone_purity"),
                "cluster_purity": units.get("cluster_purity"),
            }
        )
    return rows


MEASURED = ("abx_within", "abx_across", "abx_items", "num_items", "num_cells", "pnmi", "pnmi_units")
LOSSES = ("validation_loss", "unigram_entropy", "masked_accuracy", "majority_accuracy")


def baseline_row(layers: Sequence[Row], quality: Mapping[str, Any], source: Mapping[str, Any]) -> Row:
    """Return the MFCC row of the table that compares iterations.

    Its PNMI is that of the units in use if the iteration clustered MFCCs and no other measurement is there.
    """
    measured = next((row for row in layers if row["layer"] == MFCC), {})
    row = {"name": "MFCC", "iteration": None, "layer": MFCC, "step": None}
    row |= {name: measured.get(name) for name in MEASURED} | dict.fromkeys(LOSSES)
    if row["pnmi"] is None and not source.get("checkpoint"):
        row["pnmi"] = quality.get("units", {}).get("pnmi")
    return row


def iteration_row(number: int, layers: Sequence[Row], validation: Mapping[str, Any], outcome: Mapping[str, Any]) -> Row:
    """Return an iteration's row of the table that compares iterations: its chosen checkpoint and layer."""
    measured = next((row for row in layers if row["chosen"]), {})
    best = validation.get("best", {})
    scores = next((row for row in validation.get("rows", ()) if row["step"] == outcome["step"]), best)
    return {
        "name": f"it{number}",
        "iteration": number,
        "layer": outcome["layer"],
        "step": outcome["step"],
        **{name: measured.get(name) for name in MEASURED},
        "validation_loss": scores.get("masked_loss"),
        "unigram_entropy": validation.get("unigram_entropy"),
        "masked_accuracy": scores.get("masked_accuracy"),
        "majority_accuracy": validation.get("majority_accuracy"),
    }


def checkpoint_table(
    validation: Mapping[str, Any], abx: Mapping[str, Any], outcome: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the validated checkpoints by step; scored ones with the layer of the lowest ABX across speakers."""
    rows = []
    for row in sorted(validation.get("rows", ()), key=lambda row: row["step"]):
        scored = [one for one in abx.get("rows", ()) if one["step"] == row["step"] and one["layer"] != MFCC]
        across = [one for one in scored if one["reported"].get("across") is not None]
        best = min(across, key=lambda one: one["selection"]["across"], default=None)
        rows.append(
            {
                **row,
                "chosen": row["step"] == outcome["step"],
                "abx_layer": best and best["layer"],
                "abx_within": best and best["reported"].get("within"),
                "abx_across": best and best["reported"]["across"],
            }
        )
    return rows


def data_figures(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return how much audio there is, in all and by part, and how many files were rejected."""
    totals = {name: manifest.get(name) for name in ("num_files", "hours", "num_rejected")}
    parts = {part: manifest[part] for part in ("train", "validation") if part in manifest}
    return totals | {"parts": parts}


def stage_row(name: str, folder: Path, done: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a stage cost and where it is.

    A training's processes say themselves on what they ran; of the other stages the receipts do.
    """
    figures = done.get("figures", {})
    device = figures.get("device") or " and ".join(done.get("devices", ())) or None
    gpu_seconds = done.get("gpu_seconds") if done.get("devices") else None  # older receipts do not say
    if name == "train":
        gpu_seconds = figures.get("gpu_seconds")  # nor do older trainings; `device` is that of the last start alone
    return {
        "name": name,
        "folder": str(folder),
        "key": done.get("key", ""),
        "seconds": done.get("seconds", 0.0),
        "elapsed_seconds": elapsed_seconds(folder, done),
        "num_shards": done.get("num_shards"),
        "host": done.get("host"),
        "finished_at": done.get("finished_at"),
        "jobs": read_jobs(folder),
        "device": device,
        "gpu_seconds": gpu_seconds,
        "bytes": folder_size(folder),
        "settings": done.get("settings", {}),
        "inputs": done.get("inputs", {}),
        "figures": {key: value for key, value in figures.items() if isinstance(value, bool | int | float | str)},
    }


def elapsed_seconds(folder: Path, done: Mapping[str, Any]) -> float | None:
    """Return the seconds by the clock from a stage's plan to its end, pauses included; None if the files do not tell."""
    plan = folder / "plan.json"
    try:
        elapsed = datetime.fromisoformat(done["finished_at"]).timestamp() - plan.stat().st_mtime
    except (KeyError, ValueError, OSError):
        return None
    return max(elapsed, 0.0) if elapsed > -CLOCK_SECONDS else None  # a copied folder has another time


def hosts_of(done: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the machines that finished a stage, each once."""
    return list(dict.fromkeys(content["host"] for content in done.values() if content.get("host")))


def hashes_of(
    done: Mapping[str, Mapping[str, Any]], outcome: Mapping[str, Any], source: Mapping[str, Any]
) -> dict[str, str]:
    """Return what identifies the data, the codebook, the units and the checkpoints: 64 hex digits each."""
    found = {
        "manifest (names, sizes and times of the audio files)": done["manifest"].get("key")
        if "manifest" in done
        else "",
        "codebook (sha256)": done["kmeans"].get("figures", {}).get("sha256") if "kmeans" in done else "",
        "units (key)": done["units"].get("key") if "units" in done else "",
        "chosen checkpoint (sha256)": outcome["sha256"],
        "teacher (sha256)": source.get("sha256"),
    }
    return {name: value for name, value in found.items() if value}


def rejected_files(manifest: Path | None) -> list[dict[str, str]]:
    """Return path and reason of the first rejected files; none if there is no such table."""
    table = manifest / "rejected.parquet" if manifest else None
    if table is None or not table.exists():
        return []
    return pl.scan_parquet(table).select("path", "reason").head(MAX_REJECTED).collect().to_dicts()


def unit_usage(units: Path, num_units: int) -> npt.NDArray[np.int64] | None:
    """Count the training frames of each unit, (K,), from the trainer's table; None if it is gone."""
    path = units / "tables" / "train" / "units.npy"
    if not path.exists():
        return None
    values = np.load(path, mmap_mode="r")
    counts = np.zeros(num_units, np.int64)
    for start in range(0, len(values), CHUNK):
        counts += np.bincount(values[start : start + CHUNK], minlength=num_units)
    return counts


def gpus_of(done: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the GPUs on which stages say that they ran, each kind once."""
    found = (
        device
        for content in done.values()
        for device in (*content.get("devices", ()), content.get("figures", {}).get("device"))
    )
    return list(dict.fromkeys(device for device in found if device and device != CPU))


def environment(gpus: Sequence[str]) -> dict[str, str]:
    """Describe the machine and the packages of the process that writes the report, and the GPUs that stages used.

    CUDA is not asked for the GPUs of this machine: that would initialise it, and hold memory, in a worker that needs none.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    machine = {
        "machine": platform.node(),
        "system": platform.platform(),
        "processor": f"{_processor()}, {cores} cores usable",
        "GPUs that stages used": ", ".join(gpus) or "none noted",
        "threads of torch": str(torch.get_num_threads()),
        "Python": platform.python_version(),
    }
    return machine | {name: found for name, found in _versions(PACKAGES) if found}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _versions(packages: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each package with its version; None if it is not installed (a training node has no service)."""
    for name in packages:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, None


def find_report(folder: RunFolder, number: int) -> tuple[Path, Findings] | None:
    """Return page and content of an iteration's report: the newest that tells of its outcome, else the newest."""
    outcome = read_json(folder.outcome(number))
    found = []
    for done in folder.iteration(number).glob("report-*/done.json"):
        content = read_json(done.parent / "report.json")
        if content is not None and content.get("format") == FORMAT:
            found.append((content["outcome"] == outcome, done.stat().st_mtime, done.parent / "report.html", content))
    best = max(found, key=lambda one: one[:2], default=None)
    return best and (best[2], best[3])
