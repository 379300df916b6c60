"""Give each worker process of a job one GPU of its own. Dask runs this at the start of every worker (`--preload`).

Slurm shows a job all of its GPUs, and Dask starts several worker processes in it, named JOB-0, JOB-1, ... The choice is made
in the environment, so it has to come before torch looks for GPUs.
"""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Worker

VARIABLE = "CUDA_VISIBLE_DEVICES"


def choose(visible: str, index: int) -> str:
    """Return the device of the worker with this index, of those that the job sees (numbers or UUIDs, with commas).

    Raises:
        ValueError: the job sees too few.
    """
    devices = [device.strip() for device in visible.split(",") if device.strip()]
    if index >= len(devices):
        raise ValueError(
            f"worker {index} of this job has no GPU: {VARIABLE} is {visible!r}. Likely cause: Slurm gave fewer GPUs than "
            "`gpus` of the cluster file says, or the partition has none"
        )
    return devices[index]


def dask_setup(worker: "Worker") -> None:
    """Let this process see its GPU only."""
    index = int(str(worker.name).rpartition("-")[2])
    os.environ[VARIABLE] = choose(os.environ.get(VARIABLE, ""), index)
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        raise RuntimeError("torch has looked for GPUs before this worker chose its own: it would take all of the job's")
