"""One Slurm job of Dask workers: its script, how it is submitted and cancelled. `tasks.slurm.workers` keeps several of them."""

import asyncio
import logging
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import dask
from dask_jobqueue.slurm import SLURMJob
from distributed.core import Status
from distributed.security import Security

from tasks.slurm.commands import SlurmUnreachable, cancel, run
from tasks.slurm.settings import WorkerSection
from tasks.slurm.worker_environment import worker_environment

CONTACT_SECONDS = 60  # a worker that reaches no scheduler for so long ends

# Keys that dask-jobqueue otherwise takes from the user's jobqueue.yaml. It is given this section instead of `slurm`.
CONFIG_NAME = "hubert"
dask.config.set(
    {
        f"jobqueue.{CONFIG_NAME}": {
            "name": "hubert",
            "cores": None,
            "memory": None,
            "processes": None,
            "python": None,
            "interface": None,
            "death-timeout": CONTACT_SECONDS,
            "local-directory": None,
            "shared-temp-directory": None,
            "extra": None,
            "worker-command": "distributed.cli.dask_worker",
            "worker-extra-args": [],
            "shebang": "#!/usr/bin/env bash",
            "queue": None,
            "account": None,
            "walltime": None,
            "env-extra": None,
            "job-script-prologue": [],
            "job-cpu": None,
            "job-mem": None,
            "job-extra": None,
            "job-extra-directives": [],
            "job-directives-skip": [],
            "log-directory": None,
            "scheduler-options": {},
        }
    }
)


class WorkerJob(SLURMJob):
    """One job. Its options are given to sbatch as they are; a job that could not be submitted has a `problem` and no id."""

    def __init__(
        self,
        *args: Any,
        sbatch_options: Sequence[str] = (),
        limits_memory: bool = True,
        security: Security | None = None,
        worker_extra_args: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """Take the options, and the files of the certificates, beside dask-jobqueue's arguments."""
        self.limits_memory = limits_memory
        extra = [*worker_extra_args, *_certificates(security)]  # dask-jobqueue would break at a space in a path
        super().__init__(*args, worker_extra_args=extra, **kwargs)
        self.sbatch_options = list(sbatch_options)
        self.job_header = "\n".join(f"#SBATCH {shlex.quote(option)}" for option in sbatch_options)
        self.problem: Exception | None = None
        self.answered = False  # one of its workers has reached the scheduler
        self.silent_since: float | None = None
        self.ending_since: float | None = None

    @property
    def worker_process_memory(self) -> str:
        """What a worker process may use; without a number in the section Slurm alone sets the limit."""
        return str(super().worker_process_memory) if self.limits_memory else "0"

    async def start(self) -> None:
        """Submit it. Never raises: whoever keeps the jobs sees the problem and tries again."""
        try:
            with self.job_file() as script:
                answer = await asyncio.to_thread(run, ["sbatch", "--parsable", script])
            self.job_id = answer.strip().split(";")[0]
        except (SlurmUnreachable, subprocess.CalledProcessError) as error:
            self.problem = error
        self.status = Status.running

    async def close(self) -> None:
        """Cancel it; if Slurm does not answer, its workers end by themselves when the scheduler is gone."""
        if self.job_id is not None:
            with suppress(SlurmUnreachable):
                await asyncio.to_thread(cancel, [self.job_id])
        self.status = Status.closed
        self._event_finished.set()


def _certificates(security: Security | None) -> list[str]:
    if security is None:
        return []
    files = security.get_tls_config_for_role("worker")
    names = {"ca_file": "--tls-ca-file", "cert": "--tls-cert", "key": "--tls-key"}
    return [word for name, option in names.items() for word in (option, shlex.quote(files[name]))]


def job_arguments(section: WorkerSection) -> dict[str, Any]:
    """Return dask-jobqueue's arguments: what runs in a job, and where the scheduler listens."""
    number, unit = int(section.memory.rstrip("KMGT") or 0), section.memory.lstrip("0123456789") or "M"
    environment = worker_environment(section.cpus, section.num_workers, section.threads_per_worker)
    environment["DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE"] = "False"  # a paused worker would wait without a word
    extra = ["--lifetime", f"{section.lifetime_seconds}s", "--lifetime-stagger", f"{section.stagger_seconds}s"]
    extra += ["--preload", "tasks.slurm.worker_gpu"] if section.gpus > 1 else []
    return {
        "cores": section.num_workers * section.threads_per_worker,
        "processes": section.num_workers,
        "memory": f"{number or 1}{unit}iB",  # dask-jobqueue wants a number; the header that it makes of it is not used
        "limits_memory": number > 0,
        "interface": section.interface or None,
        "python": shlex.quote(section.python or sys.executable),
        "local_directory": '"${TMPDIR:-/tmp}"',
        "death_timeout": CONTACT_SECONDS,
        "worker_extra_args": extra,
        "job_script_prologue": [
            *section.prologue,
            *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        ],
        "scheduler_options": {"interface": section.interface or None, "dashboard_address": "127.0.0.1:0", "port": 0},
        "silence_logs": logging.WARNING,
    }
