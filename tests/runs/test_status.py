"""What `hubert status` says of a run in every state, and what `hubert prune` takes and leaves."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from hubert.core.errors import DataError, TransientError
from hubert.core.files import folder_size
from hubert.core.locks import find_holder
from hubert.core.outputs import prune_outputs
from hubert.core.paths import RunFolder
from hubert.runs.options import Wishes, settle
from hubert.runs.pipeline import Iteration
from hubert.runs.prune import STALE_SECONDS, find_prunable, remove_all
from hubert.runs.resolved import Resolved
from hubert.runs.status import Chain, format_status, read_folder, read_status
from tests.core.test_stage import SquaresStage
from tests.support.toy import CHAIN, hubert, write_material


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    """A finished iteration."""
    data, recipe = material
    folder = RunFolder.of(str(tmp_path_factory.mktemp("runs") / "toy"))
    iteration = Iteration(settle(Wishes(str(folder.root), recipe=str(recipe), data=str(data))))
    for stage in CHAIN[:-1]:
        getattr(iteration, stage).run()
    iteration.outcome().save(folder)
    iteration.report.run()
    return folder


def fresh(folder: RunFolder):
    """The iteration as a new process sees it."""
    return Iteration(Resolved.load(folder.settings(1)))


def states(folder: RunFolder) -> dict[str, str]:
    (iteration,) = read_status(folder).iterations
    return {stage.name: stage.state for stage in iteration.stages}


# Status of a stage's folder ---------------------------------------------------------------------------------------


def test_a_folder_counts_the_shards_that_are_there(tmp_path):
    stage = SquaresStage(tmp_path, (1, 2, 3, 4))
    assert read_folder(stage.folder).state == "missing"
    plan = stage.plan()
    for index in (0, 3):
        stage.run_shard(index, plan)
    status = read_folder(stage.folder)
    assert (status.state, status.num_done, status.num_shards, status.detail) == ("partial", 2, 4, "2 of 4 shards")
    next((stage.folder / "shards").iterdir()).unlink()  # a receipt without its output counts for nothing
    assert read_folder(stage.folder).num_done == 1
    stage.run()
    status = read_folder(stage.folder)
    assert (status.state, status.bytes) == ("done", folder_size(stage.folder))
    assert status.finished_at


def _hold(folder, ready, release):
    stage = SquaresStage(folder, (1, 2))
    with stage.lock():
        stage.run_shard(0, stage.plan())
        ready.set()
        release.wait(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a stage's folder with one of two shards done."""
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready, release))
    process.start()
    assert ready.wait(60)
    yield process, SquaresStage(tmp_path, (1, 2))
    if process.is_alive():  # setting an event waits for those who wait for it, and one that was killed never answers
        release.set()
    process.join()


def test_a_folder_that_a_process_holds_is_running_and_says_which(holder):
    process, stage = holder
    status = read_folder(stage.folder)
    assert (status.state, status.num_done) == ("running", 1)
    assert f"process {process.pid}" in status.detail
    with pytest.raises(TransientError, match=str(process.pid)):
        prune_outputs(stage.folder, [])


def test_a_holder_that_was_killed_holds_nothing(holder):
    process, stage = holder
    process.kill()
    process.join()
    assert (stage.folder / "lock.json").exists()
    assert find_holder(stage.folder) is None
    assert read_folder(stage.folder).state == "partial"


# Pruned outputs ---------------------------------------------------------------------------------------------------


def shards_of(stage: SquaresStage) -> list[str]:
    return [f"shards/{path.name}" for path in sorted((stage.folder / "shards").iterdir())]


def test_a_stage_stays_done_without_what_was_pruned_unless_it_is_needed(tmp_path):
    stage = SquaresStage(tmp_path, (1, 22, 333))
    stage.run()
    names = shards_of(stage)
    assert prune_outputs(stage.folder, names[:2]) == sum(len(str(n * n)) for n in (1, 22, 333)) - folder_size(
        stage.folder / "shards"
    )
    again = SquaresStage(tmp_path, (1, 22, 333))
    assert again.run() == {"sum": 1 + 484 + 110889}
    assert again.worked == []
    again.accepts_pruned = False
    assert again.done() is None
    assert again.run() == {"sum": 1 + 484 + 110889}
    assert len(again.worked) == 2
    assert "pruned" not in json.loads((stage.folder / "done.json").read_text())


def test_pruned_outputs_that_are_still_there_count(tmp_path):
    """A prune that was killed after it had written done.json."""
    stage = SquaresStage(tmp_path, (1, 2))
    stage.run()
    names = shards_of(stage)
    kept = {name: (stage.folder / name).read_bytes() for name in names}
    prune_outputs(stage.folder, names)
    for name, content in kept.items():
        (stage.folder / name).write_bytes(content)
    stage.accepts_pruned = False
    assert stage.done() is not None
    assert prune_outputs(stage.folder, names) == sum(len(content) for content in kept.values())


def test_a_sister_folder_does_not_adopt_what_was_pruned(tmp_path):
    stage = SquaresStage(tmp_path, (1, 2))
    stage.run()
    prune_outputs(stage.folder, shards_of(stage)[:1])
    grown = SquaresStage(tmp_path, (1, 2, 3))
    assert grown.run() == {"sum": 14}
    assert len(grown.worked) == 2


def test_only_outputs_of_a_finished_stage_are_pruned(tmp_path):
    stage = SquaresStage(tmp_path, (1, 2))
    stage.run_shard(0, stage.plan())
    names = shards_of(stage)
    with pytest.raises(DataError, match="nothing was removed"):
        prune_outputs(stage.folder, names)
    stage.run()
    with pytest.raises(DataError, match="nothing was removed"):
        prune_outputs(stage.folder, ["done.json"])
    assert stage.done() is not None


# Status of a run --------------------------------------------------------------------------------------------------


def test_a_finished_run_is_done_with_times_sizes_and_outcome(finished):
    status = read_status(finished)
    (iteration,) = status.iterations
    assert {stage.name: stage.state for stage in iteration.stages} == {
        **dict.fromkeys(CHAIN, "done"),
        **dict.fromkeys(("abx", "quality"), "not in the recipe"),
    }
    assert all(stage.bytes and stage.seconds is not None for stage in iteration.stages if stage.state == "done")
    assert iteration.outcome.layer == 1
    assert status.bytes == folder_size(finished.root)
    assert status.other == []
    assert "outcome: step 12, layer 1" in format_status(status)


def test_status_as_json_holds_the_same(finished):
    code, said, _ = hubert("status", finished.root, "--json")
    assert code == 0
    content = json.loads(said)
    assert content["iterations"][0]["outcome"]["step"] == 12
    assert [stage["state"] for stage in content["iterations"][0]["stages"]].count("done") == len(CHAIN)


def test_without_a_run_the_runs_are_listed(finished, monkeypatch):
    monkeypatch.setenv("HUBERT_RUNS", str(finished.root.parent))
    assert json.loads(hubert("status", "--json")[1]) == ["toy"]


def test_stages_whose_inputs_are_missing_are_missing_and_nothing_is_written(material, tmp_path):
    data, recipe = material
    folder = RunFolder.of(str(tmp_path / "new"))
    iteration = Iteration(settle(Wishes(str(folder.root), recipe=str(recipe), data=str(data))))
    iteration.manifest.run()
    before = sorted(folder.root.rglob("*"))
    found = states(folder)
    assert found["manifest"] == "done"
    assert {found[stage] for stage in CHAIN[1:]} == {"missing"}
    assert sorted(folder.root.rglob("*")) == before
    assert Chain(fresh(folder)).missing("units") == "features"


def test_data_that_have_gone_are_a_problem_that_is_named(material, tmp_path):
    data, recipe = material
    moved = tmp_path / "data"
    shutil.copytree(data, moved)
    folder = RunFolder.of(str(tmp_path / "run"))
    Iteration(settle(Wishes(str(folder.root), recipe=str(recipe), data=str(moved)))).manifest.run()
    shutil.rmtree(moved)
    status = read_status(folder)
    assert str(moved) in status.iterations[0].problem
    assert [stage.name.split("-")[0] for stage in status.other] == ["manifest"]
    assert "problem:" in format_status(status)
    assert find_prunable(folder, old=True).removals == []


def test_more_steps_make_a_finished_training_partial(finished):
    settle(Wishes(str(finished.root), overrides=["train.steps=24"]))
    try:
        found = states(finished)
        assert (found["units"], found["train"], found["validate"]) == ("done", "partial", "missing")
    finally:
        settle(Wishes(str(finished.root), overrides=["train.steps=12"]))


# Prune ------------------------------------------------------------------------------------------------------------


def test_prune_lists_first_then_frees_the_sample_and_the_run_stays_done(finished):
    home = fresh(finished).features.folder
    before, sample = folder_size(finished.root), folder_size(home / "shards")
    code, said, _ = hubert("prune", finished.root)
    assert code == 0
    assert f"to free {sample / 1000:.0f} kB" in said
    assert folder_size(finished.root) == before

    assert hubert("prune", finished.root, "--yes")[0] == 0
    assert folder_size(home / "shards") == 0
    assert Chain(fresh(finished)).is_complete()
    assert states(finished)["features"] == "done"
    assert find_prunable(finished).removals == []

    other = Iteration(settle(Wishes(str(finished.root), overrides=["kmeans.num_units=10"])))
    try:
        assert Chain(other).missing("kmeans") == "features"  # another codebook needs the frames
        assert states(finished)["features"] == "partial"
        other.features.run()
        assert folder_size(home / "shards") == sample
        other.kmeans.run()
    finally:
        settle(Wishes(str(finished.root), overrides=["kmeans.num_units=20"]))
        shutil.rmtree(other.kmeans.folder)
    assert fresh(finished).kmeans.done() is not None


def test_an_unfinished_iteration_keeps_its_sample(finished):
    outcome = finished.outcome(1)
    content = outcome.read_text()
    outcome.unlink()
    try:
        assert [one.kind for one in find_prunable(finished).removals if one.kind == "samples"] == []
    finally:
        outcome.write_text(content)


def test_all_but_the_last_two_states_can_go_and_the_training_stays_done(finished):
    train = fresh(finished).train
    checkpoints = sorted(train.folder.glob("step-*"))
    assert len(checkpoints) == 3
    extra = checkpoints[0] / "state.pt"
    assert not extra.exists()  # the trainer removed it itself; a trainer that was killed before leaves it
    shutil.copy(checkpoints[1] / "state.pt", extra)
    (removal,) = [one for one in find_prunable(finished).removals if one.kind == "states"]
    assert (removal.path, removal.bytes) == (extra, extra.stat().st_size)
    remove_all(find_prunable(finished))
    assert not extra.exists()
    assert all((path / "state.pt").exists() for path in checkpoints[1:])
    assert fresh(finished).train.done() is not None


def test_litter_of_dead_attempts_goes_and_new_files_stay(finished):
    home = fresh(finished).units.folder
    old = [home / ".table.0123456789ab.tmp", finished.root / ".report.html.0123456789ab.tmp"]
    new = home / ".units.ba9876543210.tmp"
    old[0].mkdir()
    (old[0] / "part").write_bytes(b"12345")
    old[1].write_bytes(b"123")
    new.write_bytes(b"1")
    for path in (old[0] / "part", *old):
        past = path.stat().st_mtime - STALE_SECONDS - 60
        os.utime(path, (past, past))
    found = find_prunable(finished)
    litter = [one for one in found.removals if one.kind == "temporary"]
    assert {one.path for one in litter} == set(old)
    assert sum(one.bytes for one in litter) == 8
    remove_all(found)
    assert not any(path.exists() for path in old)
    assert new.exists()
    new.unlink()


def test_old_settings_go_only_when_asked_for_and_never_what_somebody_points_to(finished):
    root = finished.root
    other = Iteration(settle(Wishes(str(root), overrides=["kmeans.num_units=8"])))
    try:
        other.features.run()  # pruned before: needed again for another codebook
        other.kmeans.run()
        kept = find_prunable(finished, old=True)
        assert [one for one in kept.removals if one.kind == "old"] == []
        assert any("not all iterations are finished" in line for line in kept.kept)
    finally:
        settle(Wishes(str(root), overrides=["kmeans.num_units=20"]))
    given_up = {other.kmeans.folder}  # the sample is the whole corpus, with any seed
    teacher = root / "it1" / "train-deadbeef"  # of older settings, but another run starts from it
    shutil.copytree(fresh(finished).train.folder, teacher)
    choice = root.parent / "other" / "it1" / "choice.json"
    choice.parent.mkdir(parents=True)
    choice.write_text(json.dumps({"source": {"checkpoint": str(teacher / "step-00000012")}}))
    answered = root / "it1" / "train-cafecafe"  # likewise, but that iteration has not been started yet
    shutil.copytree(fresh(finished).train.folder, answered)
    choice.with_name("answer.json").write_text(json.dumps({"pick": {"checkpoint": str(answered / "step-00000012")}}))

    assert not any(one.kind == "old" for one in find_prunable(finished).removals)
    found = find_prunable(finished, old=True)
    assert {one.path for one in found.removals if one.kind == "old"} == given_up
    freed = sum(folder_size(path) for path in given_up)
    assert sum(one.bytes for one in found.removals if one.kind == "old") == freed
    remove_all(found)
    assert not any(path.exists() for path in given_up)
    assert teacher.exists()
    assert Chain(fresh(finished)).is_complete()

    choice.unlink()
    for reference in (
        f'[init]\ncheckpoint = "{teacher / "step-00000012"}"',
        f'[codebook]\npath = "{teacher / "c.safetensors"}"',
    ):
        choice.with_name("resolved.toml").write_text(
            f"[source]\n{reference}\n"
        )  # what a training or labelling starts from
        assert not any(one.kind == "old" for one in find_prunable(finished, old=True).removals)
    choice.with_name("resolved.toml").unlink()
    assert {one.path for one in find_prunable(finished, old=True).removals if one.kind == "old"} == {teacher}
    shutil.rmtree(teacher)


def test_what_a_process_holds_is_left_alone(finished):
    stage = fresh(finished).features
    stage.accepts_pruned = False
    stage.run()
    with stage.lock():
        found = find_prunable(finished)
        assert not any(one.path == stage.folder for one in found.removals)
        assert any(stage.folder.name in line for line in found.kept)
    assert any(one.path == stage.folder for one in find_prunable(finished).removals)


def test_a_run_that_does_not_exist_is_a_config_error(tmp_path):
    assert hubert("prune", Path(tmp_path) / "nothing")[0] == 2
