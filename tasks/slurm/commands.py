"""Slurm's commands: what a section asks for, how a job is doing, find jobs again, cancel them.

A job is found again by its comment, which says what it is for. Slurm's answers are read as text in a format that this file
asks for, so no accounting database and no JSON plugin is needed.
"""

import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hubert.core.errors import ConfigError, TransientError
from tasks.slurm.settings import Resources, TrainingSection

COMMAND_SECONDS = 60.0
QUESTIONS = {"squeue", "sinfo"}  # asked in a fixed format: if one fails, it is mostly for Slurm's reasons of the moment
# Messages after which the same command may succeed later: of the network, of a controller that restarts or is full, of munge,
# and of limits on the jobs that one user may have in the queue.
PASSING = (
    "Unable to contact slurm controller",
    "Socket timed out",
    "Connection refused",
    "Connection timed out",
    "Connection reset",
    "Communication connection failure",
    "Message receive failure",
    "Zero Bytes were transmitted",
    "Transport endpoint is not connected",
    "Resource temporarily unavailable",
    "temporarily unable to accept job",
    "backup controller",
    "standby mode",
    "Protocol authentication error",
    "MaxSubmitJob",  # of a QOS or an association, by name; "job submit limit" stands in every refusal of an account
)
FIELDS = (
    "%i",
    "%T",
    "%r",
    "%N",
    "%P",
    "%k",
)  # id, state, reason, nodes, partition, comment (last: it may hold anything)
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
AT_WORK = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}


@dataclass(frozen=True)
class SlurmJob:
    """What Slurm says about a job: `state` and `reason` in its own words (squeue's %T and %r)."""

    job_id: str
    state: str
    reason: str = ""
    nodes: str = ""
    partition: str = ""
    comment: str = ""

    @property
    def is_waiting(self) -> bool:
        """Whether it has not started yet."""
        return self.state in WAITING

    @property
    def is_live(self) -> bool:
        """Whether it waits or runs."""
        return self.state in WAITING | AT_WORK

    def describe(self) -> str:
        """Return a sentence such as `job 17 is pending (Resources)`."""
        if self.is_waiting:
            return f"job {self.job_id} is {self.state.lower()} in partition {self.partition} ({self.reason})"
        where = f" on {self.nodes}" if self.nodes else ""
        return f"job {self.job_id} is {self.state.lower()}{where}"


class SlurmUnreachable(TransientError):
    """Slurm does not answer: nothing is known about any job."""


def layout(section: Resources) -> list[str]:
    """Return the options that lay out a section's processes: nodes x tasks for the training, one task for workers."""
    nodes, per_node = (section.nodes, section.tasks_per_node) if isinstance(section, TrainingSection) else (1, 1)
    return [
        f"--nodes={nodes}",
        f"--ntasks={nodes * per_node}",
        f"--ntasks-per-node={per_node}",
        f"--cpus-per-task={section.cpus}",
        *([f"--gpus-per-task={section.gpus}"] if section.gpus else []),
    ]


def job_options(section: Resources) -> list[str]:
    """Return all options of a section's job, for sbatch and srun."""
    named = {
        "account": section.account,
        "partition": section.partition,
        "qos": section.qos,
        "constraint": section.constraint,
        "time": section.walltime,
        "mem": section.memory,
    }
    return [*(f"--{name}={value}" for name, value in named.items() if value), *layout(section), *section.directives]


def escaped(path: Path) -> str:
    """Return a path for `--output`, where `%` begins a placeholder."""
    return str(path).replace("%", "%%")


def run(command: Sequence[str]) -> str:
    """Run one of Slurm's commands and return what it printed.

    Raises:
        ConfigError: the command is not installed here.
        SlurmUnreachable: the controller does not answer, or takes no more jobs for the moment.
        subprocess.CalledProcessError: Slurm refused; `stderr` says why.
    """
    try:
        result = subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=True,
            # SQUEUE_PARTITION and its like would hide jobs.
            env={name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")} | {"LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise ConfigError(
            f"{command[0]} was not found on this machine's PATH: a cluster of `kind: slurm` is used from a machine that can "
            "submit jobs (a login node)"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmUnreachable(f"`{command[0]}` did not answer within {COMMAND_SECONDS:.0f} s") from error
    except subprocess.CalledProcessError as error:
        text = error.stderr.strip()
        if may_pass(text) or (command[0] in QUESTIONS and not is_of_the_setup(text)):
            raise SlurmUnreachable(f"`{command[0]}` failed: {text}") from error
        raise
    return result.stdout


def is_of_the_setup(said: str) -> bool:
    """Return True if a question failed for what is installed and configured here: no time will mend that."""
    return any(sign in said for sign in ("nrecognized option", "nvalid option", "configuration source", "Invalid user"))


def may_pass(said: str) -> bool:
    """Return True if a message of Slurm's commands is about the moment, and not about what was asked."""
    return any(sign.lower() in said.lower() for sign in PASSING)


def find_jobs(*, comment: str = "", ids: Iterable[str] = (), every_state: bool = False) -> list[SlurmJob]:
    """Return this user's jobs whose comment begins with `comment` and whose id is among `ids` (if any are given).

    `every_state`: also those that ended a while ago (as long as Slurm's MinJobAge remembers them).

    Raises:
        SlurmUnreachable: Slurm does not answer.
    """
    states = ["--states=all"] if every_state else []
    text = run(["squeue", "--me", "--noheader", *states, f"--format={'|'.join(FIELDS)}"])
    wanted = set(ids)
    jobs = []
    for line in text.splitlines():
        if line.count("|") < len(FIELDS) - 1:
            continue  # the second line of a comment, of another job than ours
        job_id, state, reason, nodes, partition, said = line.split("|", len(FIELDS) - 1)
        job = SlurmJob(job_id, state, reason, nodes, partition, "" if said == "(null)" else said)
        if job.comment.startswith(comment) and (not wanted or job_id in wanted):
            jobs.append(job)
    return jobs


def steps_of(job_id: str) -> list[str]:
    """Return the steps that run in a job, such as `17.0`; those that Slurm itself starts (batch, extern) do not count.

    Raises:
        SlurmUnreachable: Slurm does not answer.
    """
    lines = run(["squeue", "--steps", "--noheader", "--format=%i", f"--jobs={job_id}"]).split()
    return [line for line in lines if line.rpartition(".")[2].isdecimal()]


def find_job(job_id: str) -> SlurmJob | None:
    """Return a job, also one that ended a while ago; None if Slurm does not know it (any more)."""
    found = find_jobs(ids=[job_id], every_state=True)
    return found[0] if found else None


def cancel(ids: Iterable[str]) -> None:
    """Cancel jobs; one that has ended meanwhile is no error.

    Raises:
        SlurmUnreachable: Slurm does not answer.
    """
    if wanted := sorted(ids):
        try:
            run(["scancel", "--quiet", *wanted])
        except subprocess.CalledProcessError as error:
            if "Invalid job id" not in error.stderr:
                raise


def refusal(wanted: Sequence[str]) -> str:
    """Return why Slurm could never start a job with these options, empty if it could. Nothing is queued.

    Raises:
        SlurmUnreachable: Slurm does not answer.
    """
    try:
        run(["sbatch", "--test-only", *wanted, "--wrap=true"])
    except subprocess.CalledProcessError as error:
        lines = [
            line.removeprefix("sbatch: error: ").removeprefix("allocation failure: ")
            for line in error.stderr.strip().splitlines()
        ]
        return lines[-1] if lines else f"sbatch --test-only failed ({error.returncode})"
    return ""
