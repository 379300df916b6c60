"""Slurm's commands against a real Slurm of virtual nodes, and the settings that are checked before anything is queued."""

import os
import subprocess

import pytest
from pydantic import ValidationError

from tasks.slurm import commands
from tasks.slurm.settings import Resources, SlurmSettings, WorkerSection, seconds_of
from tasks.slurm.worker_job import CONFIG_NAME, WorkerJob, job_arguments


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("2-3", 183600), ("2-3:30", 185400), ("1-00:00:01", 86401)],
)
def test_durations_mean_what_slurm_means_by_them(duration, seconds):
    assert seconds_of(duration) == seconds


def test_sections_have_the_sites_keys_unless_they_say_otherwise():
    settings = SlurmSettings.model_validate(
        {"kind": "slurm", "site": {"partition": "cpu", "account": "me"}, "extraction": {"partition": "gpu", "gpus": 2}}
    )
    assert (settings.extraction.partition, settings.extraction.account, settings.extraction.num_workers) == (
        "gpu",
        "me",
        2,
    )
    assert (settings.training.partition, settings.kmeans.account) == ("cpu", "me")


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"extraction": {"walltime": "01:00:00", "lifetime": "01:00:00"}}, "walltime"),
        ({"kmeans": {"walltime": 86400}}, "walltime"),
        ({"kmeans": {"max_jobs": 1, "jobs": 2}}, "max_jobs"),
        ({"evaluation": {"gpus": 2, "workers": 3}}, "workers"),
        ({"evaluation": {"memory": "16 GB"}}, "memory"),
        ({"training": {"walltime": "00:02:00"}}, "signal_seconds"),
        ({"training": {"gpu": 1}}, "gpu"),
        ({"site": {"directives": ["exclude=n1"]}}, "exclude=n1"),
        ({"site": {"directives": ["--exclude=n1\n#SBATCH --wait"]}}, "is no option"),
        ({"site": {"directives": ["--comment=mine"]}}, "leave it out"),
        ({"kmeans": {"directives": ["-J mine"]}}, "leave it out"),
        ({"kmeans": {"directives": ["--partition=gpu"]}}, "the key `partition`"),
        ({"kmeans": {"directives": ["-pgpu"]}}, "the key `partition`"),
        ({"training": {"directives": ["--time 5"]}}, "the key `walltime`"),
        ({"kmeans": {"directives": ["--nodes=2"]}}, "the key `nodes` of the section `training`"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_key(content, key):
    with pytest.raises(ValidationError, match=key):
        SlurmSettings.model_validate({"kind": "slurm", **content})


def test_a_job_is_found_by_its_comment_from_its_wait_to_its_end(slurm):
    wanted = [*commands.job_options(Resources(cpus=1, memory="100M", walltime="00:05:00")), "--comment=hubert | test"]
    job_id = commands.run(["sbatch", "--parsable", "--hold", "--output=/dev/null", *wanted, "--wrap=sleep 300"]).strip()
    (job,) = commands.find_jobs(comment="hubert | test")
    assert (job.job_id, job.is_waiting, job.reason) == (job_id, True, "JobHeldUser")
    assert job.describe() == f"job {job_id} is pending in partition main (JobHeldUser)"
    commands.cancel([job_id])
    assert commands.find_jobs(comment="hubert | test") == []
    ended = commands.find_job(job_id)
    assert (ended.state, ended.is_live) == ("CANCELLED", False)
    commands.cancel([job_id])  # no error
    assert commands.find_job("999999") is None


@pytest.mark.parametrize(
    ("memory", "options", "limit"),
    [("2G", ["--mem=2G"], "2.00GiB"), (512, ["--mem=512"], "512.00MiB"), (0, ["--mem=0"], "0"), ("", [], "0")],
)
def test_memory_may_be_all_of_a_nodes_or_the_sites_default(memory, options, limit):
    """In these two cases Slurm alone limits the workers."""
    section = WorkerSection(memory=memory, cpus=1)
    assert [option for option in commands.job_options(section) if option.startswith("--mem")] == options
    arguments = {
        name: value
        for name, value in job_arguments(section).items()
        if name not in {"scheduler_options", "silence_logs"}
    }
    words = WorkerJob("tcp://here:1", name="w", config_name=CONFIG_NAME, **arguments).job_script().split()
    assert words[words.index("--memory-limit") + 1] == limit


def test_memory_is_asked_for_in_one_way(slurm):
    """Slurm itself refuses both."""
    per_cpu = {"directives": ["--mem-per-cpu=100M"], "cpus": 1}
    with pytest.raises(ValueError, match=r"memory is '16G' and directives has '--mem-per-cpu=100M'"):
        Resources(**per_cpu)
    assert "mem" in commands.refusal([*commands.job_options(Resources(cpus=1, memory="100M")), "--mem-per-cpu=100M"])
    assert commands.refusal(commands.job_options(Resources(**per_cpu, memory="", walltime="00:05:00"))) == ""


@pytest.mark.parametrize(
    "said",
    [
        "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
        "slurm_load_jobs error: Slurm backup controller in standby mode",
        "sbatch: error: QOSMaxSubmitJobPerUserLimit",
        "srun: error: Unable to allocate resources: Slurm temporarily unable to accept job, sleeping and retrying",
    ],
)
def test_a_refusal_that_may_pass_is_not_taken_for_a_verdict(said):
    assert commands.may_pass(said)


@pytest.mark.parametrize(
    "said",
    [
        "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
        "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
    ],
)
def test_a_refusal_that_stays_is_taken_for_a_verdict(said):
    """The second one is all that Slurm says about GPUs or a time limit that a QOS never allows."""
    assert not commands.may_pass(said)


def test_whatever_squeue_fails_for_nothing_is_concluded_about_the_jobs(tmp_path, monkeypatch):
    (squeue := tmp_path / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: a new one' >&2; exit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(commands.SlurmUnreachable, match="a new one"):
        commands.find_jobs(comment="x")


def test_neither_a_users_variables_nor_another_jobs_comment_hide_a_job(slurm, monkeypatch):
    monkeypatch.setenv("SQUEUE_PARTITION", "low")
    hold = ["sbatch", "--parsable", "--hold", "--output=/dev/null", "--mem=100M", "--wrap=true"]
    other = commands.run([*hold, "--comment=of a person,\nin | two lines"]).strip()
    job_id = commands.run([*hold, "--comment=ours"]).strip()
    assert [job.job_id for job in commands.find_jobs(comment="ours")] == [job_id]
    commands.cancel([job_id, other])


@pytest.mark.parametrize(
    "wrong",
    [["--partition=nope"], ["--gpus-per-task=9", "--ntasks=1"], ["--mem=900G"], ["--nodes=9"], ["--constraint=x"]],
)
def test_slurm_says_what_could_never_start_without_queueing_it(slurm, wrong):
    assert commands.refusal(wrong) != ""
    assert commands.refusal(["--mem=100M", "--gpus-per-task=1", "--ntasks=1"]) == ""
    assert slurm.jobs() == []


@pytest.mark.faults
def test_a_node_that_dies_takes_its_jobs_with_it_and_can_come_back(slurm):
    job = ["srun", "--nodelist=n2", "--mem=100M", "--comment=node", "bash", "-c", "echo started; exec sleep 300"]
    process = subprocess.Popen(job, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == "started\n"
    slurm.kill_node("n2")
    process.wait(120)  # with 0: how a job ended is what Slurm says, not what srun returns
    process.stdout.close()
    assert [job.state for job in commands.find_jobs(comment="node", every_state=True)] == ["NODE_FAIL"]
    slurm.revive_node("n2")
    assert subprocess.run(["srun", "--nodelist=n2", "--mem=100M", "true"], check=False, timeout=60).returncode == 0
