"""`hubert run` and `hubert demo`: what is asked of the service, and what is said while a flow runs."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from http.server import ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from hubert.core.errors import ConfigError, TransientError
from tasks import cli
from tasks.service import follow as following
from tasks.service.follow import EXIT_CODES, INFO, follow, start_run
from tasks.service.prefect_api import connect
from tasks.service.settings import environment as service_environment
from tests.support.servers import Forwarding, serving
from tests.support.slurm_runs import wait_until
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


def test_runs_above_the_limit_wait_for_their_turn_and_say_so(service, tmp_path, monkeypatch):
    monkeypatch.setattr(following, "WAIT_SECONDS", 0.5)
    settings, said = service.settings, []
    with connect(settings.api_url) as api:
        api.add_work_pool(settings.pool, 1)  # a pool keeps its limit
        assert api.post("/work_pools/filter", {})[0]["concurrency_limit"] == settings.max_runs
        api.add_work_pool(settings.pool, 1, chosen=True)
        try:
            first = start_run(api, "endless", "local", {"answer": str(tmp_path / "endless")})
            wait_until((tmp_path / "endless").exists, "the first run")
            second = start_run(api, "small", "local", {"answer": str(tmp_path / "small")})

            def make_room(line: str) -> None:
                said.append(line)
                if "waits for its turn: 1 others are under way, and the service does 1 at once" in line:
                    api.post(f"/flow_runs/{first}/set_state", {"state": {"type": "CANCELLING"}})

            assert follow(settings.api_url, settings.ui_url, second, make_room, level=INFO)["type"] == "COMPLETED"
        finally:
            api.add_work_pool(settings.pool, settings.max_runs, chosen=True)
    assert any("waits for its turn" in line for line in said)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_run_whose_heartbeats_come_back_is_running_again_and_can_be_cancelled(service, tmp_path):
    """SIGSTOP and SIGCONT of the flow, as a laptop that sleeps."""
    answer = tmp_path / "endless"
    with connect(service.settings.api_url) as api:
        run_id = start_run(api, "endless", "local", {"answer": str(answer)})

        def state() -> str:
            return following.read_family(api, run_id)[0]["state"]["name"]

        wait_until(answer.exists, "the run")
        flow, *_ = json.loads(answer.read_text())
        os.kill(flow, signal.SIGSTOP)
        try:
            wait_until(lambda: state() == "Lost", "the automation", seconds=400)
        finally:
            os.kill(flow, signal.SIGCONT)
        wait_until(lambda: state() == "Running", "a heartbeat", seconds=120)
        api.post(f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}})
        wait_until(lambda: state() == "Cancelled", "the cancellation", seconds=120)
    assert not psutil.pid_exists(flow)


class Failing(Forwarding):
    """Forwards to Prefect, but answers 500 to the first few changes of a state."""

    def forward(self) -> None:
        if self.path.endswith("/set_state") and self.server.failures:
            self.server.failures -= 1
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(500, b'{"exception_message": "database is locked"}')
        else:
            super().forward()

    do_GET = do_POST = do_PATCH = forward  # noqa: N815


def test_a_prefect_server_that_answers_500_for_a_while_does_not_end_a_flow(service):
    """Run with what the service gives to its flows, and without the setting, with which it dies."""
    code = "from prefect import flow; flow(lambda: print('it ran'), name='plain')()"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    server.target = service.settings.prefect_url
    address = f"http://127.0.0.1:{server.server_address[1]}/api"
    variables = {**os.environ, **service_environment(service.settings), "PREFECT_API_URL": address}
    with serving(server):
        for codes, works in ((variables["PREFECT_CLIENT_RETRY_EXTRA_CODES"], True), ("", False)):
            server.failures = 3
            variables["PREFECT_CLIENT_RETRY_EXTRA_CODES"] = codes
            command = [sys.executable, "-c", code]
            ended = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=200)
            assert (ended.returncode == 0) is works, ended.stderr


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
