"""One training on one process or many: who am I, which device, and the sum of gradients over all processes.

There is no wrapper around the model: each process adds up the gradients of its own micro-batches, and one all-reduce
sums them. The loss is divided by the whole step's number of masked frames beforehand, so the sum over any number of
processes is, up to rounding, what a single one computes.
"""

import datetime as dt
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hubert.errors import ConfigError, TransientError

BUCKET = 1 << 26  # elements per all-reduce: 268 MB
TIMEOUT = dt.timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process's place among the processes of one training, and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0


def find_place(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Return (rank, size, local rank) from torchrun's variables, else from Slurm's (inside `srun`), else (0, 1, 0).

    Slurm's are read from the step, not from the job: a plain process inside `sbatch` or `salloc` is alone.

    Raises:
        ConfigError: the variables contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in environment and "SLURM_STEP_NUM_TASKS" in environment:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    rank, size, local_rank = (
        int(environment.get(name, default)) for name, default in zip(names, ("0", "1", "0"), strict=True)
    )
    if not 0 <= rank < size:
        raise ConfigError(f"{names[0]} is {rank} and {names[1]} is {size}: expected a rank from 0 to {size - 1}")
    return rank, size, local_rank


def find_rendezvous(environment: Mapping[str, str], size: int) -> str:
    """Return the address at which the processes meet, as torch's `init_method`.

    Under `srun` without MASTER_ADDR it is the node that launched the step, at a port derived from the job's id.
    """
    address = environment.get("MASTER_ADDR") or environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if not address:
        raise ConfigError(
            f"{size} processes were started without MASTER_ADDR: they cannot find each other. Start them with "
            "`torchrun --nproc-per-node N -m hubert.train JOB` or with `srun`"
        )
    job = int(environment.get("SLURM_JOB_ID", "0")) * 64 + int(environment.get("SLURM_STEP_ID", "0"))
    return f"tcp://{address}:{environment.get('MASTER_PORT') or 20_000 + job % 20_000}"


@contextmanager
def join_world(device: Literal["auto", "cpu", "cuda"] = "auto") -> Iterator[World]:
    """Find this process's place, meet the others (NCCL on CUDA, gloo on CPU), and leave at the end.

    Raises:
        ConfigError: CUDA was asked for and is not there, or there are more processes than GPUs.
        TransientError: the others did not come.
    """
    rank, size, local_rank = find_place(os.environ)
    world = World(rank, size, local_rank, _choose_device(device, local_rank))
    if size == 1:
        yield world
        return
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    method = "env://" if "RANK" in os.environ and "MASTER_PORT" in os.environ else find_rendezvous(os.environ, size)
    try:
        dist.init_process_group(backend, init_method=method, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise TransientError(
            f"process {rank} of {size} did not meet the others at {method} within {TIMEOUT}: {error}. Likely cause: one of "
            "them died at its start (see its log), or that address is not reachable from this node; set MASTER_ADDR"
        ) from error
    yield world
    dist.destroy_process_group()  # not after an error: the others may be gone, and the process ends anyway


def _choose_device(wanted: str, local_rank: int) -> torch.device:
    """Return the device of a process. Slurm may show each process only its own GPU; torchrun shows all of them."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = 0 if count == 1 and "LOCAL_RANK" not in os.environ else local_rank
    if index >= count:
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: {count} found. Fix: train.num_processes <= {max(count, 1)}"
            + ("" if count else ", and device = 'cpu' or 'auto'")
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


class Gradients:
    """All gradients of a model in one flat array of its weights' dtype, with a few numbers at its end that travel along.

    The parameters' `.grad` are views of the array, so zeroing, summing over processes, the norm and clipping are one
    operation each. A parameter that no micro-batch used (layerdrop) has a gradient of zeros, on every process alike.
    Never set a `.grad` to None while this object is in use.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], num_extras: int) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self._length = sum(_aligned(parameter.numel()) for parameter in trained)
        self._flat = torch.zeros(self._length + num_extras, dtype=trained[0].dtype, device=trained[0].device)
        start = 0
        for parameter in trained:
            parameter.grad = self._flat[start : start + parameter.numel()].view_as(parameter)
            start += _aligned(parameter.numel())

    @property
    def extras(self) -> Tensor:
        """The numbers at the end: (num_extras,), a view."""
        return self._flat[self._length :]

    def zero(self) -> None:
        """Forget the last step."""
        self._flat.zero_()

    def sum_over(self, world: World) -> None:
        """Sum gradients and extras over all processes, in place.

        Raises:
            TransientError: another process is gone.
        """
        if world.size == 1:
            return
        try:
            for start in range(0, len(self._flat), BUCKET):
                dist.all_reduce(self._flat[start : start + BUCKET])
        except (RuntimeError, dist.DistError) as error:
            raise TransientError(
                f"process {world.rank} of {world.size} lost the others while summing gradients: {error}. Likely cause: one "
                "of them died (its own error is in the log); the training goes on from the last checkpoint"
            ) from error

    def norm(self) -> Tensor:
        """Return the Euclidean norm of the gradients, a scalar on the device."""
        norm: Tensor = torch.linalg.vector_norm(self._flat[: self._length])
        return norm

    def scale(self, factor: float) -> None:
        """Multiply the gradients."""
        self._flat[: self._length].mul_(factor)


def _aligned(length: int) -> int:
    """Round up to 64 bytes of float32: vectorised kernels want aligned starts, and zeros change no sum."""
    return -(-length // 16) * 16


def share_integer(world: World, value: int) -> int:
    """Return the main process's value on every process.

    Raises:
        TransientError: the main process is gone.
    """
    if world.size == 1:
        return value
    shared = torch.tensor([value], device=world.device)
    try:
        dist.broadcast(shared, src=0)
    except (RuntimeError, dist.DistError) as error:
        raise TransientError(f"process {world.rank} of {world.size} lost the main one at the start: {error}") from error
    return int(shared.item())
