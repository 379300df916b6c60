"""What a run's page asks of the Prefect server: short requests, not too many, and none of them in the way of the work.

A page is for people. Whatever goes wrong while something is shown is said once in the log, and the work goes on. A server
that is slow or away is left alone for a while, so that it does not hold up what waits for tasks or follows a training.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import MissingContextError
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, PREFECT_UI_URL, temporary_settings

from hubert.core.errors import first_line

REQUEST_SECONDS = 5.0
CONNECT_SECONDS = 1.5  # httpx tries four times to connect
SILENT_SECONDS = 60.0  # after a request that was not answered
SHOW_SECONDS = 15.0  # between two versions of something that moves: the server is not for that


class UnreachedError(Exception):
    """The server does not answer, or did not a moment ago; the log says so already."""


@dataclass
class _State:
    """What this process knows of the server, and has said."""

    silent_until: float = 0.0
    is_away: bool = False
    said: set[tuple[str, str, str]] = field(default_factory=set)  # whose, what, kind of error
    # What stands on the page of each flow run, by key: the artifact's id, and a hash of what the server has of it.
    cards: dict[tuple[UUID | None, str], tuple[UUID, int]] = field(default_factory=dict)


state = _State()


def run_logger() -> "logging.Logger | logging.LoggerAdapter[Any]":
    """Return the logger of the surrounding run, outside of runs a plain one."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger(__name__)


def costs_nothing[**P, R](
    what: str, label: Callable[..., str] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R | None]]:
    """Let a function that only shows something never fail: one warning names what could not be shown, and it returns None.

    Args:
        what: is shown, for the warning.
        label: returns the name of the stage that it is about, from the function's arguments; None: it is about the run.
    """

    def decorate(show: Callable[P, R]) -> Callable[P, R | None]:
        @wraps(show)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R | None:
            try:
                return show(*args, **kwargs)
            except UnreachedError:
                return None
            except Exception as error:  # noqa: BLE001  (showing must not end what is shown)
                _warn(label(*args, **kwargs) if label is not None else "", what, error)
                return None

        return guarded

    return decorate


def _warn(whose: str, what: str, error: Exception) -> None:
    kind = type(error).__name__
    level = logging.DEBUG if (whose, what, kind) in state.said else logging.WARNING
    state.said.add((whose, what, kind))
    place = f"{whose}: " if whose else ""
    run_logger().log(
        level, "%sthe run's page does not show %s (%s: %s); the work goes on", place, what, kind, first_line(error)
    )


def path_of(page: str, identity: Any) -> str:
    """Return where a page of Prefect is (`runs/flow-run`, `artifacts/artifact`), for a link on another page of Prefect.

    Without host and port: the browser may have others for the server than this process (`ssh -L`, a proxy).
    """
    return f"{urlsplit(PREFECT_UI_URL.value() or '').path.rstrip('/')}/{page}/{identity}"


@contextmanager
def connect(*, retries: int = 0) -> Iterator[SyncPrefectClient]:
    """Open a connection to the Prefect server whose requests do not take long: Prefect's own wait for minutes."""
    timeout = httpx.Timeout(REQUEST_SECONDS, connect=CONNECT_SECONDS)
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: retries}),
        get_client(sync_client=True, httpx_settings={"timeout": timeout}) as client,
    ):
        yield client


@contextmanager
def reach() -> Iterator[SyncPrefectClient]:
    """Open a connection for the requests of a page.

    Raises:
        UnreachedError: the server does not answer, or did not in the last minute.
    """
    if time.monotonic() < state.silent_until:
        raise UnreachedError
    try:
        with connect() as client:
            yield client
    except httpx.HTTPError as error:
        if isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error:
            raise  # an answer
        state.silent_until = time.monotonic() + SILENT_SECONDS
        if not state.is_away:
            state.is_away = True
            run_logger().warning(
                "The run's page does not show what is new: Prefect does not answer (%s: %s). The work goes on; the page is "
                "tried again every %.0f s",
                type(error).__name__,
                first_line(error),
                SILENT_SECONDS,
            )
        raise UnreachedError from error
    state.is_away = False
