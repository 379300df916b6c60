"""Every stage, ours and the peers', side by side: python -m benchmarks.run [--size quick] [--device cpu] [--only step …]

Each measurement is a process of its own, so its peak memory is its own; the sides of a case take turns, so other work on the
machine hits all of them. The result is a JSON file under benchmarks/results/; `python -m benchmarks.table` makes the README's
table of it. On a machine without package index give the peers as folders: --peer-python python3 --peer-path FOLDER.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.cases import DEVICES, OURS, PEER, SIZES, Case, build_cases, inputs_of

PROJECT = machine.PROJECT
RESULTS = PROJECT / "benchmarks" / "results"
WORK = PROJECT / ".bench"
TIMEOUT = 900.0  # seconds for one measurement; the longest takes about a minute


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="quick", choices=SIZES)
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", nargs="+", default=[], help="cases whose name starts with one of these")
    parser.add_argument("--sides", nargs="+", default=[], help="only these sides")
    parser.add_argument("--repeats", type=int, help="of every case")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/peers-DEVICE.json if whole")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for inputs and scratch")
    parser.add_argument("--peer-python", type=Path, help="Python of an environment that holds the peers")
    parser.add_argument("--peer-path", type=Path, help="folder of the peers' packages, for that Python")
    args = parser.parse_args()
    cases = build_cases(args.size, args.device)
    if args.only:
        cases = [case for case in cases if case.name.startswith(tuple(args.only))]
    if not cases:
        sys.exit(f"no case starts with {', '.join(args.only)}; there are: {', '.join(all_names(args.device))}")
    whole = not args.only and not args.sides and args.size != "smoke"
    output = args.output or (RESULTS if whole else args.work) / f"peers-{args.device}.json"
    from benchmarks import peer

    peer_python = args.peer_python or peer.install()
    start = time.perf_counter()
    record = machine.describe(args.device, args.threads)
    runner = Runner(args.work, args.device, args.threads, peer_python, args.peer_path)
    runner.prepare(inputs_of(cases), args.size)
    rows = [runner.measure(case, args.sides, args.repeats or case.repeats) for case in cases]
    result = {
        "size": args.size,
        "device": args.device,
        "commit": machine.commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": record,
        "peer": peer.PEER,
        "peer_versions": runner.peer_versions | {"ffmpeg": peer.ffmpeg_version(peer_python)},
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
        "orchestration": read_orchestration(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    from benchmarks.table import render

    print(f"\n{render([result], whole=True)}\n\n{result['seconds']:.0f} s; {output}")


def read_orchestration() -> dict[str, Any] | None:
    """Return what benchmarks/studies/orchestration.py has recorded; it runs for minutes on a Slurm of its own, so not here."""
    path = RESULTS / "orchestration.json"
    return json.loads(path.read_text()) if path.exists() else None


def all_names(device: str) -> list[str]:
    """Return the names of all cases."""
    return [case.name for case in build_cases("full", device)]


class Runner:
    """Starts the processes and sums up what they measured."""

    def __init__(self, work: Path, device: str, threads: int, peer_python: Path, peer_path: Path | None) -> None:
        self.work = work.resolve()
        self.device = device
        self.threads = threads
        self.pythons = {True: Path(sys.executable), False: peer_python}
        self.peer_path = peer_path
        self.peer_versions: dict[str, str] = {}
        self.inputs = self.work / "inputs"

    def prepare(self, spec: dict[str, Any], size: str) -> None:
        """Make the inputs, in a process of its own; inputs that other code made are removed."""
        code = b"".join((PROJECT / "benchmarks" / name).read_bytes() for name in ("signals.py", "inputs.py"))
        self.inputs = self.work / f"inputs-{size}-{hashlib.sha256(code).hexdigest()[:8]}"
        for other in self.work.glob(f"inputs-{size}-*"):
            if other != self.inputs:
                shutil.rmtree(other)
        self.inputs.mkdir(parents=True, exist_ok=True)
        path = self.work / "spec.json"
        path.write_text(json.dumps(spec))
        command = [self.pythons[True], "-m", "benchmarks.inputs", self.inputs, path]
        subprocess.run(command, check=True, cwd=PROJECT, env=self._environment({}, ours=True))

    def measure(self, case: Case, only: list[str], repeats: int) -> dict[str, Any]:
        """Measure all sides of a case in turn; return the row of the result."""
        sides = [side for side in case.sides if not only or side in only]
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        errors: dict[str, str] = {}
        for number in range(repeats):
            for side in sides:
                if side in errors or (number and side in case.once):
                    continue
                print(f"{case.name} {number + 1}/{repeats} {side} ", end="", flush=True)
                try:
                    result = self._process(case, side)
                except RuntimeError as error:
                    errors[side] = str(error)
                    print(f"failed: {error}", flush=True)
                    continue
                print(f"{statistics.median(result['wall_seconds']):.2f} s", flush=True)
                found[side].append(result)
        return summarise(case, found, errors)

    def _process(self, case: Case, side: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=self.work) as name:
            folder = Path(name)
            (folder / "scratch").mkdir()
            request = {
                "stage": case.stage,
                "side": side,
                "options": case.options,
                "inputs": str(self.inputs),
                "scratch": str(folder / "scratch"),
                "device": self.device,
                "threads": self.threads,
                "spawned": time.time(),
            }
            (folder / "request.json").write_text(json.dumps(request))
            command = [self.pythons[side.startswith(OURS)], "-m", "benchmarks.measure", folder / "request.json"]
            environment = self._environment(case.environment, ours=side.startswith(OURS))
            with (folder / "log").open("w") as log:
                try:
                    process = subprocess.run(
                        [*command, folder / "result.json"],
                        cwd=PROJECT,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        timeout=TIMEOUT,
                        check=False,
                    )
                except subprocess.TimeoutExpired as error:
                    raise RuntimeError(f"more than {TIMEOUT:.0f} s") from error
            if process.returncode or not (folder / "result.json").exists():
                shutil.copy(folder / "log", self.work / "failed.log")
                lines = [line.strip() for line in (folder / "log").read_text().splitlines() if line.strip()]
                last = (lines or ["no output"])[-1].replace(str(self.work), "WORK").replace(str(PROJECT), ".")
                raise RuntimeError(f"{last[:200]} (status {process.returncode})")
            result: dict[str, Any] = json.loads((folder / "result.json").read_text())
            if side == PEER:
                self.peer_versions |= result["versions"]
            return result

    def _environment(self, extra: dict[str, str], *, ours: bool) -> dict[str, str]:
        paths = [str(PROJECT)] + ([] if ours or self.peer_path is None else [str(self.peer_path.resolve())])
        inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*paths, *(path for path in inherited if path not in paths)]),
            "OMP_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads sleep: nothing changes on an idle machine, much on a busy one
            "TQDM_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
            **({} if self.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}),
            **extra,
        }


# Summing up -------------------------------------------------------------------------------------------------------


def summarise(case: Case, found: dict[str, list[dict[str, Any]]], errors: dict[str, str]) -> dict[str, Any]:
    """Return the row of a case: what each side took, and how ours compares with each other side."""
    sides = {side: _side(results) for side, results in found.items() if results}
    row: dict[str, Any] = {"name": case.name, "title": case.title, "stage": case.stage, "options": case.options}
    row |= {"unit": case.unit, "comment": case.comment, "sides": sides, "errors": errors}
    if OURS in sides:
        row["ratios"] = {
            side: {
                "wall": speed(other, case.unit, "wall") / speed(sides[OURS], case.unit, "wall"),
                "cpu": speed(other, case.unit, "cpu") / speed(sides[OURS], case.unit, "cpu"),
            }
            for side, other in sides.items()
            if side != OURS
        }
        # More is better for us: how many times as fast we are.
        row["ratios"] = {
            side: {kind: round(1 / value, 3) for kind, value in ratios.items()}
            for side, ratios in row["ratios"].items()
        }
    checks = {side: results[0]["check"] for side, results in found.items() if results and results[0]["check"]}
    if OURS in checks and PEER in checks:
        mine, theirs = checks[OURS], checks[PEER]
        if case.agreement:
            count = min(len(mine), len(theirs))
            row["agreement"] = round(sum(a == b for a, b in zip(mine, theirs, strict=False)) / count, 4)
        elif case.tolerance is not None:
            row["difference"] = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
            row["agrees"] = row["difference"] <= case.tolerance
    return row


def _side(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum up the processes of one side: medians over all rounds, with the fastest and the slowest."""
    wall = [seconds for result in results for seconds in result["wall_seconds"]]
    cpu = [seconds for result in results for seconds in result["cpu_seconds"]]
    figures: dict[str, float] = results[0]["figures"]
    peaks = [result["figures"].get("peak_bytes", result["peak_bytes"]) for result in results]
    return {
        "wall_seconds": statistics.median(wall),
        "wall_spread": [min(wall), max(wall)],
        "cpu_seconds": statistics.median(cpu),
        "num_rounds": len(wall),
        "audio_seconds": statistics.median(result["audio_seconds"] for result in results),
        "peak_bytes": int(statistics.median(peaks)),
        "before_bytes": int(statistics.median(result["before_bytes"] for result in results)),
        "gpu_peak_bytes": max(result["gpu_peak_bytes"] for result in results),
        "bytes_written": max(result["bytes_written"] for result in results),
        "figures": {name: value for name, value in figures.items() if name != "peak_bytes"},
    }


def speed(side: dict[str, Any], unit: str, kind: str) -> float:
    """Return a side's speed by wall or CPU time: seconds of audio per second, or runs per second."""
    seconds = side[f"{kind}_seconds"]
    return (1.0 if unit == "s" else side["audio_seconds"]) / max(seconds, 1e-9)


if __name__ == "__main__":
    main()
