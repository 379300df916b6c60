"""Follow a training: `hubert.train` as a Prefect task, with its losses mirrored to MLflow and its progress on the page.

The trainer is a process of its own. If this task dies, it goes on, and the next start of the flow adopts it; if it
dies, it is started again from its last checkpoint. Cancelling the flow run in Prefect stops it, after a checkpoint.
"""

import time
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact, create_progress_artifact, update_progress_artifact

from hubert.launch import Event, find_running, stop
from hubert.paths import RunFolder
from hubert.pipeline import Iteration
from hubert.stage import Figures
from hubert.train import TrainStage, train_until_done
from tasks.markdown import cell, pairs
from tasks.stage import cached, publish

if TYPE_CHECKING:
    from tasks.tracking import Tracker

MIRROR_SECONDS = 5.0  # between two requests to MLflow
LOG_SECONDS = 10.0  # between two lines of the Prefect run's log


class Follower:
    """Shows a training's events: every line of its log, its losses now and then, MLflow a few seconds behind."""

    def __init__(self, stage: TrainStage, tracker: "Tracker | None") -> None:
        self.stage = stage
        self.tracker = tracker
        self.logger = get_run_logger()
        self.bar: UUID | Any = create_progress_artifact(0.0, description=f"{stage.label}: steps")
        self.mirrored = self.said = 0.0

    def __call__(self, event: Event) -> None:
        """Take one event."""
        if event.metrics is None:
            self.logger.info("%s", event.text)
            return
        now = time.monotonic()
        line = event.metrics
        if now - self.said > LOG_SECONDS or line["step"] >= self.stage.train.steps:
            self.said = now
            self.logger.info(
                "%s: step %d of %d, loss %s, masked accuracy %s, %s s of audio per s",
                self.stage.label,
                line["step"],
                self.stage.train.steps,
                *(cell(line[name]) for name in ("loss", "accuracy", "audio_seconds_per_second")),
            )
        if now - self.mirrored > MIRROR_SECONDS:
            self.mirrored = now
            update_progress_artifact(self.bar, min(100.0, 100 * line["step"] / self.stage.train.steps))
            self.mirror()

    def mirror(self) -> None:
        """Send new losses to MLflow; say once when it does not answer."""
        if self.tracker is None:
            return
        was_behind = self.tracker.behind
        if not self.tracker.mirror() and not was_behind:
            self.logger.warning("MLflow does not answer; the training goes on, and its losses are sent later")


@task(
    task_run_name="{label}"
)  # no retries of Prefect's: `train_until_done` starts the trainer again, and says how often
def follow_training(label: str, iteration: Iteration) -> Figures:  # noqa: ARG001  (`label` names the run)
    """Train until the steps are reached: adopt the live trainer of the folder, or start one, and follow it."""
    from tasks.tracking import tracker_of  # MLflow takes seconds to import: not for a finished run

    stage, tracker = iteration.train, tracker_of(iteration)
    follower = Follower(stage, tracker)
    with stage.lock(say=follower.logger.info):
        if tracker is not None and (url := tracker.url()):  # in the lock: it makes the MLflow run, which must be one
            create_link_artifact(url, key=f"it{iteration.number}-mlflow", link_text="losses in MLflow")
        plan = stage.plan()
        train_until_done(stage, follower)
        stage.run_shard(0, plan)
        figures: Figures = stage.complete(plan)["figures"]
    update_progress_artifact(follower.bar, 100.0)
    follower.mirror()
    return figures


def run(iteration: Iteration, cluster: str) -> Figures:  # noqa: ARG001  (Slurm: soon)
    """Train, or find the finished training."""
    stage = iteration.train
    if (done := stage.done()) is not None:
        cached(stage.label, str(stage.folder))
        return dict(done["figures"])
    figures = follow_training(stage.label, iteration)
    publish(stage, pairs({name: value for name, value in figures.items() if not isinstance(value, dict | list)}))
    return figures


def stop_trainings(flow: Any, flow_run: Any, state: Any) -> None:  # noqa: ARG001  (Prefect passes all three by name)
    """Stop the live trainings of a cancelled run, each after a checkpoint. Prefect calls it on cancellation."""
    folder = RunFolder.of(flow_run.parameters.get("run", "demo"))
    for training in folder.trainings():
        if process := find_running(training):
            stop(process)
