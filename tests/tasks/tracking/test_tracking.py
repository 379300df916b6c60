"""What MLflow gets: every point and every checkpoint once, whatever happens to the server, and never two curves in one run."""

import contextlib
import math
import socket
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import mlflow
import pytest

from hubert.model.weights import weights_digest
from tasks.tracking.mirror import Tracker
from tests.support.offered import METRICS, stage_of, write_metrics, write_offered
from tests.support.servers import Forwarding, serving
from tools.ports import free_ports

CURVE = {step: 5 - step / 100 for step in range(2, 25, 2)}


@pytest.fixture
def client(service, monkeypatch):
    use(monkeypatch, service.settings.mlflow_url)
    return mlflow.MlflowClient()


def use(monkeypatch, address):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    mlflow.set_tracking_uri(None)


def tracker_of(offered):
    tags = {"run": str(offered.folder.root), "iteration": "1"}
    return Tracker(offered.folder, offered.stage, tags, {"train.steps": 12})


def curves_of(client, tracker):
    """Return every point of each MLflow run of a tracker's experiment, by the run's name."""
    experiment_id, _ = tracker.ids()
    runs = client.search_runs([experiment_id])
    return {
        run.info.run_name: {
            name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
            for name in METRICS
        }
        for run in runs
    }


def entries_of(tracker):
    experiment_id, run_id = tracker.ids()
    return mlflow.search_logged_models([experiment_id], f"source_run_id = '{run_id}'", output_format="list")


def expected(curve):
    return dict.fromkeys(METRICS, sorted(curve.items()))


class Cutting(Forwarding):
    """Forwards requests to MLflow; those past the server's `budget` reach it too, but their answers are lost."""

    def answer(self, status: int, content: bytes) -> None:
        self.server.budget -= 1
        if self.server.budget < 0:
            self.close_connection = True
        else:
            super().answer(status, content)


def test_a_stopped_server_costs_no_waiting_and_afterwards_everything_is_there_once(client, tmp_path, monkeypatch):
    offered = write_offered(tmp_path / "run")
    write_metrics(offered.stage, dict(list(CURVE.items())[:3]))
    (port,) = free_ports(1)
    tracker = tracker_of(offered)
    with monkeypatch.context() as patch:
        use(patch, f"http://127.0.0.1:{port}")
        assert tracker.mirror() is False
        assert tracker.behind
    use(monkeypatch, client.tracking_uri)
    assert tracker.mirror() is False  # left alone for a while
    assert tracker.mirror(at_once=True)
    write_metrics(offered.stage, CURVE)
    assert tracker.mirror()
    assert tracker_of(offered).mirror()  # of another process
    assert curves_of(client, tracker) == {"it1/train": expected(CURVE)}


def test_a_server_that_hangs_is_asked_once_and_then_left_alone(client, tmp_path, monkeypatch):
    """It takes connections and never answers: each request costs the whole of MLflow's time limit."""
    offered = write_offered(tmp_path / "run")
    tracker = tracker_of(offered)
    with monkeypatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as hanging:
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        use(patch, f"http://127.0.0.1:{hanging.getsockname()[1]}")
        for _ in range(50):
            assert tracker.mirror() is False
        hanging.setblocking(False)
        callers = []
        with contextlib.suppress(BlockingIOError):
            while True:
                callers.append(hanging.accept()[0])
        for caller in callers:
            caller.close()
    assert len(callers) == 1
    use(monkeypatch, client.tracking_uri)
    assert tracker.mirror(at_once=True)
    assert curves_of(client, tracker)["it1/train"]["loss"]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_starts_no_second_curve_when_the_flow_starts_again(value, client, tmp_path):
    """MLflow keeps the largest number in the place of infinity."""
    offered = write_offered(tmp_path / "run")
    write_metrics(offered.stage, {2: 5.0, 4: value, 6: 4.0})
    first = tracker_of(offered)
    assert first.mirror()
    assert tracker_of(offered).mirror()
    assert list(curves_of(client, first)) == ["it1/train"]


def test_an_answer_that_is_lost_at_any_request_leaves_no_gap_and_no_duplicate(client, tmp_path, monkeypatch, service):
    monkeypatch.setattr("tasks.tracking.mirror.BATCH", 7)  # several requests, cut in the middle of a step
    server = ThreadingHTTPServer(("127.0.0.1", 0), Cutting)
    server.target = service.settings.mlflow_url
    with serving(server):
        address = f"http://127.0.0.1:{server.server_address[1]}"
        cuts = 0
        for budget in range(0, 40, 4):
            offered = write_offered(tmp_path / f"cut {budget}")
            write_metrics(offered.stage, CURVE)
            server.budget = budget
            use(monkeypatch, address)
            first = tracker_of(offered)
            finished = first.mirror()
            if finished:
                try:
                    first.log_checkpoints(offered.checkpoints)
                except mlflow.MlflowException:
                    finished = False
            cuts += not finished
            use(monkeypatch, service.settings.mlflow_url)
            second = tracker_of(offered)
            assert second.mirror()
            entries = second.log_checkpoints(offered.checkpoints)
            assert curves_of(client, second) == {"it1/train": expected(CURVE)}
            found = entries_of(second)
            assert sorted(model.tags["sha256"] for model in found) == sorted(entries)
            assert {(model.params["step"], str(model.status)) for model in found} == {
                (step, "READY") for step in ("4", "8", "12")
            }
            if finished:
                break
    assert finished
    assert cuts >= 4


def test_an_entry_holds_what_is_known_of_a_checkpoint_and_a_second_look_adds_nothing(client, tmp_path):
    offered = write_offered(tmp_path / "run")
    tracker = tracker_of(offered)
    tracker.mirror()
    entries = tracker.log_checkpoints(offered.checkpoints)
    assert tracker_of(offered).log_checkpoints(offered.checkpoints) == entries
    found = {model.params["step"]: model for model in entries_of(tracker)}
    best = {metric.key: metric.value for metric in found["12"].metrics}
    wanted = {"validation_loss": 3.988, "masked_accuracy": 0.112}
    assert best == pytest.approx({**wanted, "abx_within": 10.0, "abx_across": 20.0, "pnmi": 0.2})
    assert {metric.key for metric in found["4"].metrics} == set(wanted)
    assert found["12"].tags["checkpoint_path"] == offered.checkpoints[-1].checkpoint
    assert (found["12"].tags["layer"], found["12"].tags["run"]) == ("2", str(tmp_path / "run"))
    _, run_id = tracker.ids()
    losses = client.get_metric_history(run_id, "validation_loss")
    assert sorted(metric.step for metric in losses) == [4, 8, 12]


def test_steps_that_are_done_again_with_the_same_losses_are_one_curve_and_with_others_two_runs(client, tmp_path):
    stage = stage_of(tmp_path / "run")
    offered = write_offered(tmp_path / "run")
    tracker = tracker_of(offered)
    write_metrics(stage, CURVE)
    assert tracker.mirror()
    for tracking in (tracker, tracker_of(offered)):  # the same process, and another one
        write_metrics(stage, dict(list(CURVE.items())[:5]))  # cut back to a checkpoint
        assert tracking.mirror()
        write_metrics(stage, CURVE)
        assert tracking.mirror()
    assert curves_of(client, tracker) == {"it1/train": expected(CURVE)}

    other = {step: value + (0.5 if step > 10 else 0) for step, value in CURVE.items()}
    write_metrics(stage, other)
    assert tracker.mirror()
    curves = {"it1/train, done again": expected(CURVE), "it1/train": expected(other)}
    assert curves_of(client, tracker) == curves
    assert tracker_of(offered).mirror()
    assert curves_of(client, tracker) == curves


def test_another_training_of_the_iteration_is_another_mlflow_run(client, tmp_path):
    offered = write_offered(tmp_path / "run")
    tracker_of(offered).mirror()
    offered.stage = stage_of(tmp_path / "run", table_key="another")
    write_metrics(offered.stage, CURVE)
    second = tracker_of(offered)
    assert second.mirror()
    experiment_id, run_id = second.ids()
    assert len(client.search_runs([experiment_id])) == 2
    assert [metric.step for metric in client.get_metric_history(run_id, "loss")] == sorted(CURVE)


def test_two_runs_of_one_name_at_once_do_not_mix(client, tmp_path):
    trackers, curves = [], []
    for place, shift in (("here", 0.0), ("it's there", 1.0)):
        offered = write_offered(tmp_path / place / "same")
        curves.append({step: value + shift for step, value in CURVE.items()})
        write_metrics(offered.stage, curves[-1])
        trackers.append((tracker_of(offered), offered))

    def work(tracker, offered):
        assert tracker.mirror()
        tracker.log_checkpoints(offered.checkpoints)

    threads = [threading.Thread(target=work, args=one) for one in trackers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [client.get_experiment(tracker.ids()[0]).name for tracker, _ in trackers]
    assert len(set(names)) == 2
    for (tracker, offered), name, curve in zip(trackers, names, curves, strict=True):
        assert name in {"same", f"same ({offered.folder.root.parent.name})"}
        assert curves_of(client, tracker) == {"it1/train": expected(curve)}
        paths = {model.tags["checkpoint_path"] for model in entries_of(tracker)}
        assert paths == {checkpoint.checkpoint for checkpoint in offered.checkpoints}


def test_weights_are_copied_only_when_asked_and_load_from_the_copy(client, tmp_path):
    offered = write_offered(tmp_path / "run", num_checkpoints=2)
    tracker = tracker_of(offered)
    entries = tracker.log_checkpoints(offered.checkpoints)
    for entry in entries.values():
        assert {file.path for file in client.list_logged_model_artifacts(entry)} == {
            "MLmodel"
        }  # MLflow's own, a few lines
    tracker.upload(offered.checkpoints, entries)
    tracker.upload(offered.checkpoints, entries)
    for sha256, entry in entries.items():
        copy = mlflow.artifacts.download_artifacts(f"models:/{entry}", dst_path=str(tmp_path / entry))
        assert weights_digest(Path(copy), "the copy") == sha256
