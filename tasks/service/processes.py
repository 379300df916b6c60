"""Processes that outlive the command that starts them: start, recognise, watch and stop them.

A process is recognised by its id and the time at which it was created, so that an id which the system has given to
another program meanwhile is never signalled. What it started is recognised by a variable in the environment, which
children inherit, so that nothing is left behind even if it was killed before them. Each process runs in its own
session: Ctrl-C in the terminal does not reach it, and whoever started it decides in which order things stop.
"""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

from hubert.core.errors import ConfigError, TransientError

# A creation time is computed from the boot time, which a clock correction may shift a little.
CLOCK_TOLERANCE_SECONDS = 2.0
POLL_SECONDS = 0.1
EXIT_SECONDS = 5.0
MARK = "HUBERT_PROCESS"

# The children of this very process, so that one that has ended is reaped instead of staying as a zombie.
_children: dict[int, subprocess.Popen[bytes]] = {}


class ProcessRecord(BaseModel):
    """What is written down about a process: enough to find it again, and its log, from another shell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    mark: str
    """The value of the variable HUBERT_PROCESS in the environment of the process and of all that it starts."""
    pid: int
    created: float
    """Seconds since the epoch, as psutil gives them."""
    log: Path
    log_start: int
    """Where this process's part of the log begins, in bytes."""


def start_process(
    name: str, command: Sequence[str], *, mark: str, log: Path, folder: Path, environment: Mapping[str, str]
) -> ProcessRecord:
    """Start a command in `folder`, in a session of its own; append what it prints to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output, _interruptible():
        log_start = output.tell()
        child = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _children[child.pid] = child
    created = psutil.Process(child.pid).create_time()
    return ProcessRecord(name=name, mark=mark, pid=child.pid, created=created, log=log, log_start=log_start)


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


def find_process(record: ProcessRecord) -> psutil.Process | None:
    """Return the live process of a record; None if it has ended, whoever has its id now."""
    if child := _children.get(record.pid):
        child.poll()
    try:
        process = psutil.Process(record.pid)
        is_ours = abs(process.create_time() - record.created) <= CLOCK_TOLERANCE_SECONDS
        return process if is_ours and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def is_alive(record: ProcessRecord) -> bool:
    """Say whether the process of a record still runs."""
    return find_process(record) is not None


def exit_code(record: ProcessRecord) -> int | None:
    """Return the exit status of a process that has ended; None if another process than this one started it.

    The last threads of a program that counts as ended may need a moment more.
    """
    child = _children.get(record.pid)
    try:
        return child.wait(EXIT_SECONDS) if child else None
    except subprocess.TimeoutExpired:
        return None


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
    """Say that a process has ended: its exit status where known, the end of its log, and where the log is."""
    code = exit_code(record)
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
            if not is_alive(record):
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
    processes = _families(records)
    for process in processes:
        _signal(process, signal.SIGTERM)
    _, left = psutil.wait_procs(processes, timeout=grace_seconds)
    killed = [name for process in left if (name := _signal(process, signal.SIGKILL))]
    psutil.wait_procs(left, timeout=grace_seconds)
    for record in records:
        if (child := _children.get(record.pid)) and child.poll() is not None:
            del _children[record.pid]
    return killed


def _families(records: Sequence[ProcessRecord]) -> list[psutil.Process]:
    """Return processes with their descendants, and with the orphans that one that has ended left behind."""
    found = {process.pid: process for process in find_marked({record.mark for record in records})}
    for record in records:
        if leader := find_process(record):
            with suppress(psutil.NoSuchProcess):
                found |= {process.pid: process for process in (leader, *leader.children(recursive=True))}
    return list(found.values())


def find_marked(marks: Collection[str]) -> list[psutil.Process]:
    """Return the processes that were started under one of the marks, and all that they started."""
    found, job = [], os.environ.get("SLURM_JOB_ID")
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):  # ended meanwhile, or another user's
            variables = process.environ()
            # Slurm gives a job the environment it was submitted from; a job on this very machine is not ours to stop.
            is_ours = variables.get(MARK) in marks and variables.get("SLURM_JOB_ID") == job
            if is_ours and process.pid != os.getpid():
                found.append(process)
    return found


def _signal(process: psutil.Process, number: signal.Signals) -> str:
    """Send a signal; return the program's name, or nothing if it had ended already."""
    try:
        name = process.name()
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return ""
    return name


def check_port(host: str, port: int, *, setting: str) -> None:
    """Check that a server could listen on a port.

    Raises:
        ConfigError: something else listens there, or the host is not one of this machine's addresses.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            holder = find_port_holder(port) or "another program"
            raise ConfigError(
                f"port {port} on {host} cannot be used ({error.strerror}): it is held by {holder}. "
                f"Stop that program, or choose another port with {setting}."
            ) from error


def find_port_holder(port: int) -> str | None:
    """Return the program that listens on a TCP port, with its id; None if nobody does, or if it is another user's."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:  # macOS asks for root
        return None
    pids = (found.pid for found in connections if found.status == psutil.CONN_LISTEN and found.laddr[1:2] == (port,))
    pid = next(pids, None)
    if pid is None:
        return None
    try:
        return f"{' '.join(psutil.Process(pid).cmdline())[:200]} (process {pid})"
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return f"process {pid}"
