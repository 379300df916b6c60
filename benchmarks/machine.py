"""What a result was measured on: processor, memory, GPU, system, versions, commit."""

import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what decides how fast matrix products are
PACKAGES = ("torch", "torchaudio", "numpy", "scikit-learn", "polars", "soundfile")


def describe(device: str, threads: int) -> dict[str, Any]:
    """Return the record."""
    info = _read(Path("/proc/cpuinfo"))
    model = re.search(r"^model name\s*: (.*)$", info, re.MULTILINE)
    flags = set((re.search(r"^flags\s*: (.*)$", info, re.MULTILINE) or [""])[0].split())
    total = re.search(r"^MemTotal:\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    return {
        "processor": model[1].strip() if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_bytes": int(total[1]) * 1024 if total else 0,
        "gpu": _gpu() if device == "cuda" else None,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "load_before": round(os.getloadavg()[0], 2),  # 0 on an idle machine: other work makes times longer
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def commit() -> str:
    """Return the commit that is measured; with `+` where the code differs from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "hubert", "benchmarks/stages", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PROJECT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    print(json.dumps(describe("cpu", 0) | {"commit": commit()}, indent=1))
