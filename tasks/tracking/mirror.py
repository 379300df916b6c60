"""MLflow, and the only file that imports it: losses, checkpoints and scores of every training, side by side.

The trainer talks to no server: it appends to `metrics.jsonl`, and this file mirrors new lines. One experiment per run
folder, one MLflow run per training key, each checkpoint an entry of its own (a logged model that refers to the folder;
weights are copied only if the recipe says so). Mirroring is idempotent: it starts after the last step that MLflow
already has, so an outage costs nothing but a later catch-up, and a resumed training never writes a point twice. A
training whose steps come out otherwise the second time (on a GPU they may) gets another MLflow run: never two curves in one.
`tasks.tracking.registry` goes on from here: which checkpoint is the teacher.
"""

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import LifecycleStage, LoggedModel, LoggedModelStatus, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from prefect import runtime
from prefect.utilities.urls import url_for
from requests.exceptions import RequestException

from hubert.core.hashing import digest
from hubert.core.paths import RunFolder
from hubert.evaluation.checkpoints import Checkpoint
from hubert.evaluation.columns import CHECKPOINT, column
from hubert.runs.pipeline import Iteration
from hubert.training.folder import read_metrics
from hubert.training.stage import TrainStage

# A server that is down must be noticed in seconds: mirroring catches up later. And a request whose answer was lost must not
# be sent again blindly, or what it makes is there twice: the next call looks first.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

BATCH = 1000  # MLflow's own limit of metrics per request
PAUSE_SECONDS, MAX_PAUSE_SECONDS = 60.0, 900.0  # a server that does not answer is left alone, each time twice as long
WATERMARK = "loss"  # the metric whose last step says how far the mirror is
OUTAGE = (MlflowException, RequestException, OSError)
FOLDER_MARK = "run_folder_mark"  # tag: digest of a run folder's path, as a filter takes no path with a quote
MODELS_PAGE = "models?workflowType=machine_learning"  # the list of checkpoints; without it the UI opens in another mode
WEIGHTS = ("config.json", "model.safetensors")  # what `tracking.upload` copies: enough to load the model


class Tracker:
    """Mirrors one training into MLflow. A server that does not answer stops nothing."""

    def __init__(
        self, folder: RunFolder, stage: TrainStage, tags: Mapping[str, str], parameters: Mapping[str, Any]
    ) -> None:
        self.folder = folder
        self.stage = stage
        self.tags = dict(tags)
        self.parameters = dict(parameters)
        self.behind = False
        self._pause = self._silent_until = 0.0
        self._ids: tuple[str, str] | None = None
        self._sent: dict[int, float] | None = None  # the watermark's metric by step, as MLflow has it

    @property
    def client(self) -> MlflowClient:
        """A client of the server that MLFLOW_TRACKING_URI names."""
        return MlflowClient()

    def ids(self) -> tuple[str, str]:
        """Return the ids of the experiment and of the MLflow run, made at the first call."""
        if self._ids is None:
            client = self.client
            experiment_id = experiment_of(client, self.folder)
            found = client.search_runs([experiment_id], f"tags.training_key = '{self.stage.key}'", max_results=1)
            run_id = found[0].info.run_id if found else self._create_run(client, experiment_id)
            if not found or not found[0].data.params:  # MLflow may have gone away between the two requests
                params = [Param(name, str(value)[:500]) for name, value in self.parameters.items()]
                client.log_batch(run_id, params=params)
            self._ids = experiment_id, run_id
        return self._ids

    def _create_run(self, client: MlflowClient, experiment_id: str) -> str:
        tags = {"training_key": self.stage.key, "folder": str(self.stage.folder), **self.tags}
        links = f"[all checkpoints]({page_of(experiment_id, MODELS_PAGE)})"
        if address := self.tags.get("prefect_run"):
            links += f", [run in Prefect]({address})"
        tags["mlflow.note.content"] = f"{links}\n\n`{self.stage.folder}`"
        run_id: str = client.create_run(experiment_id, run_name=self.stage.label, tags=tags).info.run_id
        return run_id

    def mirror(self, *, at_once: bool = False) -> bool:
        """Send the lines of metrics.jsonl that MLflow does not have; False if it did not answer (try again later).

        After that it is not asked for a minute, then for longer, unless `at_once`: a server that hangs takes 20 s each time.
        """
        if not at_once and time.monotonic() < self._silent_until:
            return False
        try:
            self.catch_up()
        except OUTAGE:
            self.behind, self._sent = True, None
            self._pause = min(2 * self._pause or PAUSE_SECONDS, MAX_PAUSE_SECONDS)
            self._silent_until = time.monotonic() + self._pause
            return False
        self.behind = False
        self._pause = self._silent_until = 0.0
        return True

    def catch_up(self) -> None:
        """Do what `mirror` does; one of OUTAGE is raised if MLflow does not answer."""
        lines = read_metrics(self.stage.metrics)
        client, (_, run_id) = self.client, self.ids()
        if self._sent is None:
            self._sent = {metric.step: metric.value for metric in client.get_metric_history(run_id, WATERMARK)}
        if any(not _same(self._sent[line["step"]], line[WATERMARK]) for line in lines if line["step"] in self._sent):
            run_id = self._start_over(run_id)
        first = max(self._sent, default=-1) + 1
        new = [line for line in lines if line["step"] >= first]
        points = [point for line in new for point in metric_points(line)]
        # The watermark is a metric of the last request of its step, so a cut between requests repeats no step.
        for start in range(0, len(points), BATCH):
            client.log_batch(run_id, metrics=points[start : start + BATCH])
        self._sent |= {line["step"]: line[WATERMARK] for line in new}

    def _start_over(self, run_id: str) -> str:
        """Leave the MLflow run to the curve that it has, under another key, and return the id of a new one."""
        tags = {"training_key": f"{self.stage.key}, done again", "mlflow.runName": f"{self.stage.label}, done again"}
        self.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        self._ids, self._sent = None, {}
        return self.ids()[1]

    def log_checkpoints(self, checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
        """Make each validated checkpoint an entry with its losses, and the scores of its layer where they were measured.

        Returns:
            The entries' ids by the weights' sha256.
        """
        experiment_id, run_id = self.ids()
        known = {model.tags.get("sha256", ""): model for model in self._entries(experiment_id, run_id)}
        points: list[Metric] = []
        now = int(1000 * time.time())
        for one in checkpoints:
            model = known.get(one.sha256) or self._create_entry(one, experiment_id, run_id)
            if model.status != LoggedModelStatus.READY:  # the answer to the last of its requests was lost
                self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
            known[one.sha256] = model
            tags = {"layer": str(one.layer), "layer_why": one.why}
            if changed := {name: value for name, value in tags.items() if model.tags.get(name) != value}:
                self.client.set_logged_model_tags(model.model_id, changed)
            has = {metric.key: metric.value for metric in model.metrics or []}
            points += [
                Metric(name, value, now, one.step, model_id=model.model_id, run_id=run_id)
                for name, value in entry_metrics(one).items()
                if has.get(name) != value
            ]
        for start in range(0, len(points), BATCH):
            self.client.log_batch(run_id, metrics=points[start : start + BATCH])
        return {sha256: model.model_id for sha256, model in known.items()}

    def _entries(self, experiment_id: str, run_id: str) -> list[LoggedModel]:
        return mlflow.search_logged_models([experiment_id], f"source_run_id = '{run_id}'", output_format="list")

    def _create_entry(self, one: Checkpoint, experiment_id: str, run_id: str) -> LoggedModel:
        return mlflow.create_external_model(
            name=f"{self.stage.parent.name}-{one.name}",
            experiment_id=experiment_id,
            source_run_id=run_id,
            model_type="hubert",
            params={"step": str(one.step), "num_layers": str(one.num_layers)},
            tags={"checkpoint_path": one.checkpoint, "sha256": one.sha256, **self.tags},
        )

    def upload(self, checkpoints: Sequence[Checkpoint], entries: Mapping[str, str]) -> None:
        """Copy the weights of checkpoints to the artifacts of their entries; what is there already is not sent again."""
        for one in checkpoints:
            model_id = entries[one.sha256]
            there = {file.path for file in self.client.list_logged_model_artifacts(model_id)}
            for name in WEIGHTS:  # the weights last, so that they are there only if all is
                if name not in there:
                    self.client.log_model_artifact(model_id, str(Path(one.checkpoint) / name))

    def log_scores(
        self, scores: Mapping[str, float], tags: Mapping[str, str], artifacts: Mapping[Path, str], *, step: int
    ) -> None:
        """Log the iteration's final figures, tags and files to the MLflow run.

        Args:
            scores: by name.
            tags: by name.
            artifacts: the folder in MLflow of each file; empty: the top.
            step: of the chosen checkpoint.
        """
        _, run_id = self.ids()
        has = self.client.get_run(run_id).data.metrics
        # Of points with equal step and time MLflow shows the largest, so a later, lower score needs a later time.
        now = int(1000 * time.time())
        new = [Metric(name, value, now, step) for name, value in scores.items() if has.get(name) != value]
        self.client.log_batch(run_id, metrics=new, tags=[RunTag(name, value) for name, value in tags.items()])
        for path, place in artifacts.items():
            self.client.log_artifact(run_id, str(path), place or None)
        self.client.set_terminated(run_id, "FINISHED")

    def url(self) -> str | None:
        """Return the address of the MLflow run's page; None if MLflow does not answer."""
        try:
            experiment_id, run_id = self.ids()
        except OUTAGE:
            return None
        return page_of(experiment_id, f"runs/{run_id}")

    def models_url(self) -> str:
        """Return the address of the page that lists, sorts and compares the run's checkpoints."""
        return page_of(self.ids()[0], MODELS_PAGE)


def experiment_of(client: MlflowClient, folder: RunFolder) -> str:
    """Return the id of the experiment of a run's folder, made at the first call.

    It has the run's name; if a run of that name in another folder has taken it, the parent folder's name is added.
    """
    mark = mark_of(folder)
    found = client.search_experiments(ViewType.ALL, filter_string=f"tags.{FOLDER_MARK} = '{mark}'", max_results=1)
    if found:
        if found[0].lifecycle_stage == LifecycleStage.DELETED:
            client.restore_experiment(found[0].experiment_id)  # a deleted one takes no values, and keeps its name
        return str(found[0].experiment_id)
    name = next(name for name in experiment_names(folder) if client.get_experiment_by_name(name) is None)
    try:
        return client.create_experiment(name, tags={FOLDER_MARK: mark, "run": str(folder.root)})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return experiment_of(client, folder)  # another process was faster: it was this run, or the name is taken now


def experiment_names(folder: RunFolder) -> Iterator[str]:
    """Give names for a run's experiment, the plainest first."""
    place = folder.root.parent.name
    yield folder.name
    yield f"{folder.name} ({place})"
    number = 2
    while True:
        yield f"{folder.name} ({place}, {number})"
        number += 1


def mark_of(folder: RunFolder) -> str:
    """Return what tells the folder of a run from all others."""
    return digest(str(folder.root))


def page_of(experiment_id: str, page: str) -> str:
    """Return the address of a page of an experiment."""
    return f"{mlflow.get_tracking_uri().rstrip('/')}/#/experiments/{experiment_id}/{page}"


def entry_metrics(checkpoint: Checkpoint) -> dict[str, float]:
    """Return the figures of a checkpoint's entry, as they are stored; its step and its layer stand beside them."""
    figures = {key: column(key).read(checkpoint) for key in CHECKPOINT if key not in ("step", "layer")}
    return {key: float(figure) for key, figure in figures.items() if figure is not None}


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
    if address := prefect_address():
        tags["prefect_run"] = address
    parameters = {
        f"{section}.{name}": value
        for section, group in (("train", settings.train), ("kmeans", settings.kmeans), ("features", settings.features))
        for name, value in group.model_dump(mode="json").items()
    }
    return Tracker(iteration.folder, iteration.train, tags, parameters)


def prefect_address() -> str:
    """Return the address of the page of the iteration's flow run; empty outside of one."""
    flow_run = runtime.flow_run.parent_flow_run_id or runtime.flow_run.id
    return (url_for("flow-run", flow_run) if flow_run else "") or ""


def is_configured() -> bool:
    """Whether a tracking server was named; without one nothing is mirrored, and nothing is written elsewhere."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI"))


def metric_points(line: Mapping[str, Any]) -> list[Metric]:
    """Turn one line of metrics.jsonl into MLflow points at its step, the watermark's metric last."""
    when = int(line.get("time", 0) * 1000)
    names = sorted((name for name in line if name not in ("step", "time")), key=lambda name: name == WATERMARK)
    return [
        Metric(name, float(line[name]), when, line["step"]) for name in names if isinstance(line[name], int | float)
    ]


def _same(one: float, other: float) -> bool:
    """Return True if MLflow has a value as it was sent: it keeps the largest finite number in the place of an infinite one."""
    largest = sys.float_info.max
    one, other = (max(-largest, min(largest, value)) for value in (one, other))
    return one == other or (math.isnan(one) and math.isnan(other))
