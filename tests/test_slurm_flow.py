"""The training subflow on a real Slurm, seen from Prefect: what its page shows, and what cancelling does."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from hubert.checkpoint import find_latest
from hubert.launch import job_ids
from hubert.paths import read_json
from hubert.resolve import Resolved, resolve
from tasks import train
from tasks.service_settings import environment as service_environment
from tests.flow_runs import run_flow, start_flow
from tests.small import build_corpus, write_recipe

TRAINING = """
from pathlib import Path
from flows.training import training
from hubert.resolve import Resolved

def flow(settings, cluster):
    training(Resolved.load(Path(settings)), cluster)
"""
CLUSTER = """
kind: slurm
poll_seconds: 0.5
training: {nodes: 2, cpus: 1, memory: 500M, walltime: "00:10:00"}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("slurm flow") / "corpus")


@pytest.fixture
def labelled(tmp_path, corpus) -> Resolved:
    """An iteration whose audio has units; its steps are too many to end before they are looked at."""
    recipe = write_recipe(tmp_path / "small.toml", train={"steps": 100, "checkpoint_interval": 50, "num_processes": 2})
    found = resolve(str(tmp_path / "run"), str(recipe), str(corpus), iteration=1)
    for stage in ("manifest", "features", "kmeans", "units"):
        getattr(found.iteration, stage).run()
    found.save(tmp_path / "resolved.toml")
    return found


@pytest.fixture
def parameters(tmp_path, labelled, slurm) -> dict[str, str]:
    (tmp_path / "virtual.yaml").write_text(CLUSTER)
    return {"settings": str(tmp_path / "resolved.toml"), "cluster": str(tmp_path / "virtual.yaml")}


def descriptions(environment: dict[str, str], label: str) -> list[str]:
    """Return what stands below the progress bars of a stage."""
    with httpx.Client(base_url=environment["PREFECT_API_URL"]) as client:
        body = {"artifacts": {"type": {"any_": ["progress"]}}, "sort": "CREATED_DESC"}
        found = client.post("/artifacts/filter", json=body).raise_for_status().json()
    return [artifact["description"] for artifact in found if artifact["description"].startswith(label)]


@pytest.mark.timeout(600)
def test_a_training_whose_flow_is_killed_is_adopted_and_its_job_stands_on_the_page_and_in_the_figures(
    service, labelled, parameters, tmp_path
):
    environment, stage = service_environment(service.settings), labelled.iteration.train
    killed = start_flow(TRAINING, parameters, environment, tmp_path / "log")
    try:
        while not job_ids(stage.folder):
            assert killed.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
    finally:
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    run_flow(TRAINING, parameters, environment, tmp_path / "log")
    (job_id,) = job_ids(stage.folder)
    log = (tmp_path / "log").read_text()
    assert f"found the trainer alive (job {job_id}); following it" in log
    assert f"job {job_id} is running on n" in log
    assert json.loads((stage.folder / "done.json").read_text())["figures"]["slurm_jobs"] == [job_id]
    newest, first = descriptions(environment, stage.label)
    assert f"job {job_id} is completed" in newest
    assert "all 100 steps are done" in newest
    assert first.startswith(f"{stage.label}: steps; ")


def test_cancelling_a_run_writes_a_checkpoint_and_leaves_no_job(labelled, parameters, slurm):
    """As Prefect calls it, in another process than the one that followed."""
    stage = labelled.iteration.train
    launcher, max_restarts = train.find_launcher(parameters["cluster"], print)
    assert max_restarts == 3
    trainer = launcher.launch(stage.job())
    while not (stage.folder / "metrics.jsonl").exists():
        assert trainer.is_alive()
        time.sleep(0.1)
    cancelled = SimpleNamespace(parameters={"run": labelled.run, "cluster": parameters["cluster"]})
    train.stop_trainings(None, cancelled, None)
    assert slurm.jobs() == []
    record = read_json(stage.folder / "exit.json")
    assert record["name"] == "interrupted"
    assert 0 < find_latest(stage.folder).step < 100
    assert not trainer.is_alive()
    assert trainer.end(None)[0].name == "cancelled in Prefect"
