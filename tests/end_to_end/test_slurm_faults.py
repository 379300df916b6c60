"""Whole runs on a real Slurm of virtual nodes, disturbed in many ways: they end, and their outputs equal an undisturbed run's."""

import contextlib
import os
import signal
import subprocess
import sys

import httpx
import psutil
import pytest

from hubert.core.files import read_json
from hubert.core.paths import RunFolder
from tasks.service.follow import start_run
from tasks.service.prefect_api import connect
from tasks.service.service import MLFLOW, PREFECT, WORKER, down, up
from tasks.service.settings import environment as service_environment
from tasks.service.settings import find_service
from tasks.slurm import commands
from tests.conftest import service_settings
from tests.support.flow_runs import ITERATION, kill_flow_when, run_flow, start_flow
from tests.support.outputs import assert_equal_runs
from tests.support.slurm_runs import (
    jobs_named,
    kill_one_worker,
    run_and_disturb,
    training_jobs,
    wait_until,
    worker_processes,
)
from tests.support.small import build_corpus, write_recipe

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

FEATURES = "it1/features-*/receipts/*.json"
UNITS = "it1/units-*/receipts/*.json"
CHECKPOINT = "it1/train-*/step-00000008/checkpoint.json"


@pytest.fixture(scope="module")
def own_service(slurm, tmp_path_factory):
    """A service of these tests' own: its servers are killed and started again."""
    settings = service_settings(tmp_path_factory.mktemp("own service"))
    yield up(settings).settings
    down(settings)


@pytest.fixture(scope="module")
def environment(own_service):
    return service_environment(own_service)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("slurm-faults") / "corpus")


@pytest.fixture(scope="module")
def parameters(corpus, slurm):
    recipe = write_recipe(corpus.parent / "small.toml", train={"steps": 48, "num_processes": 2})
    site = slurm.write_site(corpus.parent / "site.yaml")
    return {"recipe": str(recipe), "data": str(corpus), "iteration": 1, "cluster": str(site)}


@pytest.fixture(scope="module")
def undisturbed(parameters, environment, corpus, slurm):
    run = corpus.parent / "undisturbed"
    run_flow(ITERATION, {**parameters, "run": str(run)}, environment, corpus.parent / "undisturbed.log")
    wait_until(lambda: not slurm.jobs(), "an empty queue")
    return run


@pytest.fixture
def run(tmp_path, slurm):
    """The folder of a run; nodes that the test killed are revived, and the queue is empty for the next test."""
    yield tmp_path / "run"
    for node, state in slurm.states().items():
        if state.rstrip("*") in {"down", "drained"} or state.endswith("*"):
            slurm.revive_node(node)
    commands.cancel(slurm.jobs())
    wait_until(lambda: not slurm.jobs(), "an empty queue")


def survive(run, parameters, environment, *, when, do) -> None:
    """Run an iteration to its end, which must be a good one, and do something to it when a condition holds."""
    log = run.parent / "log"
    code = run_and_disturb(ITERATION, {**parameters, "run": str(run)}, environment, log, when=when, do=do)
    assert code == 0, log.read_text()[-4000:]


def at(run, point: str):
    """Return a condition: a file of the run is there."""
    return lambda: any(run.glob(point))


def test_the_same_recipe_gives_the_same_on_this_machine_with_as_many_processes(
    undisturbed, parameters, environment, run
):
    log = run.parent / "log"
    run_flow(ITERATION, {**parameters, "run": str(run), "cluster": "local"}, environment, log)
    assert_equal_runs(run, undisturbed)
    assert len(training_jobs(undisturbed)) == 1
    assert training_jobs(run) == []


# What dies while the audio is labelled ------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [FEATURES, UNITS])
@pytest.mark.parametrize("kind", ["kill -9 of a worker", "scancel of a worker's job", "death of a worker's node"])
def test_what_dies_while_the_audio_is_labelled_is_replaced(
    point, kind, undisturbed, parameters, environment, run, slurm
):
    def disturb() -> None:
        jobs = jobs_named(slurm, "hubert-extraction")
        job, node = next(iter(jobs.items()))
        if kind.startswith("kill"):
            kill_one_worker(slurm)
        elif kind.startswith("scancel"):
            commands.cancel([job])
        else:
            slurm.kill_node(node)

    def is_at_work() -> bool:
        return bool(any(run.glob(point)) and worker_processes(slurm) and jobs_named(slurm, "hubert-extraction"))

    survive(run, parameters, environment, when=is_at_work, do=disturb)
    assert_equal_runs(run, undisturbed)


# What dies while the model is trained -------------------------------------------------------------------------------


def test_a_node_that_dies_while_it_trains_costs_the_steps_since_the_checkpoint(
    undisturbed, parameters, environment, run, slurm
):
    def disturb() -> None:
        (nodes,) = jobs_named(slurm, "hubert-train").values()
        slurm.kill_node("n2" if "2" in nodes else "n1")

    survive(run, parameters, environment, when=at(run, CHECKPOINT), do=disturb)
    assert len(training_jobs(run)) >= 2
    assert_equal_runs(run, undisturbed)


def test_a_training_that_gets_sigterm_writes_a_checkpoint_and_goes_on_in_another_job(
    undisturbed, parameters, environment, run, slurm
):
    def terminate() -> None:
        slurm.command("scancel", "--signal=TERM", training_jobs(run)[0])

    survive(run, parameters, environment, when=at(run, CHECKPOINT), do=terminate)
    assert len(training_jobs(run)) == 2
    assert_equal_runs(run, undisturbed)


def test_a_persons_scancel_stops_the_training_for_good_and_the_run_says_so(
    undisturbed, parameters, environment, run, slurm
):
    log = run.parent / "log"
    code = run_and_disturb(
        ITERATION,
        {**parameters, "run": str(run)},
        environment,
        log,
        when=at(run, CHECKPOINT),
        do=lambda: slurm.command("scancel", training_jobs(run)[0]),
    )
    assert code != 0
    assert len(training_jobs(run)) == 1
    assert "scancel" in log.read_text()
    wait_until(lambda: not slurm.jobs(), "an empty queue")
    run_flow(ITERATION, {**parameters, "run": str(run)}, environment, log)  # a person may go on
    assert_equal_runs(run, undisturbed)


@pytest.mark.parametrize("state", ["pending", "running"])
def test_the_flow_is_killed_and_its_live_training_is_adopted(state, undisturbed, parameters, environment, run, slurm):
    log = run.parent / "log"
    wanted = {**parameters, "run": str(run)}
    blockers: list[str] = []

    def is_there() -> bool:
        if state == "running":
            return any(run.glob(CHECKPOINT))
        if not blockers and any(run.glob("it1/units-*/done.json")):  # the training is submitted after these
            blockers.extend(fill(slurm))
        return bool(blockers) and any(job.is_waiting for job in commands.find_jobs(comment="hubert-train"))

    assert kill_flow_when(is_there, ITERATION, wanted, environment, log)
    before = training_jobs(run) or [job.job_id for job in commands.find_jobs(comment="hubert-train")]
    process = start_flow(ITERATION, wanted, environment, log)
    try:
        commands.cancel(blockers)
        assert process.wait(900) == 0, log.read_text()[-4000:]
    finally:
        process.kill()
        process.wait()
    assert training_jobs(run) == before  # one job id
    assert_equal_runs(run, undisturbed)


def fill(slurm) -> list[str]:
    """Fill all CPUs of all nodes with jobs that wait; returns their ids."""
    wanted = ["--exclusive", "--mem=100M", "--output=/dev/null", "--wrap=sleep 900"]
    return [commands.run(["sbatch", "--parsable", *wanted]).strip() for _ in slurm.nodes]


def kill_part(settings, name: str) -> None:
    """kill -9 of a server of the service; returns when it is gone, so that `up` sees it too."""
    record = find_service(settings.folder).processes[name]
    os.kill(record.pid, signal.SIGKILL)
    wait_until(lambda: not record.is_alive(), f"the end of the {name}")


# What else may be gone for a while ----------------------------------------------------------------------------------


def test_the_controller_of_slurm_is_restarted_while_it_trains(undisturbed, parameters, environment, run, slurm):
    def restart() -> None:
        slurm.stop_controller()
        slurm.start_controller()

    survive(run, parameters, environment, when=at(run, CHECKPOINT), do=restart)
    assert len(training_jobs(run)) == 1
    assert_equal_runs(run, undisturbed)


@pytest.mark.parametrize("point", [UNITS, CHECKPOINT])
def test_the_prefect_server_is_restarted(point, undisturbed, parameters, environment, run, own_service):
    def restart() -> None:
        kill_part(own_service, PREFECT)
        up(own_service)

    survive(run, parameters, environment, when=at(run, point), do=restart)
    assert_equal_runs(run, undisturbed)


def test_mlflow_is_down_for_the_whole_training_and_has_all_metrics_afterwards(
    undisturbed, parameters, environment, run, own_service
):
    from mlflow import MlflowClient

    from tasks.tracking.mirror import experiment_of

    log = run.parent / "log"
    process = start_flow(ITERATION, {**parameters, "run": str(run)}, environment, log)
    try:
        wait_until(lambda: any(run.glob("it1/units-*/plan.json")) or process.poll() is not None, "the units' stage")
        kill_part(own_service, MLFLOW)
        wait_until(lambda: any(run.glob("it1/train-*/done.json")) or process.poll() is not None, "the trained model")
        up(own_service)
        assert process.wait(900) == 0, log.read_text()[-4000:]
    finally:
        process.kill()
        process.wait()
    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    experiment = experiment_of(client, RunFolder.of(str(run)))
    (tracked,) = client.search_runs([experiment])
    steps = [metric.step for metric in client.get_metric_history(tracked.info.run_id, "loss")]
    assert steps == list(range(2, 49, 2))
    assert_equal_runs(run, undisturbed)


# Through the deployment ---------------------------------------------------------------------------------------------


def start_deployment(parameters, run, own_service) -> str:
    """Trigger hubert-iteration/slurm; returns the id of the flow run."""
    with connect(own_service.api_url) as api:
        return start_run(api, "hubert-iteration", "slurm", {**parameters, "run": str(run)})


def state_of(flow_run: str, own_service) -> str:
    """Return the type of a flow run's state."""
    answer = httpx.get(f"{own_service.api_url}/flow_runs/{flow_run}", trust_env=False).raise_for_status()
    return answer.json()["state_type"]


def prefect(environment, *words: str) -> None:
    """Type a command of Prefect's."""
    subprocess.run([sys.executable, "-m", "prefect", *words], env={**os.environ, **environment}, check=True)


@pytest.mark.parametrize("point", [UNITS, CHECKPOINT])
def test_cancelling_in_prefect_empties_the_queue_within_30_s(point, parameters, environment, run, slurm, own_service):
    endless = {"overrides": {"train": {"steps": 100_000}}}  # it must not end before the cancel comes
    flow_run = start_deployment({**parameters, **endless}, run, own_service)
    wait_until(lambda: any(run.glob(point)), f"{point}; {state_of(flow_run, own_service)}")
    assert slurm.jobs()
    prefect(environment, "flow-run", "cancel", flow_run)
    wait_until(lambda: not slurm.jobs(), f"an empty queue: {slurm.history()}", seconds=30)
    wait_until(lambda: state_of(flow_run, own_service) == "CANCELLED", "a cancelled run")
    if point == CHECKPOINT:  # it was told to end in time for a checkpoint
        assert read_json(next(run.glob("it1/train-*/exit.json")))["name"] == "interrupted"


def test_worker_and_flow_die_together_the_run_is_marked_and_a_retry_goes_on(
    undisturbed, parameters, environment, run, own_service
):
    flow_run = start_deployment(parameters, run, own_service)
    wait_until(lambda: any(run.glob(CHECKPOINT)), f"{CHECKPOINT}; {state_of(flow_run, own_service)}")
    worker = psutil.Process(find_service(own_service.folder).processes[WORKER].pid)
    flows = [child for child in worker.children(recursive=True) if "srun" not in child.name()]
    for process in [worker, *flows]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert state_of(flow_run, own_service) == "RUNNING"
    wait_until(lambda: state_of(flow_run, own_service) == "CRASHED", "the automation")
    up(own_service)
    prefect(environment, "flow-run", "retry", flow_run)
    wait_until(lambda: state_of(flow_run, own_service) in {"COMPLETED", "FAILED", "CRASHED"}, "an end", seconds=900)
    assert state_of(flow_run, own_service) == "COMPLETED"
    assert len(training_jobs(run)) == 1  # the job that had gone on was adopted
    assert_equal_runs(run, undisturbed)
