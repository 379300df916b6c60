"""Slurm's commands against a real Slurm of virtual nodes, and the settings that are checked before anything is queued."""

import subprocess

import pytest
from pydantic import ValidationError

from tasks import slurm as commands
from tasks.slurm_settings import Resources, SlurmSettings, seconds_of


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
