"""Runs on the virtual Slurm: start a flow, do something to it or to the cluster at a point, and look at what is left."""

import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from hubert.core.files import read_json
from tests.support.flow_runs import POLL_SECONDS, start_flow
from tools.virtual_slurm import VirtualSlurm

POINT_SECONDS = 300.0


def wait_until(condition: Callable[[], Any], what: str, seconds: float = POINT_SECONDS) -> Any:
    """Wait for something to become true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(POLL_SECONDS)
    return found


def run_and_disturb(
    flow: str,
    parameters: Mapping[str, Any],
    environment: Mapping[str, str],
    log: Path,
    *,
    when: Callable[[], Any],
    do: Callable[[], object],
) -> int:
    """Run a flow to its end, and do something to it when a condition holds, which it must; returns its exit code."""
    process = start_flow(flow, parameters, environment, log)
    try:
        wait_until(lambda: when() or process.poll() is not None, "the point to disturb the run at")
        assert process.poll() is None, f"the flow ended too early: {log.read_text()[-3000:]}"
        do()
        return process.wait(900)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def training_jobs(run: Path) -> list[str]:
    """Return the ids of the Slurm jobs of a run's trainings, in their order."""
    records = sorted(run.glob("it*/train-*/slurm.json"))
    return [job["job_id"] for record in records for job in (read_json(record) or {"jobs": []})["jobs"]]


def worker_processes(slurm: VirtualSlurm) -> list[psutil.Process]:
    """Return the processes of Dask workers that compute (not the nannies that start them again)."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            is_here = environment.get("SLURM_CONF") == str(slurm.config) and "SLURMD_NODENAME" in environment
            if is_here and "multiprocessing.spawn" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_one_worker(slurm: VirtualSlurm) -> None:
    """kill -9 of a Dask worker's process, which must be there."""
    os.kill(worker_processes(slurm)[0].pid, signal.SIGKILL)


def jobs_named(slurm: VirtualSlurm, pattern: str) -> dict[str, str]:
    """Return the running jobs whose name matches, with the node each runs on."""
    lines = slurm.command("squeue", "--noheader", "--states=running", "--format=%i %N %j").splitlines()
    rows = [line.split(maxsplit=2) for line in lines]
    return {job_id: node for job_id, node, name in rows if re.match(pattern, name)}
