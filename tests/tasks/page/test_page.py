"""A run's page is for people: whatever it costs or breaks, the work goes on. Without a service; tests/end_to_end/test_watch.py has one."""

import errno
import json
import math
import socket
import sys
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_CSRF_SUPPORT_ENABLED, PREFECT_UI_URL, temporary_settings

import hubert.report.plots.curves
from hubert.core.errors import ConfigError, DataError, TransientError
from hubert.core.stage import Plan
from hubert.report.plots.style import Plot
from hubert.report.stage_summary import summarise_stage
from hubert.runs.progress import Receipts
from tasks import choice as outcome
from tasks import resolve, stage, train
from tasks.page import page, progress
from tasks.page import prefect_client as artifacts
from tests.support.gated import GatedStage

ERRORS = [OSError(errno.ESTALE, "Stale file handle"), RuntimeError("no renderer")]


@pytest.fixture(autouse=True)
def state(monkeypatch):
    """What the process knows of the server: that it does not answer, so that no test asks one that it did not start."""
    fresh = artifacts._State(silent_until=math.inf)
    monkeypatch.setattr(artifacts, "state", fresh)
    return fresh


@pytest.fixture
def opened():
    """Return an open page."""
    one = page.Page(None, "a page")
    token = page._here.set(one)
    yield one
    page._here.reset(token)


def fail(error):
    def fails(*_args, **_options):
        raise error

    return fails


# Nothing that is shown ends the work --------------------------------------------------------------------------------

SHOWN = {
    "show": lambda home: page.show("markdown", home.name, "data", "text"),
    "open_page": lambda home: page.open_page(home, "title"),
    "recall_link": lambda home: page.recall_link(home, "mlflow"),
    "show_stage": lambda home: page.show_stage(GatedStage(home, 1), {"sum": 0}),
    "show_table": lambda home: page.show_table(home, "rows", [{"a": 1}], "text"),
    "show_link": lambda home: page.show_link(home, "dask", "http://x", "text"),
    "show_picture": lambda home: page.show_picture(home, "loss", Plot("<svg/>", "a loss"), "text"),
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", SHOWN)
def test_whatever_a_request_of_a_page_raises_is_one_warning(name, error, opened, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(page, "reach", fail(error))
    SHOWN[name](tmp_path)
    SHOWN[name](tmp_path)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "the run's page does not show" in warnings[0]
    assert type(error).__name__ in warnings[0]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_figures_that_cannot_be_written_end_no_stage(error, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(page, "summarise_stage", fail(error))
    page.show_stage(GatedStage(tmp_path, 1), {})
    assert "gated: the run's page does not show the figures of a finished stage" in caplog.text


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_bar_whose_folder_cannot_be_read_stays_where_it_is(error, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "LOOK_SECONDS", 0.0)
    plan = Plan([{"index": 0}, {"index": 1}])
    bar = progress.Bar(GatedStage(tmp_path, 2), plan)
    monkeypatch.setattr(Receipts, "new", fail(error))
    bar.look()
    bar.add([0])
    bar.stop()
    bar.end()
    assert "gated: the run's page does not show which shards are done" in caplog.text
    monkeypatch.setattr(progress, "measure", fail(error))
    blind = progress.Bar(GatedStage(tmp_path, 2), plan)
    blind.look()
    blind.add([0])
    blind.stop()
    blind.end()
    assert "gated: the run's page does not show the progress bar" in caplog.text


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_error_of_a_shard_is_the_one_that_is_raised_although_its_bar_breaks_too(error, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_deal_out", fail(DataError("a.flac is cut off")))
    monkeypatch.setattr(progress.Bar, "_found", fail(error))
    with pytest.raises(DataError, match="a.flac"):
        stage._work(GatedStage(tmp_path, 1), Plan([{"index": 0}]), "")


def training_of(folder):
    return SimpleNamespace(
        label="it1/train",
        name="train",
        key=64 * "a",
        parent=folder,
        metrics=folder / "metrics.jsonl",
        train=SimpleNamespace(steps=10),
    )


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_picture_that_cannot_be_drawn_ends_no_training(error, tmp_path, monkeypatch, caplog):
    follower = train.Follower(training_of(tmp_path), None)
    monkeypatch.setattr(hubert.report.plots.curves, "draw_training", fail(error))
    follower.draw()
    follower.finish()
    assert "it1/train: the run's page does not show the picture of the losses" in caplog.text


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_neither_the_choice_nor_the_name_of_a_run_has_to_be_shown(error, tmp_path, monkeypatch, caplog):
    iteration = SimpleNamespace(home=tmp_path, checkpoints=fail(error))
    outcome.show_choice(iteration, SimpleNamespace(step=1, layer=2, why="it is best"))
    assert "the run's page does not show the choice" in caplog.text
    monkeypatch.setattr(resolve, "RunFolder", SimpleNamespace(of=fail(error)))
    resolved = SimpleNamespace(run="x")
    assert resolve.announce(resolved) is resolved
    assert "the run's page does not show its name and its tags" in caplog.text


@pytest.mark.parametrize("name", ["quality", "manifest", "features", "kmeans", "units", "train", "validate", "abx"])
def test_a_stage_that_an_older_version_finished_shows_its_plain_figures(name):
    shown = summarise_stage(SimpleNamespace(name=name), {"hours_of_old": 3.5, "rows": []})
    assert shown.headline == "finished"
    assert "3.5" in str(shown.tables)


def test_quality_without_a_figure_that_came_later_says_all_the_rest():
    names = ("pnmi", "phone_purity", "cluster_purity")
    counts = ("num_aligned_frames", "num_files_without_alignment", "num_phones")
    units = dict.fromkeys(names, 0.5) | dict.fromkeys(counts, 3)
    figures = {"units": units, "layers": [], "num_unmatched_files": 0}
    figures |= {"layers_num_files": 2, "layers_num_aligned_files": 3}
    shown = summarise_stage(SimpleNamespace(name="quality"), figures)
    assert shown.headline == "PNMI of the units: 0.500 (3 phones)"
    assert not any("max_hours" in remark for remark in shown.remarks)


# Tasks that no worker will run ----------------------------------------------------------------------------------------


class Pending:
    """The future of a task that nobody has begun."""

    def __init__(self):
        self.wrapped_future = Future()
        self.task_run_id = uuid4()

    def wait(self, _seconds):
        """Return at once: nothing happens."""


def test_the_reason_why_a_cluster_gives_up_survives_a_server_that_does_not_answer(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(stage, "slurm_workers", lambda: SimpleNamespace(failure="the account has no hours left"))
    monkeypatch.setattr(stage, "connect", fail(httpx.ConnectError("refused")))
    futures = [Pending(), Pending()]
    with pytest.raises(TransientError, match="no hours left"):
        stage.result_of(futures[0], stage.Patience("units"))
    assert futures[0].wrapped_future.cancelled()
    assert "Prefect does not take that 1 tasks have crashed" in caplog.text

    left = iter(futures := [Pending(), Pending()])
    monkeypatch.setattr(stage.work_on_shards, "submit", lambda *_: next(left))
    monkeypatch.setattr(stage, "get_run_logger", artifacts.run_logger)
    plan = Plan([{"index": 0}, {"index": 1}])
    with pytest.raises(TransientError, match="no hours left"):
        stage._deal_out(GatedStage(tmp_path, 2), plan, progress.Bar(GatedStage(tmp_path, 2), plan))
    assert all(future.wrapped_future.cancelled() for future in futures)


def test_all_tasks_are_taken_back_before_the_server_is_asked_to_mark_one(monkeypatch):
    futures = [Pending(), Pending()]
    seen = []
    monkeypatch.setattr(
        stage,
        "connect",
        lambda **_: seen.append([one.wrapped_future.cancelled() for one in futures]) or fail(OSError())(),
    )
    stage.give_up(futures, "no workers")
    assert seen == [[True, True]]


# Few and short requests -----------------------------------------------------------------------------------------------


def test_a_server_that_is_slow_is_left_alone_for_a_while(state, monkeypatch, caplog):
    monkeypatch.setattr(artifacts, "REQUEST_SECONDS", 0.1)
    state.silent_until = 0.0
    num_connections = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            held = []
            while True:
                try:
                    held.append(server.accept())
                except OSError:
                    return
                num_connections.append(len(held))

        threading.Thread(target=accept, daemon=True).start()
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.getsockname()[1]}/api"}):
            assert page.show("markdown", "key", "data", "text") is None
            asked = len(num_connections)
            for _ in range(3):
                page.show("markdown", "key", "data", "text")
        assert asked == len(num_connections) == 1
        server.shutdown(socket.SHUT_RDWR)
    assert caplog.text.count("Prefect does not answer") == 1


class Server(ThreadingHTTPServer):
    """Keeps artifacts as Prefect does, and what was asked of it."""

    def __init__(self):
        self.artifacts, self.asked = {}, []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    """Answers the three requests of a page."""

    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/filter"):
            keys = content["artifacts"]["key"]["any_"]
            self.answer([one for one in self.server.artifacts.values() if one["key"] in keys])
        else:
            self.server.asked.append(("made", content["key"]))
            times = dict.fromkeys(("created", "updated"), "2020-01-01T00:00:00Z")
            made = {**content, **times, "id": str(uuid4())}
            self.server.artifacts[made["id"]] = made
            self.answer(made)

    def do_PATCH(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(("renewed", content["description"]))
        self.server.artifacts[self.path.rpartition("/")[2]].update(content)
        self.answer(None)

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(state):
    state.silent_until = 0.0
    with Server() as one:
        threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        address = f"http://127.0.0.1:{one.server_address[1]}/api"
        with temporary_settings({PREFECT_API_URL: address, PREFECT_CLIENT_CSRF_SUPPORT_ENABLED: False}):
            yield one
        one.shutdown()


def test_what_is_shown_already_is_not_sent_again(server):
    artifact = page.show("markdown", "key", "data", "text")
    for data, description in (("data", "text"), ("data", "news"), ("data", "news")):
        assert page.show("markdown", "key", data, description) == artifact
    assert server.asked == [("made", "key"), ("renewed", "news")]


def test_a_bar_and_the_overview_move_every_15_seconds_and_end_where_the_stage_ends(
    server, opened, tmp_path, monkeypatch
):
    clock = SimpleNamespace(now=1000.0)
    for module in (page, progress):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    opened.home = tmp_path
    bar = progress.Bar(GatedStage(tmp_path, 9), Plan([{"index": index} for index in range(9)]))
    for done in range(8):
        clock.now += 5
        bar.add([done])
    bar.stop()
    asked = [text for what, text in server.asked if what == "renewed"]
    assert len(asked) == 6  # twice while it works, once at the end, both of them
    assert asked[-1] == "gated: stopped at 8 of 9 shards"
    assert {one["description"] for one in server.artifacts.values()} == {
        "stopped at 8 of 9 shards",
        "gated: stopped at 8 of 9 shards",
    }


def test_a_training_is_drawn_less_and_less_often(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: clock.now))
    drawn = []
    monkeypatch.setattr(hubert.report.plots.curves, "draw_training", lambda _: drawn.append(clock.now / 60))
    monkeypatch.setattr(train, "run_logger", lambda: SimpleNamespace(info=lambda *_: None))
    follower = train.Follower(training_of(tmp_path), None)
    line = {"loss": 1.0, "accuracy": 0.5, "audio_seconds_per_second": 10.0}
    for minute in range(1, 130):
        clock.now = 60.0 * minute + minute / 100
        event = SimpleNamespace(metrics={**line, "step": minute, "seconds": clock.now}, kind="metrics")
        follower(event)
    assert [round(minute) for minute in drawn] == [1, 3, 7, 15, 31, 61, 91, 121]


def test_the_time_left_is_that_of_the_hardware_a_training_runs_on_now():
    line = {"loss": 1.0, "accuracy": 0.5, "audio_seconds_per_second": 10.0}
    speed = train.Speed()
    for step in range(100, 1100, 100):  # 10 s per step
        speed.look({"step": step, "seconds": 10.0 * step})
    assert "left" not in train.describe({**line, "step": 100}, 2000, train.Speed().steps_per_second)
    for step in range(900, 1300, 100):  # from the checkpoint of step 800 on, 1 s per step
        speed.look({"step": step, "seconds": 8000.0 + step - 800})
    assert train.describe({**line, "step": 1200}, 2000, speed.steps_per_second).endswith(", 13 min 20 s left")


# Links ------------------------------------------------------------------------------------------------------------------


def test_links_between_pages_of_prefect_name_no_host():
    artifact = UUID(int=1)
    with temporary_settings({PREFECT_UI_URL: "http://127.0.0.1:4200/v2"}):
        assert page.address_of(artifact) == f"/v2/artifacts/artifact/{artifact}"


def test_a_training_that_cannot_begin_is_not_at_work(opened, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tasks.tracking.mirror", SimpleNamespace(tracker_of=lambda _: None))
    iteration = SimpleNamespace(train=training_of(tmp_path), home=tmp_path)
    with pytest.raises(ConfigError):
        train.follow_training.fn("it1/train", iteration, "no-such-cluster")
    assert opened.stages["it1/train"][0] == page.STOPPED


def test_a_link_of_another_training_of_the_iteration_is_not_taken_for_this_ones(server, opened, tmp_path):
    old, new = training_of(tmp_path), training_of(tmp_path)
    new.key = 64 * "b"
    page.show_link(tmp_path, train.link_of(old), "http://mlflow/old", "it1/train in MLflow")
    opened.links.clear()
    page.recall_link(tmp_path, train.link_of(new))
    assert opened.links == {}
    page.recall_link(tmp_path, train.link_of(old))
    assert list(opened.links.values()) == ["[it1/train in MLflow](http://mlflow/old)"]
