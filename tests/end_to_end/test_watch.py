"""What a run's page shows: progress in files and hours, figures in words, checkpoints, pictures, links; each run its own."""

import base64
import json
import re
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.etree import ElementTree as ET

import httpx
import mlflow
import polars as pl
import pytest

from hubert.core.files import write_json
from hubert.core.paths import RunFolder
from hubert.core.stage import Plan
from hubert.runs.progress import Amounts, Pace, Progress, Receipts, measure
from tasks.page.page import MAX_PICTURE, key_of
from tasks.service.settings import environment as service_environment
from tests.support.flow_runs import ITERATION, run_flow, start_flow
from tests.support.gated import GatedStage
from tests.support.small import write_cluster, write_recipe

STAGES = ("features", "kmeans", "units", "train", "validate", "abx", "quality", "report")
GATED = "from tests.support.gated import gated as flow"


@dataclass(frozen=True, eq=False)
class Pages:
    """What the service shows."""

    environment: dict[str, str]
    client: httpx.Client

    def find(self, **wanted):
        """Return the artifacts that fit, the newest of each key."""
        body = {"artifacts": wanted, "sort": "CREATED_DESC", "limit": 200}
        found = self.client.post("/artifacts/filter", json=body).raise_for_status().json()
        return {artifact["key"]: artifact for artifact in reversed(found)}

    def get(self, key):
        """Return the newest artifact of a key, as its own page shows it."""
        return self.client.get(f"/artifacts/{key}/latest").raise_for_status().json()

    def of_run(self, folder):
        """Return the artifacts of a run's folder."""
        return self.find(key={"like_": key_of(folder, "%")})

    @cache  # noqa: B019  (one object for the module)
    def flow_of(self, flow_run):
        """Return the name of the flow run whose page an artifact stands on, and its flow's name."""
        run = self.client.get(f"/flow_runs/{flow_run}").raise_for_status().json()
        return run["name"], self.client.get(f"/flows/{run['flow_id']}").raise_for_status().json()["name"]

    @cache  # noqa: B019
    def root_of(self, flow_run):
        """Return the name of the flow run that a flow run is a part of, however deep."""
        run = self.client.get(f"/flow_runs/{flow_run}").raise_for_status().json()
        if run["parent_task_run_id"] is None:
            return run["name"]
        task = self.client.get(f"/task_runs/{run['parent_task_run_id']}").raise_for_status().json()
        return self.root_of(task["flow_run_id"])


@pytest.fixture(scope="module")
def pages(service):
    environment = service_environment(service.settings)
    with httpx.Client(base_url=environment["PREFECT_API_URL"], timeout=60) as client:
        yield Pages(environment, client)


# A finished iteration ---------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [1, 2])
def test_every_stage_of_a_finished_iteration_has_its_page_in_words(small_run, pages, number):
    home = RunFolder(small_run.folder).iteration(number)
    for name in STAGES:
        page = pages.get(key_of(home, name))
        text = page["data"]
        assert f"it{number}/{name}: {page['description']}" in text
        assert re.sub(r"`[^`]*`", "", text).count("_") == 0, f"a name of the code: {text}"
        assert str(home / name) in text, "the page does not say where the files are"
    choice = pages.get(key_of(home, "choice"))
    outcome = json.loads((home / "outcome.json").read_text())
    assert f"step {outcome['step']:,}, layer {outcome['layer']}" in choice["data"]
    assert outcome["why"] in choice["data"]


def test_the_audio_of_abx_and_of_alignments_does_not_hide_the_runs_own(small_run, pages):
    texts = [
        pages.get(key_of(small_run.folder, name))["description"] for name in ("manifest", "abx-audio", "aligned-audio")
    ]
    assert [text.partition(",")[0] for text in texts] == ["30 files", "24 files", "30 files"]


def test_a_bar_ends_full_and_says_how_many_files_and_how_much_audio(small_run, pages):
    home = RunFolder(small_run.folder).iteration(1)
    bars = {name: pages.get(key_of(home, f"{name}-progress")) for name in STAGES}
    assert {bar["data"] for bar in bars.values()} == {100}
    said = {name: bar["description"] for name, bar in bars.items()}
    assert re.fullmatch(r"all 30 files, 1\.8 min of audio, in .+", said["units"])
    assert re.fullmatch(r"all 24 files, 1\.4 min of audio, in .+", said["features"])
    assert re.fullmatch(r"all 3 checkpoints, in .+", said["validate"])
    assert said["train"] == "all 12 steps are done"
    assert "all 30 files" in pages.get(key_of(small_run.folder, "manifest-progress"))["description"]


def test_the_table_of_checkpoints_says_which_one_is_best_and_why(small_run, pages):
    home = RunFolder(small_run.folder).iteration(1)
    table = pages.get(key_of(home, "checkpoints"))
    rows = json.loads(table["data"])
    assert [row["step"] for row in rows] == ["4", "8", "12"]
    outcome = json.loads((home / "outcome.json").read_text())
    (chosen,) = [row for row in rows if row["chosen"]]
    assert (chosen["step"], chosen["layer"]) == (str(outcome["step"]), str(outcome["layer"]))
    assert table["description"].endswith(f"has the lowest validation loss; layer {outcome['layer']}: {outcome['why']}")
    assert float(chosen["validation loss (nats)"]) == min(float(row["validation loss (nats)"]) for row in rows)
    assert 0 < float(chosen["ABX across (%)"]) < 100


def test_pictures_are_small_and_stand_alone(small_run, pages):
    home = RunFolder(small_run.folder).iteration(2)
    for name in ("loss", "abx"):
        address = pages.get(key_of(home, f"picture-{name}"))["data"]
        kind, _, content = address.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert len(address) <= MAX_PICTURE
        assert ET.fromstring(base64.b64decode(content)).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314


def test_all_of_an_iteration_stands_on_the_page_of_its_own_run(small_run, pages):
    home = RunFolder(small_run.folder).iteration(2)
    layer = json.loads(RunFolder(small_run.folder).outcome(1).read_text())["layer"]
    found = {key: one for key, one in pages.of_run(home).items() if one["type"] != "progress"}
    assert len(found) >= 2 * len(STAGES)
    assert {pages.flow_of(artifact["flow_run_id"]) for artifact in found.values()} == {
        (f"{small_run.folder.name} it2 layer {layer}", "hubert-iteration")
    }


def test_the_overview_says_how_far_each_stage_is_and_links_to_all_the_rest(small_run, pages):
    home = RunFolder(small_run.folder).iteration(1)
    found = pages.of_run(home)
    text = found[key_of(home, "overview")]["data"]
    for name in STAGES:
        page = found[key_of(home, name)]
        assert f"/artifacts/artifact/{page['id']}) | done | {page['description']} |" in text
    for name in ("checkpoints", "picture-loss", "picture-abx"):
        assert f"/artifacts/artifact/{found[key_of(home, name)]['id']})" in text
    for name in ("mlflow", "mlflow-checkpoints"):
        assert pages.get(key_of(home, f"{name}-{training_of(home)}"))["data"] in text


def training_of(home):
    """Return the key of an iteration's only training."""
    (folder,) = home.glob("train-*")
    return folder.name.removeprefix("train-")


def test_links_lead_to_the_training_and_its_checkpoints(small_run, pages, service):
    mlflow.set_tracking_uri(service.settings.mlflow_url)
    home = RunFolder(small_run.folder).iteration(1)
    links = {
        name: pages.get(key_of(home, f"{name}-{training_of(home)}"))["data"]
        for name in ("mlflow", "mlflow-checkpoints")
    }
    addresses = {name: re.search(r"\((http://.+)\)", text)[1] for name, text in links.items()}
    for address in addresses.values():
        assert httpx.get(address).is_success
    experiment, run = re.search(r"experiments/(\d+)/runs/(\w+)", addresses["mlflow"]).groups()
    found = mlflow.MlflowClient().get_run(run)
    assert (found.info.experiment_id, found.data.tags["run"]) == (experiment, str(small_run.folder))
    assert f"/experiments/{experiment}/models" in addresses["mlflow-checkpoints"]


# While a stage runs -----------------------------------------------------------------------------------------------


def test_while_a_stage_runs_its_bar_moves_and_the_dask_dashboard_answers(pages, tmp_path):
    stage = GatedStage(tmp_path, 2)
    cluster = write_cluster(tmp_path / "one worker.yaml")
    wishes = {"folder": str(tmp_path), "num_shards": 2, "cluster": str(cluster)}
    process = start_flow(GATED, wishes, pages.environment, tmp_path / "log")
    try:
        bar = wait_for(process, lambda: pages.find(key={"any_": [key_of(tmp_path, "gated-progress")]}))
        assert next(iter(bar.values()))["data"] == 0
        (link,) = pages.find(key={"any_": [key_of(tmp_path, "dask")]}).values()
        address = re.search(r"\((http://127\.0\.0\.1:.+)\)", link["data"])[1]
        assert httpx.get(address, follow_redirects=True).is_success
        (tmp_path / "open-0").touch()
        key = key_of(tmp_path, "gated-progress")
        half = wait_for(process, lambda: (found := pages.get(key))["data"] == 50 and found)
        assert half["description"].startswith("1 of 2 shards, ")
        assert half["description"].endswith(" left")
    finally:
        (tmp_path / "open-all").touch()
        process.wait(120)
    assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    assert pages.get(key)["description"].startswith("all 2 shards, in ")
    assert stage.done()


def wait_for(process, look):
    """Return what a look finds as soon as it is something."""
    while not (found := look()):
        assert process.poll() is None, "the flow ended before"
        time.sleep(0.2)
    return found


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_two_iterations_of_two_runs_at_once_on_one_service_do_not_mix(pages, service, small_corpus, tmp_path):
    """The names differ in letters that Prefect's keys do not have."""
    recipe = write_recipe(tmp_path / "small.toml")
    names = ("My_Run", "my.run")
    shared = {"recipe": str(recipe), "data": str(small_corpus), "iteration": 1}
    wishes = {name: {**shared, "run": str(tmp_path / name)} for name in names}
    flows = [start_flow(ITERATION, wish, pages.environment, tmp_path / f"{name}.log") for name, wish in wishes.items()]
    assert [flow.wait(800) for flow in flows] == [0, 0]

    mlflow.set_tracking_uri(service.settings.mlflow_url)
    client = mlflow.MlflowClient()
    for name, other in (names, names[::-1]):
        folder, strange = tmp_path / name, str(tmp_path / other)
        home = RunFolder(folder).iteration(1)
        found = pages.of_run(folder)
        assert {key_of(home, stage) for stage in STAGES} <= set(found)
        assert {pages.root_of(artifact["flow_run_id"]) for artifact in found.values()} == {f"{name} it1 MFCC"}
        assert not [key for key, artifact in found.items() if strange in json.dumps(artifact)]
        (experiment,) = client.search_experiments(filter_string=f"tags.run = '{folder}'")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.data.tags["run"] == str(folder)
        models = mlflow.search_logged_models([experiment.experiment_id], output_format="list")
        assert sorted(model.params["step"] for model in models) == ["12", "4", "8"]
        assert all(model.tags["checkpoint_path"].startswith(f"{folder}/") for model in models)
        assert not [path for path in folder.rglob("*.json") if strange in path.read_text()]


# Keys and words ---------------------------------------------------------------------------------------------------


def test_keys_are_what_prefect_takes_and_no_two_runs_share_one():
    places = (
        "/a/run",
        "/a/Run",
        "/a/r_un",
        "/a/r-un",
        "/b/run",
        "/a/rün",
        "/a/größer",
        "/a/" + 90 * "x",
        "/a/" + 91 * "x",
    )
    homes = [path for place in places for path in (Path(place), Path(place) / "it1", Path(place) / "it12")]
    keys = [key_of(home, "units") for home in homes]
    assert len(set(keys)) == len(homes)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key) for key in keys)


def test_progress_is_said_in_files_hours_speed_and_time_left():
    amounts = Amounts("files", [1000, 204, 8666], [36_000.0, 8_280.0, 308_520.0])
    progress = Progress(amounts, done=[0])
    progress.look(100.0, [0])
    assert progress.describe() == "1,000 of 9,870 files, 10.0 of 98.0 h of audio"
    progress.look(117.25, [1])
    assert (
        progress.describe() == "1,204 of 9,870 files, 12.3 of 98.0 h of audio, 480 s of audio per s, 10 min 43 s left"
    )
    assert progress.percent == pytest.approx(100 * 44_280 / 352_800)
    progress.look(760.0, [0, 1, 2])
    assert progress.percent == 100
    assert progress.describe_end() == "all 9,870 files, 98.0 h of audio, in 11 min 00 s"


def test_time_without_a_worker_slows_nothing_down():
    pace = Pace()
    pace.look(0.0, 0.0)
    pace.look(1000.0, 0.0, at_work=False)
    pace.look(1010.0, 50.0)
    assert pace.rate == 5.0


def test_speed_is_that_of_the_last_minutes():
    pace = Pace()
    for minute in range(60):
        pace.look(60.0 * minute, 60.0 * minute)
    for minute in range(60, 72):
        pace.look(60.0 * minute, 60.0 * 59 + 6.0 * (minute - 59))  # nine of ten workers are lost
    assert pace.rate == pytest.approx(0.1)


def test_the_time_left_is_right_where_a_shard_takes_longer_than_the_window():
    pace = Pace()
    for now in range(0, 9001, 60):
        pace.look(now, now // 1800)
        assert pace.rate == (pytest.approx(1 / 1800) if now >= 1800 else None)


def test_the_time_left_is_right_where_all_workers_end_at_once():
    pace = Pace()
    for now in range(0, 6001, 60):
        pace.look(now, 16 * (now // 1200))
        assert pace.rate == (pytest.approx(16 / 1200) if now >= 1200 else None)


def test_work_that_stalls_takes_longer_by_and_by():
    pace = Pace()
    for now in range(0, 601, 60):
        pace.look(now, now)
    pace.look(1200, 600)
    assert pace.rate == pytest.approx(600 / 1140)


def test_what_shards_hold_follows_from_the_plan_and_the_lengths_of_the_files(tmp_path):
    pl.DataFrame({"num_samples": [16_000, 32_000, 48_000]}).write_parquet(tmp_path / "rows.parquet")
    pl.DataFrame({"num_samples": pl.Series([None, 16_000], dtype=pl.Int64)}).write_parquet(tmp_path / "unknown.parquet")
    plan = Plan([{"start": 0, "end": 2}, {"start": 2, "end": 3}])
    stage = GatedStage(tmp_path, 2)
    assert measure(stage, plan) == Amounts("shards", [1, 1])
    stage.tables = lambda: {"": tmp_path / "rows.parquet"}
    assert measure(stage, plan) == Amounts("shards", [2, 1], [3.0, 3.0])
    stage.tables = lambda: {"": tmp_path / "unknown.parquet"}
    assert measure(stage, Plan([{"start": 0, "end": 2}])) == Amounts("shards", [2])


def test_a_receipt_counts_when_it_comes_and_an_old_one_when_it_is_written_anew(tmp_path):
    write_json(tmp_path / "receipts" / "00001.json", {"plan": "old"})
    receipts = Receipts(tmp_path, [1, 2])
    assert receipts.new() == set()
    write_json(tmp_path / "receipts" / "00002.json", {})
    assert receipts.new() == {2}
    write_json(tmp_path / "receipts" / "00001.json", {})
    assert receipts.new() == {1, 2}


def test_a_page_that_prefect_does_not_take_costs_no_work(tmp_path, pages, monkeypatch):
    """A stage ends well although none of its artifacts is accepted."""
    (tmp_path / "open-all").touch()
    code = f"import tasks.page.prefect_client, httpx\ntasks.page.prefect_client.get_client = lambda **_: (_ for _ in ()).throw(httpx.ConnectError('gone'))\n{GATED}"
    cluster = write_cluster(tmp_path / "one worker.yaml")
    wishes = {"folder": str(tmp_path), "num_shards": 1, "cluster": str(cluster)}
    run_flow(code, wishes, pages.environment, tmp_path / "log")
    assert GatedStage(tmp_path, 1).done()
    assert "page does not show" in (tmp_path / "log").read_text()
