"""Dask workers in the jobs of a real Slurm: what happens to the work when they are cancelled, killed, or never start."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import dask
import psutil
import pytest
import yaml
from distributed.security import Security

from hubert.core.files import read_json
from tasks.clusters.runner import cancel_jobs
from tasks.clusters.settings import read_cluster
from tasks.service.settings import environment as service_environment
from tasks.slurm import commands
from tasks.slurm.certificates import clock_problem, temporary_security
from tasks.slurm.settings import WorkerSection
from tasks.slurm.worker_gpu import choose
from tasks.slurm.worker_job import CONFIG_NAME, WorkerJob, job_arguments
from tasks.slurm.workers import cancel_workers
from tests.support.flow_runs import start_flow, task_runs

FLOW = "from tests.support.gated import gated as flow"
NUM_SHARDS = 5
WAIT_SECONDS = 120


@pytest.fixture
def environment(service, slurm):
    return service_environment(service.settings)


def write_cluster(path: Path, **extraction) -> Path:
    """Write a site of the virtual cluster."""
    section = {"cpus": 1, "memory": "1500M", "jobs": 2, "max_jobs": 2, "idle_seconds": 5, **extraction}
    site = {"interface": "lo", "walltime": "00:20:00"}
    path.write_text(yaml.safe_dump({"kind": "slurm", "poll_seconds": 0.5, "site": site, "extraction": section}))
    return path


class GatedRun:
    """A flow with a gated stage in a process of its own."""

    def __init__(self, folder: Path, environment: dict[str, str], **extraction) -> None:
        self.folder, self.log = folder / "run", folder / "log"
        self.folder.mkdir()
        cluster = write_cluster(folder / "site.yaml", **extraction)
        self.parameters = {"folder": str(self.folder), "num_shards": NUM_SHARDS, "cluster": str(cluster)}
        self.process = start_flow(FLOW, self.parameters, environment, self.log)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
            cancel_workers(self.run_id)

    @property
    def run_id(self) -> str:
        return (self.folder / "run-id").read_text()

    def notes(self) -> list[Path]:
        """Return what the shards wrote when they started, by time."""
        return sorted((self.folder / "starts").glob("[0-9]*"), key=lambda path: path.name.rpartition("-")[2])

    def starts(self) -> dict[str, list[str]]:
        """Return the jobs in which each shard was started, the newest last."""
        found: dict[str, list[str]] = {}
        for path in self.notes():
            shard, job, *_ = path.name.split("-")
            found.setdefault(shard, []).append(job)
        return found

    def pids(self) -> dict[str, int]:
        """Return the process in which each shard was started last."""
        return {path.name.split("-")[0]: int(path.name.split("-")[2]) for path in self.notes()}

    def all_pids(self) -> set[int]:
        return {int(path.name.split("-")[2]) for path in self.notes()}

    def jobs_at_work(self) -> set[str]:
        return {self.starts()[shard][-1] for shard in self.at_work()}

    def finished(self) -> set[str]:
        return {str(int(path.stem)) for path in self.folder.glob("gated-*/receipts/*.json")}

    def at_work(self) -> set[str]:
        return self.starts().keys() - self.finished()

    def second_jobs(self) -> list[str]:
        """Return the jobs that did the second stage."""
        return [job for path in self.folder.glob("second/gated-*/done.json") for job in read_json(path)["jobs"]]

    def open(self, gate: str) -> None:
        (self.folder / f"open-{gate}").touch()

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.1)

    def let_one_finish(self) -> str:
        """Let a shard that is at work finish, and return it."""
        self.wait_until(lambda: len(self.jobs_at_work()) == 2)
        shard = min(self.at_work())
        self.open(shard)
        self.wait_until(lambda: shard in self.finished())
        return shard

    def end(self) -> None:
        """Let all shards finish; the flow has to end well."""
        self.open("all")
        assert self.process.wait(WAIT_SECONDS) == 0, self.log.read_text()[-4000:]
        assert self.finished() == {str(index) for index in range(NUM_SHARDS)}


def test_a_cancelled_job_and_a_killed_worker_are_replaced_and_finished_shards_are_not_done_again(
    environment, slurm, tmp_path
):
    with GatedRun(tmp_path, environment) as run:
        done = run.let_one_finish()
        jobs = commands.find_jobs(comment=f"hubert {run.run_id} ")
        assert [job.job_id for job in jobs] == slurm.jobs()

        victim, known = jobs[0].job_id, {job.job_id for job in jobs}
        lost = {shard for shard in run.at_work() if run.starts()[shard][-1] == victim}
        commands.cancel([victim])
        run.wait_until(lambda: run.jobs_at_work() - known)

        shard, pid = next(
            item for item in run.pids().items() if item[0] in run.at_work() and psutil.pid_exists(item[1])
        )
        pids = run.all_pids()
        os.kill(pid, signal.SIGKILL)
        run.wait_until(lambda: run.all_pids() - pids)  # the nanny has started another, and it works

        run.end()
        starts = run.starts()
        assert len(starts[done]) == 1
        assert all(len(starts[lost_shard]) > 1 for lost_shard in lost | {shard})
        slurm.wait_until_empty()

        (folder,) = run.folder.glob("gated-*")
        receipts = {str(int(path.stem)): read_json(path)["jobs"] for path in (folder / "receipts").glob("*.json")}
        assert receipts[done] == starts[done]
        assert read_json(folder / "done.json")["jobs"] == sorted(
            {job for jobs in receipts.values() for job in jobs}, key=int
        )


@pytest.mark.faults
def test_a_dead_node_and_a_restarted_controller_cost_only_the_shards_at_work(environment, slurm, tmp_path):
    with GatedRun(tmp_path, environment, cpus=4, workers=1) as run:  # one job per node
        done = run.let_one_finish()
        slurm.stop_controller()
        run.open(min(run.at_work()))
        run.wait_until(lambda: len(run.finished()) == 2)
        run.wait_until(lambda: "Slurm does not answer" in run.log.read_text())
        slurm.start_controller()

        run.wait_until(lambda: len(run.at_work()) == 2)
        jobs = commands.find_jobs(comment=f"hubert {run.run_id} ")
        job, known = jobs[0], {job.job_id for job in jobs}
        lost = {shard for shard in run.at_work() if run.starts()[shard][-1] == job.job_id}
        slurm.kill_node(job.nodes)
        run.wait_until(lambda: run.jobs_at_work() - known)
        run.end()
        slurm.revive_node(job.nodes)
        assert len(run.starts()[done]) == 1
        assert lost
        assert all(len(run.starts()[shard]) > 1 for shard in lost)
        slurm.wait_until_empty()


def test_a_queue_that_never_starts_is_visible_and_cancelling_empties_it(environment, slurm, tmp_path):
    with GatedRun(tmp_path, environment, directives=["--begin=now+1hour"]) as run:
        run.wait_until(lambda: "is pending in partition main (BeginTime)" in run.log.read_text())
        jobs = slurm.jobs()
        assert len(jobs) == 2
        batch = commands.run(["scontrol", "write", "batch_script", jobs[0], "-"])
        words = shlex.split(batch[batch.index("/python") :])
        assert "tls://" in batch  # who reaches the scheduler can run programs as its user
        assert Path(words[words.index("--tls-key") + 1]).stat().st_mode & 0o077 == 0
        run.process.kill()
        run.process.wait()
        cancel_workers("another run")
        assert slurm.jobs() == jobs
        flow_run = SimpleNamespace(id=run.run_id, parameters=run.parameters)
        cancel_jobs(None, flow_run, None)  # as Prefect calls it when the run is cancelled
        slurm.wait_until_empty()


def test_workers_that_cannot_start_end_the_flow_with_the_end_of_their_log_and_no_job_is_left(
    environment, slurm, tmp_path
):
    """A job whose epilog takes its time has not ended yet, and is not replaced meanwhile."""
    before = slurm.num_jobs()
    failing = {
        "jobs": 1,
        "prologue": ["echo no such module: cuda", "exit 3"],
        "log_folder": str(tmp_path / "100% logs"),
    }
    slurm.hold_epilogs.touch()
    try:
        with GatedRun(tmp_path, environment, **failing) as run:
            run.wait_until(lambda: "its epilog runs" in run.log.read_text())
            assert len(slurm.jobs()) == 1
            slurm.hold_epilogs.unlink()
            assert run.process.wait(WAIT_SECONDS) == 1
    finally:
        slurm.hold_epilogs.unlink(missing_ok=True)
    log = run.log.read_text()
    assert "3 jobs in a row ended before a worker answered" in log
    assert "no such module: cuda" in log
    assert slurm.num_jobs() - before == 3
    assert set(task_runs(environment, run.run_id).values()) <= {"Crashed", "Failed", "Completed"}
    slurm.wait_until_empty()


def test_a_node_on_which_every_job_ends_at_once_is_left_out_and_the_others_do_the_work(environment, slurm, tmp_path):
    """The prologue fails on the node that Slurm chooses first, which is idle again at once: it would take job after job."""
    failing = {"jobs": 1, "max_jobs": 1, "prologue": ['[ "$SLURMD_NODENAME" != n1 ] || exit 3']}
    with GatedRun(tmp_path, environment, **failing) as run:
        run.wait_until(run.at_work)
        (job,) = commands.find_jobs(comment=f"hubert {run.run_id} ")
        assert job.nodes != "n1"
        assert (
            "2 jobs in a row ended on node n1 before a worker answered; further jobs keep off it" in run.log.read_text()
        )
        run.end()
        slurm.wait_until_empty()


def test_certificates_are_good_on_a_node_whose_clock_is_behind_and_a_clock_that_is_too_far_off_is_named(tmp_path):
    """OpenSSL itself judges them, at the time that such a node believes it is."""

    def verdict(security: Security, seconds: float) -> str:
        path = tmp_path / "certificate.pem"
        path.write_text(security.tls_worker_cert)
        at = str(int(time.time() + seconds))
        command = ["openssl", "verify", "-attime", at, "-CAfile", str(path), str(path)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        return ended.stdout.partition(": ")[2].strip() or ended.stderr

    made = temporary_security()
    assert [verdict(made, seconds) for seconds in (-23 * 3600, -240, 0, 3600)] == ["OK"] * 4
    assert "not yet valid" in verdict(Security.temporary(), -240)
    assert "behind this machine's" in clock_problem(verdict(made, -25 * 3600))
    assert "ahead of this machine's" in clock_problem(verdict(made, 400 * 24 * 3600))
    assert clock_problem("connection refused") == ""
    assert made.get_tls_config_for_role("worker")["key"] == made.get_tls_config_for_role("client")["key"]


@pytest.mark.faults
def test_a_worker_at_the_end_of_its_lifetime_is_replaced_and_its_shard_runs_again(environment, slurm, tmp_path):
    with GatedRun(tmp_path, environment, lifetime="0:20", lifetime_stagger="") as run:
        run.wait_until(lambda: len(run.jobs_at_work()) == 2)
        known = run.jobs_at_work()
        run.wait_until(lambda: run.jobs_at_work() - known)
        run.end()
        slurm.wait_until_empty()


@pytest.mark.faults
def test_there_are_more_jobs_while_there_is_work_and_none_while_there_is_none(environment, slurm, tmp_path):
    with GatedRun(tmp_path, environment, jobs=1, max_jobs=3) as run:
        (run.folder / "pause").touch()
        run.wait_until(lambda: len(run.jobs_at_work()) == 3)
        run.open("all")
        run.wait_until(lambda: len(run.finished()) == NUM_SHARDS)
        run.wait_until(lambda: not slurm.jobs())
        assert run.process.poll() is None
        (run.folder / "pause").unlink()
        run.end()
        assert max(map(int, run.second_jobs())) > 3
        slurm.wait_until_empty()


@pytest.mark.faults
def test_a_shard_that_kills_every_worker_ends_the_flow_and_no_task_run_stays_running(environment, slurm, tmp_path):
    allowed = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    with GatedRun(tmp_path, {**environment, **allowed}, jobs=1, max_jobs=1) as run:
        (run.folder / "die-1").touch()
        run.open("all")
        assert run.process.wait(2 * WAIT_SECONDS) == 1
        assert "lost with their workers" in run.log.read_text()
        assert "1" not in run.finished()
        states = task_runs(environment, run.run_id)
        assert set(states.values()) <= {"Completed", "Crashed", "Failed"}, states
        assert "Crashed" in states.values()
        slurm.wait_until_empty()


def script(**changes) -> str:
    section = WorkerSection.model_validate({"cpus": 8, "walltime": "02:00:00", **changes})
    job = WorkerJob("tcp://here:1", name="w", config_name=CONFIG_NAME, **worker_arguments(section))
    return job.job_script()


def worker_arguments(section):
    arguments = job_arguments(section)
    return {name: value for name, value in arguments.items() if name not in {"scheduler_options", "silence_logs"}}


def test_a_users_own_settings_of_dask_jobqueue_do_not_leak_into_the_jobs():
    with dask.config.set(
        {"jobqueue.slurm": {"queue": "LEAK", "job-extra-directives": ["LEAK"], "env-extra": ["LEAK"]}}
    ):
        assert "LEAK" not in script()


def test_the_cores_of_a_job_are_shared_out_to_its_workers_and_each_gets_its_own_gpu():
    text = script(gpus=2)
    assert "export OMP_NUM_THREADS=4" in text
    assert "--nworkers 2" in text
    assert "--preload tasks.slurm.worker_gpu" in text
    assert "--preload" not in script(gpus=1)
    assert [choose("3,GPU-ab", index) for index in (0, 1)] == ["3", "GPU-ab"]
    with pytest.raises(ValueError, match="fewer GPUs than"):
        choose("3,GPU-ab", 2)


def test_a_lifetime_that_does_not_fit_into_the_walltime_is_refused_with_file_and_key(tmp_path):
    path = write_cluster(tmp_path / "site.yaml", walltime="01:00:00", lifetime="01:00:00")
    with pytest.raises(Exception, match=r"site\.yaml.*extraction.*lifetime"):
        read_cluster(str(path))
