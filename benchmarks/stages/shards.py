"""Plans and receipts of a stage whose shards are empty: what the bookkeeping itself costs.

Options: num_shards, in_memory (the stage's folder lies on no disk).
Figures: seconds to find out that everything is done, and that one shard of all is missing.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from benchmarks.measure import Outcome, Run

MEMORY = Path("/dev/shm")  # noqa: S108  (a folder with a name of its own is made there)


def ours(run: Run) -> Outcome:
    """Plan, do each shard, put together; then look again."""
    from hubert.core.stage import Figures, Spec, Stage

    @dataclass
    class Empty(Stage):
        """Shards without work."""

        name: ClassVar[str] = "empty"
        parent: Path
        num_shards: int

        def settings(self) -> dict[str, Any]:
            return {"num_shards": self.num_shards}

        def inputs(self) -> dict[str, str]:
            return {}

        def make_plan(self) -> list[Spec]:
            return [{"start": number, "end": number + 1} for number in range(self.num_shards)]

        def work(self, spec: Spec) -> tuple[list[Path], Figures]:
            return [], {"num_files": spec["end"] - spec["start"]}

    with TemporaryDirectory(dir=MEMORY if run.options["in_memory"] else run.scratch) as parent:
        return _measure(run, Empty(Path(parent), run.options["num_shards"]))


def _measure(run: Run, stage: Any) -> Outcome:
    with run.clock:
        stage.run()
    start = time.perf_counter()
    if stage.done() is None:
        raise RuntimeError("the stage ran, and is not done")
    done_seconds, start = time.perf_counter() - start, time.perf_counter()
    last = stage.num_shards - 1
    (stage.folder / "receipts" / f"{last:05d}.json").unlink()
    if stage.missing(stage.plan()) != [last]:
        raise RuntimeError(f"expected shard {last} to be missing")
    return Outcome(figures={"done_seconds": done_seconds, "missing_seconds": time.perf_counter() - start})


SIDES = {"ours": ours}
