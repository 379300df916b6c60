"""Wall time, CPU time and peak memory of a block of code in this process and its children.

Only the standard library at import: a cold start is measured with it.
"""

import ctypes
import gc
import resource
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

PROC = Path("/proc")
LEAST_SECONDS = 1.0  # of a round whose work is short: its work is then done again and again, and the mean counts


class Clock:
    """Use it as `with clock:` around what counts, as often as wanted; each time is one round.

    The peak of memory starts anew with the first round, so what preparation took and gave back does not count. Child
    processes (a loader's) count with what they alone hold, if they still live when the round ends.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.gpu_peak = 0
        self.children_peak = 0
        self.before = 0

    def __enter__(self) -> Self:
        gc.collect()
        self._synchronise()
        if not self.wall:
            self.before = memory("VmRSS")
            reset_peak()
            if self.device == "cuda":
                _torch().cuda.reset_peak_memory_stats()
        self._cpu = cpu_seconds()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._synchronise()
        self.wall.append(time.perf_counter() - self._start)
        self.cpu.append(cpu_seconds() - self._cpu)
        self.children_peak = max(self.children_peak, sum(own_memory(child) for child in children()))
        if self.device == "cuda":
            self.gpu_peak = _torch().cuda.max_memory_allocated()

    @property
    def goes_on(self) -> bool:
        """Whether the present round is still shorter than a round should be."""
        return time.perf_counter() - self._start < LEAST_SECONDS

    def share(self, parts: float) -> None:
        """Let the last round's times be the mean of so many equal parts of it."""
        self.wall[-1] /= parts
        self.cpu[-1] /= parts

    @property
    def peak(self) -> int:
        """Bytes at the peak, children included."""
        return max(memory("VmHWM"), self.before) + self.children_peak  # the kernel's counters lag a little

    def _synchronise(self) -> None:
        if self.device == "cuda":
            _torch().cuda.synchronize()


def _torch():  # noqa: ANN202  (a module)
    return sys.modules["torch"]


def memory(field: str, pid: int | str = "self") -> int:
    """Return a field of a process's status in bytes: VmRSS, or VmHWM, its peak.

    Not `ru_maxrss`: that one starts with the memory of the process that started this one.
    """
    for line in (PROC / str(pid) / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak() -> None:
    """Let VmHWM start anew from what is held now."""
    try:
        (PROC / "self" / "clear_refs").write_text("5")
    except OSError:  # some containers forbid it: the peak is then that of the whole process
        return


def children() -> list[int]:
    """Return the children of this process that still live."""
    found: list[int] = []
    for task in (PROC / "self" / "task").iterdir():
        try:
            found += [int(pid) for pid in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def own_memory(pid: int) -> int:
    """Return the bytes that a process shares with no other."""
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def cpu_seconds() -> float:
    """Return the CPU time of this process, its children that ended, and those that live, finer than the kernel's ticks."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(map(_cpu_seconds_of, children()))


def _cpu_seconds_of(pid: int) -> float:
    """Return the CPU time of a process with all its threads; 0 if it has gone (then it counts among those that ended)."""
    clock = ctypes.c_int()
    if ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
        return 0.0
    try:
        return time.clock_gettime(clock.value)
    except OSError:
        return 0.0
