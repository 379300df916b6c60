"""`hubert plan RECIPE`: what a run takes, by arithmetic alone: files, shards, tasks, disk, steps, GPU-hours.

    disk        sampled features 39 float32 (MFCC, 100 Hz) or `dim` float16 (a layer, 50 Hz) per frame; units 2 bytes per
                frame, once for people and once for the trainer; a checkpoint 4 bytes per parameter, and 8 more in the
                last two, for the optimizer
    GPU-hours   audio of all steps / audio that a GPU trains on per second. A forward pass takes a third of a training
                step's time

`ASSUMED` says where the one measured number comes from; every plan prints it.
"""

import math
import textwrap
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hubert.core import text
from hubert.core.errors import ConfigError
from hubert.core.frames import FRAME_RATE, MFCC_DIMENSION, MFCC_FRAME_RATE
from hubert.core.text import align
from hubert.model.cost import ASSUMED, OTHERS, num_parameters, training_rate
from hubert.report import conclusions
from hubert.settings.model import ModelConfig, build_config
from hubert.settings.recipe import IterationSettings, Recipe

SECONDS_PER_FILE = 12.3  # LibriSpeech: 960.9 h in 281,241 files
MANIFEST_BYTES = 70  # per file, all tables of the stage together, with paths as in LibriSpeech (measured)
TABLE_BYTES = 190  # per file, beside its units, with such paths (measured)
MAX_GROUPS = 200  # Prefect tasks that do the shards of a stage, at most: each costs about 0.2 s
FORWARD = 3  # forward passes in the time of one forward and backward pass
BIG_ENOUGH = 0.9  # a share of busy GPUs below this is worth a word


@dataclass(frozen=True)
class StagePlan:
    """Work and disk of one stage. `bytes` counts what stays until `hubert prune`."""

    stage: str
    num_shards: int
    num_tasks: int
    bytes: float


@dataclass(frozen=True)
class IterationPlan:
    """One iteration. Times of GPUs are in hours, audio in seconds or hours as named."""

    number: int
    size: str
    num_parameters: int
    clusters: str
    num_units: int
    steps: int
    seconds_per_step: float
    micro_batches_per_step: int
    epochs: float
    num_checkpoints: int
    gpu_hours_labelling: float
    gpu_hours_training: float
    gpu_hours_validation: float
    busy: float
    hours: float
    stages: list[StagePlan]

    @property
    def gpu_hours(self) -> float:
        """All GPU-hours of the iteration, if no GPU waits."""
        return self.gpu_hours_labelling + self.gpu_hours_training + self.gpu_hours_validation


@dataclass(frozen=True)
class RunPlan:
    """A whole run."""

    hours: float
    num_files: int
    num_gpus: int
    audio_seconds_per_second: float | None
    manifest: StagePlan
    iterations: list[IterationPlan]
    bytes: float
    prunable_bytes: float
    num_tasks: int
    gpu_hours: float
    wall_hours: float
    assumptions: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON-like values."""
        return asdict(self)


def build_plan(
    recipe: Recipe, *, hours: float, num_files: int | None = None, num_gpus: int = 1, rate: float | None = None
) -> RunPlan:
    """Work out what a recipe takes.

    Args:
        recipe: the settings.
        hours: of training audio; validation is held out of it unless the recipe names its own.
        num_files: files; None: as long as LibriSpeech's on average.
        num_gpus: GPUs that train and label.
        rate: seconds of audio that one of them trains on per second; None: `ASSUMED`, scaled by the multiplications of
            the model's forward pass.

    Raises:
        ConfigError: a number is not positive.
    """
    files = round(hours * 3600 / SECONDS_PER_FILE) if num_files is None else num_files
    for name, value in {
        "--hours": hours,
        "--files": files,
        "--gpus": num_gpus,
        "--audio-seconds-per-second": rate,
    }.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{name} is {value}; expected a positive number")
    data = recipe.iteration(1).data
    manifest = _stage("manifest", math.ceil(hours / data.shard_hours), files * MANIFEST_BYTES)
    iterations = []
    teacher: ModelConfig | None = None
    for number in range(1, recipe.num_iterations + 1):
        settings = recipe.iteration(number)
        iterations.append(_iteration(number, settings, teacher, hours=hours, files=files, num_gpus=num_gpus, rate=rate))
        teacher = build_config(settings.train.size, settings.train.model)
    every = [manifest, *(stage for iteration in iterations for stage in iteration.stages)]
    plan = RunPlan(
        hours=hours,
        num_files=files,
        num_gpus=num_gpus,
        audio_seconds_per_second=rate,
        manifest=manifest,
        iterations=iterations,
        bytes=sum(stage.bytes for stage in every),
        prunable_bytes=sum(stage.bytes for stage in every if stage.stage == "features"),
        num_tasks=sum(stage.num_tasks for stage in every),
        gpu_hours=sum(iteration.gpu_hours for iteration in iterations),
        wall_hours=sum(iteration.hours for iteration in iterations),
    )
    return replace(plan, assumptions=_assumptions(plan, files_are_guessed=num_files is None))


def _iteration(
    number: int,
    settings: IterationSettings,
    teacher: ModelConfig | None,
    *,
    hours: float,
    files: int,
    num_gpus: int,
    rate: float | None,
) -> IterationPlan:
    kmeans, train = settings.kmeans, settings.train
    config = build_config(train.size, train.model)
    held_out = 0.0 if settings.data.validation else hours * settings.data.validation_fraction
    validated = min(held_out or settings.validation.max_hours, settings.validation.max_hours)
    sampled = max(
        min((hours - held_out) * kmeans.sample_fraction, kmeans.sample_hours),
        min(kmeans.min_sample_files / files, 1) * hours,
    )
    frame_rate = FRAME_RATE if teacher else MFCC_FRAME_RATE
    dimension, width = (teacher.dim, 2) if teacher else (MFCC_DIMENSION, 4)
    weights = 4 * num_parameters(config, kmeans.num_units)
    checkpoints = math.ceil(train.steps / train.checkpoint_interval)
    states = min(checkpoints, 2) * 2 * weights
    micro_batches = max(1, round(train.batch_seconds / train.micro_batch_seconds))
    seconds_per_step = micro_batches * train.micro_batch_seconds
    forward = FORWARD * 3600  # seconds of audio per GPU-hour and unit of rate
    trained = train.steps * seconds_per_step / 3600 / training_rate(config, rate)
    labelled = (hours + sampled) * 3600 / forward / training_rate(teacher, rate) if teacher else 0.0
    scored = checkpoints * validated * 3600 / forward / training_rate(config, rate)
    busy = micro_batches / (num_gpus * math.ceil(micro_batches / num_gpus))
    stages = [
        _stage(
            "features",
            math.ceil(sampled / settings.features.shard_hours),
            sampled * 3600 * frame_rate * dimension * width,
        ),
        _stage("kmeans", 1, kmeans.num_units * dimension * 4),
        _stage(
            "units",
            math.ceil(hours / settings.units.shard_hours),
            2 * 2 * hours * 3600 * frame_rate + files * TABLE_BYTES,
        ),
        StagePlan("train", 1, 1, checkpoints * weights + states),
        _stage("validate", checkpoints, 0),
    ]
    if settings.abx.item:
        stages.append(_stage("abx", checkpoints if settings.abx.checkpoints == "all" else 1, 0))
    if settings.quality.alignments:
        stages.append(_stage("quality", 2, 0))
    stages.append(_stage("report", 1, 0))
    return IterationPlan(
        number=number,
        size=train.size,
        num_parameters=num_parameters(config, kmeans.num_units),
        clusters="a layer of the previous model" if teacher else "MFCC",
        num_units=kmeans.num_units,
        steps=train.steps,
        seconds_per_step=seconds_per_step,
        micro_batches_per_step=micro_batches,
        epochs=train.steps * seconds_per_step / 3600 / (hours - held_out),
        num_checkpoints=checkpoints,
        gpu_hours_labelling=labelled,
        gpu_hours_training=trained,
        gpu_hours_validation=scored,
        busy=busy,
        hours=trained / num_gpus / busy + (labelled + scored) / num_gpus,
        stages=stages,
    )


def _stage(name: str, num_shards: int, num_bytes: float) -> StagePlan:
    """Count a stage's tasks: the plan, the groups of shards, the end."""
    return StagePlan(name, num_shards, min(num_shards, MAX_GROUPS) + 2, num_bytes)


# For people -------------------------------------------------------------------------------------------------------


def _assumptions(plan: RunPlan, *, files_are_guessed: bool) -> list[str]:
    """Return one line per number that was not worked out from the recipe, with where it comes from."""
    lines = []
    if files_are_guessed:
        lines.append(f"files last {SECONDS_PER_FILE} s on average, as LibriSpeech's do (--files says otherwise)")
    if plan.audio_seconds_per_second is not None:
        lines.append(f"a GPU trains on {plan.audio_seconds_per_second:g} s of audio per second, as was given")
    else:
        speed = ASSUMED.audio_seconds_per_second
        lines.append(
            f"a GPU trains the base model on {speed:.0f} s of audio per second: a {ASSUMED.gpu}, from {ASSUMED.source}. "
            "Other sizes are scaled by the multiplications of their forward pass, which flatters small ones"
        )
        for other in OTHERS if {one.size for one in plan.iterations} == {"base"} else ():
            total = plan.gpu_hours * speed / other.audio_seconds_per_second
            lines.append(
                f"for comparison, on an {other.gpu}: {other.audio_seconds_per_second:.0f} s per second, {total:,.0f} GPU-hours "
                f"(not measured here; {other.source})"
            )
    lines.append(
        "a forward pass takes a third of a training step's time; MFCCs, ABX and quality need no GPU to speak of"
    )
    waits = {one.micro_batches_per_step: one.busy for one in plan.iterations if one.busy < BIG_ENOUGH}
    lines += [
        f"micro-batches per step: {count}; so many GPUs are only {busy:.0%} busy with them, which the times count in; a "
        "number of GPUs that divides them would do better"
        for count, busy in waits.items()
    ]
    return lines


def _hours(value: float) -> str:
    """Write hours with three digits; what is next to nothing as such."""
    if 0 < value < 0.05:
        return "< 0.1"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_plan(plan: RunPlan, recipe: str) -> str:
    """Write a plan for a terminal."""
    gpus = "1 GPU" if plan.num_gpus == 1 else f"{plan.num_gpus} GPUs"
    lines = [f"recipe {recipe}: {plan.hours:g} h of audio in {plan.num_files:,} files, {gpus}"]
    rows = [("", plan.manifest), *((f"it{one.number}/", stage) for one in plan.iterations for stage in one.stages)]
    table = [
        (
            f"{prefix}{stage.stage}",
            f"{stage.num_shards:,}",
            f"{stage.num_tasks:,}",
            text.size(stage.bytes) if stage.bytes else "-",
        )
        for prefix, stage in rows
    ]
    total = ("total", "", f"{plan.num_tasks:,}", text.size(plan.bytes))
    lines += ["", *align([("stage", "shards", "Prefect tasks", "disk"), *table, total], right=(1, 2, 3))]
    lines.append(f"`hubert prune` frees {text.size(plan.prunable_bytes)} of it once the iterations are finished")
    for one in plan.iterations:
        audio = one.steps * one.seconds_per_step / 3600
        model = f"{one.size}, {one.num_parameters / 1e6:.1f} M parameters, {one.num_units} units of {one.clusters}"
        steps = f"{one.steps:,} steps of {one.seconds_per_step:,.0f} s of audio: {_hours(audio)} h"
        training = f"{steps}, {one.epochs:,.1f} epochs, {one.num_checkpoints} checkpoints"
        kinds = {
            "labelling": one.gpu_hours_labelling,
            "training": one.gpu_hours_training,
            "validation": one.gpu_hours_validation,
        }
        cost = ", ".join(f"{name} {_hours(hours)}" for name, hours in kinds.items())
        lines += ["", f"iteration {one.number}: {model}", f"  {training}"]
        lines.append(f"  GPU-hours: {cost}; about {_hours(one.hours)} h on {gpus}")
    lines += [
        "",
        f"all: {_hours(plan.gpu_hours)} GPU-hours, about {_hours(plan.wall_hours)} h on {gpus}",
        "",
        "assumed:",
    ]
    wrap = textwrap.TextWrapper(conclusions.WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join([*lines, *(wrap.fill(line) for line in plan.assumptions)])
