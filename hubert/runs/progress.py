"""How far a stage is: files and hours of audio that its shards hold, how fast they get done, and how long the rest takes.

What a shard holds follows from the plan and from the lengths in the table that the plan's rows are of, which is read once.
After that a look costs one listing of the folder of receipts.
"""

import math
import os
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl

from hubert.core.frames import SAMPLE_RATE
from hubert.core.stage import Plan, Stage
from hubert.core.text import audio_length, duration, number, time_unit

WINDOW_SECONDS = 600.0  # of work, over which the rate is taken: a lost worker shows, a single slow shard does not


@dataclass(frozen=True)
class Amounts:
    """What each shard of a plan holds: so many of what is counted and, where it is known, so much audio."""

    counted: str
    items: Sequence[int]
    seconds: Sequence[float] | None = None

    @cached_property
    def weights(self) -> Sequence[float]:
        """What work is measured by: audio where it is known."""
        return self.seconds if self.seconds and max(self.seconds) > 0 else self.items

    def describe(self) -> str:
        """Return the whole, such as `9,870 files`."""
        count = sum(self.items)
        return f"{count:,} {self.counted if count != 1 else self.counted.removesuffix('s')}"


def measure(stage: Stage, plan: Plan) -> Amounts:
    """Return what each shard of a stage's plan holds."""
    tables = stage.tables()
    if not tables:
        return Amounts(stage.counted, [1] * len(plan))
    ends = {part: _summed_samples(path) for part, path in tables.items()}
    spans = [(spec.get("part", ""), spec["start"], spec["end"]) for spec in plan.specs]
    items = [end - start for _, start, end in spans]
    if any(samples is None for samples in ends.values()):
        return Amounts(stage.counted, items)
    sums = {part: samples for part, samples in ends.items() if samples is not None}
    seconds = [float(sums[part][end] - sums[part][start]) / SAMPLE_RATE for part, start, end in spans]
    return Amounts(stage.counted, items, seconds)


def _summed_samples(path: Path) -> np.ndarray | None:
    """Return how many samples lie before each row, and in all; None where lengths are not known yet."""
    lengths = pl.scan_parquet(path).select("num_samples").collect(engine="streaming")["num_samples"]
    if lengths.null_count():
        return None
    return np.concatenate([[0], np.cumsum(lengths.to_numpy())])


class Receipts:
    """Which of the missing shards are done, by the receipts that come after the first look."""

    def __init__(self, folder: Path, missing: Collection[int]) -> None:
        """Look at a stage's folder; `missing` are the shards that have no valid receipt now."""
        self.folder = folder / "receipts"
        self._missing = set(missing)
        # A receipt that is there and not valid, of another plan or without its outputs, counts when it is written anew.
        self._stale = {index: entry.stat().st_mtime_ns for index, entry in self._found()}

    def new(self) -> set[int]:
        """Return the shards that got done since the first look."""
        return {
            index
            for index, entry in self._found()
            if index not in self._stale or entry.stat().st_mtime_ns != self._stale[index]
        }

    def _found(self) -> list[tuple[int, "os.DirEntry[str]"]]:
        try:
            with os.scandir(self.folder) as entries:
                named = [(entry.name.removesuffix(".json"), entry) for entry in entries]
        except FileNotFoundError:
            return []
        return [(int(name), entry) for name, entry in named if name.isdecimal() and int(name) in self._missing]


class Pace:
    """How much gets done per second of work; time in which nobody could work does not count.

    Work gets done in steps: a shard, or as many as there are workers. So the rate is taken between two moments at which
    something got done, however long ago the first one is, and not between two looks.
    """

    def __init__(self, window: float = WINDOW_SECONDS) -> None:
        """Take the rate over so many seconds of work, or over one step where steps take longer."""
        self._window = window
        self._worked = 0.0
        self._last: float | None = None
        self._points: deque[tuple[float, float]] = deque()  # when what is done has changed, and to how much

    def look(self, now: float, done: float, *, at_work: bool = True) -> None:
        """Take note of what is done by now (seconds of a steady clock)."""
        if self._last is not None and at_work:
            self._worked += now - self._last
        self._last = now
        if self._points and done == self._points[-1][1]:
            return
        self._points.append((self._worked, done))
        while len(self._points) > 2 and self._worked - self._points[1][0] >= self._window:
            self._points.popleft()

    @property
    def worked(self) -> float:
        """Seconds of work since the first look."""
        return self._worked

    @property
    def rate(self) -> float | None:
        """Work per second, None as long as nothing got done."""
        if len(self._points) < 2:
            return None
        (start, before), (end, after) = self._points[0], self._points[-1]
        # The step under way takes as long as the longest one before; what it takes longer, work has become slower.
        longest = max(later - earlier for (earlier, _), (later, _) in pairwise(self._points))
        seconds = max(end, self._worked - longest) - start
        return (after - before) / seconds if after > before and seconds > 0 else None


class Progress:
    """How far a stage is, from start to end."""

    def __init__(self, amounts: Amounts, done: Collection[int]) -> None:
        """Start with the shards that were `done` before."""
        self.amounts = amounts
        self.done = set(done)
        self._pace = Pace()

    def look(self, now: float, done: Collection[int], *, at_work: bool = True) -> None:
        """Take note of the shards that are done by now; one that was done stays so."""
        self.done |= set(done)
        self._pace.look(now, self._sum(self.amounts.weights), at_work=at_work)

    def _sum(self, amounts: Sequence[float]) -> float:
        return math.fsum(amounts[index] for index in self.done)  # the same in any order: `Pace` looks for changes

    @property
    def is_complete(self) -> bool:
        """Whether all shards are done."""
        return len(self.done) >= len(self.amounts.items)

    @property
    def percent(self) -> float:
        """The share that is done, from 0 to 100."""
        whole = sum(self.amounts.weights)
        return 100.0 if self.is_complete else min(100 * self._sum(self.amounts.weights) / whole, 99.9) if whole else 0.0

    def describe(self) -> str:
        """Return `1,204 of 9,870 files, 12.3 of 98.0 h of audio, 480 s of audio per s, 12 min 30 s left`."""
        if self.is_complete:
            return f"{self.describe_end()}; now put together"
        if (rate := self._pace.rate) is None:
            at_work = f", at work for {duration(self._pace.worked)}" if self._pace.worked >= 1 else ""
            return f"{self.describe_amount()}{at_work}"
        left = (sum(self.amounts.weights) - self._sum(self.amounts.weights)) / rate
        return f"{self.describe_amount()}, {self._speed(rate)}, {duration(left)} left"

    def describe_amount(self) -> str:
        """Return `1,204 of 9,870 files, 12.3 of 98.0 h of audio`."""
        files = f"{int(self._sum(self.amounts.items)):,} of {self.amounts.describe()}"
        if (seconds := self.amounts.seconds) is None:
            return files
        return f"{files}, {audio_of(self._sum(seconds), sum(seconds))} of audio"

    def describe_end(self) -> str:
        """Return `all 9,870 files, 98.0 h of audio, in 3 min 24 s`."""
        parts = [f"all {self.amounts.describe()}" if sum(self.amounts.items) > 1 else self.amounts.describe()]
        if (seconds := self.amounts.seconds) is not None:
            parts.append(f"{audio_length(sum(seconds))} of audio")
        return ", ".join([*parts, f"in {duration(self._pace.worked)}"])

    def _speed(self, rate: float) -> str:
        if self.amounts.weights is self.amounts.seconds:
            return f"{number(rate)} s of audio per s"
        return f"{number(rate)} {self.amounts.counted} per s" if rate >= 1 else f"{duration(1 / rate)} each"


def audio_of(done: float, whole: float) -> str:
    """Write a part of a length of audio in the unit of the whole: `12.3 of 98.0 h`."""
    size, unit = time_unit(whole)
    return f"{done / size:,.1f} of {whole / size:,.1f} {unit}"
