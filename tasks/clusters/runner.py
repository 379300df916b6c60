"""The Dask workers that a stage runs on: settings of a site in, a Prefect task runner out.

`deployments/clusters/*.yaml` has one section per kind of work, so that labelling (GPU) and evaluation may ask for
different machines. Flows name a section, never a cluster.
"""

import logging
import os
import subprocess
import tempfile
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import dask
from distributed import LocalCluster
from prefect.logging.loggers import flow_run_logger
from prefect.task_runners import TaskRunner
from prefect_dask.task_runners import DaskTaskRunner

from hubert.core.errors import HubertError
from tasks.clusters.settings import AddressSettings, Section, WorkerSettings, read_cluster
from tasks.slurm.settings import SlurmSettings
from tasks.slurm.worker_environment import worker_environment

# At their default level, Dask's processes tell of every connection, in the log of the Prefect run.
logging.getLogger("distributed").setLevel(logging.WARNING)
# A worker that hangs sends no heartbeat: its nanny starts it again, after this time or up to twice as long.
dask.config.set({"distributed.scheduler.worker-ttl": "75s"})


def task_runner(cluster: str, section: Section) -> TaskRunner[Any]:
    """Return the runner for a section. Its workers start with the first task, so a finished stage starts none."""
    settings = read_cluster(cluster)
    if isinstance(settings, AddressSettings):
        return DaskTaskRunner(address=settings.address)
    workers: Any = getattr(settings, section)
    start: Any  # DaskTaskRunner passes it the arguments below, and enters what it returns
    if isinstance(settings, SlurmSettings):
        from tasks.slurm.workers import start_workers as start  # dask-jobqueue: only where there is a Slurm

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


def cancel_jobs(flow: Any, flow_run: Any, state: Any) -> None:  # noqa: ARG001  (Prefect passes all three by name)
    """Cancel the worker jobs of a run that was cancelled or has crashed. Prefect calls it."""
    try:
        if not isinstance(read_cluster(flow_run.parameters.get("cluster", "local")), SlurmSettings):
            return
        from tasks.slurm.workers import cancel_workers  # dask-jobqueue: only where there is a Slurm

        cancel_workers(str(flow_run.id))
    except (HubertError, subprocess.CalledProcessError) as error:
        flow_run_logger(flow_run).warning(
            "The run's jobs were not cancelled, and end when they miss its scheduler: %s", error
        )
