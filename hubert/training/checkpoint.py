"""Checkpoints of a training: written whole or not at all, and checked before they are trusted.

    step-00025000/
        config.json, model.safetensors   what `HuBERT.from_pretrained` and the Hub read
        state.pt                         optimizer and counters, for going on; kept for the last two
        checkpoint.json                  size and sha256 of each file, and the steps of the checkpoints before it; written last

A checkpoint that a training wrote because it was asked to stop, between two of its schedule, is `interim`: it goes when
the next one of the schedule is there, so that an interrupted training offers the same checkpoints as an undisturbed one.

The folder gets its name when all its files are on disk. A folder that nevertheless is not whole (a copy that broke
off, a file that somebody removed) is reported and passed over. The checkpoints after it, and the finished stage, know
that it was written once (`find_lost`), so that the training can make it again.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251  (only the error with which torch refuses to unpickle)
from typing import Any, Protocol

import torch
from torch import nn

from hubert.core.errors import DataError, TransientError
from hubert.core.files import atomic_write, link, read_json, remove, seal, storing, write_record
from hubert.core.hashing import file_digest
from hubert.core.outputs import sha256, time_ns

CONFIG = "config.json"
MODEL = "model.safetensors"
MODEL_FILES = (CONFIG, MODEL)
RECORD = "checkpoint.json"
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

    A training that comes by again, to make a lost checkpoint, keeps the weights of the whole ones on its way: later stages
    know them by their hash, and on a GPU they might come out different in the last bits.

    Args:
        folder: the training's folder.
        step: number of finished steps.
        model: writes its own files.
        state: tensors and plain values only, since it is read back without unpickling anything else.
        interim: not one of the schedule.
        before_rename: called when all is on disk; an exception from it leaves nothing behind.

    Raises:
        DiskError: the disk did not take it; says what it needs, what is free, and what frees space.
    """
    path = checkpoint_path(folder, step)
    size = _bytes_of(state) + _bytes_of(model.state_dict() if isinstance(model, nn.Module) else {})
    before = [other for other in find_written(folder) if other < step]
    kept = next((found for found in list_checkpoints(folder, lambda _: None) if found.step == step), None)
    if kept is not None and find_changed_file(kept) not in {None, STATE}:
        kept = None
    with atomic_write(path, size=size) as temporary:
        temporary.mkdir()
        if kept is None:
            model.save_pretrained(temporary)
        else:
            for name in MODEL_FILES:
                link(kept.path / name, temporary / name)
        torch.save(dict(state), temporary / STATE)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)}
            for file in sorted(temporary.iterdir())
        }
        record = {"step": step, "interim": interim, "before": before, "files": files}
        (temporary / RECORD).write_text(json.dumps(seal(record), indent=1) + "\n")
        before_rename()
        if path.exists():
            remove(path)
    with storing(path):
        for other in [] if interim else list_checkpoints(folder, lambda _: None):
            if other.interim:
                remove(other.path)
        for superfluous in prunable_states(folder, near=step):
            remove(superfluous)
    return Checkpoint(path, step, str(files[MODEL]["sha256"]), has_state=True, interim=interim)


def list_checkpoints(folder: Path, say: Say = print) -> list[Checkpoint]:
    """Return the complete checkpoints of a training by step; `say` hears of each one that is not complete."""
    found = []
    for path in sorted(folder.glob("step-*")):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if not match:
            continue
        problem, files, interim = _check_files(path)
        if problem:
            say(f"checkpoint {path} is not complete and is passed over: {problem}")
            continue
        has_state = STATE in files and (path / STATE).exists()
        found.append(Checkpoint(path, int(match[1]), str(files[MODEL]["sha256"]), has_state, interim))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find_written(folder: Path) -> list[int]:
    """Return the steps of all checkpoints of the schedule that were ever written, by step, those that are lost too.

    They stand in the records of the checkpoints, and in those of the finished stage.
    """
    steps: set[int] = set()
    for path in folder.glob(f"step-*/{RECORD}"):
        record = read_json(path) or {}
        steps |= set(record.get("before", ())) | ({int(record["step"])} if record.get("interim") is False else set())
    for path in (folder / "done.json", folder / "receipts" / "00000.json"):
        names = (read_json(path) or {}).get("outputs", {})
        steps |= {int(match[1]) for name in names if (match := re.match(r"step-(\d+)/", name))}
    return sorted(steps)


def find_lost(folder: Path) -> list[int]:
    """Return the steps of the checkpoints that were written once, and are damaged or gone."""
    whole = {checkpoint.step for checkpoint in list_checkpoints(folder, lambda _: None)}
    return [step for step in find_written(folder) if step not in whole]


def mend(folder: Path, say: Say = print) -> None:
    """Make the small files of checkpoints again where another file of the training holds their content.

    `config.json` is the same in all of them; what `checkpoint.json` holds of the weights stands in `done.json` too.
    """
    hashes: dict[str, str] = (read_json(folder / "done.json") or {}).get("hashes", {})
    for path in sorted(folder.glob("step-*")):
        names = {name: f"{path.name}/{name}" for name in MODEL_FILES}
        if read_json(path / RECORD) is None and all(
            name in hashes and (folder / name).exists() and file_digest(folder / name) == hashes[name]
            for name in names.values()
        ):
            files = {
                name: {"bytes": (path / name).stat().st_size, "sha256": hashes[key]} for name, key in names.items()
            }
            write_record(path / RECORD, {"step": int(path.name[5:]), "interim": False, "before": [], "files": files})
            remove(path / STATE)  # nothing says what it has to be
            say(f"{path / RECORD} was damaged or gone, and is made again")
        wanted = (read_json(path / RECORD) or {}).get("files", {}).get(CONFIG, {}).get("sha256")
        if wanted is None or _has(path / CONFIG, wanted):
            continue
        twin = next((other for other in folder.glob(f"step-*/{CONFIG}") if _has(other, wanted)), None)
        if twin is not None:
            with atomic_write(path / CONFIG) as temporary:
                temporary.write_bytes(twin.read_bytes())
            say(f"{path / CONFIG} was damaged or gone, and is made again")


def _has(path: Path, wanted: str) -> bool:
    return path.exists() and sha256(path) == wanted


def find_latest(folder: Path, say: Say = print, *, before: int | None = None) -> Checkpoint | None:
    """Return the newest checkpoint that a training can go on from; None if there is none.

    Its files are hashed; one whose content changed is reported, and the one before it is taken.

    Args:
        folder: the training's.
        say: hears of each one that is passed over.
        before: only those of fewer steps than this.
    """
    candidates = [found for found in list_checkpoints(folder, say) if before is None or found.step < before]
    for checkpoint in reversed([candidate for candidate in candidates if candidate.has_state]):
        wrong = find_changed_file(checkpoint)
        if wrong is None:
            return checkpoint
        say(
            f"checkpoint {checkpoint.path} is damaged and is passed over: the content of {wrong} is not what was written"
        )
    return None


def find_start(folder: Path, steps: int, say: Say = print) -> tuple[list[int], int, int]:
    """Find out where a training of `steps` steps goes on: after its newest checkpoint, or before those that are lost.

    Returns:
        The steps of the lost checkpoints; the step to go on from, 0 for the start; and the step of the last lost one if the
        training can go on from its newest checkpoint there, else 0. It cannot if that checkpoint does not hold the log (an
        older version wrote it): then all steps after the lost ones are done again.
    """
    newest, lost = find_latest(folder, say), find_lost(folder)
    if not lost or newest is None or newest.step < lost[0]:
        return lost, newest.step if newest else 0, 0
    before = find_latest(folder, lambda _: None, before=lost[0])
    step = before.step if before else 0
    goes_on = newest.step > lost[-1] and "metrics" in read_state(newest.path)
    say(
        f"the checkpoints of the steps {', '.join(map(str, lost))} are damaged or gone: training again from step {step} to "
        + (f"{lost[-1]}, then on from step {newest.step}" if goes_on else f"{max(steps, lost[-1])}")
    )
    return lost, step, lost[-1] if goes_on or lost[-1] > steps else 0


def find_changed_file(checkpoint: Checkpoint) -> str | None:
    """Return the name of a file whose content is not what was written; None if all are."""
    files = (read_json(checkpoint.path / RECORD) or {})["files"]
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


def prunable_states(folder: Path, keep: int = KEPT_STATES, *, near: int | None = None) -> list[Path]:
    """Return the optimizer states of all but the last `keep` checkpoints that have one.

    With `near` the last `keep` up to that step stay too: a training that makes a lost checkpoint again goes on from them.
    """
    with_state = [checkpoint for checkpoint in list_checkpoints(folder, lambda _: None) if checkpoint.has_state]
    others = with_state[: max(0, len(with_state) - keep)]
    close = [checkpoint.step for checkpoint in with_state if near is not None and checkpoint.step <= near]
    needed = close[max(0, len(close) - keep) :]
    return [checkpoint.path / STATE for checkpoint in others if checkpoint.step not in needed]


def prune_states(folder: Path, keep: int = KEPT_STATES) -> int:
    """Remove the optimizer states that nothing goes on from; return the bytes freed."""
    return sum(remove(path) for path in prunable_states(folder, keep))


def _bytes_of(content: object) -> int:
    """Return the bytes of all tensors in a nested state."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    if isinstance(content, Mapping):
        return sum(map(_bytes_of, content.values()))
    return sum(map(_bytes_of, content)) if isinstance(content, list | tuple) else 0


def _check_files(path: Path) -> tuple[str, dict[str, Any], bool]:
    """Return what is wrong with a checkpoint's files (empty if nothing), what they should be, and whether it is interim.

    Sizes are compared. `config.json` is hashed, and the weights are if they were written to after their record. The optimizer's
    state does not count: without it a checkpoint is complete.
    """
    content = read_json(path / RECORD)
    if content is None or MODEL not in content.get("files", {}):
        return f"it has no {RECORD}, or a damaged one", {}, False
    files: dict[str, Any] = content["files"]
    interim = bool(content.get("interim"))
    for name, file in files.items():
        size = (path / name).stat().st_size if (path / name).exists() else None
        if name == STATE:
            continue
        if size != file["bytes"]:
            problem = (
                f"{name} has {size} bytes instead of {file['bytes']}" if size is not None else f"{name} is missing"
            )
            return problem, files, interim
        is_suspect = name == CONFIG or time_ns(path / name) > time_ns(path / RECORD)
        if is_suspect and sha256(path / name) != file["sha256"]:
            return f"the content of {name} is not what was written", files, interim
    return "", files, interim
