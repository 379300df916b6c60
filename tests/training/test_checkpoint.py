"""Checkpoints: whole or not there, checked before they are trusted, and only as many optimizer states as needed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubert.core.errors import DataError, TransientError
from hubert.core.files import write_record
from hubert.core.hashing import file_digest
from hubert.training.checkpoint import (
    checkpoint_path,
    find_latest,
    find_lost,
    find_start,
    find_written,
    list_checkpoints,
    mend,
    prune_states,
    read_state,
    write_checkpoint,
)
from hubert.training.folder import LostOwnershipError, check_owner, claim


class SmallModel:
    """Writes what a model writes, in a few bytes."""

    def __init__(self, value: float) -> None:
        self.value = value

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"num_layers": 2}')
        save_file({"weight": torch.full((100,), self.value)}, folder / "model.safetensors")


def write_some(folder: Path, *steps: int) -> None:
    for step in steps:
        write_checkpoint(
            folder, step, SmallModel(step), {"step": step, "optimizer": {"moments": torch.full((10,), float(step))}}
        )


@pytest.fixture
def said() -> list[str]:
    return []


def test_the_newest_checkpoint_is_found_with_its_state_and_hash(tmp_path, said):
    write_some(tmp_path, 5, 10)
    latest = find_latest(tmp_path, said.append)
    assert latest is not None
    assert (latest.step, latest.path) == (10, tmp_path / "step-00000010")
    assert latest.sha256 == file_digest(latest.path / "model.safetensors")
    assert torch.equal(read_state(latest.path)["optimizer"]["moments"], torch.full((10,), 10.0))
    assert not said
    assert find_latest(tmp_path / "nowhere", said.append) is None


def test_states_are_kept_for_the_last_two(tmp_path):
    write_some(tmp_path, 5, 10, 15, 20)
    assert [(checkpoint.step, checkpoint.has_state) for checkpoint in list_checkpoints(tmp_path)] == [
        (5, False), (10, False), (15, True), (20, True)
    ]  # fmt: skip
    freed = prune_states(tmp_path, keep=0)
    assert freed > 0
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [5, 10, 15, 20]
    assert find_latest(tmp_path) is None


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "half a model": lambda path: truncate(path / "model.safetensors"),
    "no model": lambda path: (path / "model.safetensors").unlink(),
    "no config": lambda path: (path / "config.json").unlink(),
    "half a state": lambda path: truncate(path / "state.pt"),
    "no checkpoint.json": lambda path: (path / "checkpoint.json").unlink(),
    "half a checkpoint.json": lambda path: truncate(path / "checkpoint.json"),
    "a changed byte in the model": lambda path: flip(path / "model.safetensors"),
    "a changed byte in the state": lambda path: flip(path / "state.pt"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, said, damage):
    write_some(tmp_path, 5, 10)
    damage(checkpoint_path(tmp_path, 10))
    latest = find_latest(tmp_path, said.append)
    assert latest is not None
    assert latest.step == 5
    assert len(said) == 1
    assert "step-00000010" in said[0]
    write_some(tmp_path, 10)  # the training comes by again
    latest = find_latest(tmp_path)
    assert latest is not None
    assert latest.step == 10


def test_without_its_state_a_checkpoint_is_complete_but_nothing_to_go_on_from(tmp_path, said):
    write_some(tmp_path, 5, 10)
    (checkpoint_path(tmp_path, 10) / "state.pt").unlink()
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path, said.append)] == [5, 10]
    latest = find_latest(tmp_path, said.append)
    assert latest is not None
    assert latest.step == 5
    assert not said


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path):
    write_some(tmp_path, 5)
    claim(tmp_path, "other")
    with pytest.raises(LostOwnershipError, match="belongs to attempt other now, this is attempt mine"):
        write_checkpoint(tmp_path, 10, SmallModel(1), {}, before_rename=lambda: check_owner(tmp_path, "mine"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attempt.json", "step-00000005"]


def test_a_full_disk_is_a_transient_error(tmp_path):
    class FullDisk(SmallModel):
        def save_pretrained(self, folder: Path) -> None:  # noqa: ARG002
            raise OSError(28, "No space left on device")

    with pytest.raises(TransientError, match=r"No space left on device.*hubert prune"):
        write_checkpoint(tmp_path, 10, FullDisk(1), {})
    assert not list(tmp_path.iterdir())


def test_a_state_from_elsewhere_is_not_unpickled(tmp_path):
    """Loading runs no code: anything but tensors and plain values is refused."""
    write_some(tmp_path, 5)
    path = checkpoint_path(tmp_path, 5)
    torch.save({"evil": Path("/")}, path / "state.pt")
    with pytest.raises(DataError, match=r"cannot be read.*remove"):
        read_state(path)


def test_what_is_written_is_what_the_model_gave(tmp_path):
    write_some(tmp_path, 7)
    path = checkpoint_path(tmp_path, 7)
    assert torch.equal(load_file(path / "model.safetensors")["weight"], torch.full((100,), 7.0))
    files = json.loads((path / "checkpoint.json").read_text())["files"]
    assert {name: file_digest(path / name) for name in files} == {name: file["sha256"] for name, file in files.items()}
    assert set(files) == {"config.json", "model.safetensors", "state.pt"}


# Lost checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [*DAMAGES.values(), shutil.rmtree], ids=[*DAMAGES, "no folder"])
def test_the_checkpoints_after_a_lost_one_know_of_it(tmp_path, damage):
    write_some(tmp_path, 5, 10, 15)
    assert (find_written(tmp_path), find_lost(tmp_path)) == ([5, 10, 15], [])
    damage(checkpoint_path(tmp_path, 10))
    assert find_written(tmp_path) == [5, 10, 15]
    is_of_the_state = any("state" in name for name, known in DAMAGES.items() if known is damage)
    assert find_lost(tmp_path) == ([] if is_of_the_state else [10])


def test_a_finished_stage_knows_its_last_checkpoint_though_none_comes_after_it(tmp_path):
    write_some(tmp_path, 5, 10)
    write_record(tmp_path / "done.json", {"outputs": {"step-00000010/config.json": 1, "step-00000005/config.json": 1}})
    shutil.rmtree(checkpoint_path(tmp_path, 10))
    assert find_lost(tmp_path) == [10]


def test_an_interim_checkpoint_that_went_is_not_lost(tmp_path):
    write_some(tmp_path, 5)
    write_checkpoint(tmp_path, 7, SmallModel(7), {}, interim=True)
    write_some(tmp_path, 10)
    assert (find_written(tmp_path), find_lost(tmp_path)) == ([5, 10], [])


def test_a_training_goes_back_to_before_a_lost_checkpoint_and_keeps_the_states_that_it_then_goes_on_from(
    tmp_path, said
):
    for step in (5, 10, 15, 20):
        write_checkpoint(tmp_path, step, SmallModel(step), {"step": step, "metrics": ""})
    weights = checkpoint_path(tmp_path, 10) / "model.safetensors"
    shutil.rmtree(checkpoint_path(tmp_path, 5))
    assert find_start(tmp_path, 20, said.append) == ([5], 0, 5)
    assert "training again from step 0 to 5, then on from step 20" in said[-1]
    write_some(tmp_path, 5)
    has_state = [(found.step, found.has_state) for found in list_checkpoints(tmp_path)]
    assert has_state == [(5, True), (10, False), (15, True), (20, True)]
    assert find_start(tmp_path, 20, said.append) == ([], 20, 0)
    assert file_digest(weights) == list_checkpoints(tmp_path)[1].sha256


def test_a_training_whose_newest_state_holds_no_log_does_all_steps_after_the_lost_one_again(tmp_path, said):
    write_some(tmp_path, 5, 10)
    (checkpoint_path(tmp_path, 5) / "model.safetensors").unlink()
    assert find_start(tmp_path, 10, said.append) == ([5], 0, 0)


def test_weights_that_are_whole_stay_when_a_training_comes_by_again(tmp_path):
    write_some(tmp_path, 5, 10, 15)
    before = list_checkpoints(tmp_path)[0]
    assert not before.has_state
    kept = write_checkpoint(tmp_path, 5, SmallModel(5.0001), {"step": 5})
    assert kept.sha256 == before.sha256
    assert find_latest(tmp_path, before=10).step == 5
    truncate(kept.path / "model.safetensors")
    assert write_checkpoint(tmp_path, 5, SmallModel(5.0001), {"step": 5}).sha256 != before.sha256


def test_small_files_of_a_checkpoint_are_made_again_from_those_that_hold_their_content(tmp_path, said):
    write_some(tmp_path, 5, 10)
    names = [f"step-{step:08d}/{name}" for step in (5, 10) for name in ("config.json", "model.safetensors")]
    hashes = {name: file_digest(tmp_path / name) for name in names}
    write_record(tmp_path / "done.json", {"outputs": dict.fromkeys(names, 1), "hashes": hashes})
    before = list_checkpoints(tmp_path)
    (before[0].path / "config.json").unlink()
    truncate(before[1].path / "checkpoint.json")
    assert find_lost(tmp_path) == [5, 10]
    mend(tmp_path, said.append)
    assert find_lost(tmp_path) == []
    assert [(found.step, found.sha256) for found in list_checkpoints(tmp_path)] == [
        (found.step, found.sha256) for found in before
    ]
    assert len(said) == 2
