"""How a training can end, and what happens then: the one table that code, tests and docs/training-ends.md share.

An end is recognised by two witnesses: what the trainer itself left in `exit.json` (`hubert.training.exit_states.Exit`;
nothing if it was killed), and how Slurm says that the job ended. srun's own exit code is no witness, for it can be 0
after a node failed; only if a signal killed srun itself, which Slurm calls CANCELLED too, that is believed.
"""

import os
import platform
import sys
import time
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from types import TracebackType
from typing import Self

import torch

from hubert.core.errors import (
    ConfigError,
    DataError,
    DiskError,
    HubertError,
    TrainingCancelled,
    TrainingDiverged,
    TransientError,
)
from hubert.core.files import read_json, write_record
from hubert.training.folder import LostOwnershipError
from hubert.training.job import Job

PROCESS = "a process"  # instead of a state of Slurm: a trainer that Slurm did not start has ended
REFUSED = "refused"  # srun or sbatch took no job
FORGOTTEN = "forgotten"  # Slurm does not know the job any more


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


class Action(StrEnum):
    """What the flow does after an end."""

    GO_ON = "goes on with validation"
    RESTART = "starts it again from the last checkpoint"
    STOP = "stops; nothing starts it again"


@dataclass(frozen=True)
class End:
    """One row: `states` and `exits` recognise it (empty: any), `error` is raised, and `says` explains it."""

    name: str
    states: tuple[str, ...]
    exits: tuple[Exit | None, ...]
    action: Action
    error: type[HubertError]
    says: str


CANCELLED_HERE = End(
    "cancelled in Prefect",
    (),
    (),
    Action.STOP,
    TrainingCancelled,
    "it was stopped because its flow run was cancelled or interrupted, or by `hubert stop`; it had the time to write a "
    "checkpoint",
)
# The first row that fits counts.
ENDS = (
    End("finished", (), (Exit.FINISHED,), Action.GO_ON, HubertError, "all steps are done"),
    End(
        "launch failed",
        (REFUSED,),
        (),
        Action.STOP,
        ConfigError,
        "Slurm took no job; fix the key of the cluster file's section `training` that it names",
    ),
    End(
        "wrong setting",
        (),
        (Exit.CONFIG,),
        Action.STOP,
        ConfigError,
        "a setting cannot be obeyed, or the GPU's memory is too small; the message names it",
    ),
    End("wrong data", (), (Exit.DATA,), Action.STOP, DataError, "audio is damaged or vanished; the message names it"),
    End(
        "not finite",
        (),
        (Exit.DIVERGED,),
        Action.STOP,
        TrainingDiverged,
        "loss or gradient were not finite in many steps in a row; another start would end the same way",
    ),
    End(
        "scancelled by a person",
        ("CANCELLED",),
        (),
        Action.STOP,
        TrainingCancelled,
        "somebody cancelled the job with scancel, so it is not submitted again (if nobody did: its srun was killed after the "
        "flow that had started it). To go on from the last checkpoint, run the flow again (or retry the run in Prefect)",
    ),
    End("time limit", ("TIMEOUT",), (), Action.RESTART, TransientError, "the job reached its time limit"),
    End("preempted", ("PREEMPTED",), (), Action.RESTART, TransientError, "another job took the nodes"),
    End(
        "node failed",
        ("NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED", "RECONFIG_FAIL"),
        (),
        Action.RESTART,
        TransientError,
        "a node of the job died",
    ),
    End(
        "out of memory",
        ("OUT_OF_MEMORY",),
        (),
        Action.RESTART,
        TransientError,
        "the job used more main memory than it asked for; if it happens again, raise `memory` of the section `training`",
    ),
    End(
        "fault of the program",
        ("COMPLETED", "FAILED", FORGOTTEN, PROCESS),
        (Exit.FAILED,),
        Action.STOP,
        HubertError,
        "an error that nobody foresaw; its traceback is in the log",
    ),
    End(
        "interrupted by a signal",
        ("COMPLETED", "FAILED", PROCESS),
        (Exit.INTERRUPTED,),
        Action.RESTART,
        TransientError,
        "it was asked to stop, and wrote a checkpoint first (SIGUSR1 comes before the time limit, SIGTERM from "
        "`scancel --signal=TERM`)",
    ),
    End(
        "lost its surroundings",
        ("COMPLETED", "FAILED", PROCESS),
        (Exit.LOST, Exit.TRANSIENT),
        Action.RESTART,
        TransientError,
        "disk, network or another process of it failed; the last checkpoint is whole",
    ),
    End(
        "killed",
        ("COMPLETED", "FAILED", PROCESS),
        (None,),
        Action.RESTART,
        TransientError,
        "it ended before it could say why. Likely cause: out of memory, somebody killed it, or it could not be started there "
        "(the log's last lines say so)",
    ),
    End(
        "unknown",
        (),
        (),
        Action.STOP,
        HubertError,
        "neither the trainer nor Slurm says how it ended (Slurm forgets a job after MinJobAge). To go on from the last "
        "checkpoint, run the flow again",
    ),
)


def judge(state: str, code: Exit | None, *, asked: bool = False) -> End:
    """Return how a training ended.

    Args:
        state: the job's final state in Slurm's words, or PROCESS, REFUSED, FORGOTTEN.
        code: what the trainer wrote into `exit.json`; None if it did not get so far.
        asked: this service stopped it.
    """
    if asked and code is not Exit.FINISHED:
        return CANCELLED_HERE
    return next(end for end in ENDS if state in (end.states or (state,)) and code in (end.exits or (code,)))


def markdown() -> str:
    """Return the table as docs/training-ends.md shows it."""
    rows = ["| end | the job in Slurm | `exit.json` | what the flow does | what it says |", "|---|---|---|---|---|"]
    for end in (ENDS[0], CANCELLED_HERE, *ENDS[1:]):
        states = ", ".join(end.states) or "any"
        exits = (
            ", ".join("none" if code is None else f"{int(code)} `{code.name.lower()}`" for code in end.exits) or "any"
        )
        rows.append(f"| {end.name} | {states} | {exits} | {end.action} | {end.says} |")
    return "\n".join(rows) + "\n"


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
        """Record how the training ended, when nothing was raised."""
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
            try:
                write_record(path, content)
            except DiskError as problem:  # without the file the launcher starts it again, too
                print(f"{path} could not be written: {problem}", file=sys.stderr)
        return isinstance(error, HubertError | OSError)


def explain_error(error: BaseException) -> str:
    """Return an error's message, with the way out for those that are not ours."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"the GPU's memory is full: {error}. Fix: `train.activation_checkpointing = true`, with which this training goes "
            "on from its last checkpoint, or lower train.micro_batch_seconds, which starts another"
        )
    return str(error) if isinstance(error, HubertError) else f"{type(error).__name__}: {error}"
