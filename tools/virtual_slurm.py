"""A real Slurm of several virtual nodes on this one machine: for the tests, for `make slurm-demo`, for trying a site's settings.

Debian's `slurm-wlm` can run one slurmd per node name. As root, without cgroups and without systemd, munged, slurmctld and the
slurmds start in about a second. All files, sockets and ports are the cluster's own, so several can run beside each other
and beside a real one. By hand, until Ctrl-C:

    python -m tools.virtual_slurm FOLDER --nodes 3

The nodes share the machine's cores and memory: what they offer is only what the scheduler counts with.
"""

import argparse
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tools.ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
START_SECONDS = 60.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.1

# What a site's slurm.conf has too stays at its default; the rest makes nodes of processes, and ends of nodes quick.
CONFIGURATION = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ReturnToService=2
# A dead node counts as failed after at most this time; less, and nodes of a busy machine do too.
SlurmdTimeout=20
KillWait=15
MinJobAge=600
# A training's processes meet at a port that follows from the job's id: two clusters on this machine shall not have the same.
FirstJobId={first_job}
SchedulerParameters=sched_interval=2,bf_interval=2
DefMemPerCPU=500
Epilog={folder}/epilog
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=1-00:00:00 PriorityTier=10 State=UP
PartitionName=low Nodes=ALL MaxTime=1-00:00:00 PriorityTier=1 State=UP
PartitionName=short Nodes=ALL MaxTime=00:10:00 PriorityTier=10 State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus}"
)


# A site's epilog cleans up and takes its time; this one takes as long as a file is there.
EPILOG = "#!/bin/sh\nwhile [ -e {hold} ]; do sleep 0.2; done\n"


def missing_reason() -> str | None:
    """Return why no virtual cluster can run here; None if one can."""
    if os.geteuid() != 0:
        return "a virtual Slurm needs root (slurmd starts jobs as other users)"
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=search) is None]
    return f"{', '.join(missing)} not found: apt-get install slurm-wlm munge" if missing else None


class VirtualSlurm:
    """A cluster whose nodes n1, n2, ... are processes of this machine. Use it as `with VirtualSlurm(folder) as slurm`.

    Programs reach it through `environment()`, that is SLURM_CONF.
    """

    def __init__(self, folder: Path, *, num_nodes: int = 3, cpus: int = 4, memory: int = 8000, gpus: int = 1) -> None:
        """Describe it; nothing runs yet. `memory` in MB and `gpus` (none is really there) are per node."""
        self.folder = folder.resolve()
        self.nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        self._sizes = {"cpus": cpus, "memory": memory, "gpus": gpus}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def config(self) -> Path:
        """The cluster's slurm.conf."""
        return self.folder / "slurm.conf"

    @property
    def hold_epilogs(self) -> Path:
        """As long as this file is there, no job comes to its end: its epilog runs (COMPLETING)."""
        return self.folder / "hold-epilogs"

    def environment(self) -> dict[str, str]:
        """Return the variables with which Slurm's commands talk to this cluster."""
        return {"SLURM_CONF": str(self.config)}

    def start(self) -> Self:
        """Start munged, the controller and the nodes; return when all nodes are idle.

        Raises:
            RuntimeError: it cannot run here, or a part did not start; names its log.
        """
        if reason := missing_reason():
            raise RuntimeError(reason)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)  # munged's users must be allowed to pass through
        self._write_configuration()
        try:
            self._start_munge()
            self.start_controller()
            for name in self.nodes:
                self.start_node(name)
            self._wait(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), "idle nodes")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Cancel all jobs and end every process of the cluster, jobs' processes too."""
        if self._is_running("slurmctld"):
            self._run("scancel", "--user=root")
        for name in [*self.nodes, "slurmctld", "munged"]:
            self._end(name, signal.SIGTERM)
        _kill(self._job_processes())

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def history(self) -> str:
        """Return a table of all jobs, the ended ones too: id, name, state, nodes, time."""
        return self._run("squeue", "--states=all", "--sort=i", "--format=%.6i %.22j %.12T %.8N %.10M").stdout.rstrip()

    def write_site(self, path: Path, **sections: dict[str, Any]) -> Path:
        """Write the cluster file for this Slurm: two small jobs of workers, training on two nodes; `sections` win."""
        small = {"cpus": 1, "memory": "1500M"}
        workers = {**small, "jobs": 2, "max_jobs": 2}
        own: dict[str, dict[str, Any]] = {
            "site": {"walltime": "00:30:00", "interface": "lo"},
            **{name: dict(workers) for name in ("extraction", "kmeans", "evaluation")},
            "training": {**small, "nodes": 2, "tasks_per_node": 1},
        }
        for name, section in sections.items():
            own[name] = {**own[name], **section}
        path.write_text(json.dumps({"kind": "slurm", "poll_seconds": 1, **own}, indent=2))  # JSON is YAML
        return path

    # Parts ------------------------------------------------------------------------------------------------------

    def start_controller(self) -> None:
        """Start slurmctld and wait until it answers; jobs that it knew before a stop are still there."""
        self._start("slurmctld", ["slurmctld", "-D", "-f", str(self.config)])
        self._wait(lambda: self._run("scontrol", "ping").returncode == 0, "slurmctld")

    def stop_controller(self) -> None:
        """End slurmctld; running jobs go on."""
        self._end("slurmctld", signal.SIGTERM)

    def start_node(self, name: str) -> None:
        """Start a node's slurmd."""
        self._start(name, ["slurmd", "-D", "-N", name, "-f", str(self.config)])

    def kill_node(self, name: str) -> None:
        """Let a node die as by a power cut: its slurmd, its steps and every process of its jobs, with SIGKILL."""
        self._end(name, signal.SIGKILL)
        _kill(self._job_processes(name))

    def revive_node(self, name: str) -> None:
        """Start a dead node again and wait until it takes jobs."""
        self.start_node(name)
        self._wait(lambda: self.states()[name].rstrip("*") in {"idle", "mixed", "allocated"}, f"node {name}")

    def states(self) -> dict[str, str]:
        """Return each node's state, as sinfo names it; `*` means that it does not respond."""
        lines = self._run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T").stdout.split("\n")
        return dict(line.split() for line in lines if line.strip())

    def jobs(self) -> list[str]:
        """Return the ids of the jobs that are queued, running or ending."""
        return self._run("squeue", "--noheader", "--format=%i").stdout.split()

    def num_jobs(self) -> int:
        """Return how many jobs there have been, as far back as the cluster remembers."""
        return len(self._run("squeue", "--noheader", "--states=all", "--format=%i").stdout.split())

    def wait_until_empty(self) -> None:
        """Wait until no job is left, not even one that is just ending.

        Raises:
            RuntimeError: jobs are left.
        """
        self._wait(lambda: not self.jobs(), "an empty queue")

    # Details ----------------------------------------------------------------------------------------------------

    def _write_configuration(self) -> None:
        host = socket.gethostname().split(".")[0]
        controller_port, *ports = free_ports(1 + len(self.nodes))
        nodes = "\n".join(
            NODE.format(name=name, host=host, port=port, **self._sizes)
            for name, port in zip(self.nodes, ports, strict=True)
        )
        self.config.write_text(
            CONFIGURATION.format(
                host=host,
                controller_port=controller_port,
                folder=self.folder,
                nodes=nodes,
                first_job=1000 + secrets.randbelow(100_000),
            )
        )
        (self.folder / "gres.conf").write_text(f"NodeName={','.join(self.nodes)} Name=gpu File=/dev/null\n")
        epilog = self.folder / "epilog"
        epilog.write_text(EPILOG.format(hold=shlex.quote(str(self.hold_epilogs))))
        epilog.chmod(0o755)
        (self.folder / "state").mkdir(exist_ok=True)
        for name in self.nodes:
            (self.folder / f"spool-{name}").mkdir(exist_ok=True)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir(mode=0o755, exist_ok=True)
        key = folder / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        # --force: munged does not like folders that others may write, such as /tmp's
        self._start("munged", ["munged", "--foreground", "--force", *options])
        self._wait((folder / "socket").exists, "munged")

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._full_environment(),
            )

    def _end(self, name: str, number: signal.Signals) -> None:
        process = self._processes.pop(name, None)
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _is_running(self, name: str) -> bool:
        process = self._processes.get(name)
        return process is not None and process.poll() is None

    def _full_environment(self) -> dict[str, str]:
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
        return {**os.environ, **self.environment(), "PATH": path}

    def command(self, *words: str) -> str:
        """Run one of Slurm's commands on this cluster and return what it printed."""
        return self._run(*words).stdout

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self._full_environment(), capture_output=True, text=True, check=False)

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            ended = [name for name, process in self._processes.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(f"{path}:\n{path.read_text(errors='replace')[-1500:]}" for path in self._logs(ended))
                why = f"{', '.join(ended)} ended" if ended else f"not within {START_SECONDS:.0f} s"
                raise RuntimeError(f"the virtual Slurm in {self.folder} did not get as far as {what}: {why}.\n{logs}")
            time.sleep(POLL_SECONDS)

    def _logs(self, ended: list[str]) -> list[Path]:
        names = [*(f"{name}.out" for name in ended), "slurmctld.log"]
        return [self.folder / name for name in names if (self.folder / name).exists()]

    def _job_processes(self, node: str = "") -> list[psutil.Process]:
        """Return the processes of jobs (of one node)."""
        return [process for process in psutil.process_iter() if self._is_of_job(process, node)]

    def _is_of_job(self, process: psutil.Process, node: str) -> bool:
        """Recognise it by SLURM_CONF and SLURMD_NODENAME, which programs inherit; a slurmstepd has its node's log open."""
        try:
            if process.name() == "slurmstepd":
                return any(file.path.startswith(f"{self.folder}/slurmd-{node}") for file in process.open_files())
            environment = process.environ()
        except psutil.Error:
            return False  # it ended while it was looked at
        name = environment.get("SLURMD_NODENAME")
        return environment.get("SLURM_CONF") == str(self.config) and name is not None and node in {"", name}


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=STOP_SECONDS)


def main() -> int:
    """Run a cluster until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tools.virtual_slurm", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="holds configuration, state and logs")
    parser.add_argument("--nodes", type=int, default=3)
    args = parser.parse_args()
    if reason := missing_reason():
        print(reason, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with VirtualSlurm(args.folder, num_nodes=args.nodes) as cluster:
        print(f"nodes {', '.join(cluster.nodes)}; in another shell:  export SLURM_CONF={cluster.config}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("stopping", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
