"""Checkpoints: whole or not there, checked before they are trusted, and only as many optimizer states as needed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubert.core.errors import DataError, TransientError
from hubert.core.hashing import file_digest
from hubert.training.checkpoint import (
    checkpoint_path,
    find_latest,
    list_checkpoints,
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
