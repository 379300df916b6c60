"""Checkpoints of a training: written whole or not at all, and checked before they are trusted.

    step-00025000/
        config.json, model.safetensors   what `HuBERT.from_pretrained` and the Hub read
        state.pt                         optimizer and counters, for going on; kept for the last two
        checkpoint.json                  size and sha256 of each file, written last

A checkpoint that a training wrote because it was asked to stop, between two of its schedule, is `interim`: it goes when
the next one of the schedule is there, so that an interrupted training offers the same checkpoints as an undisturbed one.

The folder gets its name when all its files are on disk. A folder that nevertheless is not whole (a copy that broke
off, a file that somebody removed) is reported and passed over.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251  (only the error with which torch refuses to unpickle)
from typing import Any, Protocol

import torch

from hubert.core.errors import DataError, TransientError
from hubert.core.files import atomic_write, read_json, remove
from hubert.core.hashing import file_digest

MODEL = "model.safetensors"
STATE = "state.pt"
KEPT_STATES = 2

Say = Callable[[str], object]


class Saveable(Protocol):
    """A model that writes `config.json` and `model.safetensors` into a folder."""

    def save_pretrained(self, folder: Path, /) -> object:
        """Write the model."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. `sha256` is that of the weights."""

    path: Path
    step: int
    sha256: str
    has_state: bool
    interim: bool = False


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return folder / f"step-{step:08d}"


def write_checkpoint(
    folder: Path,
    step: int,
    model: Saveable,
    state: Mapping[str, Any],
    *,
    interim: bool = False,
    before_rename: Callable[[], object] = lambda: None,
) -> Checkpoint:
    """Write a checkpoint, then remove interim ones (unless it is one) and the optimizer states of all but the last two.

    Args:
        folder: the training's folder.
        step: number of finished steps.
        model: writes its own files.
        state: tensors and plain values only, since it is read back without unpickling anything else.
        interim: not one of the schedule.
        before_rename: called when all is on disk; an exception from it leaves nothing behind.

    Raises:
        TransientError: the disk did not take it; says what is free.
    """
    path = checkpoint_path(folder, step)
    try:
        with atomic_write(path) as temporary:
            temporary.mkdir()
            model.save_pretrained(temporary)
            torch.save(dict(state), temporary / STATE)
            files = {
                file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)}
                for file in sorted(temporary.iterdir())
            }
            record = {"step": step, "interim": interim, "files": files}
            (temporary / "checkpoint.json").write_text(json.dumps(record, indent=1) + "\n")
            before_rename()
            if path.exists():  # a broken one, from which nothing could go on, or the training would not be here again
                remove(path)
        for other in [] if interim else list_checkpoints(folder, lambda _: None):
            if other.interim:
                remove(other.path)
        prune_states(folder)
    except OSError as error:
        raise TransientError(
            f"checkpoint {path} could not be written: {error}. The training goes on from the last one when it is started "
            "again. Likely cause: the disk is full or gone; `hubert prune` frees old states"
        ) from error
    return Checkpoint(path, step, str(files[MODEL]["sha256"]), has_state=True, interim=interim)


def list_checkpoints(folder: Path, say: Say = print) -> list[Checkpoint]:
    """Return the complete checkpoints of a training by step; `say` hears of each one that is not complete."""
    found = []
    for path in sorted(folder.glob("step-*")):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if not match:
            continue
        problem, files, interim = _check_sizes(path)
        if problem:
            say(f"checkpoint {path} is not complete and is passed over: {problem}")
            continue
        has_state = (path / STATE).exists()
        found.append(Checkpoint(path, int(match[1]), str(files[MODEL]["sha256"]), has_state, interim))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find_latest(folder: Path, say: Say = print) -> Checkpoint | None:
    """Return the newest checkpoint that a training can go on from; None if there is none.

    Its files are hashed; one whose content changed is reported, and the one before it is taken.
    """
    for checkpoint in reversed([candidate for candidate in list_checkpoints(folder, say) if candidate.has_state]):
        wrong = find_changed_file(checkpoint)
        if wrong is None:
            return checkpoint
        say(
            f"checkpoint {checkpoint.path} is damaged and is passed over: the content of {wrong} is not what was written"
        )
    return None


def find_changed_file(checkpoint: Checkpoint) -> str | None:
    """Return the name of a file whose content is not what was written; None if all are."""
    files = (read_json(checkpoint.path / "checkpoint.json") or {})["files"]
    for name, file in files.items():
        path = checkpoint.path / name
        if path.exists() and file_digest(path) != file["sha256"]:
            return str(name)
    return None


def read_state(path: Path) -> dict[str, Any]:
    """Read the optimizer and counters of a checkpoint folder, onto the CPU. Nothing but tensors and plain values is read.

    Raises:
        DataError: the file is not there, or is not one that `write_checkpoint` writes.
        TransientError: the disk failed.
    """
    try:
        state: dict[str, Any] = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except (FileNotFoundError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise DataError(
            f"{path / STATE} cannot be read ({type(error).__name__}). Fix: remove {path}, and the training goes on from "
            "the checkpoint before it"
        ) from error
    except OSError as error:
        raise TransientError(
            f"{path / STATE} could not be read: {error}; nothing is wrong with it as far as is known"
        ) from error
    return state


def prunable_states(folder: Path, keep: int = KEPT_STATES) -> list[Path]:
    """Return the optimizer states of all but the last `keep` checkpoints that have one."""
    with_state = [checkpoint for checkpoint in list_checkpoints(folder, lambda _: None) if checkpoint.has_state]
    return [checkpoint.path / STATE for checkpoint in with_state[: max(0, len(with_state) - keep)]]


def prune_states(folder: Path, keep: int = KEPT_STATES) -> int:
    """Remove the optimizer states that nothing goes on from; return the bytes freed."""
    return sum(remove(path) for path in prunable_states(folder, keep))


def _check_sizes(path: Path) -> tuple[str, dict[str, Any], bool]:
    """Return what is wrong with a checkpoint's files (empty if nothing), what they should be, and whether it is interim."""
    content = read_json(path / "checkpoint.json")
    if content is None or MODEL not in content.get("files", {}):
        return "it has no checkpoint.json", {}, False
    files: dict[str, Any] = content["files"]
    interim = bool(content.get("interim"))
    for name, file in files.items():
        size = (path / name).stat().st_size if (path / name).exists() else None
        if size != file["bytes"] and not (size is None and name == STATE):
            problem = (
                f"{name} has {size} bytes instead of {file['bytes']}" if size is not None else f"{name} is missing"
            )
            return problem, files, interim
    return "", files, interim
