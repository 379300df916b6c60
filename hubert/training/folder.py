"""What the main process of a training writes, and the two locks that keep a second trainer from writing beside it."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hubert.core.errors import DataError, TransientError
from hubert.core.files import atomic_write, flush, read_json, remove, write_record, write_text
from hubert.core.process import ProcessId
from hubert.training.checkpoint import Checkpoint, Saveable, write_checkpoint

LOCK_SECONDS = 120.0  # a trainer that lost the folder finds out within CHECK_SECONDS and a step
CHECK_SECONDS = 5.0


class TrainingFolder:
    """A training's folder, seen by the process that writes it.

    Every write first makes sure that the folder still belongs to this attempt.

    Raises:
        LostOwnershipError: (from every method that writes) another attempt owns it.
        TransientError: (likewise) the disk did not take it.
    """

    def __init__(self, path: Path, attempt: str) -> None:
        self.path = path
        self.attempt = attempt
        self._checked = 0.0

    @contextmanager
    def hold(self, *, take: bool) -> Iterator[None]:
        """Hold the folder: wait for a trainer that is about to stop, then be the only one.

        Args:
            take: become the owner (a start by hand); else the launcher made this attempt the owner already.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / "trainer.lock")
        try:
            lock.acquire(timeout=0 if take else LOCK_SECONDS)
        except Timeout as error:
            owner = read_json(self.path / "trainer.json") or {}
            raise TransientError(
                f"another trainer (pid {owner.get('pid')} on {owner.get('host')}) is working in {self.path}. "
                "Fix: wait for it, or end it with SIGTERM, which lets it write a checkpoint"
            ) from error
        try:
            if take:
                claim(self.path, self.attempt)
            self.check()
            write_record(self.path / "trainer.json", {"attempt": self.attempt, **ProcessId.of(os.getpid()).as_dict()})
            for litter in (*self.path.glob(".step-*.tmp"), *self.path.glob(".metrics.jsonl.*.tmp")):
                remove(litter)  # of a trainer that was killed while it wrote
            yield
        finally:
            lock.release()

    def check(self) -> None:
        """Make sure that this attempt still owns the folder."""
        check_owner(self.path, self.attempt)
        self._checked = time.monotonic()

    def check_sometimes(self) -> None:
        """Do `check` if the last one is some seconds old, so that a trainer that lost the folder stops soon."""
        if time.monotonic() - self._checked > CHECK_SECONDS:
            self.check()

    # Metrics ----------------------------------------------------------------------------------------------------

    @property
    def metrics(self) -> Path:
        """The training's log."""
        return self.path / "metrics.jsonl"

    def cut_metrics(self, step: int) -> None:
        """Remove the lines after `step`, the step of a checkpoint, and all from a broken line on."""
        self.check()
        lines = []
        with suppress(DataError):  # a node that died may leave a hole (NFS), but after the checkpoint's lines
            for line in _iterate_metrics(self.metrics):
                if line["step"] > step:
                    break
                lines.append(json.dumps(line))
        with atomic_write(self.metrics) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines))

    def log_text(self) -> str:
        """Return the log so far."""
        return self.metrics.read_text() if self.metrics.exists() else ""

    def restore_metrics(self, step: int, text: str | None) -> None:
        """Make the log what it was when the checkpoint of `step` was written.

        Args:
            step: of the checkpoint.
            text: the log that was saved with it; None (an older version wrote it): later lines are removed.
        """
        if text is None:
            self.cut_metrics(step)
        else:
            self.check()
            with _explained(self.metrics):
                write_text(self.metrics, text)

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add a line, seen by readers at once."""
        self.check()
        with _explained(self.metrics), self.metrics.open("a") as file:
            file.write(json.dumps(dict(line)) + "\n")

    # Checkpoints ------------------------------------------------------------------------------------------------

    def save(self, step: int, model: Saveable, state: Mapping[str, Any], *, interim: bool) -> Checkpoint:
        """Write a checkpoint; the metrics up to it are on disk before it is. `interim`: not one of the schedule."""
        with _explained(self.metrics):
            flush(self.metrics)
        return write_checkpoint(self.path, step, model, state, interim=interim, before_rename=self.check)

    def write_summary(self, figures: Mapping[str, Any]) -> None:
        """Write the figures of the finished training, and the hash of its log."""
        self.check()
        with _explained(self.path / "summary.json"):
            content = self.metrics.read_bytes()
            log = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            write_record(self.path / "summary.json", {**figures, "log": log})


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TransientError(
            f"{path} could not be written: {error}. Likely cause: the disk is full or gone. The training goes on from its last "
            "checkpoint when it is started again"
        ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl in order of their steps; none if there is no file.

    What follows the last line break is left out: it is being written, or its writer was killed.

    Raises:
        DataError: a line is broken; names file and line.
    """
    return list(_iterate_metrics(path))


def _iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    whole = path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, line {number}: expected a JSON object with a step, found {text[:60]!r}. Likely cause: a machine died "
                "while it wrote, or the file was edited. Fix: start the training again, which restores the log of the last "
                "checkpoint, or remove the line"
            ) from error
        yield line


def log_is_whole(folder: Path) -> bool:
    """Say whether the log still holds what it held when the training finished; True if no hash of it was recorded.

    A longer training adds lines to it, which do not matter here.
    """
    log = (read_json(folder / "summary.json") or {}).get("log")
    path = folder / "metrics.jsonl"
    if log is None:
        return True
    return path.exists() and hashlib.sha256(path.read_bytes()[: log["bytes"]]).hexdigest() == log["sha256"]


class LostOwnershipError(TransientError):
    """Another attempt owns the training's folder."""


def claim(folder: Path, attempt: str) -> None:
    """Make `attempt` the owner of the folder: a trainer of another attempt stops before its next write."""
    write_record(folder / "attempt.json", {"attempt": attempt, "host": platform.node(), "since": time.time()})


def check_owner(folder: Path, attempt: str) -> None:
    """Make sure that the folder still belongs to `attempt`.

    Raises:
        LostOwnershipError: it belongs to another attempt.
    """
    owner = (read_json(folder / "attempt.json") or {}).get("attempt")
    if owner != attempt:
        raise LostOwnershipError(
            f"{folder} belongs to attempt {owner} now, this is attempt {attempt}: another trainer was started there. "
            "This one stops and writes nothing more"
        )
