"""`hubert status RUN`: what of a run is done, running, partial or missing, and what it takes on disk.

Nothing is computed and nothing is planned here. Which folder belongs to which stage is known once the stages before it
are done (a key needs the keys of its inputs), so `Chain` asks each stage only when its turn has come.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hubert.core import text
from hubert.core.errors import DataError, HubertError
from hubert.core.files import folder_size, read_json
from hubert.core.locks import find_holder
from hubert.core.paths import RunFolder
from hubert.core.stage import Figures, Plan, Stage, read_jobs, read_receipt
from hubert.core.text import align
from hubert.evaluation.choice import Outcome, read_outcome
from hubert.runs.pipeline import Iteration
from hubert.runs.resolved import Resolved
from hubert.settings.stages import EXTRA_MANIFESTS, STAGES
from hubert.training.folder import read_metrics
from hubert.training.launch import find_running, unfinished_job

# As it is shown: the manifest of its audio before an optional stage.
SHOWN = tuple(one for name in STAGES for one in (EXTRA_MANIFESTS.get(name), name) if one)

State = Literal["done", "running", "partial", "missing", "not in the recipe"]


class Chain:
    """The stages of an iteration in their order; each is asked once, and only after those that it needs."""

    def __init__(self, iteration: Iteration) -> None:
        self.iteration = iteration
        self._found: dict[str, tuple[Stage | None, Figures | None]] = {}

    def missing(self, name: str) -> str | None:
        """Return the first unfinished stage that `name` needs; None if all of them are done."""
        for need in STAGES[name].needs if name in STAGES else ():
            missing = self.missing(need)
            if missing is not None:
                return missing
            stage, done = self.find(need)
            if stage is not None and done is None:
                return need
        return None

    def find(self, name: str) -> tuple[Stage | None, Figures | None]:
        """Return a stage whose needs are done, and its `done.json`; the stage is None if the recipe has none.

        Raises:
            ConfigError: the data that the recipe names are not there, or lie elsewhere now.
        """
        if name not in self._found:
            stage: Stage | None = getattr(self.iteration, name)
            self._found[name] = (stage, None if stage is None else stage.done())
        return self._found[name]

    def known(self) -> Iterator[tuple[str, Stage | None, Figures | None]]:
        """Yield name, stage and `done.json` of all stages whose needs are done, those for the audio of the evaluation too."""
        for name in (*STAGES, *EXTRA_MANIFESTS.values()):
            if self.missing(name) is None:
                yield name, *self.find(name)

    def is_complete(self) -> bool:
        """Return True if every stage is done, the report too."""
        return self.missing("report") is None and self.find("report")[1] is not None


@dataclass(frozen=True)
class StageStatus:
    """One stage of an iteration, or one folder of older settings."""

    name: str
    state: State
    detail: str = ""
    folder: str = ""
    bytes: int = 0
    num_done: int = 0
    num_shards: int | None = None
    seconds: float | None = None
    finished_at: str | None = None
    jobs: tuple[str, ...] = ()  # of Slurm


@dataclass(frozen=True)
class IterationStatus:
    """One iteration: what it starts from, its stages, and its outcome if it has one."""

    number: int
    recipe: str = ""
    data: str = ""
    starts_from: str = ""
    stages: list[StageStatus] = field(default_factory=list)
    outcome: Outcome | None = None
    problem: str = ""


@dataclass(frozen=True)
class RunStatus:
    """A whole run. `other` are stage folders that no iteration's present settings lead to."""

    run: str
    folder: str
    bytes: int
    iterations: list[IterationStatus]
    other: list[StageStatus]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON-like values."""
        return asdict(self, dict_factory=_with_jobs_if_any)


def _with_jobs_if_any(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in items if name != "jobs" or value}


def read_status(folder: RunFolder) -> RunStatus:
    """Look at the folders of a run. Reads file names, sizes and receipts; of the data only the listing."""
    iterations, current = [], set()
    for number in folder.iterations():
        status, folders = _iteration(folder, number)
        iterations.append(status)
        current |= folders
    other = [read_folder(path) for path in stage_folders(folder) if path not in current]
    return RunStatus(folder.name, str(folder.root), folder_size(folder.root), iterations, other)


def _iteration(folder: RunFolder, number: int) -> tuple[IterationStatus, set[Path]]:
    """Return an iteration's status and the folders that belong to its stages."""
    outcome = read_outcome(folder, number)
    path = folder.settings(number)
    if not path.exists():
        return IterationStatus(
            number, outcome=outcome, problem=f"{path} is missing: it was never started to the end"
        ), set()
    try:
        resolved = Resolved.load(path)
    except DataError as error:
        return IterationStatus(number, outcome=outcome, problem=str(error)), set()
    found: dict[str, StageStatus] = {}
    folders: set[Path] = set()
    problem = ""
    try:
        for name, stage, done in Chain(Iteration(resolved)).known():
            found[name] = _stage(name, stage, done)
            if stage is not None:
                folders.add(stage.folder)
    except HubertError as error:
        problem = str(error)
    stages = [found.get(name, StageStatus(name, "missing")) for name in SHOWN]
    stages = [
        stage for stage in stages if stage.name not in EXTRA_MANIFESTS.values() or stage.state != "not in the recipe"
    ]
    status = IterationStatus(
        number=number,
        recipe=resolved.recipe_name,
        data=resolved.data,
        starts_from=f"{resolved.source.describe()} ({resolved.chosen})",
        stages=stages,
        outcome=outcome,
        problem=problem,
    )
    return status, folders


def _stage(name: str, stage: Stage | None, done: Figures | None) -> StageStatus:
    if stage is None:
        return StageStatus(name, "not in the recipe")
    status = read_folder(stage.folder, name)
    if status.state == "done" and done is None:  # finished once, but not as it is needed now
        why = (
            "pruned, and needed again"
            if not stage.accepts_pruned
            else "outputs are missing, or more steps are asked for"
        )
        return replace(status, state="partial", detail=why)
    return status


def read_folder(folder: Path, name: str = "") -> StageStatus:
    """Return the status of a stage's folder, whatever its key. Without a folder the stage is missing."""
    name = name or _label(folder)
    if not folder.is_dir():
        return StageStatus(name, "missing", folder=str(folder))
    plan = read_json(folder / "plan.json")
    done = read_json(folder / "done.json")
    jobs = tuple(read_jobs(folder))
    status = StageStatus(name, "partial", folder=str(folder), bytes=folder_size(folder), jobs=jobs)
    holder, trainer, job_id = find_holder(folder), find_running(folder), unfinished_job(folder)
    if done is not None and holder is None and trainer is None and not job_id:
        detail = f"{len(done['pruned'])} outputs pruned" if done.get("pruned") else ""
        total = int(done["num_shards"])
        status = replace(status, state="done", detail=detail, num_done=total, num_shards=total)
        return replace(status, seconds=done["seconds"], finished_at=done["finished_at"])
    shards = None if plan is None else Plan(plan["shards"])
    found = [] if shards is None else [read_receipt(folder, index, shards) for index in range(len(shards))]
    num_done = sum(receipt is not None for receipt in found)
    status = replace(status, num_done=num_done, num_shards=None if shards is None else len(shards))
    progress = _training_progress(folder) or (
        "no plan yet" if shards is None else f"{num_done} of {len(shards)} shards"
    )
    if holder is not None or trainer is not None or job_id:
        who = f"process {holder['pid']} on {holder['host']}" if holder else ""
        if trainer is not None:
            who = f"trainer {trainer.process.pid} on {trainer.process.host}"
        if job_id:
            who = f"Slurm job {job_id}"
        return replace(status, state="running", detail=f"{progress}; {who}")
    return replace(status, detail=progress)


def _training_progress(folder: Path) -> str:
    """Return how far a training's log goes; empty for other stages."""
    job = read_json(folder / "job.json")
    if job is None or "settings" not in job:
        return ""
    try:
        lines = read_metrics(folder / "metrics.jsonl")
    except DataError:
        return "its log is damaged; the next start restores it"
    step = int(lines[-1]["step"]) if lines else 0
    return f"step {step:,} of {job['settings']['steps']:,}"


def _label(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}" if re.fullmatch(r"it\d+", folder.parent.name) else folder.name


def stage_folders(folder: RunFolder) -> list[Path]:
    """Return the folders of all stages of a run, of all settings."""
    homes = [folder.root, *(folder.iteration(number) for number in folder.iterations())]
    names = "|".join(STAGES)
    return sorted(
        path for home in homes for path in home.glob("*-*") if re.fullmatch(rf"({names})-[0-9a-f]{{8}}", path.name)
    )


# For people -------------------------------------------------------------------------------------------------------


def format_status(status: RunStatus) -> str:
    """Write a run's status for a terminal."""
    lines = [f"run {status.run}: {text.size(status.bytes)} in {status.folder}"]
    for iteration in status.iterations:
        lines += ["", f"iteration {iteration.number}: recipe {iteration.recipe or '?'}, data {iteration.data or '?'}"]
        lines += [f"  starts from {iteration.starts_from}"] if iteration.starts_from else []
        lines += [f"  {line}" for line in format_stages(iteration.stages)]
        lines += [f"  problem: {iteration.problem}"] if iteration.problem else []
        lines.append(f"  {_outcome(iteration)}")
    if not status.iterations:
        lines.append("nothing was started yet")
    if status.other:
        unsure = any(iteration.problem for iteration in status.iterations)
        which = "folders not assigned because of the problem:" if unsure else "folders of other settings, unused above:"
        lines += ["", which]
        lines += [f"  {line}" for line in format_stages(status.other)]
    return "\n".join(lines)


def _outcome(iteration: IterationStatus) -> str:
    outcome = iteration.outcome
    if outcome is None:
        return "outcome: none yet"
    training = str(Path(outcome.checkpoint).parent)
    own = any(stage.name == "train" and stage.folder == training for stage in iteration.stages)
    whose = "outcome" if own else f"outcome of other settings ({Path(training).name})"
    return f"{whose}: step {outcome.step:,}, layer {outcome.layer}: {outcome.why}"


def format_stages(stages: list[StageStatus]) -> list[str]:
    """Write one line per stage: name, state, size, time, end, remark."""
    header = ("stage", "state", "size", "time", "finished", "")
    rows = [
        (
            stage.name,
            stage.state,
            text.size(stage.bytes) if stage.bytes else "-",
            text.duration(stage.seconds),
            (stage.finished_at or "-")[:19].replace("T", " "),
            stage.detail,
        )
        for stage in stages
    ]
    return align([header, *rows])
