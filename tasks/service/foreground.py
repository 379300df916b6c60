"""`hubert up` in the foreground: keep the service up until Ctrl-C, then stop it."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

from hubert.core.errors import TransientError
from hubert.core.paths import PROJECT
from hubert.core.process import epitaph
from tasks.service.deployments import PREFECT_FILE
from tasks.service.service import PARTS, describe, down, locked, up
from tasks.service.settings import Service, ServiceSettings, find_service
from tasks.service.signals import deaf, interrupted_by

WATCH_SECONDS = 1.0
# A part that ends again sooner than this after its start is not started once more.
RESTART_SECONDS = 60.0


def hold(
    settings: ServiceSettings,
    *,
    prefect_file: Path = PREFECT_FILE,
    project: Path = PROJECT,
    say: Callable[[str], None] = print,
) -> int:
    """Start the service, keep it up in the foreground until Ctrl-C, SIGTERM or the terminal's end, and stop it.

    A part that ends meanwhile is started again, after its log was shown; one that ends again within a minute ends all.
    A service that ran before is left as it is. Returns the exit status for the shell: 130 if it was interrupted before
    everything was ready.

    Raises:
        ConfigError, TransientError: as `up`; or a part kept ending, and the service has been stopped.
    """
    with interrupted_by(signal.SIGTERM, signal.SIGHUP):
        try:
            service = up(settings, prefect_file=prefect_file, project=project)
        except KeyboardInterrupt:
            say("Interrupted before everything was ready; what had been started is stopped.")
            return 130
        say(describe(service))
        if len(service.started) < len(PARTS):
            say(f"Started now: {', '.join(service.started) or 'nothing'}. The rest was up before; all is left running.")
            return 0
        say("Ctrl-C stops it.")
        try:
            _keep_up(service, prefect_file, project, say)
        except KeyboardInterrupt:
            say("Stopping.")
        finally:
            with deaf():
                stopped = down(settings)
            for run in stopped.runs:
                say(f"This run was under way, and is marked as crashed: {run}")
    return 0


def _keep_up(service: Service, prefect_file: Path, project: Path, say: Callable[[str], None]) -> None:
    """Start again what ends, until the service is stopped from another shell."""
    settings = service.settings
    since = dict.fromkeys(PARTS, float("-inf"))
    while True:
        time.sleep(WATCH_SECONDS)
        ended = [record for record in service.processes.values() if not record.is_alive()]
        if not ended:
            continue
        with locked(settings):  # a `hubert down` that is at work holds the lock until it is done
            if find_service(settings.folder) is None:
                say("Stopped by `hubert down`.")
                return
        for record in ended:
            if time.monotonic() - since[record.name] < RESTART_SECONDS:
                raise TransientError(f"{epitaph(record)}\nIt keeps ending: the service was stopped.")
            say(f"{epitaph(record)}\nStarting it again.")
        service = up(settings, prefect_file=prefect_file, project=project)
        say(f"Up again: {', '.join(service.started)}.")
        since |= dict.fromkeys(service.started, time.monotonic())
