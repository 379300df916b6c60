"""kill -9 at many points, then the same command: it goes on, and the outputs equal an undisturbed run's."""

import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from hubert.core.files import read_json
from tasks.service.settings import environment as service_environment
from tests.support.flow_runs import ITERATION, kill_flow_when, run_flow
from tests.support.outputs import assert_equal_runs
from tests.support.small import build_corpus, write_recipe

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

# Each point is recognised by a file that the run writes there, relative to the run's folder.
POINTS = {
    "while the audio is checked": "manifest-*/receipts/*.json",
    "after the features' plan": "it1/features-*/plan.json",
    "after the first shard of features": "it1/features-*/receipts/*.json",
    "while the codebook is fitted": "it1/kmeans-*/plan.json",
    "after the first shard of units": "it1/units-*/receipts/*.json",
    "when the training starts": "it1/train-*/process.json",
    "after the first checkpoint": "it1/train-*/step-00000004/checkpoint.json",
    "after the first validated checkpoint": "it1/validate-*/receipts/*.json",
    "while ABX is scored": "it1/abx-*/plan.json",
    "before the report": "it1/quality-*/done.json",
}


@pytest.fixture(scope="module")
def environment(service):
    return service_environment(service.settings)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("faults") / "corpus")


@pytest.fixture(scope="module")
def parameters(corpus):
    recipe = write_recipe(corpus.parent / "small.toml", train={"steps": 24})
    return {"recipe": str(recipe), "data": str(corpus), "iteration": 1}


@pytest.fixture(scope="module")
def undisturbed(parameters, environment, corpus):
    run = corpus.parent / "undisturbed"
    run_flow(ITERATION, {**parameters, "run": str(run)}, environment, corpus.parent / "undisturbed.log")
    return run


def workers_of(process: subprocess.Popen) -> list[int]:
    """Return the processes of the flow that compute: Dask's workers."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child.pid for child in children if "multiprocessing.spawn" in " ".join(child.cmdline())][:1]


@pytest.mark.parametrize("point", POINTS)
def test_the_flows_process_is_killed(point, undisturbed, parameters, environment, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    wanted = {**parameters, "run": str(run)}
    assert kill_flow_when(lambda: any(run.glob(POINTS[point])), ITERATION, wanted, environment, log)
    run_flow(ITERATION, wanted, environment, log)
    assert_equal_runs(run, undisturbed)


@pytest.mark.parametrize(
    "point", [name for name in POINTS if "shard" in name or "checked" in name or "validated" in name]
)
def test_a_dask_worker_is_killed_and_the_same_run_ends_well(point, undisturbed, parameters, environment, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    wanted = {**parameters, "run": str(run)}
    assert kill_flow_when(lambda: any(run.glob(POINTS[point])), ITERATION, wanted, environment, log, victim=workers_of)
    assert (run / "it1" / "outcome.json").exists(), log.read_text()[-3000:]
    assert_equal_runs(run, undisturbed)


def test_a_dask_worker_that_hangs_is_replaced_and_the_same_run_ends_well(
    undisturbed, parameters, environment, tmp_path
):
    """SIGSTOP: it sends no heartbeats, and what it was given waits; nothing else ends it."""
    run, log = tmp_path / "run", tmp_path / "log"
    wanted = {**parameters, "run": str(run)}
    point, stop = POINTS["after the first shard of features"], signal.SIGSTOP
    assert kill_flow_when(
        lambda: any(run.glob(point)), ITERATION, wanted, environment, log, victim=workers_of, number=stop
    )
    assert (run / "it1" / "outcome.json").exists(), log.read_text()[-3000:]
    assert_equal_runs(run, undisturbed)


def trainer_of(run: Path) -> list[int]:
    found = [read_json(record) or {} for record in run.glob("it1/train-*/process.json")]
    return [content["pid"] for content in found if content.get("pid") and psutil.pid_exists(content["pid"])]


@pytest.mark.parametrize("point", ["when the training starts", "after the first checkpoint"])
def test_the_training_process_is_killed_and_the_same_run_ends_well(
    point, undisturbed, parameters, environment, tmp_path
):
    run, log = tmp_path / "run", tmp_path / "log"
    wanted = {**parameters, "run": str(run)}
    assert kill_flow_when(
        lambda: any(run.glob(POINTS[point])), ITERATION, wanted, environment, log, victim=lambda _: trainer_of(run)
    )
    assert (run / "it1" / "outcome.json").exists(), log.read_text()[-3000:]
    assert_equal_runs(run, undisturbed)


def test_flow_and_training_are_killed_together(undisturbed, parameters, environment, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    wanted = {**parameters, "run": str(run)}
    assert kill_flow_when(
        lambda: any(run.glob(POINTS["after the first checkpoint"])),
        ITERATION,
        wanted,
        environment,
        log,
        victim=lambda process: [*trainers, process.pid] if (trainers := trainer_of(run)) else [],
    )
    run_flow(ITERATION, wanted, environment, log)
    assert_equal_runs(run, undisturbed)


def test_a_training_whose_flow_was_killed_is_adopted_and_not_started_twice(
    undisturbed, parameters, environment, tmp_path
):
    run, log = tmp_path / "run", tmp_path / "log"
    wanted = {**parameters, "run": str(run)}
    assert kill_flow_when(
        lambda: any(run.glob(POINTS["when the training starts"])), ITERATION, wanted, environment, log
    )
    (record,) = run.glob("it1/train-*/process.json")
    before = record.read_text()
    assert trainer_of(run)
    run_flow(ITERATION, wanted, environment, log)
    assert record.read_text() == before
    assert_equal_runs(run, undisturbed)
