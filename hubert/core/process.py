"""Processes that outlive their starter: start, recognise, watch and stop them.

A pid alone is reused; a pid with its start time, on one boot of one host, is not. What a process started is recognised by
a variable in the environment, which children inherit, so that nothing is left behind even if it was killed before them.
Each runs in a session of its own: Ctrl-C in the terminal does not reach it.

psutil is imported where it is needed: a trainer on a Linux node does without.
"""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict

from hubert.core.errors import TransientError

if TYPE_CHECKING:
    import psutil

POLL_SECONDS = 0.1
EXIT_SECONDS = 5.0
MARK = "HUBERT_PROCESS"
PROC = Path("/proc")  # Linux only


@dataclass(frozen=True)
class ProcessId:
    """One process, for as long as it lives and after."""

    pid: int
    started: str
    boot: str
    host: str

    @classmethod
    def of(cls, pid: int) -> Self:
        """Identify a process of this machine that is alive now."""
        return cls(pid, process_start(pid) or "", _boot(), platform.node())

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Self:
        """Take the identity out of a larger JSON object."""
        return cls(int(content["pid"]), content["started"], content["boot"], content["host"])

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for a JSON file."""
        return asdict(self)

    def is_alive(self) -> bool:
        """Return True if this very process runs on this machine now, and is no zombie."""
        exit_status(self)  # reaps it, if it is a child of ours that has ended
        return (
            self.host == platform.node()
            and self.boot == _boot()
            and bool(self.started)
            and process_start(self.pid) == self.started
        )

    def signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.is_alive():
            with suppress(ProcessLookupError):  # it ended between the two lines
                os.kill(self.pid, number)


# The children of this very process: only they have an exit status, and only their parent can reap them.
_CHILDREN: dict[ProcessId, "subprocess.Popen[bytes]"] = {}


def start_detached(
    command: Sequence[str], log: Path, *, environment: Mapping[str, str], folder: Path | None = None
) -> ProcessId:
    """Start a program that outlives this one, in a session of its own; what it prints is added to the log.

    Raises:
        FileNotFoundError: the program is not on this machine's PATH.
    """
    with log.open("ab") as output, _interruptible():
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
            env=environment,
        )
    process = ProcessId.of(child.pid)
    _CHILDREN[process] = child
    return process


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let children start with the default action for SIGINT.

    A shell starts `command &` with SIGINT ignored, children inherit that, and a Prefect worker that ignores SIGINT
    never stops on SIGTERM either (it sends itself a SIGINT).
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def exit_status(process: ProcessId, *, wait_seconds: float = 0.0) -> int | None:
    """Return how a process ended (negative: by which signal); None if it lives, or another process than this one started it.

    The last threads of a program that counts as ended may need a moment more: `wait_seconds`.
    """
    child = _CHILDREN.get(process)
    if child is None:
        return None
    with suppress(subprocess.TimeoutExpired):
        return child.wait(wait_seconds) if wait_seconds else child.poll()
    return None


def process_start(pid: int) -> str | None:
    """Return when a process started, in the system's own words; None if there is none or it is a zombie."""
    if (PROC / "self" / "stat").exists():
        try:
            fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else fields[19]
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
    except psutil.NoSuchProcess:
        return None


def _boot() -> str:
    """Name this start of the machine: pids and start times mean nothing in another one."""
    path = PROC / "sys" / "kernel" / "random" / "boot_id"
    return path.read_text().strip() if path.exists() else ""


def gpu_allocations() -> int:
    """Return how often this process has taken memory of its GPU so far: more after some work, if that used the GPU.

    That CUDA is initialised says nothing of a shard: stages share the processes. torch is not imported for this.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))


def gpu_name() -> str:
    """Return the name of the GPU that this process uses."""
    return str(sys.modules["torch"].cuda.get_device_name())


# Processes with a name and a log -------------------------------------------------------------------------------------


class ProcessRecord(BaseModel):
    """What is written down about a process: enough to find it again, and its log, from another shell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    mark: str
    """The value of the variable HUBERT_PROCESS in the environment of the process and of all that it starts."""
    process: ProcessId
    since: float
    """When it was started, in seconds since the epoch."""
    log: Path
    log_start: int
    """Where this process's part of the log begins, in bytes."""

    @property
    def pid(self) -> int:
        """Its id, which another process may have once it has ended."""
        return self.process.pid

    def is_alive(self) -> bool:
        """Return True if the process still runs."""
        return self.process.is_alive()


def start_process(
    name: str, command: Sequence[str], *, mark: str, log: Path, folder: Path, environment: Mapping[str, str]
) -> ProcessRecord:
    """Start a command in `folder`, in a session of its own; append what it prints to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log_start, since = log.stat().st_size if log.exists() else 0, time.time()
    process = start_detached(command, log, environment={**environment, MARK: mark}, folder=folder)
    return ProcessRecord(name=name, mark=mark, process=process, since=since, log=log, log_start=log_start)


def last_lines(record: ProcessRecord, count: int = 20) -> str:
    """Return the end of what a process printed since it started."""
    try:
        with record.log.open("rb") as log:
            log.seek(record.log_start)
            lines = log.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return "(its log is gone)"
    return "\n".join(lines[-count:]) or "(it printed nothing)"


def epitaph(record: ProcessRecord) -> str:
    """Describe the end of a process: its exit status where known, the end of its log, and where the log is."""
    code = exit_status(record.process, wait_seconds=EXIT_SECONDS)
    status = "" if code is None else f" with status {code}"
    return f"{record.name} ended{status}. The end of its log ({record.log}):\n{last_lines(record)}"


def wait_for(checks: Mapping[str, Callable[[], bool]], watched: Sequence[ProcessRecord], seconds: float) -> None:
    """Wait until every check has been true once.

    Raises:
        TransientError: one of the watched processes ended, or `seconds` passed; with the end of its log.
    """
    deadline = time.monotonic() + seconds
    pending = dict(checks)
    while True:
        pending = {name: check for name, check in pending.items() if not check()}
        if not pending:
            return
        for record in watched:
            if not record.is_alive():
                raise TransientError(epitaph(record))
        if time.monotonic() > deadline:
            logs = "\n".join(f"{record.log}:\n{last_lines(record)}" for record in watched)
            raise TransientError(
                f"{', '.join(pending)}: not ready after {seconds:.0f} s. The ends of the logs:\n{logs}"
            )
        time.sleep(POLL_SECONDS)


def stop_processes(records: Sequence[ProcessRecord], grace_seconds: float) -> list[str]:
    """Stop processes with all that they started: SIGTERM, then SIGKILL for what is left after `grace_seconds`.

    Returns the names of the programs that had to be killed.
    """
    import psutil

    processes = _families(records)
    for process in processes:
        _signal(process, signal.SIGTERM)
    _, left = psutil.wait_procs(processes, timeout=grace_seconds)
    killed = [name for process in left if (name := _signal(process, signal.SIGKILL))]
    psutil.wait_procs(left, timeout=grace_seconds)
    for record in records:
        exit_status(record.process)  # reaps it
    return killed


def _families(records: Sequence[ProcessRecord]) -> "list[psutil.Process]":
    """Return processes with their descendants, and with the orphans that one that has ended left behind."""
    import psutil

    found = {process.pid: process for process in find_marked({record.mark for record in records})}
    for record in records:
        if record.is_alive():
            with suppress(psutil.NoSuchProcess):
                leader = psutil.Process(record.pid)
                found |= {process.pid: process for process in (leader, *leader.children(recursive=True))}
    return list(found.values())


def find_marked(marks: Collection[str]) -> "list[psutil.Process]":
    """Return the processes that were started under one of the marks, and all that they started."""
    import psutil

    found, job = [], os.environ.get("SLURM_JOB_ID")
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):  # ended meanwhile, or another user's
            variables = process.environ()
            # Slurm gives a job the environment it was submitted from; a job on this very machine is not ours to stop.
            is_ours = variables.get(MARK) in marks and variables.get("SLURM_JOB_ID") == job
            if is_ours and process.pid != os.getpid():
                found.append(process)
    return found


def _signal(process: "psutil.Process", number: signal.Signals) -> str:
    """Send a signal; return the program's name, or nothing if it had ended already."""
    import psutil

    try:
        name = process.name()
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return ""
    return name
