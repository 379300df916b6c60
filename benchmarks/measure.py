"""One side of one stage, in a process of its own: python -m benchmarks.measure REQUEST.json RESULT.json

The process runs in the environment of its side (ours, or the peers'), so this file and the stages import nothing at the
top that one of them lacks.
"""

import importlib
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.clock import Clock


@dataclass
class Run:
    """What a side is given. `inputs` is shared and read only, `scratch` is empty and its own."""

    inputs: Path
    scratch: Path
    device: str
    threads: int
    options: dict[str, Any]
    spawned: float  # time.time() when the process was asked for
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)


@dataclass
class Outcome:
    """What a side says beside its times. `check`: numbers that all sides which do the same work must agree on."""

    audio_seconds: float = 0.0  # per round
    check: list[float] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


def main() -> None:
    """Measure, and write the result."""
    request = json.loads(Path(sys.argv[1]).read_text())
    stage = importlib.import_module(f"benchmarks.stages.{request['stage']}")
    run = Run(**{name: request[name] for name in ("device", "threads", "options", "spawned")}, **_paths(request))
    outcome: Outcome = stage.SIDES[request["side"]](run)
    clock = run.clock
    result = {
        "wall_seconds": clock.wall,
        "cpu_seconds": clock.cpu,
        "peak_bytes": clock.peak,
        "before_bytes": clock.before,
        "gpu_peak_bytes": clock.gpu_peak,
        "bytes_written": sum(file.stat().st_size for file in run.scratch.rglob("*") if file.is_file()),
        "audio_seconds": outcome.audio_seconds,
        "check": outcome.check,
        "figures": outcome.figures,
        "versions": _versions(),
    }
    Path(sys.argv[2]).write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # loaders' threads and processes need not be waited for


def _paths(request: dict[str, Any]) -> dict[str, Path]:
    return {name: Path(request[name]) for name in ("inputs", "scratch")}


def _versions() -> dict[str, str]:
    names = ("torch", "torchaudio", "transformers", "sklearn", "minimal_hubert", "torchcodec")
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in names:
        if name in sys.modules:
            try:
                found[name] = version({"sklearn": "scikit-learn"}.get(name, name))
            except PackageNotFoundError:
                continue
    return found


def use_threads(run: Run) -> None:
    """Let torch use the run's number of threads. Each stage calls it, so that nobody imports torch before its time."""
    import torch

    torch.set_num_threads(run.threads)
    torch.manual_seed(0)


def now_since_spawn(run: Run) -> float:
    """Return the seconds since the process was asked for."""
    return time.time() - run.spawned


if __name__ == "__main__":
    main()
