"""Where the service is and how to reach it; `tasks.service.service` starts and stops it.

<folder>/                   the variable HUBERT_SERVICE, else `.service` in the project
    service.json            what runs: addresses, process ids; there from `up` to `down`
    auth                    what Prefect asks its clients for, if anything (`tasks.service.access`); there from `up` to `down`
    prefect/                Prefect's home: its SQLite database, results
    mlflow.db, artifacts/   MLflow's database and files
    logs/                   what the processes print
"""

import os
import platform
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hubert.core.errors import ConfigError
from hubert.core.files import read_json, write_json
from hubert.core.paths import PROJECT
from hubert.core.process import ProcessRecord
from tasks.service.access import CLIENT_AUTH, check_host, is_loopback, read_auth

# Prefect's shortest; `PrefectApi.add_lost_run_automation` gives up a run that misses six.
HEARTBEAT_SECONDS = 30
# A server whose database is locked or whose disk is full answers 500 for a while: Prefect's clients ask again for 8 minutes,
# after 2, 4 ... 256 s, instead of ending the flow at once.
CLIENT_RETRIES = {"PREFECT_CLIENT_RETRY_EXTRA_CODES": "500,502,503,504", "PREFECT_CLIENT_MAX_RETRIES": "8"}
BYTES_PER_RUN = 4e9  # a flow, its Dask workers and a small training on this machine

# What both servers are started with, here and in docker/compose.yaml.
SERVERS = {
    "PREFECT_SERVER_UI_API_URL": "/api",  # by default the pages call port 4200, whatever the server's port is
    "PREFECT_SERVER_UI_V2_ENABLED": "true",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",  # also spares a locked database at the first start
    # Prefect's own pages need no leave. Its default lets the pages of every web site start runs from this user's browser.
    "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "http://127.0.0.1",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def service_folder() -> Path:
    """Return the folder of the service: the variable HUBERT_SERVICE, else `.service` in the project."""
    return Path(os.environ.get("HUBERT_SERVICE") or PROJECT / ".service").expanduser().resolve()


def profiles_file() -> Path:
    """Return the file in which Prefect keeps this user's settings."""
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect")
    return Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml").expanduser()


class ServiceSettings(BaseModel):
    """Where the service keeps its data and on which addresses it listens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path = Field(default_factory=service_folder, description="holds all data of the service")
    host: str = Field(
        default="127.0.0.1",
        description="the address that both servers listen on: loopback, or an internal interface of this machine",
    )
    prefect_port: int = Field(default=4200, ge=1, le=65535, description="the port of the Prefect server")
    mlflow_port: int = Field(default=5000, ge=1, le=65535, description="the port of the MLflow server")
    pool: str = Field(default="local", description="Prefect's work pool, the one that deployments/prefect.yaml names")
    worker: str = Field(default="local", description="the worker's name")
    max_runs: int = Field(
        default=0,
        ge=0,
        description="runs that the worker does at once, the others wait; 0: as many as this machine's memory has 4 GB",
    )
    query_seconds: int = Field(default=2, ge=1, description="how often the worker asks for new runs, in seconds")
    start_seconds: float = Field(
        default=180.0, gt=0, description="the longest wait for everything to be ready, in seconds"
    )
    stop_seconds: float = Field(default=15.0, gt=0, description="the time from SIGTERM to SIGKILL, in seconds")
    profiles: Path = Field(
        default_factory=profiles_file, description="this user's Prefect settings; written only if there is no such file"
    )

    @property
    def prefect_url(self) -> str:
        """The address of the Prefect server."""
        return f"http://{self.host}:{self.prefect_port}"

    @property
    def api_url(self) -> str:
        """The address of Prefect's API."""
        return f"{self.prefect_url}/api"

    @property
    def ui_url(self) -> str:
        """The address of Prefect's pages: their second version, as the first one's drop-downs do not stay open."""
        return f"{self.prefect_url}/v2"

    @property
    def mlflow_url(self) -> str:
        """The address of MLflow: pages and API."""
        return f"http://{self.host}:{self.mlflow_port}"

    @property
    def is_loopback(self) -> bool:
        """Whether this machine alone reaches the servers."""
        return is_loopback(self.host)

    @property
    def auth(self) -> str | None:
        """What a running service asks Prefect's clients for, `user:password`; read from its file, never kept in here."""
        return read_auth(self.folder)

    @property
    def run_limit(self) -> int:
        """How many runs the work pool takes at once."""
        if self.max_runs:
            return self.max_runs
        from distributed.system import MEMORY_LIMIT  # that of the cgroup too; slow to import

        return max(1, int(MEMORY_LIMIT // BYTES_PER_RUN))

    def check(self) -> None:
        """Check the addresses before anything is started.

        Raises:
            ConfigError: the host is neither a loopback nor an internal address of this machine, both servers have one port,
                or the folder's path cannot stand in a database's address.
        """
        if set("%?") & set(str(self.folder)):
            raise ConfigError(
                f"the service's folder {self.folder} has % or ? in its path, which the servers' databases cannot be "
                "addressed with; choose another one with --folder or HUBERT_SERVICE"
            )
        if self.prefect_port == self.mlflow_port:
            raise ConfigError(f"prefect_port and mlflow_port are both {self.mlflow_port}: choose different ones")
        check_host(self.host)


class Service(BaseModel):
    """A service that was started: its settings and its processes by name. This is what service.json holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: ServiceSettings
    processes: dict[str, ProcessRecord] = {}
    host_name: str = Field(default_factory=platform.node, description="the machine that the processes run on")
    started: tuple[str, ...] = Field(
        default=(), exclude=True, description="the processes that this call of `up` started"
    )

    def write(self) -> None:
        """Write service.json."""
        write_json(record_file(self.settings.folder), self.model_dump(mode="json"))


def record_file(folder: Path) -> Path:
    """Return the path of service.json in a service's folder."""
    return folder / "service.json"


def find_service(folder: Path | None = None) -> Service | None:
    """Return the service of a folder (default: `service_folder()`) as service.json says; None if there is no such file.

    Its processes may have ended since: `tasks.service.service.status` says.

    A file that was copied here with its folder is another service's, and counts as none.

    Raises:
        ConfigError: the file was written by another version of this project, or on another machine.
    """
    path = record_file(folder or service_folder())
    content = read_json(path)
    if content is None:
        return None
    try:
        service = Service.model_validate(content)
    except ValidationError as error:
        raise ConfigError(
            f"{path} is not what this version of the project writes ({error}). Stop that service with the version that "
            "started it, or remove the file if nothing of it runs."
        ) from error
    if service.host_name != platform.node():
        raise ConfigError(
            f"{path}: the service of this folder was started on {service.host_name}, and this is {platform.node()}. Use it or "
            "stop it there, choose another folder (HUBERT_SERVICE), or remove the file if that machine is gone."
        )
    return service if service.settings.folder == path.parent else None


def environment(settings: ServiceSettings) -> dict[str, str]:
    """Return the environment variables that a process needs to talk to the service and to run flows.

    Prefect's plugins are off in such a process: it has the addresses, and Dask's workers import Prefect inside an event
    loop, where Prefect 3.8 cannot start plugins (it goes on, after a traceback in the log).
    """
    no_proxy = [host for host in (os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "").split(",") if host]
    if settings.host not in no_proxy:
        no_proxy.append(settings.host)
    auth = settings.auth
    return {
        "HUBERT_SERVICE": str(settings.folder),
        "PREFECT_HOME": str(settings.folder / "prefect"),
        "PREFECT_API_URL": settings.api_url,
        "PREFECT_UI_URL": settings.ui_url,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        **CLIENT_RETRIES,
        "OMP_WAIT_POLICY": "PASSIVE",  # of flows that compute in their own process
        "PREFECT_PLUGINS_ENABLED": "false",
        "MLFLOW_TRACKING_URI": settings.mlflow_url,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "NO_PROXY": ",".join(no_proxy),
        "no_proxy": ",".join(no_proxy),
        **({CLIENT_AUTH: auth} if auth else {}),
    }
