"""The training stage: start the trainer as a process of its own, follow it, start it again from its last checkpoint."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tqdm import tqdm

from hubert.core.errors import ConfigError, DataError, TransientError, first_line
from hubert.core.files import read_json, write_record
from hubert.core.outputs import Hashes
from hubert.core.stage import Figures, Plan, Receipt, Spec, Stage
from hubert.settings.sections import TrainSettings
from hubert.training.checkpoint import MODEL_FILES, RECORD, Checkpoint, find_lost, list_checkpoints
from hubert.training.folder import log_is_whole, read_metrics
from hubert.training.init import FRESH, InitialWeights
from hubert.training.job import Horizons, Job
from hubert.training.launch import Event, Launcher, LocalLauncher, follow, job_ids

if TYPE_CHECKING:
    from hubert.units.assign import UnitsStage

MAX_RESTARTS = 3  # in a row that got no further


@dataclass(kw_only=True)
class TrainStage(Stage):
    """Masked prediction of the units.

    The number of steps is not part of the key. The first start records it as the horizon of the learning rate. More
    steps later need `extend`, which raises the horizon and goes on from the last checkpoint. Fewer are always allowed:
    a longer training's checkpoints hold what was asked for, and one that is not that far yet is trained up to there on
    its recorded schedule.

    `init` is the encoder that the training starts from, None for random weights; its weights' hash enters the key.
    """

    name: ClassVar[str] = "train"
    parent: Path
    labels: "UnitsStage"
    train: TrainSettings
    init: InitialWeights | None = None
    extend: bool = False

    def settings(self) -> dict[str, Any]:
        return {"num_units": self.labels.num_units, **self.train.key_settings()}

    def inputs(self) -> dict[str, str]:
        return {"table": self.labels.key} | ({"init": self.init.sha256} if self.init else {})

    def done(self) -> Figures | None:
        """Return the content of `done.json` if the training has reached the steps that are asked for."""
        content = super().done()
        if content is None or content["figures"]["steps"] < self.train.steps:
            return None
        return content if self._is_whole() else None

    def receipt(self, index: int, plan: Plan) -> Receipt | None:
        found = super().receipt(index, plan)
        if found is None or found.figures["steps"] < self.train.steps:
            return None
        return found if self._is_whole() else None

    def _is_whole(self) -> bool:
        """Return True if every checkpoint that was ever written is whole, as far as sizes tell, and the log too."""
        return not find_lost(self.folder) and log_is_whole(self.folder)

    def reads(self) -> list[Path]:
        return [self._table]

    @property
    def _table(self) -> Path:
        return self.labels.table("train")

    def make_plan(self) -> list[Spec]:
        return [{"table": str(self._table)}]

    def plan(self) -> Plan:
        """Return the plan.

        Raises:
            ConfigError: more steps than the training was started for, without `extend`.
        """
        self.check_steps()
        return super().plan()

    def work(self, spec: Spec) -> tuple[list[Path], Figures]:  # noqa: ARG002  (there is one shard)
        with _shown(self) as show:
            train_until_done(self, show)
        return self.outputs(), self.summary()

    def finish(self, receipts: list[Receipt]) -> tuple[list[Path], Figures]:
        return [], {**receipts[0].figures, "checkpoints": self.checkpoints()}

    def seconds_of(self, receipts: list[Receipt]) -> float:
        """Return the seconds of all attempts: a receipt only knows the last call, which may have found all of it done."""
        return max(super().seconds_of(receipts), receipts[0].figures["seconds"])

    # For whoever follows the training ---------------------------------------------------------------------------

    @property
    def metrics(self) -> Path:
        """The training's log: one JSON object per line."""
        return self.folder / "metrics.jsonl"

    def _complete(self) -> list[Checkpoint]:
        return list_checkpoints(self.folder, lambda _: None)  # the trainer itself reports the incomplete ones

    def reached(self) -> int:
        """Return the step of the newest complete checkpoint; 0 if there is none."""
        return max((checkpoint.step for checkpoint in self._complete()), default=0)

    def checkpoints(self) -> list[dict[str, Any]]:
        """Return `step, path, sha256, num_layers` of each complete checkpoint, by step."""
        rows = []
        for checkpoint in self._complete():
            config = read_json(checkpoint.path / "config.json") or {}
            row = {"step": checkpoint.step, "path": str(checkpoint.path), "sha256": checkpoint.sha256}
            rows.append({**row, "num_layers": config["model"]["num_layers"]})
        return rows

    def is_trained(self) -> bool:
        """Return True if the steps are reached, and counted: the trainer writes its summary after the last checkpoint."""
        summary = read_json(self.folder / "summary.json") or {"steps": 0}
        return min(self.reached(), int(summary["steps"])) >= self.train.steps and self._is_whole()

    def outputs(self) -> list[Path]:
        """Return the files of the models. The log and the optimizer's states still change after the stage is done."""
        paths = (found.path for found in self._complete() if not found.interim)
        return [path / name for path in paths for name in MODEL_FILES]

    def hash_outputs(self, outputs: Iterable[Path]) -> Hashes:
        """Return what was recorded when the checkpoints were written: they may have lain there for days."""
        records = {path.parent: read_json(path.parent / RECORD) or {} for path in outputs}
        return {
            path.relative_to(self.folder).as_posix(): records[path.parent]["files"][path.name]["sha256"]
            for path in outputs
        }

    def summary(self) -> Figures:
        """Return what the trainer counted, and its last losses.

        Raises:
            DataError: the training has not finished.
        """
        content = read_json(self.folder / "summary.json")
        lines = read_metrics(self.metrics)
        if content is None or not lines:
            raise DataError(
                f"{self.folder} has no summary.json: the training there has not finished; run `hubert train` again"
            )
        jobs = {"slurm_jobs": ids} if (ids := job_ids(self.folder)) else {}
        figures = {name: value for name, value in content.items() if name != "log"}
        return {**figures, **jobs, "last": lines[-1]}

    def horizons(self) -> Horizons:
        """Return the recorded schedule; empty before the first start."""
        newest = read_json(self.folder / "job.json") or {"horizons": []}
        content = read_json(self.folder / "horizons.json") or newest
        return tuple((int(first), int(last)) for first, last in content["horizons"])

    def check_steps(self) -> None:
        """Make sure that the steps asked for fit to the training that is there.

        Raises:
            ConfigError: they are more than it was started for, and `extend` is not set.
        """
        recorded = self.horizons()
        if recorded and self.train.steps > recorded[-1][1] and not self.extend:
            raise ConfigError(
                f"train.steps is {self.train.steps}, but the training in {self.folder} was started for {recorded[-1][1]} steps, "
                "and its learning rate falls to 0 there. To go on from its last checkpoint on a longer schedule, say so with "
                "`--extend`; for a new training from step 0 change another setting, such as train.seed"
            )

    def job(self) -> Job:
        """Return what the trainer is told, and record the schedule: the steps of the first start, or a longer one.

        Raises:
            ConfigError: as `check_steps`.
        """
        self.check_steps()
        horizons = self.horizons()
        steps = self.train.steps
        if not horizons or steps > horizons[-1][1]:
            horizons = (*horizons, (self.reached() if horizons else 0, steps))
            write_record(self.folder / "horizons.json", {"horizons": horizons})
        return Job(
            folder=self.folder,
            table=self._table,
            table_key=self.labels.key,
            num_units=self.labels.num_units,
            settings=self.train,
            horizons=horizons,
            init=self.init.checkpoint if self.init else FRESH,
            init_sha256=self.init.sha256 if self.init else "",
        )


OnEvent = Callable[[Event], object]


def train_until_done(
    stage: TrainStage, on_event: OnEvent, *, launcher: Launcher | None = None, max_restarts: int = MAX_RESTARTS
) -> None:
    """Train until the stage's steps are reached: adopt the live trainer of its folder, or start one, and follow it.

    A trainer that was killed or lost its surroundings is started again from its last checkpoint. A keyboard interrupt
    stops it after a checkpoint; any other end of this process leaves it running, to be adopted later.

    Args:
        stage: which training.
        on_event: called with each line of the log, each new line of metrics, each change of the trainer's state.
        launcher: where it runs; on this machine if nothing is said.
        max_restarts: how often it is started again without a new checkpoint in between.

    Raises:
        ConfigError, DataError, TrainingDiverged: another start would end the same way.
        TrainingCancelled: a person stopped it.
        TransientError: it failed more than `max_restarts` times without getting further.
    """
    launcher = launcher or LocalLauncher()
    listener = Listener(on_event)
    failures = 0
    while True:
        reached = stage.reached()
        error = _follow_once(stage, listener, launcher)
        if error is None:
            return
        if stage.reached() > reached:
            failures = 0
            listener.log(f"{first_line(error)}\nstarting it again from step {stage.reached()}")
            continue
        failures += 1
        if failures > max_restarts:
            raise error
        listener.log(f"{error}\nstarting it again from step {reached} ({failures} of {max_restarts})")
        time.sleep(launcher.pause(failures))


class Listener:
    """Hands a training's events on, and knows the last step whose metrics it handed on: another start repeats none."""

    def __init__(self, on_event: OnEvent) -> None:
        self.on_event = on_event
        self.step = 0

    def __call__(self, event: Event) -> None:
        if event.metrics is not None:
            self.step = int(event.metrics["step"])
        self.on_event(event)

    def log(self, text: str) -> None:
        """Hand a line on that the trainer did not write."""
        self.on_event(Event("log", text=text))


def _follow_once(stage: TrainStage, listener: Listener, launcher: Launcher) -> TransientError | None:
    """Follow the live trainer of a stage's folder, or start one, until it ends.

    Returns:
        None if the steps are reached; else why they are not, where another start may get further.

    Raises:
        As `train_until_done`.
    """
    trainer = launcher.find_running(stage.folder)
    if trainer is not None:
        listener.log(f"found the trainer alive ({trainer.name}); following it")
    elif stage.is_trained():
        return None
    try:
        trainer = trainer or launcher.launch(stage.job())
        for event in follow(trainer, after_step=listener.step, silence_seconds=60 * stage.train.silence_minutes):
            listener(event)
    except KeyboardInterrupt:
        if trainer := trainer or launcher.find_running(stage.folder):
            trainer.stop()
        raise
    except TransientError as error:
        return error
    if stage.is_trained():
        return None
    return TransientError(f"the trainer in {stage.folder} ended before step {stage.train.steps} or its summary")


@contextmanager
def _shown(stage: TrainStage) -> Iterator[OnEvent]:
    """Show a training: a progress bar in a terminal, else the trainer's own lines."""
    with tqdm(total=stage.train.steps, desc=stage.label, unit="step", disable=None) as bar:

        def show(event: Event) -> None:
            if event.metrics is not None:
                bar.update(event.metrics["step"] - bar.n)
                bar.set_postfix(loss=event.metrics["loss"], accuracy=event.metrics["accuracy"])
            elif bar.disable:
                print(event.text, flush=True)

        yield show
