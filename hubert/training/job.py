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
    step-00025000/   checkpoints: `hubert.training.checkpoint`
"""

import json
import time
import tomllib
import uuid
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hubert.core.errors import ConfigError
from hubert.core.files import SEAL, unseal
from hubert.settings.sections import TrainSettings, explain
from hubert.training.init import FRESH, settle_init

Horizons = tuple[tuple[int, int], ...]


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
        whole = unseal(content) if isinstance(content, dict) else content
        if whole is None:
            raise ConfigError(
                f"job file {path} is not what was written: its content does not fit its {SEAL}. Likely cause: it was edited, or "
                f"is damaged. Fix: `hubert train RUN` writes it again; of one that you edited remove the line {SEAL}"
            )
        job = Job.model_validate(whole)
    except FileNotFoundError as error:
        raise ConfigError(f"job file {path} does not exist") from error
    except ValidationError as error:
        raise ConfigError(f"job file {path}: {explain(error)}") from error
    except ValueError as error:
        raise ConfigError(f"job file {path} is neither JSON nor TOML (*.toml): {error}") from error
    if job.init == FRESH:  # a job that was written by hand
        found = settle_init(job.settings)
        job = job.model_copy(update={"init": found.checkpoint, "init_sha256": found.sha256}) if found else job
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
