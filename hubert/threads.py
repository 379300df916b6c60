"""Let torch use one thread where its pieces of work are too small to share."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

_LOCK = Lock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread.

    The number is the process's, too: threads come in one after the other, so that each finds what was there before.
    """
    if torch.get_num_threads() == 1:
        yield
        return
    with _LOCK:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
