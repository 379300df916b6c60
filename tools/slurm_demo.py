"""`make slurm-demo`: the demo recipe, end to end, through a real Slurm of three virtual nodes on this machine.

Extraction, k-means and evaluation run on Dask workers in Slurm jobs, each training is an srun over two nodes. Options go
to `hubert demo`, such as `--steps 100`.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tools.virtual_slurm import VirtualSlurm, missing_reason

PROJECT = Path(__file__).resolve().parent.parent
FOLDER = PROJECT / ".slurm-demo"
EMPTY_SECONDS = 30.0


def main() -> int:
    """Run the demo on a cluster that lasts as long as it; returns the exit code."""
    if reason := missing_reason():
        print(reason, file=sys.stderr)
        return 2
    shutil.rmtree(FOLDER / "slurm", ignore_errors=True)
    with VirtualSlurm(FOLDER / "slurm") as cluster:
        site = cluster.write_site(FOLDER / "site.yaml")
        print(
            f"Slurm: nodes {', '.join(cluster.nodes)}; look at it with  SLURM_CONF={cluster.config} squeue", flush=True
        )
        environment = {**os.environ, **cluster.environment(), "HUBERT_SERVICE": str(FOLDER / "service")}
        command = [str(Path(sys.executable).parent / "hubert"), "demo", "--run", "slurm-demo", "--cluster", str(site)]
        code = subprocess.run([*command, *sys.argv[1:]], env=environment, check=False).returncode
        deadline = time.monotonic() + EMPTY_SECONDS
        while (left := cluster.jobs()) and time.monotonic() < deadline:
            time.sleep(0.5)
        print(f"\nSlurm's jobs:\n{cluster.history()}")
        print(f"still in the queue: {', '.join(left)}" if left else "the queue is empty")
    return code or bool(left)


if __name__ == "__main__":
    sys.exit(main())
