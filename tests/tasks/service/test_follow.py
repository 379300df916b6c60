"""`hubert run` and `hubert demo`: what is asked of the service, and what is said while a flow runs."""

import contextlib
import io
import json
from argparse import Namespace
from pathlib import Path

import pytest

from hubert.core.errors import ConfigError, TransientError
from tasks import cli
from tasks.service import follow as following
from tasks.service.follow import EXIT_CODES, INFO, follow, start_run
from tasks.service.prefect_api import connect
from tests.support.toy import write_material
from tools.ports import free_ports


def hubert(*words) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def run_small(service, answer: Path) -> tuple[str, list[str]]:
    """Run the small flow; returns how it ended, and what was said."""
    said: list[str] = []
    with connect(service.settings.api_url) as api:
        run_id = start_run(api, "small", "local", {"answer": str(answer)})
    state = follow(service.settings.api_url, service.settings.ui_url, run_id, said.append, level=INFO)
    assert run_id in said[0]
    return state["type"], said


# With a real server and worker ------------------------------------------------------------------------------------


def test_a_run_is_followed_from_its_start_to_its_end(service, tmp_path):
    ended, said = run_small(service, tmp_path / "answer.json")
    assert ended == "COMPLETED"
    assert json.loads((tmp_path / "answer.json").read_text())["number"] == 7
    assert f"{service.settings.ui_url}/runs/flow-run/" in said[0]
    assert said[-1].endswith("(small) Completed")


def test_a_failed_run_says_why_once_and_where_to_look(service, tmp_path):
    ended, said = run_small(service, tmp_path / "no such folder" / "answer.json")
    assert ended == "FAILED"
    reasons = [line for line in said if "no such folder" in line]
    assert len(reasons) == 1
    assert "FileNotFoundError" in reasons[0]
    assert f"{service.settings.ui_url}/runs/flow-run/" in reasons[0]
    assert not any("Traceback" in line for line in said)


def test_the_exit_code_says_how_a_run_ended(service):
    settings = service.settings
    with connect(settings.api_url) as api:
        (deployment,) = [
            found for found in api.deployments() if (found["flow_name"], found["name"]) == ("small", "other")
        ]
        for state, code in EXIT_CODES.items():
            waiting = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2099-01-01T00:00:00Z"}}
            content = {"parameters": {"answer": "never"}, "state": waiting}
            run = api.post(f"/deployments/{deployment['id']}/create_flow_run", content)
            api.post(
                f"/flow_runs/{run['id']}/set_state", {"state": {"type": state, "name": state.title()}, "force": True}
            )
            with contextlib.redirect_stdout(io.StringIO()):
                assert cli.follow_run(settings, run["id"]) == code


def test_an_unknown_deployment_or_parameter_is_a_config_error(service):
    with connect(service.settings.api_url) as api:
        with pytest.raises(ConfigError, match=r"no-such-flow/local is not registered.*small/local"):
            start_run(api, "no-such-flow", "local", {})
        with pytest.raises(ConfigError, match="refuses the parameters"):
            start_run(api, "small", "local", {"answer": "x", "number": "many"})
        with pytest.raises(ConfigError, match="knows no flow run"):
            following.read_family(api, "00000000-0000-0000-0000-000000000000")


def test_a_server_that_stays_silent_ends_the_following(monkeypatch):
    monkeypatch.setattr(following, "OUTAGE_SECONDS", 0.2)
    monkeypatch.setattr(following, "POLL_SECONDS", 0.05)
    (port,) = free_ports(1)
    with pytest.raises(TransientError, match="The run may go on"):
        follow(f"http://127.0.0.1:{port}/api", "", "0", print)


def test_status_without_a_run_shows_the_service(service, monkeypatch, tmp_path):
    monkeypatch.setenv("HUBERT_SERVICE", str(service.settings.folder))
    monkeypatch.setenv("HUBERT_RUNS", str(tmp_path))
    code, said, _ = hubert("status")
    assert code == 0
    assert service.settings.ui_url in said
    assert said.count("answers") == 2
    assert "none yet" in said


# Before anything is asked of a server -----------------------------------------------------------------------------


def test_a_service_that_is_not_up_is_a_config_error_that_names_the_command(tmp_path):
    code, _, error = hubert("run", "--folder", tmp_path / "nothing")
    assert code == 2
    assert "hubert up" in error


def test_parameters_are_absolute_since_a_worker_runs_elsewhere(tmp_path, monkeypatch):
    data, recipe = write_material(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HUBERT_RUNS", str(tmp_path / "runs"))
    found = cli.build_parameters("toy", recipe.name, data.name, "local", {"train.steps": 5})
    assert found == {
        "run": str(tmp_path / "runs" / "toy"),
        "recipe": str(recipe),
        "data": str(data),
        "cluster": "local",
        "overrides": {"train.steps": 5},
    }
    named = cli.build_parameters("demo", "demo", "", "local", {})
    assert (named["recipe"], named["data"]) == ("demo", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "no-such"}, "no-such"),
        ({"recipe": "librispeech-mini", "data": ""}, "--data"),
        ({"data": "/no/such/folder"}, "does not exist"),
        ({"cluster": "no-such"}, "no-such"),
        ({"overrides": {"train.stepps": 1}}, "stepps"),
        ({"run": "a b"}, "a b"),
    ],
)
def test_a_wrong_wish_stops_before_anything_is_queued(change, message):
    wishes = {"run": "toy", "recipe": "demo", "data": "", "cluster": "local", "overrides": {}, **change}
    with pytest.raises(ConfigError, match=message):
        cli.build_parameters(**wishes)


def test_ports_of_the_options_win_over_those_of_the_service_that_is_there(tmp_path):
    options = Namespace(folder=tmp_path, prefect_port=4321, mlflow_port=None)
    settings = cli.service_settings(options)
    assert (settings.folder, settings.prefect_port, settings.mlflow_port) == (tmp_path, 4321, 5000)
    with pytest.raises(ConfigError, match="99999"):
        cli.service_settings(Namespace(folder=tmp_path, prefect_port=99_999, mlflow_port=None))


def test_down_without_a_service_says_so(tmp_path):
    code, said, _ = hubert("down", "--folder", tmp_path / "nothing")
    assert code == 0
    assert "nothing was running" in said


@pytest.mark.parametrize("command", ["up", "down", "demo", "run"])
def test_help_of_the_service_commands_names_their_defaults(command):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "default" in out.getvalue()


def test_the_console_script_has_all_commands():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        cli.main(["--help"])
    for command in ("manifest", "report", "status", "prune", "plan", "up", "down", "demo", "run"):
        assert f"\n    {command}" in out.getvalue()
