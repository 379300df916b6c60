"""How a training can end, and what happens then: the one table that code, tests and docs/training-ends.md share.

An end is recognised by two witnesses: what the trainer itself left in `exit.json` (`hubert.job.Exit`; nothing if it was
killed), and how Slurm says that the job ended. srun's own exit code is no witness, for it can be 0 after a node failed;
only if a signal killed srun itself, which Slurm calls CANCELLED too, that is believed.
"""

from dataclasses import dataclass
from enum import StrEnum

from hubert.errors import ConfigError, DataError, HubertError, TrainingCancelled, TrainingDiverged, TransientError
from hubert.job import Exit

PROCESS = "a process"  # instead of a state of Slurm: a trainer that Slurm did not start has ended
REFUSED = "refused"  # srun or sbatch took no job
FORGOTTEN = "forgotten"  # Slurm does not know the job any more


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
    "it was stopped because its flow run was cancelled or interrupted; it had the time to write a checkpoint",
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
