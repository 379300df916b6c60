"""The progress bar of a stage on the run's page: files and audio that are done, how fast it goes, how long the rest takes."""

import time
from collections.abc import Collection

from hubert.progress import Progress, Receipts, measure
from hubert.stage import Plan, Stage
from tasks.page import AT_WORK, STOPPED, key_of, note, renew, show, slug

LOOK_SECONDS = 4.0  # between two listings of the receipts, and two requests


class Bar:
    """A stage's bar, from its first missing shard to its end."""

    def __init__(self, stage: Stage, plan: Plan, name: str = "") -> None:
        """Show the bar; `name` tells the stage from another one of the run that has its name."""
        missing = stage.missing(plan)
        self.label = name or stage.label
        self._progress = Progress(measure(stage, plan), set(range(len(plan))).difference(missing))
        self._receipts = Receipts(stage.folder, missing)
        self._looked = time.monotonic()
        self._progress.look(self._looked, ())
        self._shown = self._progress.describe()
        key = key_of(stage.parent, f"{slug(name or stage.name)}-progress")
        self._artifact = show("progress", key, self._progress.percent, self._shown, below=True)
        note(self.label, AT_WORK, self._shown)

    def look(self, waits_for: str = "") -> None:
        """Look what got done, every few seconds at most; `waits_for` is what the work waits for while no worker is there."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        self._progress.look(now, self._receipts.new(), at_work=not waits_for)
        waiting = f" (no worker yet: {waits_for})" if waits_for else ""
        self._show(f"{self._progress.describe()}{waiting}")

    def add(self, done: Collection[int]) -> None:
        """Count shards whose task has ended well: a network disk may show their receipts later."""
        self._progress.done.update(done)
        self.look()

    def end(self) -> None:
        """Fill the bar: the stage is finished."""
        count = range(len(self._progress.amounts.items))
        self._progress.look(time.monotonic(), count)
        self._show(self._progress.describe_end())

    def stop(self) -> None:
        """Leave the bar where it is: the stage has failed."""
        self._progress.look(time.monotonic(), self._receipts.new())
        self._show(f"stopped at {self._progress.describe_amount()}", STOPPED)

    def _show(self, text: str, state: str = AT_WORK) -> None:
        if text == self._shown:
            return
        self._shown = text
        if self._artifact is not None:
            renew(self._artifact, self._progress.percent, text)
        note(self.label, state, text)
