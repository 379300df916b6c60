"""Starting, finding, following and stopping trainers, and the stage that does it: real processes, real kills."""

import datetime as dt
import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from hubert.core.errors import ConfigError, DataError, HubertError, TrainingDiverged, TransientError
from hubert.core.files import folder_size, read_json, write_json
from hubert.core.paths import PROJECT
from hubert.core.process import ProcessId
from hubert.training.checkpoint import checkpoint_path, find_latest
from hubert.training.distributed import World, meet
from hubert.training.exit_states import Exit
from hubert.training.folder import Pulse, read_metrics
from hubert.training.launch import Event, TrainerProcess, find_running, follow, launch, raise_for_end
from hubert.training.ranks import find_meeting_point, find_place, first_host, threads_per_process
from hubert.training.stage import TrainStage, train_until_done
from tests.support.corpus import NUM_UNITS
from tests.support.disk import fill, small_disk
from tests.support.training import SETTINGS, assert_same_training, job_of, metrics_of, train, write_table
from tools.given_stages import labels_in
from tools.ports import free_ports

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, table: Path) -> Path:
    """The folder of 20 steps without an interruption."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(job_of(folder, table)) is Exit.FINISHED
    return folder


KILLER = """
import os, signal, sys
from pathlib import Path
from hubert.training.job import Job, read_job
from hubert.training.folder import TrainingFolder
from hubert.training.trainer import Trainer
from tests.support.training import ALONE

where, step = sys.argv[2], int(sys.argv[3])

class Folder(TrainingFolder):
    def check(self):
        writes_checkpoint = any(self.path.glob(".step-*.tmp/checkpoint.json"))
        if where == "checkpoint" and trainer.counters.step == step and writes_checkpoint:
            os.kill(os.getpid(), signal.SIGKILL)
        super().check()

class Killed(Trainer):
    def _accumulate(self, batch, *arguments, **keywords):
        super()._accumulate(batch, *arguments, **keywords)
        if where == "step" and (batch.plan.step, batch.plan.index) == (step, 2):
            os.kill(os.getpid(), signal.SIGKILL)

job = read_job(Path(sys.argv[1])).model_copy(update={"attempt": f"{where} {step}"})
trainer = Killed(job, ALONE, take_folder=True)
trainer.folder = Folder(job.folder, job.attempt)
trainer.run()
"""


def test_a_training_that_is_killed_ends_as_an_undisturbed_one(tmp_path, table, undisturbed):
    """kill -9 when a checkpoint is on disk but has no name yet, and in the middle of a step: weights and metrics equal."""
    job = job_of(tmp_path / "run", table)
    write_json(tmp_path / "job.json", job.model_dump(mode="json"))
    for where, step, left in (("checkpoint", 10, 0), ("step", 13, 10)):
        command = [sys.executable, "-c", KILLER, str(tmp_path / "job.json"), where, str(step)]
        killed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PROJECT)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        latest = find_latest(job.folder)
        assert (latest.step if latest else 0) == left
        assert read_metrics(job.folder / "metrics.jsonl")[-1]["step"] == (10 if where == "checkpoint" else 12)
    assert train(job) is Exit.FINISHED
    assert_same_training(job.folder, undisturbed)
    assert not list(job.folder.glob(".*tmp"))


def test_a_trainer_is_found_adopted_and_stopped_after_a_checkpoint(tmp_path, table):
    """Steps enough that it cannot finish before the request."""
    job = job_of(tmp_path, table, steps=400, checkpoint_interval=400)
    started = launch(job)
    adopted = find_running(tmp_path)
    assert adopted is not None
    assert (adopted.process, adopted.attempt) == (started.process, started.attempt)
    with pytest.raises(TransientError, match="asked to stop, and wrote a checkpoint first"):  # noqa: PT012
        for event in follow(adopted):
            if event.metrics is not None:
                adopted.stop()
    record, latest = read_json(tmp_path / "exit.json"), find_latest(tmp_path)
    assert record is not None
    assert record["code"] == Exit.INTERRUPTED
    assert latest is not None
    assert 2 <= latest.step < 400
    assert find_running(tmp_path) is None


def test_two_processes_train_as_one_does(tmp_path, table, undisturbed):
    """Under torchrun with gloo: equal up to the order of summation; stopped together, and finished by one process."""
    process = launch(job_of(tmp_path, table, num_processes=2))
    with suppress(TransientError):  # it may finish before it is stopped
        for event in follow(process):
            if event.metrics is not None and event.metrics["step"] >= 6:
                process.stop()
    record = read_json(tmp_path / "exit.json")
    assert record is not None
    assert record["code"] in (Exit.INTERRUPTED, Exit.FINISHED)
    assert "on 2 x cpu" in (tmp_path / "train.log").read_text()
    assert train(job_of(tmp_path, table)) is Exit.FINISHED
    for line, other in zip(metrics_of(tmp_path), metrics_of(undisturbed), strict=True):
        assert line == pytest.approx(other, rel=1e-3)
    weights, others = (load_file(checkpoint_path(path, 20) / "model.safetensors") for path in (tmp_path, undisturbed))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-3, atol=1e-4)


def test_a_process_finds_its_place_from_torchrun_or_from_the_slurm_step():
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    step = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"}
    assert find_place({}) == (0, 1, 0)
    assert find_place(torchrun) == (3, 4, 1)
    assert find_place(step) == (5, 8, 1)
    assert find_place(step | torchrun) == (3, 4, 1)
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == (0, 1, 0)  # inside sbatch, not inside srun
    with pytest.raises(ConfigError, match="RANK is 4 and WORLD_SIZE is 4"):
        find_place(torchrun | {"RANK": "4"})


def test_processes_meet_at_the_first_node_of_the_step_and_not_where_srun_was_called():
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    step |= {"SLURM_STEP_NODELIST": "localhost,no-such-node"}
    assert find_meeting_point(step, 2) == ("localhost", 20448)
    assert find_meeting_point(step | {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}, 2) == ("node1", 1234)
    with pytest.raises(ConfigError, match=r"node no-such-node.*does not resolve.*MASTER_ADDR"):
        find_meeting_point(step | {"SLURM_STEP_NODELIST": "no-such-node,localhost"}, 2)
    with pytest.raises(ConfigError, match="without MASTER_ADDR"):
        find_meeting_point({}, 2)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[007-009,12],cpu1", "gpu007"),
        ("rack[2,5]node[03-04]-ib", "rack2node03-ib"),
    ],
)
def test_the_first_node_is_taken_from_slurms_list(hosts, first):
    assert first_host(hosts) == first


def test_a_process_under_srun_uses_its_own_cores_and_a_local_one_its_share_of_the_machines():
    cores = len(os.sched_getaffinity(0))
    assert threads_per_process({"SLURM_STEP_NUM_TASKS": "2", "SLURM_CPUS_PER_TASK": "7"}, 2) == 7
    assert threads_per_process({}, 1) == cores
    assert threads_per_process({"SLURM_CPUS_PER_TASK": "7"}, cores) == 1  # inside sbatch, not inside srun


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_meets_nobody_says_where_and_why(rank):
    """Process 0 listens and nobody comes; process 1 calls where nobody listens."""
    (port,) = free_ports(1)
    world = World(rank, 2, 0, torch.device("cpu"))
    with pytest.raises(TransientError, match=rf"process {rank} of 2 .* within 1 s at 127.0.0.1, port {port}.*firewall"):
        meet("gloo", world, "127.0.0.1", port, timeout=dt.timedelta(seconds=1))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Exit.CONFIG, ConfigError),
        (Exit.DATA, DataError),
        (Exit.DIVERGED, TrainingDiverged),
        (Exit.INTERRUPTED, TransientError),
        (Exit.TRANSIENT, TransientError),
        (Exit.FAILED, HubertError),
    ],
)
def test_the_end_of_a_trainer_is_raised_as_its_kind_of_error_with_its_last_words(tmp_path, code, kind):
    (tmp_path / "train.log").write_text("the last words\n")
    write_json(tmp_path / "exit.json", {"attempt": "a", "code": code, "message": "why"})
    process = TrainerProcess(tmp_path, "a", ProcessId(1, "", "", ""), 0)
    with pytest.raises(kind, match=r"(?s)why.*the last words") as caught:
        raise_for_end(process)
    assert type(caught.value) is kind


def test_a_reused_pid_is_not_taken_for_the_trainer(tmp_path):
    own = ProcessId.of(os.getpid())
    assert own.is_alive()
    write_json(tmp_path / "process.json", {"attempt": "a", **own.as_dict()})
    assert find_running(tmp_path) is not None
    write_json(tmp_path / "process.json", {"attempt": "a", **own.as_dict(), "started": "1"})
    assert find_running(tmp_path) is None


# The stage --------------------------------------------------------------------------------------------------------


def stage_of(folder: Path, table: Path, steps: int, *, extend: bool = False) -> TrainStage:
    chosen = SETTINGS.model_copy(update={"steps": steps, "checkpoint_interval": 20, "seed": 5})
    return TrainStage(parent=folder, labels=labels_in(table, NUM_UNITS), train=chosen, extend=extend)


def test_a_killed_trainer_is_started_again_and_more_steps_continue_it_only_when_asked_to(tmp_path, table):
    first = stage_of(tmp_path, table, 40)
    events: list[Event] = []

    def kill_the_first(event: Event) -> None:
        events.append(event)
        running = find_running(first.folder)
        if len(events) == 1 and running is not None:
            running.process.signal(signal.SIGKILL)

    train_until_done(first, kill_the_first)
    assert sum("killed by SIGKILL" in event.text and "starting it again" in event.text for event in events) == 1
    assert [event.metrics["step"] for event in events if event.metrics] == list(range(2, 41, 2))
    figures = first.run()  # nothing is left to train
    # All starts, not only this call; the receipt rounds to milliseconds.
    assert read_json(first.folder / "done.json")["seconds"] >= round(figures["seconds"], 3) > 0
    assert [row["step"] for row in figures["checkpoints"]] == [20, 40]
    assert figures["checkpoints"][0]["num_layers"] == 3

    more = stage_of(tmp_path, table, 44)
    assert more.key == first.key
    assert more.done() is None
    with pytest.raises(ConfigError, match=r"train.steps is 44, but .* was started for 40 steps.*--extend"):
        more.run()
    longer = stage_of(tmp_path, table, 44, extend=True)
    figures = longer.run()
    assert [row["step"] for row in figures["checkpoints"]] == [20, 40, 44]
    assert longer.horizons() == ((0, 40), (40, 44))
    assert [line["step"] for line in read_metrics(longer.metrics)] == list(range(2, 45, 2))
    assert stage_of(tmp_path, table, 44).done() is not None
    assert stage_of(tmp_path, table, 40).done() is not None  # the longer one holds it


def test_a_training_that_was_killed_before_its_summary_writes_it_at_the_next_start(tmp_path, table):
    stage = stage_of(tmp_path, table, 4)
    figures = stage.run()
    for name in ("summary.json", "done.json", "receipts/00000.json"):
        (stage.folder / name).unlink()
    assert not stage.is_trained()
    again = stage_of(tmp_path, table, 4).run()
    assert again["checkpoints"] == figures["checkpoints"]
    assert again["steps"] == 4


@pytest.mark.parametrize("part", ["model.safetensors", "state.pt"])
def test_a_training_whose_disk_is_full_is_started_again_and_ends_as_an_undisturbed_one(
    part, tmp_path, table, undisturbed
):
    """The disk has room for the log, and for half of the first checkpoint's weights, or of its state."""
    whole = checkpoint_path(undisturbed, 10)
    room = 100_000 + (0 if part == "model.safetensors" else (whole / "model.safetensors").stat().st_size)
    assert room < folder_size(whole)
    events: list[Event] = []
    with small_disk(tmp_path / "small", "16m") as disk:
        ballast = fill(disk, leave=room)
        stage = TrainStage(parent=disk / "run", labels=labels_in(table, NUM_UNITS), train=SETTINGS)

        def make_room(event: Event) -> None:
            events.append(event)
            if "starting it again" in event.text:
                ballast.unlink()

        train_until_done(stage, make_room, max_restarts=1)
        (said,) = [event.text for event in events if "starting it again" in event.text]
        assert "lost its surroundings" in said
        assert "No space left on device. It needs " in said
        assert "hubert prune RUN" in said
        assert_same_training(stage.folder, undisturbed)
        assert not list(stage.folder.glob(".*"))


def test_a_training_whose_files_may_not_be_so_large_is_started_again_too(tmp_path, table, undisturbed):
    """RLIMIT_FSIZE, which the trainer inherits: the kernel says EFBIG."""
    stage = TrainStage(parent=tmp_path, labels=labels_in(table, NUM_UNITS), train=SETTINGS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    events: list[Event] = []

    def lift(event: Event) -> None:
        events.append(event)
        if "starting it again" in event.text:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        train_until_done(stage, lift, max_restarts=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [event.text for event in events if "starting it again" in event.text and "ulimit -f" in event.text]
    assert_same_training(stage.folder, undisturbed)


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_a_trainer_that_hangs_is_reported_ended_and_started_again(
    num_processes, tmp_path, table, undisturbed, monkeypatch
):
    """SIGSTOP: of the trainer, or of the second of two processes, for which the first one then waits."""
    monkeypatch.setattr("hubert.training.folder.UNUSUAL_SECONDS", 5)
    settings = SETTINGS.model_copy(update={"silence_minutes": 0.5, "num_processes": num_processes})
    stage = TrainStage(parent=tmp_path, labels=labels_in(table, NUM_UNITS), train=settings)
    events: list[Event] = []
    stopped: list[psutil.Process] = []

    def stop_one(event: Event) -> None:
        events.append(event)
        running = find_running(stage.folder)
        if event.metrics is not None and not stopped and running is not None:
            leader = psutil.Process(running.process.pid)
            main = (read_json(stage.folder / "trainer.json") or {})["pid"]
            ranks = [each for each in leader.children() if "hubert.train" in each.cmdline() and each.pid != main]
            stopped.append(ranks[0] if num_processes > 1 else leader)
            stopped[0].suspend()

    train_until_done(stage, stop_one, max_restarts=1)
    assert any("no sign of life" in event.text for event in events if event.kind == "state")
    (said,) = [event.text for event in events if "starting it again" in event.text]
    assert "hung: no sign of life" in said
    assert not stopped[0].is_running() or stopped[0].status() == psutil.STATUS_ZOMBIE  # dead, and not yet waited for
    if num_processes == 1:
        assert_same_training(stage.folder, undisturbed)


def test_a_silence_is_judged_by_what_was_usual_and_a_trainer_without_a_machine_is_not_waited_for(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("hubert.training.folder.time.monotonic", lambda: clock[0])
    pulse = Pulse(tmp_path, "a", limit_seconds=100)

    def look_until(seconds: float, **how: bool) -> None:
        while clock[0] < seconds:
            clock[0] += 4
            pulse.look(**how)

    look_until(400, is_waiting=True)
    assert not pulse.has_stopped
    look_until(600)  # it starts: imports may take three times as long
    assert "not even a first one" in pulse.describe()
    assert not pulse.has_stopped
    for beat in range(10):
        write_json(tmp_path / "trainer.json", {"attempt": "a", "beats": True, "beat": beat})
        os.utime(tmp_path / "trainer.json", (beat, beat))
        look_until(600 + 20 * (beat + 1))
    assert pulse.describe() == ""
    look_until(960)
    assert pulse.describe() == ""  # 160 s are less than ten times 20 s
    look_until(1000)
    assert "no sign of life for 3 min (until now one at least every 20 s)" in pulse.describe()
    assert pulse.has_stopped


def test_a_trainer_that_keeps_failing_is_given_up_with_its_error(tmp_path, table):
    """A folder that cannot be locked: the trainer ends as transient, and no checkpoint is made."""
    stage = stage_of(tmp_path, table, 4)
    stage.folder.mkdir(parents=True)
    (stage.folder / "trainer.lock").mkdir()
    events: list[Event] = []
    with pytest.raises(TransientError, match=r"trainer\.lock"):
        train_until_done(stage, events.append, max_restarts=0)
    assert not any("starting it again" in event.text for event in events)
