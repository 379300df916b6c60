"""Running the project's flows as processes against the real service, and looking at what they left."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubert.core.paths import PROJECT
from tasks.service.follow import read_family
from tasks.service.prefect_api import connect

POLL_SECONDS = 0.05
PRETRAINING = "from flows.pretraining import hubert_pretraining as flow"
ITERATION = "from flows.iteration import hubert_iteration as flow"


@dataclass(frozen=True)
class SmallRun:
    """A run's folder, and the parameters of `hubert-pretraining` that it was made with."""

    folder: Path
    parameters: dict[str, str]


def start_flow(flow: str, parameters: Mapping[str, Any], environment: Mapping[str, str], log: Path) -> subprocess.Popen:
    """Start a flow in a process and a session of its own; its output goes to `log`."""
    code = f"{flow}\nimport json, sys\nflow(**json.loads(sys.argv[1]))"
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(parameters)],
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=PROJECT,
            start_new_session=True,
        )


def run_flow(flow: str, parameters: Mapping[str, Any], environment: Mapping[str, str], log: Path) -> None:
    """Run a flow to its end, which has to be a success."""
    process = start_flow(flow, parameters, environment, log)
    assert process.wait(600) == 0, log.read_text()[-4000:]


def kill_flow_when(
    condition: Callable[[], bool],
    flow: str,
    parameters: Mapping[str, Any],
    environment: Mapping[str, str],
    log: Path,
    *,
    victim: Callable[[subprocess.Popen], list[int]] = lambda process: [process.pid],
    number: signal.Signals = signal.SIGKILL,
) -> bool:
    """Start a flow, `kill -9` the victim (or send another signal) as soon as the condition holds and it lives; False if the flow ended before."""
    process = start_flow(flow, parameters, environment, log)
    try:
        while process.poll() is None:
            if condition() and (pids := victim(process)):
                for pid in pids:
                    os.kill(pid, number)
                process.wait(600)
                return True
            try:
                process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        return False
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def newest_run(environment: Mapping[str, str], folder: Path) -> str:
    """Return the id of the newest flow run of a run's folder that is no part of another."""
    wanted = {"flow_runs": {"parent_task_run_id": {"is_null_": True}}, "sort": "START_TIME_DESC"}
    with connect(environment["PREFECT_API_URL"]) as api:
        runs = api.post("/flow_runs/filter", wanted)
    return next(run["id"] for run in runs if run["parameters"].get("run") == str(folder))


def task_runs(environment: Mapping[str, str], run_id: str) -> dict[str, str]:
    """Return the state's name of each task run of a flow run and of all below it, by the task run's name."""
    found: dict[str, str] = {}
    with connect(environment["PREFECT_API_URL"]) as api:
        family = [run["id"] for run in read_family(api, run_id)]
        wanted = {"flow_runs": {"id": {"any_": family}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 200}
        while page := api.post("/task_runs/filter", {**wanted, "offset": len(found)}):
            found |= {f"{run['name']}#{run['id']}": run["state_name"] for run in page}
    return found


def finished_folders(run: Path) -> dict[str, float]:
    """Return when each stage's `done.json` was written, by its folder."""
    return {str(path.parent.relative_to(run)): path.stat().st_mtime for path in run.rglob("done.json")}
