"""One training on one process or many: rank, device, and the sum of gradients over all processes.

There is no wrapper around the model: each process adds up the gradients of its own micro-batches, and one all-reduce
sums them. The loss is divided by the whole step's number of masked frames beforehand, so the sum over any number of
processes is, up to rounding, what a single one computes.
"""

import datetime as dt
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # not in its __all__

from hubert.core.errors import ConfigError, TransientError, first_line
from hubert.training.ranks import find_meeting_point, find_place

BUCKET = 1 << 26  # elements per all-reduce: 268 MB
TIMEOUT = dt.timedelta(minutes=10)
MEETING_TIMEOUT = dt.timedelta(seconds=150)  # from the first process that is there to the last


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

    @property
    def num_gpus(self) -> int:
        """How many GPUs the processes use: one each, or none."""
        return self.size if self.device.type == "cuda" else 0


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
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has found the others already
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise TransientError(
                f"process {rank} of {size} did not meet the others that torchrun started: {error}. Likely cause: one of them "
                "died at its start (see its lines in the log)"
            ) from error
    else:
        meet(backend, world, *find_meeting_point(os.environ, size))
    yield world
    dist.destroy_process_group()  # not after an error: the others may be gone, and the process ends anyway


def meet(backend: str, world: World, address: str, port: int, *, timeout: dt.timedelta = MEETING_TIMEOUT) -> None:
    """Make the process group: all processes of the world meet at an address on which the main one listens.

    A first group with a short timeout finds out whether all are there and reach each other; the training's own is
    patient, since a step may wait for a large checkpoint or a slow disk.

    Raises:
        TransientError: the others did not come, or cannot be reached.
    """
    try:
        store = TCPStore(address, port, world.size, world.is_main, timeout)
        join = partial(dist.init_process_group, backend, rank=world.rank, world_size=world.size)
        join(store=PrefixStore("meet", store), timeout=timeout)
        dist.all_reduce(torch.zeros(1, device=world.device))
        dist.destroy_process_group()
        join(store=PrefixStore("train", store), timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        nodes = f" (nodes {os.environ['SLURM_STEP_NODELIST']})" if "SLURM_STEP_NODELIST" in os.environ else ""
        raise TransientError(
            f"process {world.rank} of {world.size} on {platform.node()} did not meet the others{nodes} within "
            f"{timeout.total_seconds():.0f} s at {address}, port {port}, where process 0 listens: {first_line(error)}. "
            "Likely causes: one of them died at its start (see its lines in the log); that address or port is not reachable "
            "from this node (a firewall, or the wrong network: set `interface` in the cluster file's section `training`, or "
            "export MASTER_ADDR and MASTER_PORT in its `prologue`)"
        ) from error


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
