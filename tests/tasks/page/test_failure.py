"""What a failed run says: the real flows, failing, and the page that they leave."""

import os
import signal
import time
from types import SimpleNamespace

import psutil
import pytest
from distributed.protocol import deserialize, serialize

from hubert.core.errors import ConfigError, DataError, TrainingCancelled, TrainingDiverged, TransientError
from tasks.page.failure import WENT_ON, WHAT_FAILED, advise, facts_of, key_of_page, noting
from tasks.service.follow import read_family, start_run
from tasks.service.prefect_api import connect
from tests.support.small import write_cluster
from tests.support.toy import hubert, write_material

POLL_SECONDS = 0.2
ENDED = {"FAILED", "CRASHED", "COMPLETED"}


def wait_for(check, what):
    deadline = time.monotonic() + 200
    while not (found := check()):
        assert time.monotonic() < deadline, f"{what}: never"
        time.sleep(POLL_SECONDS)
    return found


def wait_for_end(api, run_id):
    (run,) = wait_for(
        lambda: [run for run in read_family(api, run_id)[:1] if run["state_type"] in ENDED], f"the end of {run_id}"
    )
    return run


def wait_for_page(api, run_id):
    """Return the markdown: written by the run's own process, or by the worker a moment after the run has ended."""
    (page,) = wait_for(lambda: pages_of(api, run_id), "the page")
    return page["data"]


def pages_of(api, run_id):
    found = api.post("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run_id]}}})
    return [page for page in found if (page["key"] or "").endswith(WHAT_FAILED)]


def damage(path):
    """Spoil the middle of a file; size and time stay, so the manifest cannot know."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[:40] = bytes(40)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.timeout(900)
def test_a_file_that_is_damaged_fails_on_a_worker_and_each_run_above_names_stage_shard_file_and_what_to_do(
    deployed, tmp_path
):
    data, recipe = write_material(tmp_path)
    run = tmp_path / "spoilt"
    code, _, err = hubert("manifest", run, "--recipe", recipe, "--data", data)
    assert code == 0, err
    spoilt = data / "train" / "train 7.wav"
    damage(spoilt)
    cluster = write_cluster(tmp_path / "one worker.yaml")
    wishes = {"run": str(run), "recipe": str(recipe), "data": str(data), "cluster": str(cluster)}
    with connect(deployed.settings.api_url) as api:
        run_id = start_run(api, "hubert-pretraining", "local", wishes)
        whole = wait_for_end(api, run_id)
        (iteration,) = [found for found in read_family(api, run_id) if "it1" in found["tags"]]
        pages = {found["id"]: wait_for_page(api, found["id"]) for found in (whole, iteration)}

    assert whole["state_type"] == "FAILED"
    assert whole["name"] == "spoilt, all iterations of small"
    assert iteration["name"] == "spoilt it1 MFCC"
    assert {"spoilt", "it1"} <= set(iteration["tags"])
    for found in (whole, iteration):
        message, page = found["state"]["message"], pages[found["id"]]
        for words in ("it1/features, shard", str(spoilt), "unusable"):
            assert words in message
            assert words in page.replace("\\", "")
        (folder,) = run.glob("it1/features-*")
        assert f"| folder | `{folder}` |" in page
        assert "[it1/features" in page
        assert "**Retry**" in page
        assert f"`prefect flow-run retry {run_id}`" in page  # of the run that was started, from the pages of both
        assert f"`hubert status {run}`" in page


@pytest.mark.timeout(900)
def test_a_flow_whose_process_is_killed_leaves_a_page_with_what_was_under_way(service, tmp_path):
    answer = tmp_path / "pids"
    with connect(service.settings.api_url) as api:
        run_id = start_run(api, "endless", "local", {"answer": str(answer)})
        pids = wait_for(lambda: answer.exists() and answer.read_text(), "the flow's start")
        for pid in map(int, pids.strip("[]").split(",")):
            psutil.Process(pid).send_signal(signal.SIGKILL)
        assert wait_for_end(api, run_id)["state_type"] == "CRASHED"
        page = wait_for_page(api, run_id)
    assert "crashed" in page
    assert "SIGKILL" in page
    assert "| under way | [wait" in page
    assert "**Retry**" in page


@pytest.mark.timeout(900)
def test_two_runs_have_pages_of_their_own_and_one_that_is_retried_and_ends_well_says_that_it_went_on(service, tmp_path):
    wishes = [{"run": str(tmp_path / name), "wanted": str(tmp_path / f"{name}.txt")} for name in ("first", "second")]
    with connect(service.settings.api_url) as api:
        first, second = (start_run(api, "faltering", "local", one) for one in wishes)
        for run_id in (first, second):
            assert "DataError" in wait_for_page(api, run_id)
        (before,), (other,) = pages_of(api, first), pages_of(api, second)
        assert before["key"] != other["key"]

        (tmp_path / "first.txt").touch()
        assert wait_for_end(api, first)["state_type"] == "FAILED"
        retry = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the test"}
        api.post(f"/flow_runs/{first}/set_state", {"state": retry, "force": True})
        wait_for(lambda: WENT_ON in pages_of(api, first)[0]["data"], "the end of the retried run")
        assert [page["id"] for page in pages_of(api, first)] == [before["id"]]  # in its place, not beside it
        assert "DataError" in wait_for_page(api, second)


def test_the_key_of_a_failures_page_names_run_folder_and_iteration(tmp_path):
    runs = [SimpleNamespace(parameters={"run": str(tmp_path / name)}) for name in ("a/mine", "b/mine")]
    keys = {key_of_page(run, tags) for run in runs for tags in ((), ("mine", "it1"), ("mine", "it2"))}
    assert len(keys) == 6
    assert all(key.startswith("mine-") and key.endswith(WHAT_FAILED) for key in keys)


def test_what_is_noted_nearest_to_an_error_stands_and_travels_between_processes():
    def fail():
        with noting(stage="it2/units", shard=lambda: "3 (of 9)", folder="/runs/a"):
            raise DataError("x.wav: empty")

    with pytest.raises(DataError) as failure, noting(stage="it2/units", folder="/runs/b", log="/runs/b/log"):
        fail()
    error = deserialize(*serialize(failure.value))
    assert facts_of(error) == {"stage": "it2/units", "shard": "3 (of 9)", "folder": "/runs/a", "log": "/runs/b/log"}
    assert str(error) == "it2/units, shard 3 (of 9): x.wav: empty"


def test_what_explains_an_error_never_stands_in_its_place():
    with pytest.raises(OSError, match="disk") as failure, noting(stage="it1/kmeans", shard=lambda: 1 / 0):
        raise OSError(28, "disk full")
    assert failure.value.errno == 28
    assert facts_of(failure.value) == {"stage": "it1/kmeans", "shard": "unknown (division by zero)"}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConfigError(), "Copy to new run"),
        (DataError(), "data.max_rejected"),
        (TransientError(), "memory"),
        (TrainingDiverged(), "learning_rate"),
        (TrainingCancelled(), "last checkpoint"),
        (ZeroDivisionError(), "traceback"),
        (None, "process of the run is gone"),
    ],
)
def test_every_kind_of_failure_has_its_advice_with_the_button_or_without_a_deployment_in_words(error, words):
    assert words in " ".join(advise(error, {"id": "123", "deployment_id": "456"}))
    by_hand = " ".join(advise(error, {"id": "123", "deployment_id": None}))
    assert "**" not in by_hand
    assert "Start it" in by_hand
