"""Start a training on this machine, find it again after a restart, follow it, stop it.

The trainer is a process of its own in its own session: the death of whoever started it does not touch it. Who comes
later finds it by `process.json` or `trainer.json` (pid and the start time of that pid, so a reused pid is no mistake)
and adopts it. How it ended stands in `exit.json`, which the trainer writes itself, since an adopted process has no exit
code for us.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hubert.errors import ConfigError, DataError, HubertError, TrainingDiverged, TransientError
from hubert.job import Exit, Job, claim, new_attempt
from hubert.paths import PROJECT, read_json, write_json
from hubert.processes import ProcessId

POLL_SECONDS = 0.2
STOP_SECONDS = 300.0  # a step and a checkpoint of the largest model fit into it
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

_CHILDREN: dict[int, "subprocess.Popen[bytes]"] = {}


@dataclass(frozen=True)
class TrainerProcess:
    """A trainer (or the torchrun above several) on this machine. `log_start`: where to begin reading its log, in bytes."""

    folder: Path
    attempt: str
    process: ProcessId
    log_start: int

    def is_alive(self) -> bool:
        """Say whether it still runs."""
        child = _CHILDREN.get(self.process.pid)
        if child is not None and child.poll() is not None:
            return False
        return self.process.is_alive()


@dataclass(frozen=True)
class Event:
    """Something that a trainer said: a line of its log, or the content of a line of metrics.jsonl."""

    kind: Literal["log", "metrics"]
    text: str = ""
    metrics: Mapping[str, Any] | None = None


def launch(job: Job) -> TrainerProcess:
    """Start a trainer: a plain process, or torchrun if `settings.num_processes` is more than one.

    The new attempt owns the folder at once; a trainer that still runs there stops before its next write, and the new
    one waits for it.
    """
    job = job.model_copy(update={"attempt": job.attempt or new_attempt()})
    folder = job.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "job.json", job.model_dump(mode="json"))
    claim(folder, job.attempt)
    processes = job.settings.num_processes
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *torchrun, "-m", "hubert.train", str(folder / "job.json")]
    with (folder / "train.log").open("ab") as log:
        log_start = log.tell()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=PROJECT,
            env={**ENVIRONMENT, **os.environ},
        )
    _CHILDREN[child.pid] = child
    process = ProcessId.of(child.pid)
    write_json(folder / "process.json", {"attempt": job.attempt, **process.as_dict(), "command": command})
    return TrainerProcess(folder, job.attempt, process, log_start)


def find_running(folder: Path) -> TrainerProcess | None:
    """Return the live trainer of a folder, whoever started it; None if there is none on this machine."""
    folder = folder.resolve()
    log = folder / "train.log"
    for name in ("process.json", "trainer.json"):
        content = read_json(folder / name)
        if content is None:
            continue
        size = log.stat().st_size if log.exists() else 0
        process = TrainerProcess(folder, content["attempt"], ProcessId.read(content), size)
        if process.is_alive():
            return process
    return None


def follow(process: TrainerProcess, *, after_step: int = 0) -> Iterator[Event]:
    """Yield what a trainer says until it ends: new log lines, and lines of metrics.jsonl past `after_step`.

    A resumed trainer repeats the steps after its checkpoint, with the same figures; those are not yielded twice.

    Raises:
        ConfigError, DataError, TrainingDiverged: as the trainer ended; the same start would end the same way.
        TransientError: it was killed, or asked to stop, or lost its surroundings: start it again.
        HubertError: a fault of the program.
    """
    log = _Tail(process.folder / "train.log", process.log_start)
    metrics = _Tail(process.folder / "metrics.jsonl", 0)
    while True:
        alive = process.is_alive()
        yield from (Event("log", text=line) for line in log.read())
        for line in metrics.read():
            content = json.loads(line)
            if content["step"] > after_step:
                after_step = content["step"]
                yield Event("metrics", metrics=content)
        if not alive:
            break
        time.sleep(POLL_SECONDS)
    raise_for_end(process)


def raise_for_end(process: TrainerProcess) -> None:
    """Raise what the end of a trainer asks for; return if it finished.

    Raises:
        HubertError: of the class that `hubert.job.Exit` stands for, with the last lines of the log.
    """
    folder = process.folder
    content = read_json(folder / "exit.json") or {}
    child = _CHILDREN.pop(process.process.pid, None)
    log = folder / "train.log"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:]) if log.exists() else ""
    if content.get("attempt") == process.attempt:
        end = Exit(content["code"])
        if end is Exit.FINISHED:
            return
        kinds: dict[Exit, type[HubertError]] = {
            Exit.CONFIG: ConfigError,
            Exit.DATA: DataError,
            Exit.DIVERGED: TrainingDiverged,
            Exit.FAILED: HubertError,
        }
        message = content["message"] or "it was asked to stop, and wrote a checkpoint first"
        raise kinds.get(end, TransientError)(f"training in {folder}: {message}\nThe last lines of its log:\n{tail}")
    owner = (read_json(folder / "attempt.json") or {}).get("attempt")
    if owner != process.attempt:
        raise TransientError(f"the trainer in {folder} stopped: attempt {owner} owns the folder now")
    code = None if child is None else child.returncode
    how = f" by {signal.Signals(-code).name}" if code is not None and code < 0 else ""
    raise TransientError(
        f"the trainer in {folder} (pid {process.process.pid}) was killed{how} before it could say why. Likely cause: out of "
        f"memory, or somebody killed it. Started again, it goes on from its last checkpoint. The last lines of its log:\n{tail}"
    )


def stop(process: TrainerProcess, *, timeout: float = STOP_SECONDS) -> None:
    """Ask a trainer to finish its step, write a checkpoint and end; kill it after `timeout` seconds.

    With several processes the request goes to the main one, which tells the others: torchrun itself would kill them
    30 s after a signal.
    """
    content = read_json(process.folder / "trainer.json")
    main = ProcessId.read(content) if content and content["attempt"] == process.attempt else process.process
    (main if main.is_alive() else process.process).signal(signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while process.is_alive():
        if time.monotonic() > deadline:
            main.signal(signal.SIGKILL)
            process.process.signal(signal.SIGKILL)
        time.sleep(POLL_SECONDS)


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
