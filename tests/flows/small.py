"""Flows for the tests of the service: one that ends at once, one that does not end by itself, and one on a Dask worker."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from prefect import flow, get_run_logger, task

from hubert.core.errors import DataError
from tasks.page.failure import close_page, write_page


@flow(name="small")
def small(answer: str, number: int = 1) -> None:
    """Write down what the flow was given and what it sees of the service."""
    variables = {name: os.environ.get(name) for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "HUBERT_SERVICE")}
    Path(answer).write_text(json.dumps({"number": number, "folder": str(Path.cwd()), **variables}))


@flow(name="inner")
def inner(answer: str) -> None:
    """Start a process that outlives this one unless it is stopped, and wait."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    wait(answer, [os.getpid(), child.pid])


@task(name="wait")
def wait(answer: str, pids: list[int]) -> None:
    """Say which processes there are, in a task that does not end."""
    Path(f"{answer}.part").write_text(json.dumps(pids))
    Path(f"{answer}.part").rename(answer)
    time.sleep(600)


@flow(name="endless", on_crashed=[write_page])
def endless(answer: str) -> None:
    """Run a subflow that does not end."""
    inner(answer)


@flow(name="faltering", on_completion=[close_page], on_failure=[write_page])
def faltering(run: str, wanted: str) -> None:
    """Fail as long as a file is not there."""
    if not Path(wanted).exists():
        raise DataError(f"{wanted} of {run} is not there")


@flow(name="spread")
def spread(variable: str) -> None:
    """Run a task in a Dask worker that was started without a variable of this process's environment."""
    from distributed import LocalCluster
    from prefect_dask import DaskTaskRunner

    os.environ.pop(variable)
    workers = {"n_workers": 1, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    runner = DaskTaskRunner(cluster_class=LocalCluster, cluster_kwargs=workers)
    on_workers.with_options(task_runner=runner)(variable)


@flow(name="on workers")
def on_workers(variable: str) -> None:
    """Submit the task."""
    look.submit(variable).result()


@task(name="look")
def look(variable: str) -> None:
    """Log whether the variable is there."""
    get_run_logger().info("this worker has %s: %s", variable, variable in os.environ)
