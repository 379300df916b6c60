"""What Prefect, Dask and Slurm cost beside the work: shards that only sleep, through a real flow on workers that are up.

    python benchmarks/studies/orchestration.py --cluster virtual --output benchmarks/results/orchestration.json

200 shards of 5 s on 3 workers are 333.3 s of work; what is more is overhead. `virtual` starts a Slurm of three virtual nodes on
this machine (root; slurm-wlm), one job of one worker each; another name is a cluster file with three workers in its
section `extraction`. The service is started for it and stopped again.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hubert.core.files import atomic_write
from hubert.core.stage import Figures, Spec, Stage

NUM_WORKERS = 3


@dataclass
class SleepStage(Stage):
    """Shards that take their time and compute nothing."""

    name: ClassVar[str] = "sleep"
    parent: Path
    num_shards: int
    seconds: float

    def settings(self) -> dict[str, Any]:
        return {"num_shards": self.num_shards, "seconds": self.seconds}

    def inputs(self) -> dict[str, str]:
        return {}

    def make_plan(self) -> list[Spec]:
        return [{"number": number} for number in range(self.num_shards)]

    def work(self, spec: Spec) -> tuple[list[Path], Figures]:
        time.sleep(self.seconds)
        with atomic_write(output := self.folder / f"{spec['number']}.txt") as temporary:
            temporary.write_text(platform.node())
        return [output], {"job": os.environ.get("SLURM_JOB_ID", ""), "pid": os.getpid()}


def measure(folder: Path, cluster: str, num_shards: int, seconds: float) -> dict[str, Any]:
    """Run the stage in a flow, after the workers have come up, and return what it took."""
    from prefect import flow, get_run_logger
    from prefect.context import FlowRunContext

    from tasks.clusters.runner import task_runner
    from tasks.stage import run_stage

    stage = SleepStage(folder, num_shards, seconds)
    took: list[float] = []

    @flow(task_runner=task_runner(cluster, "extraction"))
    def sleep() -> None:
        run_stage(SleepStage(folder / "start", 1, 0.0))  # the first task starts the workers
        context = FlowRunContext.get()
        context.task_runner.client.wait_for_workers(NUM_WORKERS)  # a new client would lack the cluster's certificates
        run_stage(SleepStage(folder / "warm", 2 * NUM_WORKERS, 1.0))  # each worker imports the project
        get_run_logger().info("%d workers are up", NUM_WORKERS)
        start = time.perf_counter()
        run_stage(stage)
        took.append(time.perf_counter() - start)

    sleep()
    ideal = num_shards * seconds / NUM_WORKERS
    plan = stage.plan()
    receipts = [receipt for index in range(num_shards) if (receipt := stage.receipt(index, plan))]
    return {
        "num_shards": num_shards,
        "shard_seconds": seconds,
        "num_workers": len({receipt.figures["pid"] for receipt in receipts}),
        "slurm_jobs": sorted({receipt.figures["job"] for receipt in receipts} - {""}),
        "wall_seconds": round(took[0], 1),
        "ideal_seconds": round(ideal, 1),
        "overhead_percent": round(100 * (took[0] / ideal - 1), 1),
    }


def main() -> None:
    """Start what is needed, measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cluster", default="virtual")
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        cluster = args.cluster
        if cluster == "virtual":
            from tools.virtual_slurm import VirtualSlurm

            slurm = stack.enter_context(VirtualSlurm(folder / "slurm"))
            os.environ.update(slurm.environment())
            workers = {"jobs": NUM_WORKERS, "max_jobs": NUM_WORKERS, "workers": 1}
            cluster = str(slurm.write_site(folder / "site.yaml", extraction=workers))
        os.environ.update(start_service(folder / "service", stack))
        result = measure(folder / "run", cluster, args.shards, args.seconds)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result |= {"cluster": args.cluster, "cores": os.cpu_count(), "python": platform.python_version()}
    result |= {"commit": commit.stdout.strip(), "command": f"python {' '.join(sys.argv)}"}
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def start_service(folder: Path, stack: ExitStack) -> dict[str, str]:
    """Start the servers on free ports until the stack is left; return the variables that a flow needs."""
    from tasks.service import service
    from tasks.service.settings import ServiceSettings, environment
    from tools.ports import free_ports

    prefect_port, mlflow_port = free_ports(2)
    settings = ServiceSettings(
        folder=folder, profiles=folder / "profiles.toml", prefect_port=prefect_port, mlflow_port=mlflow_port
    )
    service.up(settings)
    stack.callback(service.down, settings)
    return environment(settings)


if __name__ == "__main__":
    main()
