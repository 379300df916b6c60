"""The Dask workers that a stage runs on: settings of a site in, a Prefect task runner out.

`deployments/clusters/*.yaml` has one section per kind of work, so that labelling (GPU) and evaluation may ask for
different machines. Flows name a section, never a cluster.
"""

import logging
import os
import tempfile
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Annotated, Any, Literal

import yaml
from distributed import LocalCluster
from prefect.task_runners import TaskRunner
from prefect_dask.task_runners import DaskTaskRunner
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hubert.config import explain
from hubert.errors import ConfigError
from hubert.paths import find_cluster
from tasks.slurm_settings import SlurmSettings
from tasks.worker_environment import worker_environment

# At their default level, Dask's processes tell of every connection, in the log of the Prefect run.
logging.getLogger("distributed").setLevel(logging.WARNING)


class WorkerSettings(BaseModel):
    """The workers of one section."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_workers: int = Field(default=0, ge=0, description="worker processes; 0: one per core")
    threads_per_worker: int = Field(default=1, ge=1, description="shards at once in one worker process")
    memory_limit: str = Field(
        default="auto", description="memory per worker, such as 8GB; auto: the machine's, shared out; 0: no limit"
    )
    dashboard_address: str = Field(
        default="127.0.0.1:0", description="where Dask's dashboard listens; port 0: any free one"
    )


class LocalSettings(BaseModel):
    """A cluster file of `kind: local`: workers on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["local"]
    extraction: WorkerSettings = Field(default=WorkerSettings(), description="manifest, features, units")
    kmeans: WorkerSettings = Field(default=WorkerSettings(), description="codebook")
    evaluation: WorkerSettings = Field(default=WorkerSettings(), description="validation, ABX, quality, report")


class AddressSettings(BaseModel):
    """A cluster file of `kind: address`: a Dask scheduler that somebody else runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["address"]
    address: str = Field(description="the scheduler's address, such as tcp://node1:8786", pattern=r"^[a-z]+://.+:\d+$")


ClusterSettings = LocalSettings | AddressSettings | SlurmSettings
_CLUSTERS: TypeAdapter[ClusterSettings] = TypeAdapter(Annotated[ClusterSettings, Field(discriminator="kind")])
Section = Literal["extraction", "kmeans", "evaluation"]


def read_cluster(name: str) -> ClusterSettings:
    """Read a site's settings by name or path.

    Raises:
        ConfigError: the file is missing, not YAML, or a key is wrong; names it.
    """
    path = find_cluster(name)
    if not path.exists():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"cluster {name!r}: {path} does not exist; known clusters: {known}")
    try:
        content = yaml.safe_load(path.read_text())
        return _CLUSTERS.validate_python(content)
    except yaml.YAMLError as error:
        raise ConfigError(f"cluster {path} is not YAML: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"cluster {path}: {explain(error)}") from error


def task_runner(cluster: str, section: Section) -> TaskRunner[Any]:
    """Return the runner for a section. Its workers start with the first task, so a finished stage starts none."""
    settings = read_cluster(cluster)
    if isinstance(settings, AddressSettings):
        return DaskTaskRunner(address=settings.address)
    workers: Any = getattr(settings, section)
    start: Any  # DaskTaskRunner passes it the arguments below, and enters what it returns
    if isinstance(settings, SlurmSettings):
        from tasks.slurm_workers import start_workers as start  # dask-jobqueue: only where there is a Slurm

        arguments = {"section": workers, "name": section, "poll_seconds": settings.poll_seconds}
        return DaskTaskRunner(cluster_class=start, cluster_kwargs=arguments)
    start = shared_workers
    return DaskTaskRunner(cluster_class=start, cluster_kwargs={"workers": workers})


def shared_workers(workers: WorkerSettings) -> AbstractContextManager[LocalCluster]:
    """Give this process's local workers, started at the first call and stopped with the process.

    Starting them costs seconds of every core (each imports torch), so the flows of a process share them.
    """
    return nullcontext(_start_workers(workers))


@cache
def _start_workers(workers: WorkerSettings) -> LocalCluster:
    return LocalCluster(**local_workers(workers))


def local_workers(workers: WorkerSettings) -> dict[str, Any]:
    """Return LocalCluster's arguments: cores are shared out, so that workers do not fight for them."""
    cores = len(os.sched_getaffinity(0))
    num_workers = workers.num_workers or cores
    return {
        "n_workers": num_workers,
        "threads_per_worker": workers.threads_per_worker,
        "memory_limit": None if workers.memory_limit == "0" else workers.memory_limit,
        "host": "127.0.0.1",
        "dashboard_address": workers.dashboard_address,
        "local_directory": tempfile.gettempdir(),
        "env": worker_environment(cores, num_workers, workers.threads_per_worker),
    }
