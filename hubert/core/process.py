"""Which process is meant: a pid alone is reused, a pid with its start time on one boot of one host is not."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self


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
        """Say whether this very process runs on this machine now. A zombie does not."""
        return (
            self.host == platform.node()
            and self.boot == _boot()
            and bool(self.started)
            and process_start(self.pid) == self.started
        )

    def signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.is_alive():
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return  # it ended between the two lines


_CHILDREN: dict[ProcessId, "subprocess.Popen[bytes]"] = {}


def start_detached(
    command: Sequence[str], log: Path, *, environment: Mapping[str, str], folder: Path | None = None
) -> ProcessId:
    """Start a program that outlives this one, in a session of its own; what it prints is added to the log.

    Raises:
        FileNotFoundError: the program is not on this machine's PATH.
    """
    with log.open("ab") as file:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
            env=environment,
        )
    process = ProcessId.of(child.pid)
    _CHILDREN[process] = child
    return process


def exit_status(process: ProcessId) -> int | None:
    """Return how a process ended (negative: by which signal); None if it lives, or another process than this one started it."""
    child = _CHILDREN.get(process)
    return child.poll() if child is not None else None


def process_start(pid: int) -> str | None:
    """Return when a process started, in the system's own words; None if there is none or it is a zombie."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else fields[19]
    command = ["ps", "-o", "state=,lstart=", "-p", str(pid)]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    state, _, started = listed.partition(" ")
    return None if not state or state.startswith("Z") else started.strip()


def _boot() -> str:
    """Name this start of the machine: pids and start times mean nothing in another one."""
    path = Path("/proc/sys/kernel/random/boot_id")
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
