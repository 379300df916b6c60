"""What the main process of a training writes, and the two locks that keep a second trainer from writing beside it."""

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import Timeout

from hubert.core.errors import DataError, TransientError
from hubert.core.files import atomic_write, flush, read_json, remove, storing, write_record, write_text
from hubert.core.locks import acquire
from hubert.core.process import ProcessId
from hubert.training.checkpoint import Checkpoint, Saveable, write_checkpoint

LOCK_SECONDS = 120.0  # a trainer that lost the folder finds out within CHECK_SECONDS and a step
CHECK_SECONDS = 5.0
BEAT_SECONDS = 1.0
LOOK_SECONDS = 2.0
UNUSUAL_SECONDS = 60.0  # a shorter silence is not worth a word
USUAL_FACTOR = 10  # nor is one of less than so many times what is usual
START_FACTOR = 3


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
        self._checked = self._beaten = 0.0

    @contextmanager
    def hold(self, *, take: bool) -> Iterator[None]:
        """Hold the folder: wait for a trainer that is about to stop, then be the only one.

        Args:
            take: become the owner (a start by hand); else the launcher made this attempt the owner already.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            lock = acquire(self.path / "trainer.lock", wait_seconds=0 if take else LOCK_SECONDS)
        except Timeout as error:
            owner = read_json(self.path / "trainer.json") or {}
            raise TransientError(
                f"another trainer (pid {owner.get('pid')} on {owner.get('host')}) is working in {self.path}. "
                "Fix: wait for it, or end it with SIGTERM, which lets it write a checkpoint"
            ) from error
        with lock:
            if take:
                claim(self.path, self.attempt)
            self.check()
            # Of a trainer that was killed while it wrote; first, as it may be what fills the disk.
            for litter in (*self.path.glob(".step-*.tmp"), *self.path.glob(".metrics.jsonl.*.tmp")):
                remove(litter)
            record = {"attempt": self.attempt, "beats": True, **ProcessId.of(os.getpid()).as_dict()}
            write_record(self.path / "trainer.json", record)
            yield

    def check(self) -> None:
        """Make sure that this attempt still owns the folder."""
        check_owner(self.path, self.attempt)
        self._checked = time.monotonic()

    def check_sometimes(self) -> None:
        """Do `check` if the last one is some seconds old, so that a trainer that lost the folder stops soon."""
        if time.monotonic() - self._checked > CHECK_SECONDS:
            self.check()

    def beat(self) -> None:
        """Touch the sign of life, once a second at most: the follower of the training looks at the time of this file."""
        if time.monotonic() - self._beaten > BEAT_SECONDS:
            self._beaten = time.monotonic()
            with suppress(FileNotFoundError), storing(self.path / "trainer.json"):
                os.utime(self.path / "trainer.json")

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
            write_text(self.metrics, text)

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add a line, seen by readers at once."""
        self.check()
        with storing(self.metrics), self.metrics.open("a") as file:
            file.write(json.dumps(dict(line)) + "\n")

    # Checkpoints ------------------------------------------------------------------------------------------------

    def save(self, step: int, model: Saveable, state: Mapping[str, Any], *, interim: bool) -> Checkpoint:
        """Write a checkpoint; the metrics up to it are on disk before it is. `interim`: not one of the schedule."""
        with storing(self.metrics):
            flush(self.metrics)
        return write_checkpoint(self.path, step, model, state, interim=interim, before_rename=self.check)

    def write_summary(self, figures: Mapping[str, Any]) -> None:
        """Write the figures of the finished training, and the hash of its log."""
        self.check()
        content = self.metrics.read_bytes()
        log = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        write_record(self.path / "summary.json", {**figures, "log": log})


class Pulse:
    """Notices when a trainer gives no sign of life any more: its machine's clock is not asked, only whether something changes.

    Signs are the time of trainer.json, which the trainer renews after each micro-batch, and the sizes of its log, its metrics
    and a checkpoint that is being written.
    """

    def __init__(self, folder: Path, attempt: str, limit_seconds: float) -> None:
        """Follow an attempt; after `limit_seconds` without a sign it `has_stopped`."""
        self._folder = folder
        self._attempt = attempt
        self._limit = limit_seconds
        self._signs: tuple[float, ...] = ()
        self._since = self._looked = time.monotonic()
        self._usual = 0.0  # the longest time between two signs so far
        self._has_begun = False

    def look(self, *, is_waiting: bool = False) -> None:
        """Look for a sign, every few seconds. A trainer that waits for its machine need not give one."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        is_steady = now - self._looked < 5 * LOOK_SECONDS  # else it is we who were away
        self._looked = now
        signs = self._find()
        if signs == self._signs and not is_waiting:
            return
        if is_steady and self._has_begun:
            self._usual = max(self._usual, now - self._since)
        self._has_begun = signs[0] != 0
        self._signs, self._since = signs, now

    def _find(self) -> tuple[float, ...]:
        folder = self._folder
        record = folder / "trainer.json"
        content = read_json(record) or {}
        is_ours = content.get("attempt") == self._attempt
        if is_ours and not content.get("beats"):
            self._limit = math.inf  # a trainer of an older version, which gives only the signs of its log
        files = [folder / "train.log", folder / "metrics.jsonl", *folder.glob(".step-*.tmp/*")]
        try:
            return (
                record.stat().st_mtime if is_ours else 0.0,
                *(file.stat().st_size for file in files if file.exists()),
            )
        except FileNotFoundError:  # a checkpoint has just got its name
            return (-1.0,)

    @property
    def _silence(self) -> float:
        return self._looked - self._since

    @property
    def has_stopped(self) -> bool:
        """Whether it has been silent for too long; longer if it does so, or has not begun: imports from a slow disk take long."""
        return self._silence > max(self._limit * (1 if self._has_begun else START_FACTOR), USUAL_FACTOR * self._usual)

    def describe(self) -> str:
        """Return for how many minutes there has been no sign, if that is unusual; empty if it is not."""
        if self._silence < max(UNUSUAL_SECONDS, USUAL_FACTOR * self._usual):
            return ""
        usual = f" (until now one at least every {self._usual:.0f} s)" if self._has_begun else ", not even a first one"
        return f"no sign of life for {self._silence // 60:.0f} min{usual}"


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
    """Return True if the log still holds what it held when the training finished; True if no hash of it was recorded.

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
