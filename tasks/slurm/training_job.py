"""What a training's job is: its comment, its script, and the commands of srun and sbatch that submit it."""

import os
import shlex
import sys
from collections.abc import Collection
from pathlib import Path

from hubert.core.errors import ConfigError
from hubert.core.paths import PROJECT
from hubert.core.process import ProcessId, start_detached
from hubert.training.launch import ENVIRONMENT
from tasks.slurm import commands as slurm
from tasks.slurm.nodes import leaving_out
from tasks.slurm.settings import TrainingSection

COMMENT = "hubert-train"


def comment(folder: Path, attempt: str) -> str:
    """Return the comment by which a job is found again; the folder's name has the training's key."""
    return f"{COMMENT} {folder.name} {attempt}"


def script(section: TrainingSection, folder: Path) -> str:
    """Return what each task runs; its argument is the attempt, so that a task that starts late does not take another's."""
    interfaces = {name: section.interface for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if section.interface}
    lines = [f'export {name}="${{{name}:-{value}}}"' for name, value in ENVIRONMENT.items()]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in interfaces.items()]
    program = [section.python or sys.executable, "-m", "hubert.train", str(folder / "job.json")]
    lines.append(f'exec {shlex.join(program)} --attempt "$1"')
    return "\n".join(["#!/bin/bash", *section.prologue, *lines]) + "\n"


def srun(section: TrainingSection, folder: Path, attempt: str, left_out: Collection[str] = ()) -> list[str]:
    """Return the command that submits a training, not to the nodes `left_out`, and stays until it has ended."""
    return ["srun", *leaving_out(job_options(section, folder, attempt), left_out), *step_options(folder, attempt)]


def sbatch(section: TrainingSection, folder: Path, attempt: str, left_out: Collection[str] = ()) -> list[str]:
    """Return the command that submits the same srun, without staying."""
    log = slurm.escaped(folder / "train.log")
    inner = ["srun", *slurm.layout(section), *step_options(folder, attempt)]
    batch = ["--parsable", "--no-requeue", f"--output={log}", "--open-mode=append", f"--wrap=exec {shlex.join(inner)}"]
    return ["sbatch", *leaving_out(job_options(section, folder, attempt), left_out), *batch]


def job_options(section: TrainingSection, folder: Path, attempt: str) -> list[str]:
    """Return the options of a training's job."""
    return [
        *slurm.job_options(section),
        f"--signal=USR1@{section.signal_seconds}",
        "--job-name=hubert-train",
        f"--comment={comment(folder, attempt)}",
        f"--chdir={PROJECT}",
    ]


def step_options(folder: Path, attempt: str) -> list[str]:
    """Return the step's options and its program. One process that fails ends the others, which would wait for it."""
    return ["--kill-on-bad-exit=1", "--wait=0", "bash", str(folder / "launch.sh"), attempt]


def start(command: list[str], folder: Path) -> ProcessId:
    """Start srun in a session of its own, with the training's log as its output.

    Raises:
        ConfigError: srun is not there.
    """
    environment = dict(os.environ)
    if "SLURM_JOB_ID" in environment:  # this flow itself runs in a job: srun would start the training inside it
        environment = {name: value for name, value in environment.items() if not is_of_job(name)}
    try:
        return start_detached(command, folder / "train.log", environment=environment)
    except FileNotFoundError as error:
        raise ConfigError(
            "srun was not found on this machine's PATH: a cluster of `kind: slurm` is used from a machine that can submit jobs"
        ) from error


def is_of_job(name: str) -> bool:
    """Return True if a variable describes the job that this process runs in."""
    return name.startswith("SLURM_") and name != "SLURM_CONF"
