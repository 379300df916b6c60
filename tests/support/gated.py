"""A stage whose shards wait until a test lets them go on, and a flow that runs it on Slurm: both for processes of their own."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from prefect import flow, runtime

from hubert.core.files import atomic_write
from hubert.core.stage import Receipt, Spec, Stage
from tasks.clusters.runner import task_runner
from tasks.stage import run_stage

POLL_SECONDS = 0.05


@dataclass
class GatedStage(Stage):
    """Each shard notes which job and process works on it, and ends when its gate (or all of them) is opened."""

    name: ClassVar[str] = "gated"
    parent: Path
    num_shards: int

    def settings(self) -> dict[str, Any]:
        return {"num_shards": self.num_shards}

    def inputs(self) -> dict[str, str]:
        return {}

    def make_plan(self) -> list[Spec]:
        return [{"index": index} for index in range(self.num_shards)]

    def work(self, spec: Spec) -> tuple[list[Path], dict[str, Any]]:
        index = spec["index"]
        output = self.folder / "shards" / f"{index}.txt"
        start = self.parent / "starts" / f"{index}-{os.environ.get('SLURM_JOB_ID', '0')}-{os.getpid()}-{time.time_ns()}"
        with atomic_write(start) as temporary:
            temporary.touch()
        if (self.parent / f"die-{index}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        while not any((self.parent / f"open-{gate}").exists() for gate in (index, "all")):
            time.sleep(POLL_SECONDS)
        with atomic_write(output) as temporary:
            temporary.write_text(str(index))
        return [output], {"value": index}

    def finish(self, receipts: list[Receipt]) -> tuple[list[Path], dict[str, Any]]:
        return [], {"sum": sum(receipt.figures["value"] for receipt in receipts)}


@flow(name="gated-inner")
def inner(folder: str, num_shards: int) -> None:
    """Run the stage on the runner that it was given; after a pause, if there is to be one, once more elsewhere."""
    run_stage(GatedStage(Path(folder), num_shards))
    pause = Path(folder) / "pause"
    if pause.exists():
        while pause.exists():
            time.sleep(POLL_SECONDS)
        second = Path(folder) / "second"
        second.mkdir()
        (second / "open-all").touch()
        run_stage(GatedStage(second, num_shards))


@flow(name="gated")
def gated(folder: str, num_shards: int, cluster: str) -> None:
    """Note the id of this run, and run the stage below it."""
    with atomic_write(Path(folder) / "run-id") as temporary:
        temporary.write_text(str(runtime.flow_run.id))
    inner.with_options(task_runner=task_runner(cluster, "extraction"))(folder, num_shards)
