"""What mirroring to MLflow takes: ten thousand points of a log and a hundred checkpoints, to a server that is up.

    python -m benchmarks.studies.mirroring --output benchmarks/results/mirroring.json

The log has the metrics that a training writes, ten per line; each checkpoint becomes an entry with its losses and a version of
the registered model. A second pass, as of a flow that is started again, has to find that everything is there. The service
is started for it and stopped again.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.studies.orchestration import start_service
from hubert.core.hashing import digest
from hubert.core.paths import RunFolder
from hubert.evaluation.checkpoints import Checkpoint, LayerScores
from hubert.evaluation.choice import Outcome
from hubert.settings.sections import TrainSettings
from hubert.training.stage import TrainStage
from tools.given_stages import labels_in

METRICS = ("epoch", "accuracy", "feature_penalty", "grad_norm", "max_grad_norm", "learning_rate", "num_nonfinite")
METRICS += ("audio_seconds_per_second", "seconds", "loss")


def write_log(stage: TrainStage, num_lines: int) -> None:
    """Write metrics.jsonl."""
    stage.folder.mkdir(parents=True)
    lines = ({"step": step, "time": 1e9 + step, **dict.fromkeys(METRICS, 1 / step)} for step in range(1, num_lines + 1))
    (stage.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def offer(stage: TrainStage, number: int, step: int) -> Checkpoint:
    """Return the record of a checkpoint; only the server is asked to remember it."""
    scores = [
        LayerScores(layer=layer, abx_within=5.0 + layer, abx_across=8.0 + layer, pnmi=0.5) for layer in range(1, 13)
    ]
    return Checkpoint(
        step=step,
        checkpoint=str(stage.folder / f"step-{step:08d}"),
        sha256=digest([number, step]),
        num_layers=12,
        validation_loss=5 - step / 1000,
        masked_accuracy=step / 1000,
        unmasked_loss=5.0,
        unmasked_accuracy=0.1,
        layer=1,
        why="lowest ABX",
        layers=tuple(scores),
    )


def measure(root: Path, num_points: int, num_checkpoints: int) -> dict[str, Any]:
    """Mirror everything twice, and count what MLflow has afterwards."""
    import mlflow

    from tasks.tracking.mirror import Tracker
    from tasks.tracking.registry import find_registered, register, versions_of

    folder = RunFolder(root)
    stage = TrainStage(parent=folder.iteration(1), labels=labels_in(root / "table", 500), train=TrainSettings())
    write_log(stage, num_points // len(METRICS))
    checkpoints = [offer(stage, number, 100 * (number + 1)) for number in range(num_checkpoints)]
    best = checkpoints[-1]
    outcome = Outcome(1, best.checkpoint, best.sha256, best.step, 1, "abx", best.why)
    result: dict[str, Any] = {"points": num_points, "checkpoints": num_checkpoints}
    for name in ("first", "again"):
        tracker = Tracker(folder, stage, {"run": str(root), "iteration": "1"}, {})
        start = time.perf_counter()
        tracker.catch_up()
        mirrored = time.perf_counter()
        entries = tracker.log_checkpoints(checkpoints)
        logged = time.perf_counter()
        register(tracker, 1, checkpoints, entries, outcome)
        end = time.perf_counter()
        seconds = {
            "points": mirrored - start,
            "entries": logged - mirrored,
            "versions": end - logged,
            "all": end - start,
        }
        result[f"{name}_seconds"] = {part: round(value, 2) for part, value in seconds.items()}
    experiment_id, run_id = tracker.ids()
    client = tracker.client
    counted = {
        "points": sum(len(client.get_metric_history(run_id, name)) for name in METRICS),
        "entries": len(mlflow.search_logged_models([experiment_id], output_format="list")),
        "versions": len(versions_of(client, find_registered(client, folder, 1).name)),
    }
    wanted = {"points": num_points, "entries": num_checkpoints, "versions": num_checkpoints}
    if counted != wanted:
        raise SystemExit(f"MLflow has {counted}, expected {wanted}")
    return {**result, "in_mlflow_afterwards": counted}


def main() -> None:
    """Start the service, measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--checkpoints", type=int, default=100)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        os.environ.update(start_service(Path(name) / "service", stack))
        result = measure(Path(name) / "run", args.points, args.checkpoints)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result |= {"cores": os.cpu_count(), "python": platform.python_version(), "mlflow": version("mlflow")}
    result |= {
        "commit": commit.stdout.strip(),
        "command": f"python -m benchmarks.studies.mirroring {' '.join(sys.argv[1:])}",
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
