"""What a site is asked before a run (`tasks.clusters.preflight`) and what `hubert check` finds out, on a real Slurm of virtual nodes."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hubert.core.errors import ConfigError
from hubert.core.paths import DEPLOYMENTS, PROJECT
from tasks import cli
from tasks.clusters.settings import read_cluster
from tasks.service.settings import environment as service_environment
from tasks.slurm.settings import SECTIONS, Site, SlurmSettings, TrainingSection, WorkerSection

SMALL = {"cpus": 1, "memory": "1000M"}


def write_site(path: Path, **sections) -> Path:
    """Write a cluster file for the virtual nodes."""
    content = {name: {**SMALL, **sections.get(name, {})} for name in SECTIONS}
    site = {"interface": "lo", "walltime": "00:30:00", **sections.get("site", {})}
    path.write_text(yaml.safe_dump({"kind": "slurm", "site": site, **content}))
    return path


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"site": {"partition": "nope"}}, ["extraction.partition", "'nope'", "Invalid partition"]),
        ({"evaluation": {"gpus": 9}}, ["evaluation.gpus", "9"]),
        ({"kmeans": {"memory": "900G"}}, ["kmeans.memory", "'900G'"]),
        ({"kmeans": {"constraint": "a100"}}, ["kmeans.constraint", "'a100'"]),
        ({"training": {"nodes": 2, "tasks_per_node": 9}}, ["training.tasks_per_node", "9"]),
        ({"training": {"nodes": 4}}, ["training.nodes", "4"]),
        ({"extraction": {"directives": ["--reservation=x"]}}, ["extraction.directives", "reservation"]),
        ({"extraction": {"partition": "short"}}, ["extraction.walltime", "'00:30:00'", "short allows 10 minutes"]),
        ({"extraction": {"walltime": "00:20:00", "lifetime": "00:30:00"}}, ["extraction", "lifetime", "walltime"]),
    ],
)
def test_what_could_never_start_is_refused_with_file_and_key_before_anything_is_queued(
    slurm, tmp_path, capsys, sections, words
):
    path = write_site(tmp_path / "site.yaml", **sections)
    assert cli.main(["run", "--cluster", str(path)]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in [str(path), *words]), message
    assert slurm.jobs() == []


def test_what_a_site_has_is_not_refused(slurm, tmp_path):
    from tasks.clusters.preflight import check_cluster

    training = {"nodes": 3, "tasks_per_node": 1, "gpus": 1, "cpus": 4}
    check_cluster(str(write_site(tmp_path / "site.yaml", extraction={"gpus": 1}, training=training)))
    check_cluster("local")


def test_nodes_that_are_away_are_waited_for_but_what_no_node_has_is_refused(slurm, tmp_path, caplog):
    from tasks.clusters.preflight import check_cluster

    fits = write_site(tmp_path / "fits.yaml")
    nodes = f"nodename={','.join(slurm.nodes)}"
    slurm.command("scontrol", "update", nodes, "state=drain", "reason=test")
    try:
        check_cluster(str(fits))
        assert "n1 is drained, n2 is drained, n3 is drained" in caplog.text
        for key, value in {"partition": "nope", "gpus": 9, "memory": "900G", "cpus": 99}.items():
            with pytest.raises(ConfigError, match="Slurm would never start such a job"):
                check_cluster(str(write_site(tmp_path / "never.yaml", kmeans={key: value})))
        with pytest.raises(ConfigError, match="Slurm would never start such a job"):
            check_cluster(str(write_site(tmp_path / "never.yaml", training={"nodes": 4})))
    finally:
        slurm.command("scontrol", "update", nodes, "state=resume")


def test_a_slurm_that_does_not_answer_is_only_warned_of(slurm, tmp_path, caplog):
    from tasks.clusters.preflight import check_cluster

    slurm.stop_controller()
    try:
        check_cluster(str(write_site(tmp_path / "site.yaml")))
    finally:
        slurm.start_controller()
    assert "The section extraction of the cluster file was not checked" in caplog.text


@pytest.fixture
def environment(service, slurm, tmp_path, monkeypatch):
    for name, value in {**service_environment(service.settings), "HUBERT_RUNS": str(tmp_path / "the runs")}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name}  ")]
    return re.split(r"  +", line)[1:]


def test_check_says_what_works_on_each_sections_node_and_why_the_rest_does_not(environment, slurm, capsys):
    sections = {
        "kmeans": {"python": "/no/such/python"},
        "evaluation": {"gpus": 1},  # Slurm counts one per node, and none is there
        "training": {"directives": ["--begin=now+1hour"]},
    }
    path = write_site(environment / "site.yaml", **sections)
    assert cli.main(["check", str(path), "--wait", "20"]) == 1  # a busy machine starts jobs after seconds
    text = capsys.readouterr().out
    assert row(text, "queue")[1:] == ["-", row(text, "queue")[2], "FAILED"], text
    for name in ("packages", "shared folder", "Prefect API", "scheduler"):
        found = row(text, name)
        assert [cell[:3] for cell in found] == ["ok:", "-", "ok:", "-"], text
    assert row(text, "GPU") == ["-", "-", "FAILED", "-"]
    assert row(text, "job") == ["-", "FAILED", "-", "-"]
    assert "/no/such/python: No such file" in text
    assert re.search(r"training: queue: job \d+ is pending in partition main \(BeginTime\)", text)
    assert "0 of 1 usable" in text
    slurm.wait_until_empty()
    assert [*(environment / "the runs").iterdir()] == []


def test_ctrl_c_cancels_the_jobs_of_check(environment, slurm):
    path = write_site(environment / "site.yaml", site={"directives": ["--begin=now+1hour"]})
    command = [sys.executable, "-m", "tasks.cli", "check", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT)
    while "pending" not in process.stdout.readline():
        assert process.poll() is None
    assert len(slurm.jobs()) == len(SECTIONS)
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    process.stdout.close()
    assert process.wait() == 130
    slurm.wait_until_empty()


@pytest.mark.faults  # it imports all libraries in a new worker
def test_check_starts_the_workers_of_this_machine_where_there_is_nothing_to_submit(environment, capsys):
    path = environment / "here.yaml"
    path.write_text("{kind: local, kmeans: {num_workers: 1}}")
    assert cli.main(["check", str(path)]) == 0, capsys.readouterr().out
    text = capsys.readouterr().out
    assert row(text, "workers") == ["1 started"]
    assert "all of it works" in text


def test_the_sites_file_that_people_copy_has_every_key_with_a_comment(tmp_path):
    path = DEPLOYMENTS / "clusters" / "slurm.yaml"
    assert isinstance(read_cluster("slurm"), SlurmSettings)
    assert isinstance(read_cluster(str(shutil.copy(path, tmp_path / "mine.yaml"))), SlurmSettings)
    explained = dict(re.findall(r"^ *(\w+): ?.*?# *(\S.*)$", path.read_text(), flags=re.MULTILINE))
    models = (Site, WorkerSection, TrainingSection, SlurmSettings)
    keys = {name for model in models for name in model.model_fields} - {"kind", "site"}
    assert keys - explained.keys() == set()
