"""Let torch use one thread where its pieces of work are too small to share."""

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread in the thread that calls, and in threads that begin meanwhile; others keep theirs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Heap:
    """Gives memory that is free back to the system now and then, where the C library can (glibc).

    On a CPU oneDNN keeps something small for each new length of a batch, and each pins a page of a heap that is full of holes
    otherwise: a process of base would grow by 35 MB per minute of audio. Each time costs up to 0.1 s of page faults.
    """

    def __init__(self, device: torch.device, seconds: float = 2.0) -> None:
        self._seconds = seconds
        self._last = time.monotonic()
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if device.type == "cpu" else None

    def give_back(self) -> None:
        """Give memory back, unless the batches are computed on a GPU or that was done less than `seconds` ago."""
        now = time.monotonic()
        if self._trim is not None and now >= self._last + self._seconds:
            self._trim(0)
            self._last = now
