"""Rank, world size and meeting point of a training's processes, from torchrun's or Slurm's environment."""

import os
import re
import socket
import subprocess
from collections.abc import Mapping

from hubert.core.errors import ConfigError

SCONTROL_SECONDS = 60.0


def find_place(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Return (rank, size, local rank) from torchrun's variables, else from Slurm's (inside `srun`), else (0, 1, 0).

    Slurm's are read from the step, not from the job: a plain process inside `sbatch` or `salloc` is alone.

    Raises:
        ConfigError: the variables contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if _is_slurm_step(environment):
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    rank, size, local_rank = (
        int(environment.get(name, default)) for name, default in zip(names, ("0", "1", "0"), strict=True)
    )
    if not 0 <= rank < size:
        raise ConfigError(f"{names[0]} is {rank} and {names[1]} is {size}: expected a rank from 0 to {size - 1}")
    return rank, size, local_rank


def threads_per_process(environment: Mapping[str, str], num_processes: int) -> int:
    """Return the cores that a process may use for itself.

    Under `srun` its task' share (`--cpus-per-task`), else the machine's cores, shared out to `num_processes`.
    """
    if _is_slurm_step(environment):
        return int(environment.get("SLURM_CPUS_PER_TASK") or _cores())
    return max(1, _cores() // num_processes)


def find_meeting_point(environment: Mapping[str, str], size: int) -> tuple[str, int]:
    """Return the address and port at which the processes meet: MASTER_ADDR and MASTER_PORT, else those of Slurm's step.

    SLURM_LAUNCH_NODE_IPADDR is not used: it is the machine where srun was called, maybe a login node. The first process
    runs on the step's first node; the port is derived from the job's id.

    Raises:
        ConfigError: there is no address, or that node's name and address are not known here.
    """
    address = environment.get("MASTER_ADDR")
    if not address and _is_slurm_step(environment) and environment.get("SLURM_STEP_NODELIST"):
        address = _address_of(first_host(environment["SLURM_STEP_NODELIST"]))
    if not address:
        raise ConfigError(
            f"{size} processes were started without MASTER_ADDR: they cannot find each other. Start them with "
            "`torchrun --nproc-per-node N -m hubert.train JOB` or with `srun`"
        )
    job = int(environment.get("SLURM_JOB_ID", "0")) * 64 + int(environment.get("SLURM_STEP_ID", "0"))
    return address, int(environment.get("MASTER_PORT") or 20_000 + job % 20_000)


def first_host(hosts: str) -> str:
    """Return the first name of a list in Slurm's notation, such as `gpu007` of `gpu[007-009,12],cpu1`."""
    name = re.split(r",(?![^\[]*\])", hosts)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", name)


def _is_slurm_step(environment: Mapping[str, str]) -> bool:
    return "RANK" not in environment and "SLURM_STEP_NUM_TASKS" in environment


def _address_of(node: str) -> str:
    """Return a node's name if it resolves, else its NodeAddr in Slurm's configuration.

    Raises:
        ConfigError: neither resolves.
    """
    if _resolves(node):
        return node
    try:
        command = ["scontrol", "show", "node", node]
        said = subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_SECONDS, check=False)
        text = said.stdout + said.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        text = str(error)
    match = re.search(r"\bNodeAddr=(\S+)", text)
    if match and _resolves(match[1]):
        return match[1]
    raise ConfigError(
        f"the first process runs on node {node}, and that name does not resolve on {socket.gethostname()}, nor is there a "
        f"usable NodeAddr (`scontrol show node {node}` said: {text.strip()[:200]!r}). Fix: add the node to DNS or /etc/hosts, "
        "or export MASTER_ADDR in `prologue` of the cluster file's section `training`"
    )


def _resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
