"""The local service: real Prefect and MLflow servers and a real worker, started, used, broken and stopped."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from hubert.core.errors import ConfigError, TransientError
from hubert.core.paths import PROJECT
from tasks.service.deployments import read_deployments
from tasks.service.prefect_api import connect
from tasks.service.profiles import disable_plugins, enable_plugins, plugins_are_enabled
from tasks.service.service import MLFLOW, PARTS, PREFECT, WORKER, deploy, describe, down, status, up
from tasks.service.settings import Service, ServiceSettings, environment, find_service
from tests.conftest import service_settings
from tools.ports import free_ports

FLOWS = PROJECT / "tests" / "flows"
DEADLINE_SECONDS = 120.0  # a machine that is busy with other things


def wait_until(check, what):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := check()):
        assert time.monotonic() < deadline, f"{what}: not within {DEADLINE_SECONDS:.0f} s"
        time.sleep(0.1)
    return found


def prefect_typed_elsewhere(service, folder, *words):
    """Run `prefect` as a person in another folder does: no variable set but the service's folder (it is not the default)."""
    variables = {
        "HOME": str(service.settings.profiles.parent.parent),
        "PATH": "/usr/bin:/bin",
        "HUBERT_SERVICE": str(service.settings.folder),
    }
    command = [Path(sys.executable).parent / "prefect", *words]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def post(service, path, content):
    with connect(service.settings.api_url) as api:
        return api.post(path, content)


def final_state(service, name):
    """Wait for the run `name` to end; return its state."""

    def ended():
        (run,) = post(service, "/flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})
        return run["state"] if run["state_type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"} else None

    return wait_until(ended, f"the end of run {name}")


def test_both_servers_answer_with_their_pages_and_the_worker_runs(service):
    settings = service.settings
    for address in (
        f"{settings.api_url}/health",
        settings.ui_url,
        f"{settings.mlflow_url}/health",
        settings.mlflow_url,
    ):
        assert httpx.get(address, trust_env=False, follow_redirects=True).status_code == 200
    assert status(settings) == {PREFECT: "answers", MLFLOW: "answers", WORKER: "runs"}
    (worker,) = post(service, "/work_pools/local/workers/filter", {})
    assert (worker["name"], worker["status"]) == ("local", "ONLINE")
    assert settings.ui_url in describe(service)
    assert settings.mlflow_url in describe(service)


def test_all_data_lie_in_the_service_folder(service):
    folder = service.settings.folder
    assert {"service.json", "mlflow.db", "logs", "prefect"} <= {path.name for path in folder.iterdir()}
    assert (folder / "prefect" / "prefect.db").exists()


def test_a_second_up_changes_nothing(service):
    again = up(service.settings, prefect_file=FLOWS / "prefect.yaml", project=FLOWS)
    assert again.started == ()
    assert again.processes == service.processes == find_service(service.settings.folder).processes


def test_up_with_other_ports_names_both_and_leaves_the_service_alone(service):
    other = service.settings.model_copy(update={"mlflow_port": free_ports(1)[0]})
    with pytest.raises(
        ConfigError, match=rf"mlflow_port: {other.mlflow_port} .* runs with {service.settings.mlflow_port}"
    ):
        up(other, prefect_file=FLOWS / "prefect.yaml", project=FLOWS)
    assert status(service.settings)[MLFLOW] == "answers"


def test_a_bare_name_and_a_full_name_typed_in_another_folder_run_to_completion(service, tmp_path):
    """The acceptance of the issue: `prefect deployment run NAME` in any shell that has the environment."""
    numbers = {"small": 7, "small/other": 8}
    for name in numbers:
        answer = tmp_path / name.replace("/", "-")
        run = prefect_typed_elsewhere(
            service, tmp_path, "deployment", "run", name, "--param", f"answer={answer}", "--flow-run-name", name
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert f"{service.settings.ui_url}/" in run.stdout.replace("\n", "")
        assert run.stderr == ""
    for name, number in numbers.items():
        assert final_state(service, name)["type"] == "COMPLETED"
        assert json.loads((tmp_path / name.replace("/", "-")).read_text()) == {
            "number": number,
            "folder": str(FLOWS),
            "PREFECT_API_URL": service.settings.api_url,
            "MLFLOW_TRACKING_URI": service.settings.mlflow_url,
            "HUBERT_SERVICE": str(service.settings.folder),
        }


def test_an_unknown_name_gives_the_error_of_prefect(service, tmp_path):
    run = prefect_typed_elsewhere(service, tmp_path, "deployment", "run", "nonsense")
    assert run.returncode == 1
    assert "Deployment 'nonsense' not found!" in run.stdout + run.stderr


def test_a_deployment_without_its_flow_is_an_error_that_shows_what_prefect_said(service, tmp_path):
    (tmp_path / "empty.py").write_text("")
    prefect_file = tmp_path / "prefect.yaml"
    prefect_file.write_text("deployments: [{name: local, entrypoint: 'empty.py:gone', work_pool: {name: local}}]")
    with pytest.raises(ConfigError, match=r"(?s)missing on the server: local .empty.py:gone.*'gone' not found"):
        deploy(service.settings, prefect_file, project=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("deployments: [", "not valid YAML"),
        ("name: x", "expected a list `deployments`"),
        ("deployments: [{name: local}]", "deployment 1: expected `name` and `entrypoint`"),
    ],
)
def test_a_wrong_file_of_deployments_is_refused_before_anything_starts(tmp_path, content, message):
    prefect_file = tmp_path / "prefect.yaml"
    if content is not None:
        prefect_file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        up(ServiceSettings(folder=tmp_path / "service"), prefect_file=prefect_file)
    assert not (tmp_path / "service").exists()


def test_the_deployments_of_the_project_name_flows_that_exist():
    found = read_deployments(PROJECT / "deployments" / "prefect.yaml")
    entrypoints = {entrypoint for _, entrypoint in found}
    assert sorted(found) == sorted((name, entrypoint) for name in ("local", "slurm") for entrypoint in entrypoints)
    for entrypoint in entrypoints:
        file, function = entrypoint.split(":")
        assert f"def {function}(" in (PROJECT / file).read_text()


def test_a_taken_port_is_named_with_its_holder_and_the_option(tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = holder.getsockname()[1]
        settings = ServiceSettings(folder=tmp_path, prefect_port=free_ports(1)[0], mlflow_port=taken)
        with pytest.raises(ConfigError, match=rf"port {taken} .*process {os.getpid()}\).*--mlflow-port"):
            up(settings, prefect_file=FLOWS / "prefect.yaml", project=FLOWS)
    assert find_service(tmp_path) is None


def test_one_port_for_both_servers_is_refused(tmp_path):
    settings = ServiceSettings(folder=tmp_path, prefect_port=5000, mlflow_port=5000)
    with pytest.raises(ConfigError, match="both 5000"):
        up(settings, prefect_file=FLOWS / "prefect.yaml", project=FLOWS)


@pytest.mark.slow
def test_a_server_that_dies_at_once_is_an_error_with_its_log_and_nothing_is_left(tmp_path):
    """MLflow refuses a database that is none; the Prefect server, started at the same time, is stopped again."""
    (tmp_path / "mlflow.db").write_text("this is no database" * 100)
    prefect_port, mlflow_port = free_ports(2)
    settings = ServiceSettings(folder=tmp_path, prefect_port=prefect_port, mlflow_port=mlflow_port)
    with pytest.raises(
        TransientError, match=r"(?s)MLflow server ended with status 1.*mlflow-server\.log.*not a database"
    ):
        up(settings, prefect_file=FLOWS / "prefect.yaml", project=FLOWS)
    assert find_service(tmp_path) is None
    for port in (prefect_port, mlflow_port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_down_without_a_service_does_nothing(tmp_path):
    assert down(ServiceSettings(folder=tmp_path)).processes == ()
    assert set(status(ServiceSettings(folder=tmp_path)).values()) == {"not started"}


def test_a_record_of_another_version_is_an_error_that_says_what_to_do(tmp_path):
    (tmp_path / "service.json").write_text('{"ports": [1, 2]}')
    with pytest.raises(ConfigError, match="Stop that service with the version that started it"):
        find_service(tmp_path)


def test_a_copied_folder_is_not_the_service_of_the_folder_it_was_copied_from(tmp_path):
    Service(settings=ServiceSettings(folder=tmp_path / "old")).write()
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    assert find_service(tmp_path / "old") is not None
    assert find_service(tmp_path / "new") is None


def test_a_service_of_another_machine_is_neither_used_nor_stopped_here(tmp_path):
    Service(settings=ServiceSettings(folder=tmp_path), host_name="login1").write()
    with pytest.raises(ConfigError, match="started on login1"):
        down(ServiceSettings(folder=tmp_path))


def test_a_folder_that_no_database_can_be_addressed_in_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match="%"):
        up(ServiceSettings(folder=tmp_path / "100%"))
    assert not (tmp_path / "100%").exists()


def test_a_proxy_of_the_user_is_not_asked_for_the_service(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "example.org")
    assert environment(ServiceSettings())["NO_PROXY"] == "example.org,127.0.0.1"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert environment(ServiceSettings())["no_proxy"] == "127.0.0.1"


def test_a_profile_is_written_only_where_there_is_none_and_removed_only_as_it_was_written(tmp_path):
    profiles = tmp_path / "home" / ".prefect" / "profiles.toml"
    assert not plugins_are_enabled(profiles)
    assert enable_plugins(profiles, tmp_path)
    disable_plugins(profiles, tmp_path / "another service")
    assert plugins_are_enabled(profiles)
    disable_plugins(profiles, tmp_path)
    assert not profiles.exists()

    own = 'active = "mine"\n\n[profiles.mine]\nPREFECT_API_URL = "http://example.org/api"\n'
    profiles.write_text(own)
    assert not enable_plugins(profiles, tmp_path)
    disable_plugins(profiles, tmp_path)
    assert profiles.read_text() == own
    assert "prefect config set" in describe(Service(settings=ServiceSettings(folder=tmp_path, profiles=profiles)))


@pytest.mark.slow
def test_in_the_foreground_a_killed_server_is_started_again_and_ctrl_c_stops_all(tmp_path):
    """`up` notices the killed server (hold calls it); a flow under way ends with the service, and is marked as crashed."""
    settings = service_settings(tmp_path)
    code = (
        "import sys; from pathlib import Path; from tasks.service.foreground import hold\n"
        "from tasks.service.settings import ServiceSettings\n"
        "settings = ServiceSettings.model_validate_json(sys.argv[1])\n"
        "sys.exit(hold(settings, prefect_file=Path(sys.argv[2]) / 'prefect.yaml', project=Path(sys.argv[2])))"
    )
    command = [sys.executable, "-u", "-c", code, settings.model_dump_json(), str(FLOWS)]
    output = tmp_path / "output.txt"
    with output.open("wb") as file:
        held = subprocess.Popen(command, cwd=PROJECT, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "Ctrl-C stops it." in output.read_text() or held.poll() is not None, "the start")
        assert held.poll() is None, output.read_text()
        service = find_service(settings.folder)

        service_processes = {name: psutil.Process(service.processes[name].pid) for name in PARTS}
        service_processes[PREFECT].kill()
        wait_until(lambda: "Up again: Prefect server." in output.read_text(), "a new server")
        repaired = find_service(settings.folder)
        assert {name for name in PARTS if repaired.processes[name] != service.processes[name]} == {PREFECT}
        assert "Prefect server ended" in output.read_text()

        (deployment,) = post(service, "/deployments/filter", {"flows": {"name": {"any_": ["endless"]}}})
        pids = tmp_path / "pids.json"
        post(service, f"/deployments/{deployment['id']}/create_flow_run", {"parameters": {"answer": str(pids)}})
        wait_until(pids.exists, "the endless flow")
        left = [psutil.Process(pid) for pid in json.loads(pids.read_text())]
        left += [psutil.Process(record.pid) for record in repaired.processes.values()]

        held.send_signal(signal.SIGINT)
        assert held.wait(DEADLINE_SECONDS) == 0
    finally:
        held.kill()
        held.wait()
        down(settings)
    assert not [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert find_service(settings.folder) is None
    assert not settings.profiles.exists()
    said = output.read_text()
    assert "(endless)" in said
    assert "(inner)" in said
    with sqlite3.connect(settings.folder / "prefect" / "prefect.db") as database:
        assert database.execute("select distinct state_type from flow_run").fetchall() == [("CRASHED",)]
        tasks = dict(database.execute("select name, state_type from task_run").fetchall())
    assert any(name.startswith("wait") for name in tasks)
    assert set(tasks.values()) == {"CRASHED"}
