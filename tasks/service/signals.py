"""What a signal does while something must not be left half done."""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def interrupted_by(*signals: signal.Signals) -> Iterator[None]:
    """Treat signals as Ctrl-C, except those that are ignored (nohup)."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled({number: interrupt for number in signals if signal.getsignal(number) is not signal.SIG_IGN}):
        yield


@contextmanager
def deaf() -> Iterator[None]:
    """Ignore Ctrl-C, SIGTERM and the terminal's end: a second one must not leave half of the service running."""
    with _handled(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN)):
        yield


@contextmanager
def _handled(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Install signal handlers, and put the former ones back."""
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
