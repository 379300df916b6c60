"""The service on one machine: a Prefect server, an MLflow server and a worker, started and stopped as one.

`up` starts what is missing, so it also repairs a service of which one process died; `tasks.service.foreground` does so by itself.
The servers listen on loopback, without passwords, or on an internal interface, where Prefect asks for one
(`tasks.service.access`). `tasks.service.settings` says where the data are and how other processes find the service.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import httpx
from filelock import Timeout
from pydantic import BaseModel, ConfigDict, Field

from hubert.core.errors import ConfigError, TransientError
from hubert.core.locks import acquire
from hubert.core.paths import PROJECT
from hubert.core.process import (
    EXIT_SECONDS,
    ProcessRecord,
    exit_status,
    find_marked,
    last_lines,
    start_process,
    stop_processes,
    wait_for,
)
from tasks.service.access import CLIENT_AUTH, SERVER_AUTH, auth_file, check_port, choose_auth, write_auth
from tasks.service.deployments import PREFECT_FILE, check_registered, deploy_command, read_deployments
from tasks.service.prefect_api import PrefectApi, connect
from tasks.service.profiles import disable_plugins, enable_plugins, plugins_are_enabled
from tasks.service.settings import (
    SERVERS,
    Service,
    ServiceSettings,
    environment,
    find_service,
    record_file,
    service_folder,
)
from tasks.service.signals import deaf

PREFECT, MLFLOW, WORKER = PARTS = ("Prefect server", "MLflow server", "worker")
HEALTH_SECONDS = 10.0

Health = Literal["answers", "runs", "does not answer", "ended", "not started"]


class Stopped(BaseModel):
    """What `down` did."""

    model_config = ConfigDict(frozen=True)

    processes: tuple[str, ...] = Field(default=(), description="the parts of the service that ran until now")
    killed: tuple[str, ...] = Field(default=(), description="the programs that did not stop on SIGTERM")
    runs: tuple[str, ...] = Field(
        default=(), description="runs that were under way, `run (flow)`; they are marked as crashed"
    )


def up(settings: ServiceSettings, *, prefect_file: Path = PREFECT_FILE, project: Path = PROJECT) -> Service:
    """Start what of the service does not run, wait until all of it is ready, and register the deployments.

    If all of it runs and answers, nothing is done and the result's `started` is empty.

    Args:
        settings: where the service listens and keeps its data.
        prefect_file: the deployments to register.
        project: the folder that the flows' entry points are relative to, and in which the worker runs them.

    Raises:
        ConfigError: a port is taken, the service runs with other settings, a deployment is wrong, or the address is one
            that needs an auth string and there is none.
        TransientError: a process ended or was not ready in time; what this call had started is stopped again.
    """
    settings.check()
    read_deployments(prefect_file)
    with locked(settings):
        auth = choose_auth(settings.host, settings.folder)
        service = find_service(settings.folder) or Service(settings=settings)
        running = {name: record for name, record in service.processes.items() if record.is_alive()}
        if running:
            _check_same(service.settings, settings, auth)
        if len(running) < len(PARTS):
            return _start_missing(settings, auth, service.processes, prefect_file, project)
        with connect(settings.api_url, settings.auth) as api:
            wait_for(_ready(settings, api, running), list(running.values()), HEALTH_SECONDS)
            if settings.max_runs:
                api.add_work_pool(settings.pool, settings.max_runs, chosen=True)
        return service


def _start_missing(
    settings: ServiceSettings,
    auth: str | None,
    former: dict[str, ProcessRecord],
    prefect_file: Path,
    project: Path,
) -> Service:
    """Start the missing parts, both servers at once, then the worker while the deployments are registered."""
    running = {name: record for name, record in former.items() if record.is_alive()}
    missing = [name for name in PARTS if name not in running]
    # A server that was killed may have left children, which still hold its port. A worker's flows go on without it.
    orphaned = [record for name, record in former.items() if name in missing and name != WORKER]
    stop_processes(orphaned, settings.stop_seconds)
    if PREFECT in missing:
        check_port(settings.host, settings.prefect_port, setting="--prefect-port")
    if MLFLOW in missing:
        check_port(settings.host, settings.mlflow_port, setting="--mlflow-port")
    parts = dict(running)
    started: list[ProcessRecord] = []

    def start(name: str, command: list[str], folder: Path) -> ProcessRecord:
        started.append(record := _start(settings, name, command, folder))
        if name in PARTS:  # written at once: whatever happens to this command, `down` knows what runs
            parts[name] = record
            Service(settings=settings, processes=parts).write()
        return record

    commands = _commands(settings)
    try:
        write_auth(settings.folder, auth)
        for name in missing:
            if name != WORKER:
                start(name, commands[name], settings.folder)
        with connect(settings.api_url, settings.auth) as api:
            wait_for({PREFECT: api.is_healthy}, list(parts.values()), settings.start_seconds)
            api.add_work_pool(settings.pool, settings.run_limit, chosen=bool(settings.max_runs))
            api.add_lost_run_automation()
            if WORKER in missing:
                if not find_marked({_mark(settings, WORKER)}):  # no worker and no flow of one is left
                    api.crash_unfinished_runs(settings.pool, "The process of this run is gone: it was killed.")
                start(WORKER, commands[WORKER], settings.folder)
            registering = start("deployments", deploy_command(prefect_file), project)
            checks = {**_ready(settings, api, parts), "deployments": lambda: not registering.is_alive()}
            wait_for(checks, list(parts.values()), settings.start_seconds)
            _check_deployed(prefect_file, registering, api)
    except BaseException:
        with deaf():
            stop_processes(started, settings.stop_seconds)
            if not running:
                _forget(settings)
        raise
    enable_plugins(settings.profiles, settings.folder)
    return Service(settings=settings, processes=parts, started=tuple(missing))


def deploy(settings: ServiceSettings, prefect_file: Path = PREFECT_FILE, *, project: Path = PROJECT) -> list[str]:
    """Register all deployments of a file with the running service; return their names, `flow/deployment`.

    Raises:
        ConfigError: the file is wrong, or a flow that it names does not exist.
        TransientError: the server does not answer.
    """
    read_deployments(prefect_file)
    with connect(settings.api_url, settings.auth) as api:
        command = _start(settings, "deployments", deploy_command(prefect_file), project)
        try:
            wait_for({"deployments": lambda: not command.is_alive()}, [], settings.start_seconds)
        except BaseException:
            with deaf():
                stop_processes([command], settings.stop_seconds)
            raise
        return _check_deployed(prefect_file, command, api)


def _check_deployed(prefect_file: Path, command: ProcessRecord, api: PrefectApi) -> list[str]:
    """Check what a `deploy_command` that has ended did; as `check_registered`."""
    printed = f"`prefect deploy` printed ({command.log}):\n{last_lines(command, 40)}"
    return check_registered(
        prefect_file, exit_status(command.process, wait_seconds=EXIT_SECONDS), printed, api.deployments()
    )


def down(settings: ServiceSettings) -> Stopped:
    """Stop exactly the processes that `up` started, the worker first, and remove service.json and the auth string.

    The worker's flows are stopped with it, with all that they started, and their runs are marked as crashed, so that
    none stays "running" for ever. What they wrote stays: the same run, started again, goes on where it was. Scheduled
    runs wait for the next `up`. A flow that was started in a shell goes on, but its servers are gone.
    """
    with locked(settings):
        service = find_service(settings.folder)
        if service is None:
            return Stopped()
        settings = service.settings
        alive = tuple(name for name, record in service.processes.items() if record.is_alive())
        worker = [record for name, record in service.processes.items() if name == WORKER]
        killed = stop_processes(worker, settings.stop_seconds)
        runs: list[str] = []
        if PREFECT in alive:
            # A server that hangs, or whose auth string is lost, is stopped all the same; the next `up` marks the runs.
            with suppress(TransientError, ConfigError), connect(settings.api_url, settings.auth) as api:
                runs = api.crash_unfinished_runs(settings.pool, "The service was stopped during this run.")
        killed += stop_processes(list(service.processes.values()), settings.stop_seconds)
        disable_plugins(settings.profiles, settings.folder)
        _forget(settings)
        return Stopped(processes=alive, killed=tuple(killed), runs=tuple(runs))


def status(settings: ServiceSettings) -> dict[str, Health]:
    """Return the health of each part of the service."""
    service = find_service(settings.folder)
    if service is None:
        return dict.fromkeys(PARTS, "not started")
    return {name: _health(service, name) for name in PARTS}


def describe(service: Service) -> str:
    """Return what a person wants to know about a service: its addresses, its folder, what to type."""
    settings = service.settings
    lines = [
        f"Prefect  {settings.ui_url}",
        f"MLflow   {settings.mlflow_url}",
        f"data     {settings.folder}",
        *_warnings(settings),
        "start a run:  prefect deployment run hubert-iteration",
    ]
    if settings.folder != service_folder():
        lines.append(f"in another shell, first:  export HUBERT_SERVICE='{settings.folder}'")
    if not plugins_are_enabled(settings.profiles):
        lines.append(
            "outside the project's folder, once:  prefect config set PREFECT_PLUGINS_ENABLED=true  "
            f"({settings.profiles} is yours, and left alone)"
        )
    return "\n".join(lines)


def _warnings(settings: ServiceSettings) -> list[str]:
    """Return warnings on who can reach the servers, and with what."""
    lines = []
    if settings.auth is not None:
        lines.append(f"password {auth_file(settings.folder)} (Prefect's pages ask for what is in it)")
    if not settings.is_loopback:
        lines.append(
            f"MLflow has no password: whoever reaches {settings.host}:{settings.mlflow_port} reads and changes all of it"
        )
    return lines


def _forget(settings: ServiceSettings) -> None:
    """Remove what is known of a service that was stopped."""
    record_file(settings.folder).unlink(missing_ok=True)
    write_auth(settings.folder, None)


def _commands(settings: ServiceSettings) -> dict[str, list[str]]:
    """Return the command of each part."""
    python, folder = sys.executable, settings.folder
    prefect_port, mlflow_port = str(settings.prefect_port), str(settings.mlflow_port)
    artifacts = (folder / "artifacts").as_uri()
    # MLflow answers only to names that it knows, and takes changes only from its own pages; both lists replace its own.
    names = ",".join(f"{host}:{mlflow_port}" for host in (settings.host, "localhost", "127.0.0.1"))
    known = [] if settings.is_loopback else ["--allowed-hosts", names, "--cors-allowed-origins", settings.mlflow_url]
    return {
        PREFECT: [python, "-m", "prefect", "server", "start", "--host", settings.host, "--port", prefect_port],
        # One web process, artifacts read from disk: 250 MB of memory instead of 1.6 GB.
        MLFLOW: [
            *(python, "-m", "mlflow", "server", "--host", settings.host, "--port", mlflow_port, "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
            *("--default-artifact-root", artifacts, "--no-serve-artifacts"),
            *known,
        ],
        WORKER: [
            *(python, "-m", "prefect", "worker", "start", "--type", "process"),
            *("--pool", settings.pool, "--name", settings.worker),
        ],
    }


def _start(settings: ServiceSettings, name: str, command: list[str], folder: Path) -> ProcessRecord:
    """Start a process with its log in the service's folder."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    # A profile of the user's may name another server, and a string may be that server's.
    others = {"PREFECT_PROFILE", "PREFECT_PROFILES_PATH", SERVER_AUTH, CLIENT_AUTH}
    inherited = {key: value for key, value in os.environ.items() if key not in others}
    own = {**SERVERS, "PREFECT_WORKER_QUERY_SECONDS": str(settings.query_seconds)}
    if name == PREFECT and (auth := settings.auth) is not None:
        own[SERVER_AUTH] = auth
    log = settings.folder / "logs" / f"{name.lower().replace(' ', '-')}.log"
    variables = {**inherited, **environment(settings), **own}
    return start_process(name, command, mark=_mark(settings, name), log=log, folder=folder, environment=variables)


def _mark(settings: ServiceSettings, name: str) -> str:
    """Return the mark by which the processes of a part, and all that it starts, are found again."""
    return f"{name} of {settings.folder}"


def _ready(
    settings: ServiceSettings, api: PrefectApi, parts: dict[str, ProcessRecord]
) -> dict[str, Callable[[], bool]]:
    """Return a check for each part: does it answer?"""
    worker_since = parts[WORKER].since
    return {
        PREFECT: api.is_healthy,
        MLFLOW: lambda: _answers(f"{settings.mlflow_url}/health"),
        WORKER: lambda: api.worker_is_online(settings.pool, settings.worker, worker_since),
    }


def _health(service: Service, name: str) -> Health:
    """Return the health of one part."""
    record, settings = service.processes.get(name), service.settings
    if record is None or not record.is_alive():
        return "ended"
    if name == WORKER:
        return "runs"
    address = settings.api_url if name == PREFECT else settings.mlflow_url
    return "answers" if _answers(f"{address}/health") else "does not answer"


def _answers(address: str) -> bool:
    """Return True if an address answers with success, without a proxy."""
    try:
        return httpx.get(address, timeout=HEALTH_SECONDS, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _check_same(running: ServiceSettings, wanted: ServiceSettings, auth: str | None) -> None:
    """Raise ConfigError if a service that runs listens elsewhere than wanted, or asks for another auth string."""
    for field in ("host", "prefect_port", "mlflow_port", "pool", "worker"):
        now, then = getattr(running, field), getattr(wanted, field)
        if now != then:
            raise ConfigError(
                f"{field}: {then!r} was asked for, but the service in {running.folder} runs with {now!r}. "
                "Stop it first (`hubert down`), or use another folder (HUBERT_SERVICE)."
            )
    if running.auth != auth:
        raise ConfigError(
            f"{SERVER_AUTH} is not what the service in {running.folder} asks for (it was started "
            f"{'with another' if running.auth else 'without one'}). Stop it first (`hubert down`), or unset the variable."
        )


@contextmanager
def locked(settings: ServiceSettings) -> Iterator[None]:
    """Hold the service's lock: one `up` or `down` at a time."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    try:
        with acquire(settings.folder / "lock", wait_seconds=settings.start_seconds):
            yield
    except Timeout as error:
        raise TransientError(
            f"another `hubert up` or `hubert down` has held {error.lock_file} for {settings.start_seconds:.0f} s"
        ) from error
