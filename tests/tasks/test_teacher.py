"""Who chooses the teacher: the service, a person in MLflow's registry, a person in Prefect's form; against the real servers."""

import threading
import time
from pathlib import Path

import mlflow
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

from hubert.core.errors import ConfigError, DataError, TransientError
from hubert.core.files import read_json
from hubert.evaluation.checkpoints import ALIAS, ANSWER, FORM, SERVICE
from tasks.service.follow import start_run
from tasks.service.prefect_api import connect
from tasks.tracking.registry import ANSWERED_LAYER, find_registered, look_up, persons_pick, register
from tests.flows.asking import asking
from tests.support.offered import write_offered
from tests.support.toy import write_material
from tests.tasks.tracking.test_tracking import client, tracker_of, use  # noqa: F401  (`client` is a fixture)
from tools.ports import free_ports

POLL_SECONDS = 0.2


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    data, recipe = write_material(tmp_path_factory.mktemp("choose"))
    return {"recipe": str(recipe), "data": str(data)}


@pytest.fixture
def prefect(service):
    settings = service.settings
    with temporary_settings({PREFECT_API_URL: settings.api_url, PREFECT_UI_URL: settings.ui_url}):
        yield


@pytest.fixture
def registered(client, tmp_path):  # noqa: F811
    """An iteration whose checkpoints are versions 1 to 3 of a registered model; the service has set the aliases."""
    offered = write_offered(tmp_path / f"run {tmp_path.name}")
    log(offered)
    return offered


def log(offered, best=None):
    """Do what the service does at the end of an iteration."""
    tracker = tracker_of(offered)
    entries = tracker.log_checkpoints(offered.checkpoints)
    register(tracker, 1, offered.checkpoints, entries, best or offered.outcome)


def model_of(client, offered):  # noqa: F811
    return find_registered(client, offered.folder, 1)


def aliases(client, offered):  # noqa: F811
    return {name: str(version) for name, version in model_of(client, offered).aliases.items()}


def outcome_at(offered, index):
    checkpoint = offered.checkpoints[index]
    return offered.outcome.__class__(
        1, checkpoint.checkpoint, checkpoint.sha256, checkpoint.step, checkpoint.layer, "abx", "other items"
    )


def settle(offered, material, **wishes):
    """Run the beginning of iteration 2; returns what it wrote down."""
    asking(run=str(offered.folder.root), **material, **wishes)
    return read_json(offered.folder.choice(2))


# The registry -----------------------------------------------------------------------------------------------------


def test_every_checkpoint_is_a_version_with_its_figures_and_the_service_sets_both_aliases(client, registered):  # noqa: F811
    log(registered)  # a second time
    model = model_of(client, registered)
    assert set(model.name) <= set("run-test_every_checkpoint_is_a_version0-it1_abcdefghijklmnopqrstuvwxyz0123456789.+")
    versions = {version.version: version.tags for version in client.search_model_versions(f"name = '{model.name}'")}
    assert {str(number): tags["step"] for number, tags in versions.items()} == {"1": "4", "2": "8", "3": "12"}
    best = next(tags for tags in versions.values() if tags["step"] == "12")
    assert (best["validation_loss"], best["abx_across"], best["layer"]) == ("3.988 nats", "20.00 %", "2")
    assert aliases(client, registered) == {"best": "3", "teacher": "3"}
    assert persons_pick(registered.folder, 1) is None


def test_the_service_moves_teacher_with_best_until_a_person_has_moved_it(client, registered):  # noqa: F811
    log(registered, outcome_at(registered, 1))
    assert aliases(client, registered) == {"best": "2", "teacher": "2"}
    name = model_of(client, registered).name
    client.set_registered_model_alias(name, "teacher", 1)
    log(registered)
    assert aliases(client, registered) == {"best": "3", "teacher": "1"}
    pick = persons_pick(registered.folder, 1)
    assert (pick.sha256, pick.by) == (registered.checkpoints[0].sha256, ALIAS)
    client.delete_registered_model_alias(name, "teacher")  # gives the choice back
    assert persons_pick(registered.folder, 1) is None
    log(registered)
    assert aliases(client, registered) == {"best": "3", "teacher": "3"}


def test_a_model_that_was_renamed_is_still_found(client, registered):  # noqa: F811
    name = model_of(client, registered).name
    client.rename_registered_model(name, f"my {name}")
    client.set_registered_model_alias(f"my {name}", "teacher", 2)
    log(registered)
    assert aliases(client, registered) == {"best": "3", "teacher": "2"}


def test_an_entry_is_named_by_alias_version_or_id(client, registered):  # noqa: F811
    name = model_of(client, registered).name
    client.set_registered_model_alias(name, "mine", 1)
    first = registered.checkpoints[0]
    entry = client.get_model_version(name, "1").source
    for teacher in (f"models:/{name}@mine", f"models:/{name}/1", entry):
        pick = look_up(teacher, None)
        assert (pick.checkpoint, pick.sha256, pick.layer, pick.by) == (first.checkpoint, first.sha256, 2, FORM)
        assert teacher in pick.why
        assert "step 4 of iteration 1" in pick.why
        assert look_up(teacher, 1).layer == 1


def test_a_version_that_was_registered_by_hand_elsewhere_counts_too(client, registered):  # noqa: F811
    source = client.get_model_version(model_of(client, registered).name, "2").source
    mlflow.register_model(source, "by-hand")
    assert look_up("models:/by-hand/1", None).sha256 == registered.checkpoints[1].sha256


def test_what_mlflow_does_not_have_is_refused_with_what_it_has(client, registered):  # noqa: F811
    name = model_of(client, registered).name
    wrong = {
        "models:/no-such@teacher": rf"no registered model 'no-such'; it has: .*{name}",
        f"models:/{name}@nobody": r"has no alias 'nobody'; versions: 1 \(step 4\), 2 \(step 8\), 3 \(step 12\); aliases: best = 3",
        f"models:/{name}/9": r"has no version 9; versions: 1 \(step 4\)",
        "models:/m-0123456789abcdef0123456789abcdef": "no entry m-0123",
        f"models:/{name}/first": "expected models:/NAME@ALIAS",
        f"models:/{name}": "no entry",
    }
    for teacher, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            look_up(teacher, None)


def test_a_checkpoint_that_has_changed_or_gone_is_refused(client, registered):  # noqa: F811
    name = model_of(client, registered).name
    folder = Path(registered.checkpoints[0].checkpoint)
    other = Path(registered.checkpoints[1].checkpoint) / "model.safetensors"
    (folder / "model.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(DataError, match="replaced or moved"):
        look_up(f"models:/{name}/1", None)
    folder.rename(folder.with_name("away"))
    with pytest.raises(ConfigError, match=r"step 4 of iteration 1\): its folder .* does not exist"):
        look_up(f"models:/{name}/1", None)


# What an iteration starts from ------------------------------------------------------------------------------------


def test_the_next_iteration_obeys_whom_it_should(client, registered, material, prefect, monkeypatch):  # noqa: F811
    best, first = registered.checkpoints[-1], registered.checkpoints[0]
    choice = settle(registered, material)
    assert (choice["by"], choice["source"]["sha256"]) == (SERVICE, best.sha256)
    assert "lowest validation loss; layer 2: lowest ABX" in choice["why"]

    name = model_of(client, registered).name
    client.set_registered_model_alias(name, "teacher", 1)
    choice = settle(registered, material)
    assert (choice["by"], choice["source"]["sha256"], choice["source"]["layer"]) == (ALIAS, first.sha256, 2)
    assert f"a person gave the alias `teacher` of {name} to version 1 (step 4 of iteration 1)" in choice["why"]

    choice = settle(registered, material, layer=1)
    assert (choice["by"], choice["source"]["sha256"], choice["source"]["layer"]) == (FORM, first.sha256, 1)
    choice = settle(registered, material, teacher=f"models:/{name}/2")
    assert (choice["by"], choice["source"]["sha256"]) == (FORM, registered.checkpoints[1].sha256)
    choice = settle(registered, material, teacher=f"{registered.folder.root}/it1/step-00000012")
    assert (choice["by"], choice["source"]["sha256"]) == (FORM, best.sha256)

    settle(registered, material)
    use(monkeypatch, f"http://127.0.0.1:{free_ports(1)[0]}")
    choice = settle(registered, material)  # begun with a person's choice, which is not lost with the server
    assert (choice["by"], choice["source"]["sha256"]) == (ALIAS, first.sha256)
    assert "MLflow did not answer" in choice["why"]
    registered.folder.choice(2).unlink()
    choice = settle(registered, material)  # not begun
    assert (choice["by"], choice["source"]["sha256"]) == (SERVICE, best.sha256)
    assert "MLflow did not answer, so a choice made there is not seen" in choice["why"]
    with pytest.raises(TransientError, match="MLflow does not answer"):
        settle(registered, material, teacher=f"models:/{name}@teacher")


# The form ---------------------------------------------------------------------------------------------------------


def wait_for_state(api, run_id, name, after=None):
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        (run,) = api.post("/flow_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
        state = run["state"]
        if state["name"] == name and state["id"] != (after or {}).get("id"):
            return state
        assert state["type"] not in {"FAILED", "CRASHED"}, state["message"]
        time.sleep(POLL_SECONDS)
    raise AssertionError(f"still {state['name']}")


def read_form(api, run_id, state):
    """Return schema and description of what a paused run asks for; the form follows the state by a moment."""
    keys = state["state_details"]["run_input_keyset"]
    for _ in range(50):
        answer = api._client.get(f"/flow_runs/{run_id}/input/{keys['description']}")
        if answer.is_success:
            return api._client.get(f"/flow_runs/{run_id}/input/{keys['schema']}").json(), answer.json()
        time.sleep(POLL_SECONDS)
    raise AssertionError("no form")


def resume(api, run_id, **answer):
    return api.post(f"/flow_runs/{run_id}/resume", {"run_input": answer})


def test_a_deployed_run_is_suspended_offers_scores_and_obeys_the_answer(client, registered, material, prefect, service):  # noqa: F811
    with connect(service.settings.api_url) as api:
        wishes = {"run": str(registered.folder.root), **material, "choose": "ask"}
        run_id = start_run(api, "asking", "local", wishes)
        schema, description = read_form(api, run_id, wait_for_state(api, run_id, "Suspended"))
        checkpoints, layers = (schema["properties"][name] for name in ("checkpoint", "layer"))
        assert checkpoints["enum"][0] == "step 4: validation loss 3.996 nats, masked accuracy 10.4 %"
        assert checkpoints["default"] == checkpoints["enum"][2]
        assert layers["enum"][1:] == [
            "layer 1: ABX within 11.00 %, ABX across 21.00 %, PNMI 0.100",
            "layer 2: ABX within 10.00 %, ABX across 20.00 %, PNMI 0.200",
        ]
        assert "| 12 | 3.988 | 11.2 | 2 | 10.00 | 20.00 |" in description
        refused = resume(api, run_id, checkpoint="step 5", layer=layers["enum"][1])
        assert (refused["status"], "step 5" in refused["details"]["reason"]) == ("REJECT", True)
        resume(api, run_id, checkpoint=checkpoints["enum"][1], layer=layers["enum"][1])
        wait_for_state(api, run_id, "Completed")
    choice = read_json(registered.folder.choice(2))
    second = registered.checkpoints[1]
    assert (choice["by"], choice["source"]["sha256"], choice["source"]["layer"]) == (ANSWER, second.sha256, 1)
    assert choice["why"] == "a person answered: step 8 of iteration 1; layer 1: as was given"
    model = model_of(client, registered)
    assert (str(model.aliases["teacher"]), model.tags[ANSWERED_LAYER]) == ("2", "2:1")

    assert settle(registered, material, choose="ask") == choice  # another start of the same work asks nobody
    choice = settle(registered, material)  # and `auto` obeys the answer, as the alias shows it
    assert (choice["by"], choice["source"]["sha256"], choice["source"]["layer"]) == (ALIAS, second.sha256, 1)


def test_a_run_without_a_deployment_waits_and_asks_again_for_what_cannot_be_obeyed(
    client,  # noqa: F811
    registered,
    material,
    service,
    monkeypatch,
):
    monkeypatch.setattr("tasks.teacher.POLL_SECONDS", POLL_SECONDS)
    client.set_registered_model_alias(model_of(client, registered).name, "teacher", 1)
    with connect(service.settings.api_url) as api:
        thread = threading.Thread(target=settle_there, args=(registered, material, service))
        thread.start()
        run_id = wait_for_run(api, registered.folder.root)
        first = wait_for_state(api, run_id, "Paused")
        schema, description = read_form(api, run_id, first)
        checkpoints = schema["properties"]["checkpoint"]
        assert checkpoints["default"] == checkpoints["enum"][0]
        assert "a person gave the alias `teacher`" in description

        folder = Path(registered.checkpoints[1].checkpoint)
        folder.rename(folder.with_name("away"))
        assert resume(api, run_id, checkpoint=checkpoints["enum"][1])["status"] == "ACCEPT"
        second = wait_for_state(api, run_id, "Paused", after=first)
        _, description = read_form(api, run_id, second)
        assert description.startswith("The last answer cannot be obeyed: ")
        assert str(folder) in description
        assert resume(api, run_id)["status"] == "ACCEPT"  # the proposal, without a change
        thread.join()
    choice = read_json(registered.folder.choice(2))
    assert (choice["by"], choice["source"]["sha256"]) == (ANSWER, registered.checkpoints[0].sha256)


def settle_there(registered, material, service):
    settings = service.settings
    with temporary_settings({PREFECT_API_URL: settings.api_url, PREFECT_UI_URL: settings.ui_url}):
        settle(registered, material, choose="ask")


def wait_for_run(api, root):
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        for run in api.post("/flow_runs/filter", {"flow_runs": {"state": {"name": {"any_": ["Paused"]}}}}):
            if run["parameters"].get("run") == str(root):
                return run["id"]
        time.sleep(POLL_SECONDS)
    raise AssertionError("no paused run")
