"""Trainings as jobs of a real Slurm: two nodes, and every end that Slurm, a node or a person can bring about."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hubert.core.errors import ConfigError, TrainingCancelled
from hubert.core.paths import PROJECT
from hubert.runs.prune import is_busy
from hubert.runs.status import read_folder
from hubert.training.checkpoint import checkpoint_path
from hubert.training.exit_states import Exit
from hubert.training.folder import read_metrics
from hubert.training.launch import Event, job_ids, slurm_jobs, unfinished_job
from hubert.training.stage import TrainStage, train_until_done
from tasks.slurm import commands
from tasks.slurm.settings import SlurmSettings
from tasks.slurm.training import SlurmLauncher, write_jobs
from tasks.slurm.training_job import comment
from tests.support.corpus import NUM_UNITS
from tests.support.training import SETTINGS, job_of, metrics_of, train, write_table
from tools.given_stages import labels_in

STEPS = 40
TWO_NODES = {"nodes": 2, "cpus": 1, "memory": "500M", "walltime": "00:10:00"}


def launcher_of(**training) -> SlurmLauncher:
    settings = {"kind": "slurm", "training": TWO_NODES | training, "poll_seconds": 0.5}
    return SlurmLauncher(SlurmSettings.model_validate(settings), print)


def stage_of(folder: Path, table: Path) -> TrainStage:
    """`train.num_processes` is for one machine: here it must not count."""
    chosen = SETTINGS.model_copy(update={"steps": STEPS, "checkpoint_interval": 20, "num_processes": 3})
    return TrainStage(parent=folder, labels=labels_in(table, NUM_UNITS), train=chosen)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, table, slurm) -> TrainStage:
    """A training on two nodes."""
    stage = stage_of(tmp_path_factory.mktemp("undisturbed"), table)
    train_until_done(stage, ignore, launcher=launcher_of())
    return stage


def ignore(_: Event) -> None:
    """Take no notice."""


class Disturber:
    """Takes a training's events, and does something once when the first losses come."""

    def __init__(self, disturb: Callable[[str], object], stage: TrainStage) -> None:
        self.texts: list[str] = []
        self._disturb = disturb
        self._stage = stage
        self._done = False

    def __call__(self, event: Event) -> None:
        self.texts.append(event.text)
        if event.metrics is not None and not self._done:
            self._done = True
            self._disturb(job_ids(self._stage.folder)[-1])

    def says(self, text: str) -> bool:
        return any(text in said for said in self.texts)


def train_disturbed(stage: TrainStage, disturb: Callable[[str], object], **training) -> Disturber:
    events = Disturber(disturb, stage)
    train_until_done(stage, events, launcher=launcher_of(**training))
    return events


def assert_same(stage: TrainStage, other: TrainStage) -> None:
    assert metrics_of(stage.folder) == metrics_of(other.folder)
    model, expected = (checkpoint_path(each.folder, STEPS) / "model.safetensors" for each in (stage, other))
    assert model.read_bytes() == expected.read_bytes()


def states_of(stage: TrainStage) -> list[str]:
    return [job["ended"] for job in slurm_jobs(stage.folder)]


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def block_all_nodes(slurm) -> str:
    """Submit a job that holds every node; returns its id when it runs."""
    blocker = ["sbatch", "--parsable", f"--nodes={len(slurm.nodes)}", "--exclusive", "--mem=100M", "--time=10"]
    job_id = commands.run([*blocker, "--output=/dev/null", "--wrap=sleep 600"]).strip()
    wait_for(lambda: commands.find_job(job_id).state == "RUNNING")
    return job_id


# Undisturbed ------------------------------------------------------------------------------------------------------


def test_two_nodes_train_as_one_process_does(undisturbed, tmp_path, table):
    """Equal up to the order of summation, whatever `train.num_processes` says."""
    assert "on 2 x cpu (1 threads each)" in (undisturbed.folder / "train.log").read_text()
    assert train(job_of(tmp_path, table, steps=STEPS, checkpoint_interval=20)) is Exit.FINISHED
    for line, other in zip(metrics_of(undisturbed.folder), metrics_of(tmp_path), strict=True):
        assert line == pytest.approx(other, rel=2e-3)
    ours, theirs = (
        load_file(checkpoint_path(folder, 20) / "model.safetensors") for folder in (undisturbed.folder, tmp_path)
    )
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-4)


def test_the_job_says_what_it_trains_and_the_figures_say_which_job_it_was(undisturbed):
    (job_id,) = job_ids(undisturbed.folder)
    (entry,) = slurm_jobs(undisturbed.folder)
    job = commands.find_job(job_id)
    assert job.comment == comment(undisturbed.folder, entry["attempt"])
    assert undisturbed.key[:8] in job.comment
    assert (entry["ended"], unfinished_job(undisturbed.folder)) == ("COMPLETED", "")
    assert undisturbed.summary()["slurm_jobs"] == [job_id]


# Ended from outside -----------------------------------------------------------------------------------------------


def test_a_training_that_gets_sigterm_writes_a_checkpoint_and_a_new_job_goes_on_from_it(undisturbed, tmp_path, table):
    stage = stage_of(tmp_path, table)
    events = train_disturbed(stage, lambda job_id: commands.run(["scancel", "--signal=TERM", job_id]))
    assert states_of(stage) == ["FAILED", "COMPLETED"]
    assert events.says("interrupted by a signal")
    assert events.says(f"job {job_ids(stage.folder)[1]} is running on n")
    log = (stage.folder / "train.log").read_text()
    assert "asked to stop: step" in log
    assert "resuming after step" in log
    assert_same(stage, undisturbed)


def test_a_persons_scancel_stops_a_training_for_good_and_the_run_says_how_to_go_on(tmp_path, table, slurm):
    stage = stage_of(tmp_path, table)
    with pytest.raises(TrainingCancelled, match=r"scancelled by a person.*run the flow again"):
        train_disturbed(stage, lambda job_id: commands.run(["scancel", job_id]))
    assert states_of(stage) == ["CANCELLED"]
    assert slurm.jobs() == []


FOLLOWER = """
import sys
from pathlib import Path
from hubert.training.stage import train_until_done
from tests.tasks.slurm.test_slurm_training import ignore, launcher_of, stage_of
train_until_done(stage_of(Path(sys.argv[1]), Path(sys.argv[2])), ignore, launcher=launcher_of())
"""


def test_a_job_whose_follower_is_killed_while_it_waits_and_while_it_runs_is_adopted(
    undisturbed, tmp_path, table, slurm
):
    stage = stage_of(tmp_path, table)

    def state() -> str:
        ids = job_ids(stage.folder)
        return commands.find_job(ids[0]).state if ids else ""

    blocker = block_all_nodes(slurm)
    conditions = (lambda: state() == "PENDING", lambda: read_metrics(stage.metrics))
    for number, condition in enumerate(conditions):
        follower = subprocess.Popen([sys.executable, "-c", FOLLOWER, str(tmp_path), str(table)], cwd=PROJECT)
        try:
            wait_for(condition)
            assert follower.poll() is None
        finally:
            os.kill(follower.pid, signal.SIGKILL)
            follower.wait()
        if not number:
            commands.cancel([blocker])
    texts: list[str] = []
    train_until_done(stage, lambda event: texts.append(event.text), launcher=launcher_of())
    (job_id,) = job_ids(stage.folder)
    assert f"found the trainer alive (job {job_id}); following it" in texts
    assert len(slurm_jobs(stage.folder)) == 1
    assert_same(stage, undisturbed)


def test_a_job_that_waits_says_why_and_is_gone_as_soon_as_it_is_stopped(tmp_path, table, slurm):
    blocker = block_all_nodes(slurm)
    stage = stage_of(tmp_path, table)
    trainer = launcher_of().launch(stage.job())
    job_id = trainer.name.removeprefix("job ")
    wait_for(lambda: trainer.is_alive() and "(Resources)" in trainer.state())
    assert trainer.state() == f"job {job_id} is pending in partition main (Resources)"
    assert is_busy(stage.folder)
    assert read_folder(stage.folder).detail == f"step 0 of {STEPS}; Slurm job {job_id}"
    trainer.stop()
    assert not is_busy(stage.folder)
    assert slurm.jobs() == [blocker]
    assert trainer.end(None)[0].name == "cancelled in Prefect"
    assert launcher_of().find_running(stage.folder) is None
    commands.cancel([blocker])
    wait_for(lambda: slurm.jobs() == [])


def test_a_job_whose_srun_died_while_it_waited_is_not_waited_for(tmp_path, table, slurm):
    """Nobody would start the trainer in it. A machine that cannot see the srun, since another one submitted, adopts it."""
    blocker = block_all_nodes(slurm)
    stage = stage_of(tmp_path, table)
    trainer = launcher_of().launch(stage.job())
    (entry,) = slurm_jobs(stage.folder)
    os.kill(entry["srun"]["pid"], signal.SIGKILL)
    write_jobs(stage.folder, [entry | {"srun": entry["srun"] | {"host": "elsewhere"}}])
    assert launcher_of().find_running(stage.folder).name == trainer.name
    write_jobs(stage.folder, [entry])
    assert launcher_of().find_running(stage.folder) is None
    assert slurm.jobs() == [blocker]
    commands.cancel([blocker])
    wait_for(lambda: slurm.jobs() == [])


def test_a_training_whose_srun_is_killed_goes_on_in_another_job(undisturbed, tmp_path, table, slurm):
    """Slurm calls the end of the first one CANCELLED, as if a person had done it."""
    stage = stage_of(tmp_path, table)
    events = train_disturbed(stage, lambda _: os.kill(slurm_jobs(stage.folder)[-1]["srun"]["pid"], signal.SIGKILL))
    assert states_of(stage)[1:] == ["COMPLETED"], (stage.folder / "train.log").read_text()
    assert events.says("its srun ")
    assert_same(stage, undisturbed)
    slurm.wait_until_empty()


@pytest.mark.parametrize("detached", [False, True])
def test_a_job_that_slurm_refuses_is_a_config_error_with_slurms_words(tmp_path, table, slurm, detached):
    with pytest.raises(ConfigError, match=r"(?s)launch failed.*invalid partition specified: nope"):
        launcher_of(partition="nope", detached=detached).launch(stage_of(tmp_path, table).job())
    assert slurm.jobs() == []


# Long ones --------------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_a_training_whose_node_dies_goes_on_in_a_new_job(undisturbed, tmp_path, table, slurm):
    stage = stage_of(tmp_path, table)
    killed: list[str] = []

    def kill_its_first_node(job_id: str) -> None:
        killed.append(commands.find_job(job_id).nodes.replace("[", "").split("-")[0].split(",")[0])
        slurm.kill_node(killed[0])

    try:
        events = train_disturbed(stage, kill_its_first_node)
        assert states_of(stage)[0] == "NODE_FAIL"
        assert states_of(stage)[-1] == "COMPLETED"
        assert events.says("node failed: a node of the job died")
        assert_same(stage, undisturbed)
    finally:
        slurm.revive_node(killed[0])


@pytest.mark.faults
def test_a_preempted_training_goes_on_when_the_other_job_has_ended(undisturbed, tmp_path, table, slurm):
    stage = stage_of(tmp_path, table)

    def preempt(_: str) -> None:
        other = ["sbatch", "--partition=main", "--nodes=3", "--exclusive", "--mem=100M", "--output=/dev/null"]
        commands.run([*other, "--wrap=sleep 20"])

    events = train_disturbed(stage, preempt, partition="low")
    assert states_of(stage) == ["PREEMPTED", "COMPLETED"]
    assert events.says("preempted: another job took the nodes")
    assert_same(stage, undisturbed)


@pytest.mark.faults
def test_a_training_goes_on_while_slurms_controller_is_down(undisturbed, tmp_path, table, slurm):
    """Its losses are read from its files; nothing is submitted twice."""
    stage = stage_of(tmp_path, table)
    seen: list[int] = []
    texts: list[str] = []

    def follow(event: Event) -> None:
        texts.append(event.text)
        if event.metrics is not None:
            seen.append(event.metrics["step"])
            if len(seen) == 1:
                slurm.stop_controller()
            if seen[-1] == STEPS:
                slurm.start_controller()

    train_until_done(stage, follow, launcher=launcher_of())
    assert states_of(stage) == ["COMPLETED"]
    assert seen == list(range(2, STEPS + 1, 2))
    assert any("Slurm does not answer" in text and "Nothing is concluded from that" in text for text in texts)
    assert_same(stage, undisturbed)


@pytest.mark.faults
def test_a_detached_training_is_told_to_stop_goes_on_and_can_be_cancelled(undisturbed, tmp_path, table, slurm):
    stage = stage_of(tmp_path / "one", table)
    events = train_disturbed(stage, lambda job_id: commands.run(["scancel", "--signal=TERM", job_id]), detached=True)
    assert len(job_ids(stage.folder)) == 2
    assert events.says("interrupted by a signal")
    assert_same(stage, undisturbed)
    other = stage_of(tmp_path / "two", table)
    with pytest.raises(TrainingCancelled, match="scancelled by a person"):
        train_disturbed(other, lambda job_id: commands.run(["scancel", job_id]), detached=True)
    wait_for(lambda: slurm.jobs() == [])


def test_a_node_on_which_the_trainer_never_starts_is_left_out_by_the_next_jobs(tmp_path, table, slurm):
    """The prologue fails on the node that Slurm chooses first."""
    stage = stage_of(tmp_path, table)
    events: list[Event] = []
    one = {"nodes": 1, "prologue": ['[ "$SLURMD_NODENAME" != n1 ] || exit 3']}
    train_until_done(stage, events.append, launcher=launcher_of(**one))
    jobs = slurm_jobs(stage.folder)
    assert [job["node"] == "n1" for job in jobs] == [True, True, False]
    assert [job["started"] for job in jobs] == [False, False, True]
    assert any("it keeps off n1, where jobs ended at once" in event.text for event in events if event.kind == "state")


SLOW_PYTHON = """#!{python}
import sys, time
sys.path.insert(0, "")  # as `python -m` does
from hubert import train
from hubert.training.trainer import Trainer

step = Trainer._step
Trainer._step = lambda *arguments: (time.sleep(9), step(*arguments))[1]
sys.exit(train.main(sys.argv[3:]))
"""


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_training_that_is_longer_than_its_time_limit_is_submitted_again_until_it_is_done(
    undisturbed, tmp_path, table, slurm
):
    """6 minutes of steps with a limit of 3, before which Slurm sends SIGUSR1 (up to a minute earlier than asked)."""
    slow_python = tmp_path / "slow-python"
    slow_python.write_text(SLOW_PYTHON.format(python=sys.executable))
    slow_python.chmod(0o755)
    stage = stage_of(tmp_path, table)
    texts: list[str] = []
    launcher = launcher_of(walltime="00:03:00", signal_seconds=30, python=str(slow_python))
    train_until_done(stage, lambda event: texts.append(event.text), launcher=launcher)
    assert len(job_ids(stage.folder)) >= 3
    assert states_of(stage)[-1] == "COMPLETED"
    assert sum("interrupted by a signal" in text for text in texts) == len(job_ids(stage.folder)) - 1
    assert any("SIGUSR1" in line for line in (stage.folder / "train.log").read_text().splitlines())
    assert_same(stage, undisturbed)
