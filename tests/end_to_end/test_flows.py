"""The flows against real Prefect, Dask and MLflow servers: a whole run, a second start, changes, and a kill."""

import json
import shutil

import mlflow
import polars as pl
import pytest

from hubert.core.files import read_json
from hubert.core.paths import RunFolder
from hubert.data.split import select_sample
from tasks.service.settings import environment as service_environment
from tasks.tracking.registry import find_registered
from tests.support.flow_runs import (
    ITERATION,
    PRETRAINING,
    finished_folders,
    kill_flow_when,
    newest_run,
    run_flow,
    task_runs,
)
from tests.support.outputs import assert_equal_runs
from tests.support.small import write_bad_files, write_cluster


@pytest.fixture(scope="module")
def environment(service):
    return service_environment(service.settings)


@pytest.fixture(scope="module")
def corpus(small_corpus):
    return small_corpus


@pytest.fixture(scope="module")
def parameters(small_run):
    """Two iterations of the small recipe; on one worker, while the small run had as many as there are cores."""
    return {**small_run.parameters, "cluster": str(write_cluster(small_run.folder.with_name("one worker.yaml")))}


@pytest.fixture(scope="module")
def finished(small_run):
    """A finished run; the folder."""
    return small_run.folder


@pytest.mark.timeout(900)
def test_a_folder_of_speech_becomes_two_iterations_a_choice_and_a_report(finished):
    assert (finished / "report.html").exists()
    for number in (1, 2):
        outcome = json.loads((finished / f"it{number}" / "outcome.json").read_text())
        assert outcome["layer"] in (1, 2)
        assert outcome["rule"] == "abx"
    choice = json.loads((finished / "it2" / "choice.json").read_text())
    first = json.loads((finished / "it1" / "outcome.json").read_text())
    assert choice["source"]["sha256"] == first["sha256"]


def test_a_second_start_of_a_finished_run_does_no_work_and_all_tasks_are_cached(finished, parameters, environment):
    before = finished_folders(finished)
    first = newest_run(environment, finished)
    run_flow(PRETRAINING, parameters, environment, finished.parent / "second.log")
    assert finished_folders(finished) == before
    second = newest_run(environment, finished)
    assert second != first
    states = {name.split("#")[0]: state for name, state in task_runs(environment, second).items()}
    subflows = {"hubert-iteration-0", "hubert-iteration-1", "label-0", "codebook-0", "training-0", "evaluation-0"}
    tasks = {name: state for name, state in states.items() if name not in subflows}
    assert len(tasks) >= 20
    assert set(tasks.values()) == {"Cached"}, tasks


def test_changing_abx_alone_scores_again_and_writes_the_report_again_and_nothing_else(
    finished, parameters, environment
):
    before = finished_folders(finished)
    changed = {**parameters, "overrides": {"abx": {"max_size_group": 5}}, "iteration": 1}
    run_flow(ITERATION, changed, environment, finished.parent / "abx.log")
    fresh = {name.rpartition("-")[0] for name, when in finished_folders(finished).items() if before.get(name) != when}
    assert fresh == {"it1/abx", "it1/report"}


@pytest.mark.timeout(900)
def test_a_file_that_is_added_relabels_only_the_shards_whose_rows_changed(environment, tmp_path, corpus, parameters):
    data, run, log = tmp_path / "data", tmp_path / "grown", tmp_path / "log"  # MLflow's experiment has the run's name
    shutil.copytree(corpus, data)
    overrides = {"kmeans": {"sample_fraction": 0.5, "min_sample_files": 1}, "train": {"steps": 4, "log_interval": 4}}
    overrides |= {"abx": {"item": ""}, "quality": {"alignments": ""}, "units": {"shard_hours": 0.003}}
    wanted = {**parameters, "run": str(run), "data": str(data), "iteration": 1, "overrides": overrides}
    run_flow(ITERATION, wanted, environment, log)
    before = finished_folders(run)

    source = min((data / "train").rglob("*.flac"))
    shutil.copy2(source, source.with_name(f"{name_outside_the_sample(source.parent, 0.5)}.flac"))
    run_flow(ITERATION, wanted, environment, log)
    new = {name.rpartition("-")[0]: run / name for name in finished_folders(run).keys() - before.keys()}
    assert set(new) == {"manifest", "it1/units", "it1/train", "it1/validate", "it1/report"}  # no features, no codebook

    (old,) = [run / name for name in before if name.startswith("it1/units")]
    known = {spec["digest"] for spec in read_json(old / "plan.json")["shards"]}
    units = new["it1/units"]
    specs = read_json(units / "plan.json")["shards"]
    receipts = [read_json(units / "receipts" / f"{index:05d}.json") for index in range(len(specs))]
    assert [bool(receipt["adopted_from"]) for receipt in receipts] == [spec["digest"] in known for spec in specs]
    assert 1 <= sum(not receipt["adopted_from"] for receipt in receipts) < len(receipts) / 2


def name_outside_the_sample(folder, fraction):
    """Return a file name whose id the k-means sample does not draw; `folder` is a speaker's, below the part's."""
    names = [f"extra-{number}" for number in range(20)]
    ids = [f"{folder.name}/{name}" for name in names]
    rows = pl.DataFrame({"fileid": ids, "num_samples": [16_000] * len(ids)})
    drawn = select_sample(rows, fraction=fraction, min_files=1)["fileid"].to_list()
    return next(name for name, fileid in zip(names, ids, strict=True) if fileid not in drawn)


def test_the_losses_of_each_training_and_every_checkpoint_are_in_mlflow_once(finished, service):
    mlflow.set_tracking_uri(service.settings.mlflow_url)
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string=f"tags.run = '{finished}'")
    runs = mlflow.search_runs([experiment.experiment_id], output_format="list")
    assert {run.info.run_name for run in runs} == {"it1/train", "it2/train"}
    for run in runs:
        history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
        assert [metric.step for metric in history] == [2, 4, 6, 8, 10, 12]
        models = mlflow.search_logged_models(
            [experiment.experiment_id], f"source_run_id = '{run.info.run_id}'", output_format="list"
        )
        assert sorted(model.params["step"] for model in models) == ["12", "4", "8"]
        assert all(
            {"validation_loss", "masked_accuracy"} <= {metric.key for metric in model.metrics} for model in models
        )
        scored = [model for model in models if "abx_across" in {metric.key for metric in model.metrics}]
        registered = find_registered(client, RunFolder(finished), int(run.data.tags["iteration"]))
        best = client.get_model_version_by_alias(registered.name, "best")
        assert [f"models:/{model.model_id}" for model in scored] == [best.source]
        paths = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"report.html", "report.json", "checkpoints.csv", "resolved.toml", "choice.json", "plots"} == paths
        plots = {file.path for file in client.list_artifacts(run.info.run_id, "plots")}
        assert {"plots/loss.svg", "plots/abx.svg", "plots/heat.svg"} <= plots
        assert (
            f"/runs/flow-run/{run.data.tags['prefect_run'].rpartition('/')[2]}" in run.data.tags["mlflow.note.content"]
        )


@pytest.mark.timeout(900)
def test_a_flow_that_is_killed_while_it_trains_goes_on_and_ends_like_an_undisturbed_one(
    finished, parameters, environment
):
    run = finished.parent / "killed"
    killed = {**parameters, "run": str(run), "iteration": 1, "cluster": "local"}  # equal to the bit: on as many workers
    log = finished.parent / "killed.log"
    at_work = lambda: bool([*run.glob("it1/train-*/step-00000004")])  # noqa: E731
    assert kill_flow_when(at_work, ITERATION, killed, environment, log)
    run_flow(ITERATION, killed, environment, log)
    assert_equal_runs(run, finished)


def test_bad_files_are_named_and_stop_the_run_unless_more_may_be_rejected(environment, tmp_path, corpus, parameters):
    data = tmp_path / "data with, odd ñame"
    (data / "train").mkdir(parents=True)
    (data / "val").symlink_to(corpus / "val")
    for path in sorted((corpus / "train").rglob("*.flac")):
        (data / "train" / path.name).write_bytes(path.read_bytes())
    bad = write_bad_files(data / "train")
    overrides = {"abx": {"item": ""}, "quality": {"alignments": ""}}
    wanted = {**parameters, "run": str(tmp_path / "run"), "data": str(data), "iteration": 1, "overrides": overrides}
    log = tmp_path / "log"
    with pytest.raises(AssertionError) as failure:
        run_flow(ITERATION, wanted, environment, log)
    message = str(failure.value)
    assert "max_rejected" in message
    assert all(path.name in message for path in bad)

    wanted["overrides"] = {**overrides, "data": {"max_rejected": 0.5}}
    run_flow(ITERATION, wanted, environment, log)
    (manifest,) = [path for path in (tmp_path / "run").glob("manifest-*") if (path / "done.json").exists()]
    rejected = pl.read_parquet(manifest / "rejected.parquet")
    assert sorted(rejected["path"]) == sorted(str(path) for path in bad)
    assert all(rejected["reason"])
