"""Gathers the data of an iteration's report from the files of its stages.

Only `done.json`, `metrics.jsonl` and the stages' own tables are read: no server, and no stage is run. ABX and quality
may be absent, and so may single figures that an older version of a stage did not write.
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

from hubert.core.files import folder_size, read_json, rename
from hubert.core.stage import CPU, read_jobs
from hubert.evaluation.checkpoints import build_checkpoints
from hubert.evaluation.choice import MFCC, Outcome
from hubert.report.report_data import ComparisonRow, LayerRow, ReportData, Source, StageRow
from hubert.settings.stages import EVALUATED

MAX_REJECTED = 20  # rejected files that the page names
CLOCK_SECONDS = 5.0  # two machines' clocks may differ by that
CHUNK_UNITS = 1 << 24  # units counted at once
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
    outcome: Outcome | None,
    previous: ComparisonRow | None,
) -> ReportData:
    """Gather what the page of one iteration shows.

    Args:
        run: the run's folder.
        number: of the iteration, from 1.
        resolved: what the iteration was asked to do (`hubert.runs.resolved.Resolved`).
        stages: name and folder of each finished stage.
        outcome: the chosen checkpoint and layer; None while the iteration is not finished.
        previous: the row of the previous iteration in the table that compares iterations.
    """
    done = {name: rename(read_json(stages[name] / "done.json") or {}) for name in EVALUATED if name in stages}
    figures = {name: done.get(name, {}).get("figures", {}) for name in EVALUATED}
    source = describe_source(resolved)
    layers = layer_table(figures["abx"], figures["quality"], outcome)
    manifest, quality = figures["manifest"], figures["quality"]
    checkpoints = build_checkpoints(
        outcome, figures["validate"].get("rows", ()), figures["abx"].get("rows", ()), quality.get("layers", ())
    )
    return ReportData.model_validate(
        {
            "run": run.name,
            "iteration": number,
            "recipe": resolved.get("recipe_name", ""),
            "description": resolved.get("recipe", {}).get("description", ""),
            "data": resolved.get("data", ""),
            "source": source,
            "outcome": outcome,
            "baseline": baseline_row(layers, quality, source),
            "previous": previous,
            "row": iteration_row(number, layers, figures["validate"], outcome),
            "layers": layers,
            "checkpoints": checkpoints,
            "abx": figures["abx"],
            "units": {part: figures["units"].get(part) for part in ("train", "validation")},
            "phones": quality.get("units"),
            "data_figures": manifest
            | {"parts": {part: manifest[part] for part in ("train", "validation") if part in manifest}},
            "rejected": rejected_files(stages.get("manifest")),
            "training": figures["train"] | {"folder": stages["train"].name if "train" in stages else None},
            "hashes": hashes_of(done, outcome, source),
            "stages": [stage_row(name, stages[name], content) for name, content in done.items() if content],
            "hosts": hosts_of(done),
            "environment": environment(gpus_of(done)),
            "resolved": dict(resolved),
        }
    )


def describe_source(resolved: Mapping[str, Any]) -> Source:
    """Return what an iteration clustered, MFCC or a layer of a checkpoint, and who chose it."""
    source = resolved.get("source", {})
    checkpoint, layer = source.get("checkpoint") or "", source.get("layer") or MFCC
    return Source(
        name=f"layer {layer} of {Path(checkpoint).name}" if checkpoint else "MFCC",
        checkpoint=checkpoint,
        sha256=source.get("sha256") or "",
        layer=layer,
        why=resolved.get("chosen", ""),
        by=resolved.get("chosen_by", ""),
    )


def layer_table(abx: Mapping[str, Any], quality: Mapping[str, Any], outcome: Outcome | None) -> list[LayerRow]:
    """Return one row for MFCC and one for each layer of the chosen checkpoint, with what was measured of it."""
    step = None if outcome is None else outcome.step
    scored = {row["layer"]: row for row in abx.get("rows", ()) if row["step"] in (None, step)}
    clustered = {row["layer"]: row for row in quality.get("layers", ())}
    rows = []
    for layer in sorted({*scored, *clustered}):
        rates, units = scored.get(layer, {}), clustered.get(layer, {})
        reported, selection = rates.get("reported", {}), rates.get("selection", {})
        every = rates.get("all", {})
        rows.append(
            LayerRow(
                layer=layer,
                name="MFCC" if layer == MFCC else f"layer {layer}",
                chosen=outcome is not None and layer == outcome.layer,
                abx_within=reported.get("within"),
                abx_across=reported.get("across"),
                abx_items=reported.get("items"),
                num_items=reported.get("num_items", every.get("num_items")),
                num_cells=reported.get("num_cells", every.get("num_cells")),
                selection_within=selection.get("within"),
                selection_across=selection.get("across"),
                selection_items=selection.get("items"),
                pnmi=units.get("pnmi"),
                pnmi_units=units.get("num_units"),
                phone_purity=units.get("phone_purity"),
                cluster_purity=units.get("cluster_purity"),
            )
        )
    return rows


MEASURED = ("abx_within", "abx_across", "abx_items", "num_items", "num_cells", "pnmi", "pnmi_units")


def baseline_row(layers: Sequence[LayerRow], quality: Mapping[str, Any], source: Source) -> ComparisonRow:
    """Return the MFCC row of the table that compares iterations.

    Its PNMI is that of the units in use if the iteration clustered MFCCs and no other measurement is there.
    """
    measured = _measured(next((row for row in layers if row.layer == MFCC), None))
    if measured["pnmi"] is None and not source.checkpoint:
        measured["pnmi"] = quality.get("units", {}).get("pnmi")
    return ComparisonRow(name="MFCC", layer=MFCC, **measured)


def iteration_row(
    number: int, layers: Sequence[LayerRow], validation: Mapping[str, Any], outcome: Outcome | None
) -> ComparisonRow:
    """Return an iteration's row of the table that compares iterations: its chosen checkpoint and layer."""
    step = None if outcome is None else outcome.step
    scores = next((row for row in validation.get("rows", ()) if row["step"] == step), validation.get("best", {}))
    return ComparisonRow(
        name=f"it{number}",
        iteration=number,
        layer=None if outcome is None else outcome.layer,
        step=step,
        **_measured(next((row for row in layers if row.chosen), None)),
        validation_loss=scores.get("validation_loss"),
        unigram_entropy=validation.get("unigram_entropy"),
        masked_accuracy=scores.get("masked_accuracy"),
        majority_accuracy=validation.get("majority_accuracy"),
    )


def _measured(row: LayerRow | None) -> dict[str, Any]:
    return {name: getattr(row, name, None) for name in MEASURED}


def stage_row(name: str, folder: Path, done: Mapping[str, Any]) -> StageRow:
    """Return what a stage cost and where it is.

    A training's processes say themselves on what they ran; of the other stages the receipts do.
    """
    figures = done.get("figures", {})
    device = figures.get("device") or " and ".join(done.get("devices", ())) or None
    gpu_seconds = done.get("gpu_seconds") if done.get("devices") else None  # older receipts do not say
    if name == "train":
        gpu_seconds = figures.get("gpu_seconds")  # nor do older trainings; `device` is that of the last start alone
    given = {"key", "seconds", "num_shards", "host", "finished_at", "settings", "inputs"} & done.keys()
    return StageRow(
        name=name,
        folder=str(folder),
        elapsed_seconds=elapsed_seconds(folder, done),
        jobs=read_jobs(folder),
        device=device,
        gpu_seconds=gpu_seconds,
        bytes=folder_size(folder),
        figures={key: value for key, value in figures.items() if isinstance(value, bool | int | float | str)},
        **{key: done[key] for key in given},
    )


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


def hashes_of(done: Mapping[str, Mapping[str, Any]], outcome: Outcome | None, source: Source) -> dict[str, str]:
    """Return what identifies the data, the codebook, the units and the checkpoints: 64 hex digits each."""
    found = {
        "manifest (names, sizes and times of the audio files)": done.get("manifest", {}).get("key"),
        "codebook (sha256)": done.get("kmeans", {}).get("figures", {}).get("sha256"),
        "units (key)": done.get("units", {}).get("key"),
        "chosen checkpoint (sha256)": outcome and outcome.sha256,
        "teacher (sha256)": source.sha256,
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
    for start in range(0, len(values), CHUNK_UNITS):
        counts += np.bincount(values[start : start + CHUNK_UNITS], minlength=num_units)
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
