"""Flows for the tests of the service: one that ends at once, and one that does not end by itself."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from prefect import flow, task


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


@flow(name="endless")
def endless(answer: str) -> None:
    """Run a subflow that does not end."""
    inner(answer)
