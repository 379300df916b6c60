"""The plugin that lets `prefect` find the service and understand a bare name; without effect where it does not fit."""

import asyncio
import logging
from pathlib import Path

import pytest
from prefect import __version__
from prefect.plugins import HookContext

from tasks.service.plugin import accept_bare_names, setup_environment
from tasks.service.settings import Service, ServiceSettings


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a service that was started on port 4321; no address is configured."""
    for name in ("PREFECT_API_URL", "PREFECT_UI_URL", "MLFLOW_TRACKING_URI", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HUBERT_SERVICE", str(tmp_path))
    Service(settings=ServiceSettings(folder=tmp_path, prefect_port=4321)).write()
    return tmp_path


def set_up(api_url=None):
    return setup_environment(ctx=HookContext(__version__, api_url, logging.getLogger))


def test_a_name_without_a_slash_means_the_deployment_local():
    class Client:
        def read_deployment_by_name(self, name):
            return name

    assert accept_bare_names(Client)
    assert accept_bare_names(Client)
    assert [Client().read_deployment_by_name(name) for name in ("flow", "flow/slurm")] == ["flow/local", "flow/slurm"]


def test_an_asynchronous_client_stays_one():
    class Client:
        async def read_deployment_by_name(self, name):
            return name

    assert accept_bare_names(Client)
    assert asyncio.run(Client().read_deployment_by_name("flow")) == "flow/local"


@pytest.mark.parametrize("client", [None, object, type("Client", (), {"read_deployment": None})])
def test_a_client_that_changed_is_left_alone(client):
    before = dir(client)
    assert not accept_bare_names(client)
    assert dir(client) == before


def test_a_client_that_changed_is_a_warning_not_an_error(folder, monkeypatch, caplog):
    monkeypatch.setattr("prefect.client.orchestration.PrefectClient", object)
    assert set_up() is not None
    assert "write <flow>/<deployment> in full" in caplog.text


def test_the_addresses_of_the_service_are_supplied_and_that_nobody_is_told(folder, monkeypatch):
    for variable in ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.delenv(variable, raising=False)
    assert set_up().env == {
        "PREFECT_API_URL": "http://127.0.0.1:4321/api",
        "PREFECT_UI_URL": "http://127.0.0.1:4321/v2",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def test_an_address_that_the_user_configured_stands(folder, monkeypatch):
    assert set_up("http://example.org/api") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://example.org")
    assert "MLFLOW_TRACKING_URI" not in set_up().env


def test_without_a_service_nothing_is_supplied(tmp_path, monkeypatch):
    monkeypatch.setenv("HUBERT_SERVICE", str(tmp_path / "none"))
    assert set_up() is None
    assert not Path(tmp_path / "none").exists()
