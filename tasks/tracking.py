"""MLflow, and the only file that imports it: losses, checkpoints and scores of every training, side by side.

The trainer talks to no server: it appends to `metrics.jsonl`, and this file mirrors new lines. One experiment per run,
one MLflow run per training key, each checkpoint an entry of its own (a logged model that refers to the folder; weights
are not copied). Mirroring is idempotent: it starts after the last step that MLflow already has, so an outage costs
nothing but a later catch-up, and a resumed training never writes a point twice.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import LifecycleStage, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from requests.exceptions import RequestException

from hubert.pipeline import Iteration
from hubert.train import TrainStage

# A server that is down must be noticed in seconds: mirroring catches up later.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

BATCH = 1000  # MLflow's own limit of metrics per request
WATERMARK = "loss"  # the metric whose last step says how far the mirror is
OUTAGE = (MlflowException, RequestException, OSError)


class Tracker:
    """Mirrors one training into MLflow. A server that does not answer stops nothing."""

    def __init__(
        self, run_name: str, stage: TrainStage, tags: Mapping[str, str], parameters: Mapping[str, Any]
    ) -> None:
        self.run_name = run_name
        self.stage = stage
        self.tags = dict(tags)
        self.parameters = dict(parameters)
        self.behind = False
        self._ids: tuple[str, str] | None = None
        self._next_step: int | None = None

    @property
    def client(self) -> MlflowClient:
        """A client of the server that MLFLOW_TRACKING_URI names."""
        return MlflowClient()

    def ids(self) -> tuple[str, str]:
        """Return the ids of the experiment and of the MLflow run, made at the first call."""
        if self._ids is None:
            client = self.client
            experiment = client.get_experiment_by_name(self.run_name)
            if experiment is not None and experiment.lifecycle_stage == LifecycleStage.DELETED:
                client.restore_experiment(experiment.experiment_id)  # a deleted one takes no values, and keeps its name
            experiment_id = experiment.experiment_id if experiment else client.create_experiment(self.run_name)
            found = client.search_runs([experiment_id], f"tags.training_key = '{self.stage.key}'", max_results=1)
            if found:
                run_id = found[0].info.run_id
            else:
                tags = {"training_key": self.stage.key, "folder": str(self.stage.folder), **self.tags}
                run_id = client.create_run(experiment_id, run_name=self.stage.label, tags=tags).info.run_id
            if not found or not found[0].data.params:  # MLflow may have gone away between the two requests
                params = [Param(name, str(value)[:500]) for name, value in self.parameters.items()]
                client.log_batch(run_id, params=params)
            self._ids = experiment_id, run_id
        return self._ids

    def mirror(self) -> bool:
        """Send the lines of metrics.jsonl that MLflow does not have; False if it did not answer (try again later)."""
        try:
            self._mirror()
        except OUTAGE:
            self.behind, self._next_step = True, None
            return False
        self.behind = False
        return True

    def _mirror(self) -> None:
        client, (_, run_id) = self.client, self.ids()
        if self._next_step is None:
            history = client.get_metric_history(run_id, WATERMARK)
            self._next_step = max((metric.step for metric in history), default=-1) + 1
        points = []
        for line in read_lines(self.stage.folder / "metrics.jsonl"):
            if line["step"] >= self._next_step:
                points += metric_points(line)
        # The watermark is a metric of the last request of its step, so a cut between requests repeats no step.
        for start in range(0, len(points), BATCH):
            client.log_batch(run_id, metrics=points[start : start + BATCH])
        if points:
            self._next_step = points[-1].step + 1

    def log_checkpoints(self, rows: list[dict[str, Any]]) -> bool:
        """Make each validated checkpoint an entry with its losses (and ABX where it was scored)."""
        try:
            known = self._known_checkpoints()
            for row in rows:
                self._log_checkpoint(row, known)
        except OUTAGE:
            return False
        return True

    def _known_checkpoints(self) -> dict[str, str]:
        experiment_id, run_id = self.ids()
        models = mlflow.search_logged_models([experiment_id], f"source_run_id = '{run_id}'", output_format="list")
        return {model.tags.get("sha256", ""): model.model_id for model in models}

    def _log_checkpoint(self, row: Mapping[str, Any], known: dict[str, str]) -> None:
        experiment_id, run_id = self.ids()
        metrics = {
            name: float(value) for name, value in row.items() if isinstance(value, int | float) and name != "step"
        }
        model_id = known.get(row["sha256"])
        if model_id is None:
            model = mlflow.create_external_model(
                name=f"{self.stage.parent.name}-step-{row['step']:08d}",
                experiment_id=experiment_id,
                source_run_id=run_id,
                model_type="hubert",
                params={"step": str(row["step"])},
                tags={"checkpoint_path": row["path"], "sha256": row["sha256"], **self.tags},
            )
            model_id = model.model_id
        has = {metric.key: metric.value for metric in self.client.get_logged_model(model_id).metrics or []}
        new = {name: value for name, value in metrics.items() if has.get(name) != value}
        if new:
            mlflow.log_metrics(new, step=row["step"], run_id=run_id, model_id=model_id)

    def log_scores(
        self, scores: Mapping[str, float], tags: Mapping[str, str], artifacts: list[Path], *, step: int
    ) -> bool:
        """Log the iteration's final figures, tags and report to the MLflow run; `step` is the chosen checkpoint's."""
        try:
            _, run_id = self.ids()
            has = self.client.get_run(run_id).data.metrics
            # Of points with equal step and time MLflow shows the largest, so a later, lower score needs a later time.
            now = int(1000 * time.time())
            new = [Metric(name, value, now, step) for name, value in scores.items() if has.get(name) != value]
            self.client.log_batch(run_id, metrics=new, tags=[RunTag(name, value) for name, value in tags.items()])
            for path in artifacts:
                self.client.log_artifact(run_id, str(path))
            self.client.set_terminated(run_id, "FINISHED")
        except OUTAGE:
            return False
        return True

    def url(self) -> str | None:
        """Return the address of the MLflow run's page; None if MLflow does not answer."""
        try:
            experiment_id, run_id = self.ids()
        except OUTAGE:
            return None
        return f"{mlflow.get_tracking_uri().rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"


def tracker_of(iteration: Iteration) -> Tracker | None:
    """Return the tracker of an iteration's training; None if no tracking server was named."""
    if not is_configured():
        return None
    settings = iteration.settings
    tags = {
        "run": str(iteration.folder.root),
        "iteration": str(iteration.number),
        "recipe": iteration.resolved.recipe_name,
        "starts_from": iteration.source.describe(),
    }
    parameters = {
        f"{section}.{name}": value
        for section, group in (("train", settings.train), ("kmeans", settings.kmeans), ("features", settings.features))
        for name, value in group.model_dump(mode="json").items()
    }
    return Tracker(iteration.folder.name, iteration.train, tags, parameters)


def log_evaluation(iteration: Iteration) -> bool:
    """Catch up with the training's losses, then log checkpoints, scores, the choice and the report.

    Returns:
        Whether MLflow has everything now; False if it did not answer (the files stay, and a rerun sends them).
    """
    tracker = tracker_of(iteration)
    if tracker is None:
        return True
    outcome = iteration.outcome()
    scores: dict[str, float] = {}
    if iteration.abx is not None:
        for row in iteration.abx.figures()["rows"]:
            if row["layer"] in (0, outcome.layer) and row["step"] in (None, outcome.step):
                name = "mfcc" if row["layer"] == 0 else "best_layer"
                scores |= {f"abx_{speaker}_{name}": row["all"][speaker] for speaker in ("within", "across")}
    if iteration.quality is not None:
        figures = iteration.quality.figures()["units"]
        scores |= {f"units_{name}": figures[name] for name in ("pnmi", "phone_purity", "cluster_purity")}
    validation = iteration.validate.figures()
    rows = [dict(row) for row in validation["rows"]]
    for row in rows:
        if row["step"] == outcome.step:
            row |= {name: value for name, value in scores.items() if "best_layer" in name}
    scores |= {name: validation[name] for name in ("unigram_entropy", "majority_accuracy")}
    tags = {"chosen_step": str(outcome.step), "chosen_layer": str(outcome.layer), "chosen_because": outcome.why}
    return (
        tracker.mirror()
        and tracker.log_checkpoints(rows)
        and tracker.log_scores(scores, tags, [iteration.report.folder / "report.html"], step=outcome.step)
    )


def is_configured() -> bool:
    """Whether a tracking server was named; without one nothing is mirrored, and nothing is written elsewhere."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a metrics file; a line that is being written is left for the next call."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def metric_points(line: Mapping[str, Any]) -> list[Metric]:
    """Turn one line of metrics.jsonl into MLflow points at its step, the watermark's metric last."""
    when = int(line.get("time", 0) * 1000)
    names = sorted((name for name in line if name not in ("step", "time")), key=lambda name: name == WATERMARK)
    return [
        Metric(name, float(line[name]), when, line["step"]) for name in names if isinstance(line[name], int | float)
    ]
