"""The progress bar of a stage on the run's page: files and audio that are done, how fast it goes, how long the rest takes."""

import time
from collections.abc import Collection
from typing import Any

from hubert.core.stage import Plan, Stage
from hubert.runs.progress import Progress, Receipts, measure
from tasks.page.page import AT_WORK, STOPPED, key_of, note, show, slug
from tasks.page.prefect_client import SHOW_SECONDS, costs_nothing

LOOK_SECONDS = 4.0  # between two listings of the receipts
BAR = "the progress bar"


def _label(bar: "Bar", *_args: Any, **_options: Any) -> str:
    return bar.label


class Bar:
    """A stage's bar, from its first missing shard to its end. It only shows: no error of it is one of the stage."""

    def __init__(self, stage: Stage, plan: Plan, name: str = "") -> None:
        """Show the bar; `name` tells the stage from another one of the run that has its name."""
        self.label = name or stage.label
        self._key = key_of(stage.parent, f"{slug(name or stage.name)}-progress")
        self._progress: Progress | None = None
        self._receipts: Receipts | None = None
        self._looked = self._sent = time.monotonic()
        self._open(stage, plan)

    @costs_nothing(BAR, _label)
    def _open(self, stage: Stage, plan: Plan) -> None:
        missing = stage.missing(plan)
        self._progress = Progress(measure(stage, plan), set(range(len(plan))).difference(missing))
        self._receipts = Receipts(stage.folder, missing)
        self._progress.look(self._looked, ())
        self._send(self._progress, self._progress.describe())

    @costs_nothing(BAR, _label)
    def look(self, waits_for: str = "") -> None:
        """Look what got done, every few seconds at most; `waits_for` is what the work waits for while no worker is there."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS or self._progress is None:
            return
        self._looked = now
        self._progress.look(now, self._new(), at_work=not waits_for)
        waiting = f" (no worker yet: {waits_for})" if waits_for else ""
        if now - self._sent >= SHOW_SECONDS:
            self._send(self._progress, f"{self._progress.describe()}{waiting}")

    def add(self, done: Collection[int]) -> None:
        """Count shards whose task has ended well: a network disk may show their receipts later."""
        if self._progress is not None:
            self._progress.done.update(done)
        self.look()

    @costs_nothing(BAR, _label)
    def end(self) -> None:
        """Fill the bar: the stage is finished."""
        if self._progress is not None:
            count = range(len(self._progress.amounts.items))
            self._progress.look(time.monotonic(), count)
            self._send(self._progress, self._progress.describe_end())

    @costs_nothing(BAR, _label)
    def stop(self) -> None:
        """Leave the bar where it is: the stage has failed."""
        if self._progress is None:
            note(self.label, STOPPED, "stopped")
            return
        self._progress.look(time.monotonic(), self._new())
        self._send(self._progress, f"stopped at {self._progress.describe_amount()}", STOPPED)

    @costs_nothing("which shards are done", _label)
    def _found(self) -> set[int]:
        return self._receipts.new() if self._receipts is not None else set()

    def _new(self) -> set[int]:
        return self._found() or set()

    def _send(self, progress: Progress, text: str, state: str = AT_WORK) -> None:
        self._sent = time.monotonic()
        show("progress", self._key, progress.percent, text, below=True)
        note(self.label, state, text)
