"""Start a training, find it again after a restart, follow it, stop it: on this machine, or as a `Launcher` says.

A local trainer is a process of its own in its own session: the death of whoever started it does not touch it. Who comes
later finds it by `process.json` or `trainer.json` (pid and the start time of that pid, so a reused pid is no mistake)
and adopts it. How it ended stands in `exit.json`, which the trainer writes itself, since an adopted process has no exit
code for us.
"""

import json
import math
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from hubert.core.errors import TransientError
from hubert.core.files import look_again, read_json, write_record
from hubert.core.paths import PROJECT
from hubert.core.process import ProcessId, exit_status, start_detached
from hubert.training.exit_states import PROCESS, Action, End, Exit, judge
from hubert.training.folder import Pulse, claim
from hubert.training.job import Job, new_attempt

POLL_SECONDS = 0.2
KILL_SECONDS = (
    15.0  # after which a process that does not end on SIGKILL is left to the system (it waits for a dead disk)
)
STOP_SECONDS = 300.0  # a step and a checkpoint of the largest model fit into it
MAX_BACKOFF_SECONDS = 60.0
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    # Threads of torch that wait for each other sleep instead of spinning: 5 % slower on an idle machine of 2 cores, and
    # 2 to 10 times as fast as soon as anything else wants a core (a server, a second training).
    "OMP_WAIT_POLICY": "PASSIVE",
    # By default glibc returns every large tensor to the system and asks for it again a moment later: a third of a CPU
    # training went into page faults (tiny, two processes: 150 s of audio per second, 275 with these).
    "MALLOC_MMAP_THRESHOLD_": str(2_000_000_000),
    "MALLOC_TRIM_THRESHOLD_": str(4_000_000_000),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
    "OMP_NUM_THREADS": "1",  # torchrun warns without it; the trainer sets its own number
}
LOG_TAIL = 30  # lines of the trainer's log in an error's message


class RunningTrainer(ABC):
    """A trainer that was started, wherever. `log_start`: where to begin reading its log, in bytes."""

    folder: Path
    attempt: str
    log_start: int

    @property
    @abstractmethod
    def name(self) -> str:
        """What people call it, such as `pid 123` or `job 17`."""

    @abstractmethod
    def is_alive(self) -> bool:
        """Return True if it waits or runs."""

    @abstractmethod
    def stop(self, *, timeout: float = STOP_SECONDS) -> None:
        """Let it finish its step, write a checkpoint and end; end it by force after `timeout` seconds."""

    @abstractmethod
    def kill(self) -> None:
        """End it at once, and all its processes, although it hangs."""

    def is_waiting(self) -> bool:
        """Return True if it has no machine to run on: then no sign of life is expected."""
        return False

    @abstractmethod
    def end(self, code: Exit | None) -> tuple[End, str]:
        """Return how it ended, and the witness's words; `code` is what stands in `exit.json`, None if nothing does."""

    def state(self) -> str:
        """Return how it is doing, in a sentence that changes when there is news; empty if there is nothing to say."""
        return ""


class Launcher(ABC):
    """Where trainings run."""

    @abstractmethod
    def launch(self, job: Job) -> RunningTrainer:
        """Start a trainer. The new attempt owns the folder at once: an older one stops before its next write."""

    @abstractmethod
    def find_running(self, folder: Path) -> RunningTrainer | None:
        """Return the running trainer of a folder; None if there is none."""

    def pause(self, failures: int) -> float:
        """Return the seconds before another start, after so many in a row that got no further."""
        return min(MAX_BACKOFF_SECONDS, 2 ** (failures - 1) - 1)


@dataclass(frozen=True)
class TrainerProcess(RunningTrainer):
    """A trainer (or the torchrun above several) on this machine."""

    folder: Path
    attempt: str
    process: ProcessId
    log_start: int

    @property
    def name(self) -> str:
        return f"pid {self.process.pid}"

    def is_alive(self) -> bool:
        return exit_status(self.process) is None and self.process.is_alive()

    def stop(self, *, timeout: float = STOP_SECONDS) -> None:
        """Stop it; with several processes the main one is asked, and tells the others.

        torchrun itself would kill them 30 s after a signal.
        """
        content = read_json(self.folder / "trainer.json")
        main = ProcessId.read(content) if content and content["attempt"] == self.attempt else self.process
        (main if main.is_alive() else self.process).signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout
        while self.is_alive():
            if time.monotonic() > deadline:
                main.signal(signal.SIGKILL)
                self.process.signal(signal.SIGKILL)
            time.sleep(POLL_SECONDS)

    def kill(self) -> None:
        """Kill it with all below it: torchrun gives each of several processes a session of its own."""
        with suppress(psutil.NoSuchProcess):
            leader = psutil.Process(self.process.pid)
            family = [leader, *leader.children(recursive=True)]
            if self.process.is_alive():
                for member in family:
                    with suppress(psutil.NoSuchProcess):
                        member.kill()
                psutil.wait_procs(family[1:], timeout=KILL_SECONDS)
        deadline = time.monotonic() + KILL_SECONDS
        while self.is_alive() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def end(self, code: Exit | None) -> tuple[End, str]:
        number = exit_status(self.process)
        killed = code is None and number is not None and number < 0
        words = f"killed by {signal.Signals(-number).name}" if killed and number else ""
        return judge(PROCESS, code, asked=was_cancelled(self)), words


class LocalLauncher(Launcher):
    """Trainings on this machine."""

    def launch(self, job: Job) -> TrainerProcess:
        return launch(job)

    def find_running(self, folder: Path) -> TrainerProcess | None:
        return find_running(folder)


@dataclass(frozen=True)
class Event:
    """Something that was heard of a trainer: a line of its log, the content of a line of metrics.jsonl, a new state."""

    kind: Literal["log", "metrics", "state"]
    text: str = ""
    metrics: Mapping[str, Any] | None = None


def begin_attempt(job: Job) -> Job:
    """Write the job file of a new attempt and make it the folder's owner; returns the job with the attempt's id."""
    folder = job.folder.resolve()
    job = job.model_copy(update={"folder": folder, "attempt": job.attempt or new_attempt()})
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / "job.json", job.model_dump(mode="json"))
    claim(folder, job.attempt)
    return job


def launch(job: Job) -> TrainerProcess:
    """Start a trainer on this machine: a plain process, or torchrun if `settings.num_processes` is more than one.

    The new attempt owns the folder at once; a trainer that still runs there stops before its next write, and the new
    one waits for it.
    """
    job = begin_attempt(job)
    folder = job.folder
    processes = job.settings.num_processes
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *torchrun, "-m", "hubert.train", str(folder / "job.json")]
    log_start = log_size(folder)
    process = start_detached(command, folder / "train.log", environment={**ENVIRONMENT, **os.environ}, folder=PROJECT)
    write_record(folder / "process.json", {"attempt": job.attempt, **process.as_dict(), "command": command})
    return TrainerProcess(folder, job.attempt, process, log_start)


def find_running(folder: Path) -> TrainerProcess | None:
    """Return the running trainer of a folder on this machine; None if there is none."""
    folder = folder.resolve()
    for name in ("process.json", "trainer.json"):
        content = read_json(folder / name)
        if content is None:
            continue
        process = TrainerProcess(folder, content["attempt"], ProcessId.read(content), log_size(folder))
        if process.is_alive():
            return process
    return None


def cancel(trainer: RunningTrainer, *, timeout: float = STOP_SECONDS) -> None:
    """Stop a trainer for good: a flow that follows it does not start it again."""
    write_record(trainer.folder / "cancelled.json", {"attempt": trainer.attempt, "at": time.time()})
    trainer.stop(timeout=timeout)


def was_cancelled(trainer: RunningTrainer) -> bool:
    """Return True if somebody stopped a trainer by this program."""
    return bool((read_json(trainer.folder / "cancelled.json") or {}).get("attempt") == trainer.attempt)


def log_size(folder: Path) -> int:
    """Return how long the log of a training is so far, in bytes."""
    log = folder / "train.log"
    return log.stat().st_size if log.exists() else 0


def slurm_jobs(folder: Path) -> list[dict[str, Any]]:
    """Return what is written down of a training's Slurm jobs, newest last: `attempt`, `job_id`, `ended`."""
    return list((read_json(folder / "slurm.json") or {}).get("jobs", []))


def job_ids(folder: Path) -> list[str]:
    """Return the ids of a training's Slurm jobs, newest last."""
    return [job["job_id"] for job in slurm_jobs(folder) if job["job_id"]]


def unfinished_job(folder: Path) -> str:
    """Return the id of a training's newest Slurm job if nobody has written down its end: it may live. Empty if none."""
    jobs = slurm_jobs(folder)
    if not jobs or jobs[-1]["ended"] or end_record(folder, jobs[-1]["attempt"]):
        return ""
    return str(jobs[-1]["job_id"] or "(not known yet)")


def end_record(folder: Path, attempt: str) -> dict[str, Any] | None:
    """Return what an attempt wrote when it ended; None if it did not get so far."""
    content = read_json(folder / "exit.json")
    return content if content is not None and content.get("attempt") == attempt else None


def follow(trainer: RunningTrainer, *, after_step: int = 0, silence_seconds: float = math.inf) -> Iterator[Event]:
    """Yield what is heard of a trainer until it ends: new log lines, its state, lines of metrics past `after_step`.

    A resumed trainer repeats the steps after its checkpoint, with the same figures; those are not yielded twice. One that
    gives no sign of life for `silence_seconds` is killed.

    Raises:
        HubertError: as `raise_for_end`.
        TransientError: it hung.
    """
    log = _Tail(trainer.folder / "train.log", trainer.log_start)
    metrics = _Tail(trainer.folder / "metrics.jsonl", 0)
    pulse = Pulse(trainer.folder, trainer.attempt, silence_seconds)
    state = ""
    while True:
        alive = trainer.is_alive()
        pulse.look(is_waiting=trainer.is_waiting())
        if (now := "; ".join(filter(None, (trainer.state(), pulse.describe())))) != state:
            state = now
            yield Event("state", text=now)
        yield from (Event("log", text=line) for line in log.read())
        for line in metrics.read():
            content = json.loads(line)
            if content["step"] > after_step:
                after_step = content["step"]
                yield Event("metrics", metrics=content)
        if not alive:
            break
        if pulse.has_stopped:
            trainer.kill()
            raise TransientError(
                f"training in {trainer.folder} ({trainer.name}) hung: {pulse.describe()}, so it was ended. Likely cause: a disk "
                "or network that does not answer, a GPU or kernel that is stuck, a process of it that was stopped. If a step of "
                "it takes so long, raise train.silence_minutes"
            )
        time.sleep(POLL_SECONDS)
    raise_for_end(trainer)


def raise_for_end(trainer: RunningTrainer) -> None:
    """Raise what the end of a trainer asks for; return if it finished.

    Raises:
        ConfigError, DataError, TrainingDiverged: the same start would end the same way.
        TrainingCancelled: a person stopped it.
        TransientError: it was killed, or asked to stop, or lost its surroundings: start it again.
        HubertError: a fault of the program, or nobody knows.
    """
    look_again(trainer.folder)  # another node wrote there
    folder, record = trainer.folder, end_record(trainer.folder, trainer.attempt)
    end, witness = trainer.end(Exit(record["code"]) if record else None)
    if end.action is Action.GO_ON:
        return
    owner = (read_json(folder / "attempt.json") or {}).get("attempt")
    if record is None and owner != trainer.attempt:
        raise TransientError(f"the trainer in {folder} stopped: attempt {owner} owns the folder now")
    log = folder / "train.log"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:]) if log.exists() else ""
    details = "; ".join(text for text in (end.says, witness, record["message"] if record else "") if text)
    raise end.error(f"training in {folder} ({trainer.name}): {end.name}: {details}\nThe last lines of its log:\n{tail}")


class _Tail:
    """Reads the whole lines that were added to a file since the last look, from its start if it was replaced."""

    def __init__(self, path: Path, position: int) -> None:
        self._path = path
        self._position = position
        self._inode = path.stat().st_ino if path.exists() else None

    def read(self) -> list[str]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode:
                self._inode, self._position = status.st_ino, 0
            file.seek(self._position)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._position += len(whole) + len(newline)
        return whole.decode(errors="replace").split("\n") if newline else []
