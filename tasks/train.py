"""Follow a training: `hubert.train` as a Prefect task, with its losses mirrored to MLflow and its progress on the page.

The trainer is a process of its own, or a Slurm job. If this task dies, it goes on, and the next start of the flow adopts
it; if it dies, it is started again from its last checkpoint. Cancelling the flow run in Prefect stops it, after a checkpoint.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prefect import task

from hubert.core.paths import RunFolder
from hubert.core.stage import Figures
from hubert.core.text import duration, fixed, number, percent, value
from hubert.runs.pipeline import Iteration
from hubert.runs.progress import Pace
from hubert.training.launch import (
    STOP_SECONDS,
    Event,
    Launcher,
    LocalLauncher,
    RunningTrainer,
    cancel,
    unfinished_job,
)
from hubert.training.stage import MAX_RESTARTS, TrainStage, train_until_done
from tasks.clusters.settings import read_cluster
from tasks.page.failure import noting
from tasks.page.page import AT_WORK, STOPPED, key_of, note, recall_link, show, show_link, show_picture, show_stage
from tasks.page.prefect_client import SHOW_SECONDS, costs_nothing, run_logger
from tasks.slurm.settings import SlurmSettings
from tasks.slurm.training import SlurmLauncher, SlurmTrainer
from tasks.stage import cached

if TYPE_CHECKING:
    from tasks.tracking.mirror import Tracker

MIRROR_SECONDS = 5.0  # between two requests to MLflow
DRAW_SECONDS = 60.0  # until the first picture of the losses, then twice as long each time: the server keeps them all
MAX_DRAW_SECONDS = 1800.0
SPEED_SECONDS = 120.0  # of work, over which the time that is left is taken
LOG_SECONDS = 10.0  # between two lines of the Prefect run's log
JOB_STOP_SECONDS = 15.0  # for the last step and a checkpoint of a job whose run was cancelled


class Follower:
    """Shows a training's events: every line of its log, its losses now and then, MLflow a few seconds behind.

    No error of what it shows on the page is one of the training.
    """

    def __init__(self, stage: TrainStage, tracker: "Tracker | None") -> None:
        self.stage = stage
        self.label = stage.label
        self.tracker = tracker
        self.logger = run_logger()
        self.key = key_of(stage.parent, f"{stage.name}-progress")
        self.progress, self.state, self.news = 0.0, "", "no step yet"
        self.speed = Speed()
        self.shown = self.mirrored = self.said = 0.0
        self.drawn, self.draw_after = time.monotonic(), DRAW_SECONDS
        self.show()

    @property
    def description(self) -> str:
        """What stands below the progress bar: the job's state, how good and how fast the training is."""
        return "; ".join(text for text in (self.state, self.news) if text)

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
        self.speed.look(line)
        if now - self.said > LOG_SECONDS or line["step"] >= self.stage.train.steps:
            self.said = now
            self.logger.info(
                "%s: step %d of %d, loss %s, masked accuracy %s, %s s of audio per s",
                self.stage.label,
                line["step"],
                self.stage.train.steps,
                *(value(line[name]) for name in ("loss", "accuracy", "audio_seconds_per_second")),
            )
        if now - self.mirrored > MIRROR_SECONDS:
            self.mirrored = now
            self.progress = min(100.0, 100 * line["step"] / self.stage.train.steps)
            self.news = describe(line, self.stage.train.steps, self.speed.steps_per_second)
            if now - self.shown >= SHOW_SECONDS:
                self.show()
            self.mirror()
            if now - self.drawn > self.draw_after:
                self.draw_after = min(2 * self.draw_after, MAX_DRAW_SECONDS)
                self.draw()

    @costs_nothing("the progress bar", lambda follower, *_: follower.label)
    def show(self, state: str = AT_WORK) -> None:
        """Bring the progress bar up to date."""
        self.shown = time.monotonic()
        show("progress", self.key, self.progress, self.description, below=True)
        note(self.label, state, self.description)

    @costs_nothing("the picture of the losses", lambda follower: follower.label)
    def draw(self) -> None:
        """Show the losses so far as a picture."""
        self.drawn = time.monotonic()
        from hubert.report.plots.curves import draw_training  # matplotlib takes a second to import

        if (plot := draw_training(self.stage.metrics)) is not None:
            show_picture(self.stage.parent, "loss", plot, f"{self.stage.label}: loss by step")

    def finish(self) -> None:
        """Fill the bar, and send the last losses."""
        self.progress, self.news = 100.0, f"all {self.stage.train.steps:,} steps are done"
        self.show()
        self.draw()
        self.mirror(at_once=True)

    def stop(self) -> None:
        """Leave the bar where it is: the training has ended before its last step."""
        self.news = f"stopped; last seen: {self.news}"
        self.show(STOPPED)

    def mirror(self, *, at_once: bool = False) -> None:
        """Send new losses to MLflow; say once when it does not answer."""
        if self.tracker is None:
            return
        was_behind = self.tracker.behind
        if not self.tracker.mirror(at_once=at_once) and not was_behind:
            self.logger.warning("MLflow does not answer; the training goes on, and its losses are sent later")


class Speed:
    """How fast a training is now: after going on on other hardware, the average of all attempts would mislead for hours."""

    def __init__(self) -> None:
        self._pace = Pace(SPEED_SECONDS)
        self._last = (0.0, 0)

    def look(self, line: Mapping[str, Any]) -> None:
        """Take note of a line of metrics."""
        seconds, step = line["seconds"], line["step"]
        if seconds < self._last[0] or step < self._last[1]:  # it went on from a checkpoint before the last line
            self._pace = Pace(SPEED_SECONDS)
        self._last = seconds, step
        self._pace.look(seconds, step)

    @property
    def steps_per_second(self) -> float | None:
        """Steps per second of work in the last minutes; None before the second line."""
        return self._pace.rate


def describe(line: Mapping[str, Any], steps: int, steps_per_second: float | None) -> str:
    """Return step, loss, speed and, where that is known, the time that is left, from a line of metrics."""
    missing = max(0, steps - line["step"])
    left = f", {duration(missing / steps_per_second)} left" if steps_per_second else ""
    return (
        f"step {line['step']:,} of {steps:,}, loss {fixed(line['loss'])} nats and {percent(line['accuracy'])} % right on masked "
        f"frames, {number(line['audio_seconds_per_second'])} s of audio per s{left}"
    )


@task(
    task_run_name="{label}"
)  # no retries of Prefect's: `train_until_done` starts the trainer again, and says how often
def follow_training(label: str, iteration: Iteration, cluster: str) -> Figures:  # noqa: ARG001  (`label` names the run)
    """Train until the steps are reached: adopt the live trainer of the folder, or start one, and follow it."""
    from tasks.tracking.mirror import tracker_of  # MLflow takes seconds to import: not for a finished run

    stage, tracker = iteration.train, tracker_of(iteration)
    follower = Follower(stage, tracker)
    try:
        launcher, max_restarts = find_launcher(cluster, follower.logger.warning)
        with stage.lock(say=follower.logger.info):
            if tracker is not None and (
                url := tracker.url()
            ):  # in the lock: it makes the MLflow run, which must be one
                show_link(iteration.home, link_of(stage), url, f"{stage.label} in MLflow: losses while it trains")
            stage.check(follower.logger.info)
            plan = stage.plan()
            train_until_done(stage, follower, launcher=launcher, max_restarts=max_restarts)
            stage.run_shard(0, plan)
            figures: Figures = stage.complete(plan)["figures"]
    except BaseException:
        follower.stop()
        raise
    follower.finish()
    return figures


def link_of(stage: TrainStage, what: str = "mlflow") -> str:
    """Return what a link to MLflow is called: an iteration that is trained again with other settings has another one."""
    return f"{what}-{stage.key[:8]}"


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
    stage = iteration.begin(iteration.train)
    if (done := stage.settled(run_logger().info)) is not None:
        cached(stage.label, str(stage.folder))
        recall_link(iteration.home, link_of(stage))
        figures: Figures = dict(done["figures"])
    else:
        with noting(stage=stage.label, folder=stage.folder, log=stage.folder / "train.log"):
            figures = follow_training(stage.label, iteration, cluster)
    show_stage(stage, figures)
    return figures


def stop_trainings(flow: Any, flow_run: Any, state: Any) -> None:  # noqa: ARG001  (Prefect passes all three by name)
    """Stop the live trainings of a cancelled run, each after a checkpoint. Prefect calls it on cancellation.

    The flow's process is dead by then. Slurm's jobs have less time than local processes: nodes cost others' waiting.
    """
    for trainer in find_trainers(RunFolder.of(flow_run.parameters.get("run", "demo"))):
        cancel(trainer, timeout=JOB_STOP_SECONDS if isinstance(trainer, SlurmTrainer) else STOP_SECONDS)


def find_trainers(folder: RunFolder, say: Callable[[str], object] = print) -> Iterator[RunningTrainer]:
    """Return the live trainers of a run, wherever they run; `say` is called if Slurm does not answer.

    Raises:
        ConfigError: a training has a job, and Slurm's commands are not on this machine.
    """
    for training in folder.trainings():
        launcher = SlurmLauncher(SlurmSettings(kind="slurm"), say) if unfinished_job(training) else LocalLauncher()
        if trainer := launcher.find_running(training):
            yield trainer
