"""Quiet defaults: no telemetry, nothing for the pages of other web sites; with the names of the installed versions."""

import os
import re
import subprocess
import sys

import httpx

from hubert.core.paths import PROJECT
from tasks.service.settings import SERVERS, ServiceSettings, environment

OTHER_SITE = {"Origin": "http://example.org"}


def test_every_variable_that_is_set_or_documented_is_known_to_the_installed_versions(tmp_path):
    import mlflow.environment_variables
    import prefect.settings

    documented = set(re.findall(r"\b(?:PREFECT|MLFLOW)_[A-Z_]+\b", (PROJECT / "docs" / "service.md").read_text()))
    names = documented | {*SERVERS, *environment(ServiceSettings(folder=tmp_path))}
    assert {"PREFECT_SERVER_ANALYTICS_ENABLED", "MLFLOW_SERVER_ALLOWED_HOSTS"} <= names
    unknown = [name for name in names if name.startswith("PREFECT_") and not hasattr(prefect.settings, name)]
    unknown += [
        name for name in names if name.startswith("MLFLOW_") and not hasattr(mlflow.environment_variables, name)
    ]
    assert not unknown


def test_a_process_of_the_service_sends_no_telemetry(tmp_path):
    code = (
        "from prefect._internal.analytics.enabled import is_telemetry_enabled as prefect\n"
        "from mlflow.telemetry.utils import is_telemetry_disabled as mlflow\n"
        "print(prefect(), not mlflow())"
    )
    # Both are silent in tests and on CI by themselves; a person's shell has none of these.
    silent = re.compile(
        r"CI|.*_CI|CI_.*|GITHUB_.*|PYTEST_.*|BUILD.*|DO_NOT_TRACK|MLFLOW_.*|PREFECT_.*|.*_BUILD.*|JENKINS.*"
    )
    bare = {name: value for name, value in os.environ.items() if not silent.fullmatch(name)}

    def sends(variables):
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env={**bare, **variables}, capture_output=True, text=True, check=True).stdout

    home = {"PREFECT_HOME": str(tmp_path / "prefect")}
    assert sends(home) == "True True\n"  # else this test could not fail
    assert sends({**home, **environment(ServiceSettings(folder=tmp_path))}) == "False False\n"


def test_the_servers_have_telemetry_off(service):
    prefect = httpx.get(f"{service.settings.api_url}/admin/settings", trust_env=False).json()
    assert prefect["server"]["analytics_enabled"] is False
    assert prefect["server"]["ui"]["show_promotional_content"] is False
    mlflow = httpx.get(f"{service.settings.mlflow_url}/ajax-api/3.0/mlflow/ui-telemetry", trust_env=False).json()
    assert mlflow["disable_ui_telemetry"] is True


def test_a_page_of_another_web_site_gets_no_leave_to_use_prefect(service):
    address = f"{service.settings.api_url}/flows/"
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    leave = httpx.options(address, headers={**OTHER_SITE, **asks}, trust_env=False)
    assert leave.status_code == 400
    assert "access-control-allow-origin" not in leave.headers
    plain = {**OTHER_SITE, "Content-Type": "text/plain"}  # what a browser sends without asking is not taken for JSON
    sent = httpx.post(address, content='{"name": "of another site"}', headers=plain, trust_env=False)
    assert sent.status_code == 422
    assert "access-control-allow-origin" not in sent.headers


def test_a_page_of_another_web_site_cannot_change_anything_in_mlflow(service):
    address = f"{service.settings.mlflow_url}/api/2.0/mlflow/experiments/create"
    sent = httpx.post(address, json={"name": "of another site"}, headers=OTHER_SITE, trust_env=False)
    assert sent.status_code == 403
