"""Follow a training: `hubert.train` as a Prefect task, with its losses mirrored to MLflow and its progress on the page.

The trainer is a process of its own, or a Slurm job. If this task dies, it goes on, and the next start of the flow adopts
it; if it dies, it is started again from its last checkpoint. Cancelling the flow run in Prefect stops it, after a checkpoint.
"""

import datetime as dt
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact, create_progress_artifact, update_progress_artifact

from hubert.launch import STOP_SECONDS, Event, Launcher, LocalLauncher
from hubert.paths import RunFolder
from hubert.pipeline import Iteration
from hubert.stage import Figures
from hubert.train import MAX_RESTARTS, TrainStage, train_until_done
from tasks.cluster_settings import read_cluster
from tasks.failure import noting
from tasks.markdown import cell, pairs
from tasks.slurm_settings import SlurmSettings
from tasks.slurm_training import SlurmLauncher
from tasks.stage import cached, publish

if TYPE_CHECKING:
    from tasks.tracking import Tracker

MIRROR_SECONDS = 5.0  # between two requests to MLflow
LOG_SECONDS = 10.0  # between two lines of the Prefect run's log
JOB_STOP_SECONDS = 15.0  # for the last step and a checkpoint of a job whose run was cancelled


class Follower:
    """Shows a training's events: every line of its log, its losses now and then, MLflow a few seconds behind."""

    def __init__(self, stage: TrainStage, tracker: "Tracker | None") -> None:
        self.stage = stage
        self.tracker = tracker
        self.logger = get_run_logger()
        self.progress, self.state, self.speed = 0.0, "", "no step yet"
        self.bar: UUID | Any = create_progress_artifact(0.0, description=self.description)
        self.mirrored = self.said = 0.0

    @property
    def description(self) -> str:
        """What stands below the progress bar: the job's state, and how fast the training is."""
        return "; ".join(text for text in (f"{self.stage.label}: steps", self.state, self.speed) if text)

    def __call__(self, event: Event) -> None:
        """Take one event."""
        if event.metrics is None:
            self.logger.info("%s", event.text)
            if event.kind == "state":
                self.state = event.text
                self.show()
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
            self.progress = min(100.0, 100 * line["step"] / self.stage.train.steps)
            self.speed = describe_speed(line, self.stage.train.steps)
            self.show()
            self.mirror()

    def show(self) -> None:
        """Bring the progress bar up to date."""
        update_progress_artifact(self.bar, self.progress, description=self.description)

    def finish(self) -> None:
        """Fill the bar, and send the last losses."""
        self.progress, self.speed = 100.0, f"all {self.stage.train.steps:,} steps are done"
        self.show()
        self.mirror()

    def mirror(self) -> None:
        """Send new losses to MLflow; say once when it does not answer."""
        if self.tracker is None:
            return
        was_behind = self.tracker.behind
        if not self.tracker.mirror() and not was_behind:
            self.logger.warning("MLflow does not answer; the training goes on, and its losses are sent later")


def describe_speed(line: Mapping[str, Any], steps: int) -> str:
    """Return step, speed and the time that is left, from a line of metrics."""
    left = dt.timedelta(seconds=round(line["seconds"] / line["step"] * max(0, steps - line["step"])))
    return f"step {line['step']:,} of {steps:,}, {cell(line['audio_seconds_per_second'])} s of audio per s, {left} left"


@task(
    task_run_name="{label}"
)  # no retries of Prefect's: `train_until_done` starts the trainer again, and says how often
def follow_training(label: str, iteration: Iteration, cluster: str) -> Figures:  # noqa: ARG001  (`label` names the run)
    """Train until the steps are reached: adopt the live trainer of the folder, or start one, and follow it."""
    from tasks.tracking import tracker_of  # MLflow takes seconds to import: not for a finished run

    stage, tracker = iteration.train, tracker_of(iteration)
    follower = Follower(stage, tracker)
    launcher, max_restarts = find_launcher(cluster, follower.logger.warning)
    with stage.lock(say=follower.logger.info):
        if tracker is not None and (url := tracker.url()):  # in the lock: it makes the MLflow run, which must be one
            create_link_artifact(url, key=f"it{iteration.number}-mlflow", link_text="losses in MLflow")
        plan = stage.plan()
        train_until_done(stage, follower, launcher=launcher, max_restarts=max_restarts)
        stage.run_shard(0, plan)
        figures: Figures = stage.complete(plan)["figures"]
    follower.finish()
    return figures


def find_launcher(cluster: str, say: Callable[[str], object]) -> tuple[Launcher, int]:
    """Return where a cluster's trainings run, and how often one may be started again without getting further.

    Raises:
        ConfigError: the cluster's file is missing or wrong.
    """
    settings = read_cluster(cluster)
    if isinstance(settings, SlurmSettings):
        return SlurmLauncher(settings, say), settings.training.max_restarts
    return LocalLauncher(), MAX_RESTARTS


def run(iteration: Iteration, cluster: str) -> Figures:
    """Train, or find the finished training."""
    stage = iteration.train
    if (done := stage.done()) is not None:
        cached(stage.label, str(stage.folder))
        return dict(done["figures"])
    with noting(stage=stage.label, folder=stage.folder, log=stage.folder / "train.log"):
        figures = follow_training(stage.label, iteration, cluster)
    publish(stage, pairs({name: value for name, value in figures.items() if not isinstance(value, dict | list)}))
    return figures


def stop_trainings(flow: Any, flow_run: Any, state: Any) -> None:  # noqa: ARG001  (Prefect passes all three by name)
    """Stop the live trainings of a cancelled run, each after a checkpoint. Prefect calls it on cancellation.

    The flow's process is dead by then. Slurm's jobs have less time than local processes: nodes cost others' waiting.
    """
    folder = RunFolder.of(flow_run.parameters.get("run", "demo"))
    launcher, _ = find_launcher(flow_run.parameters.get("cluster", "local"), print)
    for training in folder.trainings():
        if trainer := launcher.find_running(training):
            trainer.stop(timeout=JOB_STOP_SECONDS if isinstance(launcher, SlurmLauncher) else STOP_SECONDS)
