"""Who reaches the service: addresses that are refused, and a real service on an internal interface, with its password."""

import socket
import stat
from pathlib import Path

import httpx
import psutil
import pytest

from hubert.core.errors import ConfigError
from tasks.service.access import (
    CLIENT_AUTH,
    SERVER_AUTH,
    auth_file,
    choose_auth,
    internal_addresses,
    read_auth,
    write_auth,
)
from tasks.service.follow import INFO, follow, start_run
from tasks.service.prefect_api import connect
from tasks.service.service import PARTS, down, status, up
from tasks.service.settings import ServiceSettings, environment, find_service
from tests.conftest import service_settings
from tests.tasks.service.test_service import FLOWS, prefect_typed_elsewhere
from tools.ports import free_ports

AUTH = "someone:a-long:secret"
DEPLOYED = {"prefect_file": FLOWS / "prefect.yaml", "project": FLOWS}
INTERNAL = next((address for address, _ in internal_addresses()), None)


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("", "expected an IPv4 address"),
        ("::", "expected an IPv4 address"),
        ("example.org", "expected an IPv4 address"),
        ("0.0.0.0", "every interface .* name one of them"),  # noqa: S104
        ("8.8.8.8", "public address"),
        ("198.51.100.77", "not an address of this machine"),
    ],
)
def test_an_address_that_is_not_of_one_internal_interface_is_refused(tmp_path, monkeypatch, host, message):
    monkeypatch.setenv(SERVER_AUTH, AUTH)
    with pytest.raises(ConfigError, match=rf"{message}.*its internal addresses are: .*{INTERNAL or 'none'}"):
        up(ServiceSettings(folder=tmp_path, host=host), **DEPLOYED)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("auth", ["password", "user:", ":password", "user:two words", "user:pass\nword"])
def test_a_string_that_is_not_user_and_password_is_refused_and_not_shown(tmp_path, monkeypatch, auth):
    monkeypatch.setenv(SERVER_AUTH, auth)
    with pytest.raises(ConfigError, match="expected `user:password`") as error:
        choose_auth("127.0.0.1", tmp_path)
    assert auth not in str(error.value).replace("user:password", "")


def test_on_loopback_there_is_a_password_only_if_one_is_given(tmp_path, monkeypatch):
    monkeypatch.delenv(SERVER_AUTH, raising=False)
    assert choose_auth("127.0.0.1", tmp_path) is None
    monkeypatch.setenv(SERVER_AUTH, AUTH)
    assert choose_auth("127.0.0.1", tmp_path) == AUTH


def test_a_kept_password_that_others_may_read_is_refused(tmp_path):
    write_auth(tmp_path, AUTH)
    assert read_auth(tmp_path) == AUTH
    auth_file(tmp_path).chmod(0o640)
    with pytest.raises(ConfigError, match="mode 640, expected 600"):
        environment(ServiceSettings(folder=tmp_path))


def test_a_start_that_fails_leaves_no_password_for_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setenv(SERVER_AUTH, AUTH)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        settings = ServiceSettings(folder=tmp_path, prefect_port=free_ports(1)[0], mlflow_port=holder.getsockname()[1])
        with pytest.raises(ConfigError, match="--mlflow-port"):
            up(settings, **DEPLOYED)
    assert read_auth(tmp_path) is None


@pytest.fixture
def settings(tmp_path):
    """Settings of a service on an internal interface; what runs of it is stopped."""
    if INTERNAL is None:
        pytest.skip("this machine has no internal IPv4 address but loopback")
    settings = service_settings(tmp_path, host=INTERNAL)
    yield settings
    down(settings)


@pytest.mark.slow
def test_on_an_internal_interface_the_service_demands_a_password_and_works_with_it(settings, tmp_path, monkeypatch):
    monkeypatch.delenv(SERVER_AUTH, raising=False)
    with pytest.raises(ConfigError, match=rf"(?s)export {SERVER_AUTH}=.*\nhubert up --host {INTERNAL}"):
        up(settings, **DEPLOYED)
    assert find_service(settings.folder) is None

    monkeypatch.setenv(SERVER_AUTH, AUTH)
    service = up(settings, **DEPLOYED)
    monkeypatch.setenv(SERVER_AUTH, f"{AUTH}-another")
    with pytest.raises(ConfigError, match=f"{SERVER_AUTH} is not what the service .* asks for"):
        up(settings, **DEPLOYED)
    monkeypatch.delenv(SERVER_AUTH)  # from here on it is known
    assert up(settings, **DEPLOYED).started == ()
    assert set(status(settings).values()) == {"answers", "runs"}

    the_password_is_asked_for(settings)
    a_task_on_a_worker_without_the_variable_reports_its_state(settings)
    typed = prefect_typed_elsewhere(service, tmp_path, "deployment", "inspect", "small/local")
    assert typed.returncode == 0, typed.stdout + typed.stderr
    mlflow_answers_to_its_own_names_only(settings)
    the_password_lies_in_one_file_only(settings, service)

    assert down(settings).processes == PARTS
    assert not auth_file(settings.folder).exists()


def the_password_is_asked_for(settings):
    address = f"{settings.api_url}/deployments/filter"
    for auth, code in ((None, 401), (("someone", "wrong"), 401), (tuple(AUTH.split(":", 1)), 200)):
        assert httpx.post(address, json={}, auth=auth, trust_env=False).status_code == code
    with connect(settings.api_url) as api, pytest.raises(ConfigError, match="asks for another auth string"):
        api.deployments()


def a_task_on_a_worker_without_the_variable_reports_its_state(settings):
    said = []
    with connect(settings.api_url, settings.auth) as api:
        run_id = start_run(api, "spread", "local", {"variable": CLIENT_AUTH})
        state = follow(settings.api_url, settings.ui_url, run_id, said.append, level=INFO, auth=settings.auth)
        assert state["type"] == "COMPLETED", said
        (run,) = api.post("/task_runs/filter", {"task_runs": {"name": {"like_": "look"}}})
    assert run["state_type"] == "COMPLETED"
    assert any(f"this worker has {CLIENT_AUTH}: False" in line for line in said)


def mlflow_answers_to_its_own_names_only(settings):
    address = f"{settings.mlflow_url}/api/2.0/mlflow/experiments/search"
    answers = [
        ({}, 200),
        ({"Host": f"localhost:{settings.mlflow_port}"}, 200),  # through a tunnel
        ({"Host": "example.org"}, 403),
        ({"Origin": settings.mlflow_url}, 200),  # what a browser sends from MLflow's pages, and from another's
        ({"Origin": "http://example.org"}, 403),
    ]
    for headers, code in answers:
        response = httpx.post(address, json={"max_results": 1}, headers=headers, trust_env=False)
        assert response.status_code == code, headers


def the_password_lies_in_one_file_only(settings, service):
    kept = auth_file(settings.folder)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    secret = AUTH.partition(":")[2]
    assert [path for path in files_of(settings.folder) if secret.encode() in path.read_bytes()] == [kept]
    for record in service.processes.values():
        family = [psutil.Process(record.pid), *psutil.Process(record.pid).children(recursive=True)]
        assert not any(secret in word for process in family for word in process.cmdline())


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
