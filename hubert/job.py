"""What the trainer is told, what it leaves behind, and the rule that only one of them writes.

<folder>/
    job.json         what the newest start was asked to do (`Job`)
    attempt.json     the attempt that owns the folder; a trainer that finds another one's id here stops
    trainer.json     the live main process: pid, its start time, host
    trainer.lock     held by the main process; the system releases it if the process dies
    exit.json        how the attempt ended (`Exit`), written by the trainer itself
    slurm.json       the Slurm jobs of all attempts, newest last
    launch.sh        what each task of a Slurm job runs
    horizons.json    the learning rate's schedule: [[from step, last step], ...], longer after `--extend`
    metrics.jsonl    one line per log interval
    train.log        what the trainer printed
    step-00025000/   checkpoints: `hubert.checkpoint`
"""

import json
import os
import platform
import time
import tomllib
import uuid
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from hubert.config import TrainSettings, explain
from hubert.errors import ConfigError, DataError, HubertError, TrainingDiverged, TransientError
from hubert.origins import FRESH, settle_init
from hubert.paths import read_json, write_json

Horizons = tuple[tuple[int, int], ...]


class Exit(IntEnum):
    """How a trainer ended: its exit code."""

    FINISHED = 0
    FAILED = 1
    """A fault of the program: the log holds the traceback."""
    CONFIG = 2
    DATA = 3
    DIVERGED = 4
    INTERRUPTED = 5
    """Asked to stop (SIGTERM, SIGUSR1): it wrote a checkpoint first. Starting again goes on from there."""
    LOST = 6
    """Another attempt took the folder over; nothing was written after that."""
    TRANSIENT = 7
    """Disk, network or another process failed; the last checkpoint is whole."""


class LostOwnershipError(TransientError):
    """Another attempt owns the training's folder."""


class Job(BaseModel):
    """One start of a training.

    `horizons` is the learning rate's schedule as (from step, last step) pairs; `init` is `fresh`, or the local checkpoint
    whose encoder the training starts from (head and mask embedding are new, as they belong to the units).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    table: Path
    table_key: str
    num_units: int
    settings: TrainSettings
    horizons: Horizons = ()
    attempt: str = ""
    init: str = FRESH
    init_sha256: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have been trained with for this job to go on from it."""
        return {
            "table": self.table_key,
            "num_units": self.num_units,
            "init": self.init_sha256 or self.init,
            "settings": self.settings.key_settings(),
        }


def read_job(path: Path) -> Job:
    """Read a job from JSON or TOML.

    Raises:
        ConfigError: the file is missing, not parsable, or a field is wrong.
    """
    try:
        text = path.read_text()
        content = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        job = Job.model_validate(content)
    except FileNotFoundError as error:
        raise ConfigError(f"job file {path} does not exist") from error
    except ValidationError as error:
        raise ConfigError(f"job file {path}: {explain(error)}") from error
    except ValueError as error:
        raise ConfigError(f"job file {path} is neither JSON nor TOML (*.toml): {error}") from error
    if job.init == FRESH:  # a job that was written by hand
        found = settle_init(job.settings)
        job = job.model_copy(update={"init": found["checkpoint"], "init_sha256": found["sha256"]}) if found else job
    return job if job.horizons else job.model_copy(update={"horizons": ((0, job.settings.steps),)})


def learning_rate(settings: TrainSettings, horizons: Horizons, update: int) -> float:
    """Return the learning rate of update `update` (from 1): linear warm-up, then linear to 0 just after the horizon.

    This is fairseq's polynomial_decay (power 1, end 0) one update earlier: its first update has a rate of 0, and
    torchaudio's last one; here each of the updates changes the weights.

    The horizon is the one that was recorded for the steps up to here, so a training that was extended and falls back to
    an earlier checkpoint repeats what it did.
    """
    if update <= settings.warmup_steps:
        return settings.learning_rate * update / settings.warmup_steps
    horizon = [last for first, last in horizons if first < update][-1]
    left = max(0, horizon + 1 - update) / (horizon + 1 - settings.warmup_steps)
    return settings.learning_rate * left


def new_attempt() -> str:
    """Return an id for one start of a trainer."""
    return f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"


def claim(folder: Path, attempt: str) -> None:
    """Make `attempt` the owner of the folder: a trainer of another attempt stops before its next write."""
    write_json(folder / "attempt.json", {"attempt": attempt, "host": platform.node(), "since": time.time()})


def check_owner(folder: Path, attempt: str) -> None:
    """Make sure that the folder still belongs to `attempt`.

    Raises:
        LostOwnershipError: it belongs to another attempt.
    """
    owner = (read_json(folder / "attempt.json") or {}).get("attempt")
    if owner != attempt:
        raise LostOwnershipError(
            f"{folder} belongs to attempt {owner} now, this is attempt {attempt}: another trainer was started there. "
            "This one stops and writes nothing more"
        )


def exit_of(error: BaseException | None) -> Exit:
    """Return the exit code for what ended a trainer."""
    kinds: list[tuple[type[BaseException], Exit]] = [
        (LostOwnershipError, Exit.LOST),
        (ConfigError, Exit.CONFIG),
        (DataError, Exit.DATA),
        (TrainingDiverged, Exit.DIVERGED),
        (TransientError, Exit.TRANSIENT),
        (OSError, Exit.TRANSIENT),
        (torch.OutOfMemoryError, Exit.CONFIG),
        (torch.AcceleratorError, Exit.TRANSIENT),
    ]
    if error is None:
        return Exit.FINISHED
    return next((code for kind, code in kinds if isinstance(error, kind)), Exit.FAILED)


class ExitRecord:
    """Writes `exit.json` when the block ends, however it ends short of a kill; swallows the errors that it explains.

    Of several processes the first that fails is recorded: the others only miss it.
    """

    def __init__(self, job: Job, *, is_main: bool) -> None:
        self.job = job
        self.is_main = is_main
        self.code = Exit.FAILED
        self.message = ""

    def __enter__(self) -> Self:
        return self

    def finish(self, code: Exit, message: str = "") -> None:
        """Say how the training ended, when nothing was raised."""
        self.code, self.message = code, message

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None:
            self.code, self.message = exit_of(error), explain_error(error)
        path = self.job.folder / "exit.json"
        owner = (read_json(self.job.folder / "attempt.json") or {}).get("attempt")
        recorded = (read_json(path) or {}).get("attempt") == self.job.attempt
        if owner == self.job.attempt and not recorded and (error is not None or self.is_main):
            content = {"attempt": self.job.attempt, "code": int(self.code), "name": self.code.name.lower()}
            content |= {"message": self.message, "host": platform.node(), "pid": os.getpid(), "at": time.time()}
            write_json(path, content)
        return isinstance(error, HubertError | OSError)


def explain_error(error: BaseException) -> str:
    """Return an error's message, with the way out for those that are not ours."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"the GPU's memory is full: {error}. Fix: `train.activation_checkpointing = true`, with which this training goes "
            "on from its last checkpoint, or lower train.micro_batch_seconds, which starts another"
        )
    return str(error) if isinstance(error, HubertError) else f"{type(error).__name__}: {error}"
