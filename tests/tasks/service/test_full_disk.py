"""The databases of Prefect and MLflow on a disk that is really full: flows wait until there is room, and nothing is lost."""

import os
import subprocess
import sys
from http.server import ThreadingHTTPServer

import httpx
import mlflow
import pytest

from tasks.service.service import down, up
from tasks.service.settings import environment as service_environment
from tasks.tracking.mirror import Tracker
from tests.conftest import service_settings
from tests.support.disk import fill, small_disk
from tests.support.offered import METRICS, write_metrics, write_offered
from tests.support.servers import Forwarding, serving
from tests.support.slurm_runs import wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

FLOW = "from prefect import flow; flow(lambda: print('it ran'), name='plain')()"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A service whose data lie on a small disk."""
    with small_disk(tmp_path_factory.mktemp("disk") / "small", "128m") as disk:
        settings = service_settings(disk)
        up(settings)
        yield settings
        down(settings)


class Counting(Forwarding):
    """Forwards to Prefect, and counts the answers that say that the server could not do it."""

    def answer(self, status: int, content: bytes) -> None:
        self.server.refused += status >= httpx.codes.INTERNAL_SERVER_ERROR
        super().answer(status, content)


def fill_database(settings) -> None:
    """Write to Prefect until its database takes nothing more: it may have room of its own left on a full disk."""
    artifact = {"key": "ballast", "type": "markdown", "data": 50_000 * "x"}
    for _ in range(1000):
        answer = httpx.post(f"{settings.api_url}/artifacts/", json=artifact, trust_env=False, timeout=60)
        if answer.is_server_error:
            return
    pytest.fail("the database did not get full")


def test_a_flow_waits_for_a_prefect_whose_disk_is_full(settings):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Counting)
    server.target, server.refused = settings.prefect_url, 0
    address = f"http://127.0.0.1:{server.server_address[1]}/api"
    variables = {**os.environ, **service_environment(settings), "PREFECT_API_URL": address}
    ballast = fill(settings.folder.parent)
    try:
        fill_database(settings)
        with serving(server):
            flow = subprocess.Popen([sys.executable, "-c", FLOW], env=variables, stdout=subprocess.PIPE, text=True)
            wait_until(lambda: server.refused or flow.poll() is not None, "a request that is refused", seconds=300)
            ballast.unlink()
            said, _ = flow.communicate(timeout=600)
    finally:
        ballast.unlink(missing_ok=True)
    assert server.refused
    assert flow.returncode == 0
    assert "it ran" in said


def test_mlflow_gets_all_points_once_when_its_disk_has_room_again(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.mlflow_url)
    mlflow.set_tracking_uri(None)
    offered = write_offered(tmp_path / "run")
    tracker = Tracker(offered.folder, offered.stage, {}, {})
    assert tracker.mirror()
    curve = {step: 5 - step / 10_000 for step in range(2, 6001, 2)}
    write_metrics(offered.stage, {step: value for step, value in curve.items() if step > 12})
    ballast = fill(settings.folder.parent)
    try:
        assert tracker.mirror() is False
    finally:
        ballast.unlink()
    assert tracker.mirror(at_once=True)
    _, run_id = tracker.ids()
    client = mlflow.MlflowClient()
    for name in METRICS:
        steps = [point.step for point in client.get_metric_history(run_id, name)]
        assert sorted(steps) == list(range(2, 6001, 2))
