"""The training subflow on a real Slurm, seen from Prefect: what its page shows, and what cancelling does."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from hubert.core.files import read_json
from hubert.core.paths import RunFolder
from hubert.runs.options import RunOptions
from hubert.runs.pipeline import Iteration
from hubert.runs.resolve import resolve
from hubert.runs.resolved import Resolved
from hubert.training.checkpoint import find_latest
from hubert.training.folder import read_metrics
from hubert.training.launch import job_ids
from hubert.training.stage import TrainStage
from tasks import train
from tasks.page.page import key_of
from tasks.service.follow import read_family, start_run
from tasks.service.prefect_api import connect
from tasks.service.service import down, up
from tasks.service.settings import environment as service_environment
from tests.conftest import service_settings
from tests.support.flow_runs import run_flow, start_flow
from tests.support.small import write_recipe

TRAINING = """
from pathlib import Path
from flows.training import training
from hubert.runs.resolved import Resolved

def flow(settings, cluster):
    training(Resolved.load(Path(settings)), cluster)
"""
CLUSTER = """
kind: slurm
poll_seconds: 0.5
training: {nodes: 2, cpus: 1, memory: 500M, walltime: "00:10:00"}
"""


@pytest.fixture(params=[100], ids=["short"])
def labelled(tmp_path, small_corpus, request) -> Resolved:
    """An iteration whose audio has units; `request.param` is the training's steps."""
    train_settings = {"steps": request.param, "checkpoint_interval": request.param // 2, "num_processes": 2}
    recipe = write_recipe(tmp_path / "small.toml", train=train_settings)
    found = resolve(RunOptions(str(tmp_path / "run"), 1, str(recipe), str(small_corpus)))
    for stage in ("manifest", "features", "kmeans", "units"):
        getattr(Iteration(found), stage).run()
    found.remember()
    return found


too_long = pytest.mark.parametrize("labelled", [100_000], ids=["long"], indirect=True)


@pytest.fixture
def parameters(tmp_path, labelled, slurm) -> dict[str, str]:
    (tmp_path / "virtual.yaml").write_text(CLUSTER)
    return {"settings": str(RunFolder(Path(labelled.run)).settings(1)), "cluster": str(tmp_path / "virtual.yaml")}


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def descriptions(environment: dict[str, str], stage: TrainStage) -> list[str]:
    """Return what stands below the progress bars of a training."""
    with httpx.Client(base_url=environment["PREFECT_API_URL"]) as client:
        body = {"artifacts": {"key": {"any_": [key_of(stage.parent, "train-progress")]}}, "sort": "CREATED_DESC"}
        found = client.post("/artifacts/filter", json=body).raise_for_status().json()
    return [artifact["description"] for artifact in found]


def test_the_training_shows_its_job_on_the_page_and_in_the_figures(service, labelled, parameters, tmp_path):
    environment, stage = service_environment(service.settings), Iteration(labelled).train
    run_flow(TRAINING, parameters, environment, tmp_path / "log")
    (job_id,) = job_ids(stage.folder)
    assert f"job {job_id} is running on n" in (tmp_path / "log").read_text()
    assert json.loads((stage.folder / "done.json").read_text())["figures"]["slurm_jobs"] == [job_id]
    newest, *_ = descriptions(environment, stage)
    assert newest.startswith(f"job {job_id} is ")
    assert newest.endswith("; all 100 steps are done")


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_training_whose_flow_is_killed_is_adopted_by_the_next_flow(service, labelled, parameters, tmp_path):
    environment, stage = service_environment(service.settings), Iteration(labelled).train
    killed = start_flow(TRAINING, parameters, environment, tmp_path / "log")
    try:
        wait_for(lambda: job_ids(stage.folder) or killed.poll() is not None)
        assert killed.poll() is None, (tmp_path / "log").read_text()[-3000:]
    finally:
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    run_flow(TRAINING, parameters, environment, tmp_path / "log")
    (job_id,) = job_ids(stage.folder)
    assert f"found the trainer alive (job {job_id}); following it" in (tmp_path / "log").read_text()


@too_long
def test_cancelling_a_run_writes_a_checkpoint_and_leaves_no_job(labelled, parameters, slurm):
    """As Prefect calls it, in another process than the one that followed."""
    stage = Iteration(labelled).train
    launcher, max_restarts = train.find_launcher(parameters["cluster"], print)
    assert max_restarts == 3
    trainer = launcher.launch(stage.job())
    wait_for(lambda: read_metrics(stage.metrics))
    cancelled = SimpleNamespace(parameters={"run": labelled.run, "cluster": parameters["cluster"]})
    train.stop_trainings(None, cancelled, None)
    assert slurm.jobs() == []
    record = read_json(stage.folder / "exit.json")
    assert record["name"] == "interrupted"
    assert find_latest(stage.folder).step > 0
    assert not trainer.is_alive()
    assert trainer.end(None)[0].name == "cancelled in Prefect"


DEPLOYED = """
from pathlib import Path
from prefect import flow
from flows.training import training
from hubert.runs.resolved import Resolved
from tasks import train

@flow(name="only-training", on_cancellation=[train.stop_trainings])
def only_training(run: str, settings: str, cluster: str) -> None:
    training(Resolved.load(Path(settings)), cluster)
"""
DEPLOYMENTS = """
deployments:
  - {name: local, entrypoint: "deployed.py:only_training", work_pool: {name: local}}
"""


@pytest.fixture
def service_on_slurm(tmp_path, slurm):
    """A service of its own: the worker's processes find Slurm by an environment that it must have at its start."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "deployed.py").write_text(DEPLOYED)
    (project / "prefect.yaml").write_text(DEPLOYMENTS)
    settings = service_settings(tmp_path)
    yield up(settings, prefect_file=project / "prefect.yaml", project=project)
    down(settings)


@pytest.mark.faults
@pytest.mark.timeout(600)
@too_long
@pytest.mark.parametrize("waits", [True, False])
def test_cancelling_the_flow_run_in_prefect_empties_the_queue(
    service_on_slurm, labelled, parameters, slurm, waits, record_property
):
    stage = Iteration(labelled).train
    if waits:
        for name in slurm.nodes:
            slurm._run("scontrol", "update", f"nodename={name}", "state=drain", "reason=test")
    try:
        with connect(service_on_slurm.settings.api_url) as api:
            run_id = start_run(api, "only-training", "local", {"run": labelled.run, **parameters})
            wait_for(slurm.jobs if waits else lambda: read_metrics(stage.metrics))
            since = time.monotonic()
            api.post(f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
            wait_for(lambda: slurm.jobs() == [])
            record_property("seconds from the request to the empty queue", round(time.monotonic() - since, 1))
            wait_for(lambda: read_family(api, run_id)[0]["state_type"] == "CANCELLED")
        assert len(job_ids(stage.folder)) == 1
        assert waits or find_latest(stage.folder).step > 0
    finally:
        for name in slurm.nodes if waits else []:
            slurm._run("scontrol", "update", f"nodename={name}", "state=resume")
