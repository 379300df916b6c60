"""`hubert prune RUN`: what of a run can be removed without taking anything from a later stage.

    samples      frames of the k-means sample, once their codebook is there and the iteration is finished. The stage
                 stays done; another codebook on the same sample computes them again
    states       optimizer states of all but a training's last two checkpoints. Models stay
    temporary    half-written files of attempts that died
    old          whole folders of settings that the finished iterations do not lead to any more (only with `old`)

What a process holds is left alone, and so is every folder that an outcome or a teacher points into, of any run beside.
"""

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hubert.core import text
from hubert.core.errors import HubertError, TransientError
from hubert.core.files import folder_size, read_json, remove
from hubert.core.locks import find_holder, hold
from hubert.core.outputs import prune_outputs
from hubert.core.paths import RunFolder
from hubert.core.text import align
from hubert.evaluation.choice import read_outcome
from hubert.runs.pipeline import Iteration
from hubert.runs.resolved import Resolved, read_settings, relocate
from hubert.runs.status import Chain, stage_folders
from hubert.training.checkpoint import KEPT_STATES, STATE, list_checkpoints
from hubert.training.launch import find_running, unfinished_job

STALE_SECONDS = 3600.0  # a temporary file that nothing has touched for so long belongs to no live attempt
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")  # `hubert.core.files.atomic_write`
SCRATCH = re.compile(r"features-\w{8}")  # scratch folders of ABX, inside its stage's folder

Kind = Literal["samples", "states", "temporary", "old"]


@dataclass(frozen=True)
class Removal:
    """Something that can go: `outputs` of the stage folder `path`, or all of `path` if there are none."""

    kind: Kind
    path: Path
    bytes: int
    why: str
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What can go, and what was left alone although it looks the part."""

    removals: list[Removal]
    kept: list[str]

    @property
    def bytes(self) -> int:
        """The bytes that removing everything frees."""
        return sum(removal.bytes for removal in self.removals)


def find_prunable(folder: RunFolder, *, old: bool = False) -> Findings:
    """List what can be removed from a run. Nothing is changed.

    Args:
        folder: the run.
        old: also whole stage folders of settings that were given up.
    """
    removals: list[Removal] = []
    kept: list[str] = []
    current: set[Path] = set()
    complete = True
    for number in folder.iterations():
        try:
            chain = _chain(folder, number)
        except HubertError as error:
            chain = None
            kept.append(f"it{number}: its present settings cannot be told: {error}")
        if chain is None:
            complete = False
            continue
        current |= {stage.folder for _, stage, _ in chain.known() if stage is not None}
        complete = complete and chain.is_complete()
        removals += _samples(folder, number, chain)
    superseded: list[Removal] = []
    if old and complete:
        superseded = list(_superseded(folder, current))
    elif old:
        kept.append("folders of older settings: not all iterations are finished, so it is not known which are needed")
    gone = {removal.path for removal in superseded}
    removals = [removal for removal in removals if removal.path not in gone]
    for training in folder.trainings():
        if training not in gone:
            removals += _states(training)
    removals += [one for one in _temporary(folder) if not any(path in one.path.parents for path in gone)]
    busy = {path for path in stage_folders(folder) if is_busy(path)}
    kept += [f"{path.name}: a process is working there" for path in sorted(busy)]
    free = [one for one in removals if not any(path == one.path or path in one.path.parents for path in busy)]
    return Findings(free + superseded, kept)


def remove_all(findings: Findings, say: Callable[[str], object] = print) -> int:
    """Remove what `find_prunable` listed; return the bytes freed. What became busy since is left alone, and `say` hears it."""
    freed = 0
    # A stage's record is written anew without its samples, which a full disk does not take: first what needs no space.
    for removal in sorted(findings.removals, key=lambda one: one.kind == "samples"):
        try:
            if removal.kind == "samples":
                freed += prune_outputs(removal.path, removal.outputs)
            elif removal.kind == "old":
                freed += _remove_stage(removal.path)
            else:
                freed += remove(removal.path)
        except TransientError as error:
            say(f"left alone: {error}")
    return freed


def _remove_stage(path: Path) -> int:
    with hold(path, path.name, wait_seconds=0):
        # Renamed first: a kill in between leaves a temporary folder, not half a stage.
        temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"
        path.rename(temporary)
    return remove(temporary)


def is_busy(path: Path) -> bool:
    """Return True if a process, or perhaps a Slurm job, works in a stage's folder."""
    return find_holder(path) is not None or find_running(path) is not None or bool(unfinished_job(path))


# What can go ------------------------------------------------------------------------------------------------------


def _chain(folder: RunFolder, number: int) -> Chain | None:
    """Return an iteration's chain of stages; None if it was never started to the end."""
    path = folder.settings(number)
    if not path.exists():
        return None
    chain = Chain(Iteration(Resolved.load(path)))
    list(chain.known())  # raises if the data are not where the settings say
    return chain


def _samples(folder: RunFolder, number: int, chain: Chain) -> Iterator[Removal]:
    """Give the sampled frames of a finished iteration, unless a codebook is being made in it."""
    if read_outcome(folder, number) is None or chain.missing("train") is not None:
        return
    if any(is_busy(path) for path in folder.iteration(number).glob("kmeans-*")):
        return
    stage, _ = chain.find("features")
    content = read_json(stage.folder / "done.json") if stage is not None else None
    if stage is None or content is None:
        return
    outputs = {**content["outputs"], **content.get("pruned", {})}  # a prune that was cut off may have left some
    there = {
        name: size for name, size in outputs.items() if name.startswith("shards/") and (stage.folder / name).exists()
    }
    if there:
        why = f"it{number} is finished: {len(there)} shards of sampled frames"
        yield Removal("samples", stage.folder, sum(there.values()), why, tuple(there))


def _states(training: Path) -> Iterator[Removal]:
    with_state = [
        checkpoint.path / STATE for checkpoint in list_checkpoints(training, lambda _: None) if checkpoint.has_state
    ]
    for path in with_state[: max(0, len(with_state) - KEPT_STATES)]:
        yield Removal("states", path, path.stat().st_size, "optimizer state; the last two checkpoints keep theirs")


def _superseded(folder: RunFolder, current: set[Path]) -> Iterator[Removal]:
    """Give the stage folders that no iteration leads to and nothing points into."""
    wanted = [reference.resolve() for reference in _references(folder.root.parent)]
    for path in stage_folders(folder):
        if path in current or is_busy(path) or any(path.resolve() in reference.parents for reference in wanted):
            continue
        yield Removal("old", path, folder_size(path), "of older settings; no finished iteration uses it")


def _references(runs: Path) -> Iterator[Path]:
    """Give every checkpoint and codebook that an outcome or the settings of any run in the same place name."""
    for path in (*runs.glob("*/it*/outcome.json"), *runs.glob("*/it*/choice.json"), *runs.glob("*/it*/answer.json")):
        content = read_json(path) or {}
        content = content.get("pick", content)  # of an answer
        checkpoint = content.get("checkpoint") or content.get("source", {}).get("checkpoint") or "/"
        yield Path(checkpoint)
        yield Path(RunFolder(path.parents[1]).own(checkpoint))  # the run may have been moved
    for path in runs.glob("*/it*/resolved.toml"):
        settings = relocate(read_settings(path), path.parents[1])
        yield Path(settings["source"].get("checkpoint") or "/")
        yield Path(settings.get("init", {}).get("checkpoint") or "/")
        yield Path(settings.get("codebook", {}).get("path") or "/")


def _temporary(folder: RunFolder) -> Iterator[Removal]:
    """Give the half-written files and folders of dead attempts."""
    for home, directories, files in os.walk(folder.root):
        for name in [*directories, *files]:
            path = Path(home) / name
            if not TEMPORARY.fullmatch(name) and not (SCRATCH.fullmatch(name) and Path(home).name.startswith("abx-")):
                continue
            if name in directories:
                directories.remove(name)  # it goes as a whole
            if time.time() - _last_change(path) > STALE_SECONDS:
                size = folder_size(path) if path.is_dir() else path.lstat().st_size
                yield Removal("temporary", path, size, "left by an attempt that died")


def _last_change(path: Path) -> float:
    try:
        inside = [*path.rglob("*")] if path.is_dir() else []
        return max(one.lstat().st_mtime for one in (path, *inside))
    except FileNotFoundError:
        return time.time()  # somebody is at work on it


# For people -------------------------------------------------------------------------------------------------------


def format_findings(findings: Findings, root: Path) -> str:
    """Write what can go for a terminal."""
    rows = [(one.kind, text.size(one.bytes), str(one.path.relative_to(root)), one.why) for one in findings.removals]
    lines = align([("what", "size", "where", "why"), *rows], right=(1,)) if rows else ["nothing to remove"]
    return "\n".join([*lines, *(f"left alone: {line}" for line in findings.kept)])
