"""A finished iteration as files, without training: checkpoints with their log, losses and layers' scores."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from hubert.core.hashing import file_digest
from hubert.core.paths import RunFolder
from hubert.evaluation.checkpoints import Checkpoint, LayerScores, save_checkpoints
from hubert.evaluation.choice import Outcome
from hubert.model.hubert import HuBERT
from hubert.settings.model import build_config
from hubert.settings.sections import TrainSettings
from hubert.training.stage import TrainStage
from tests.support.small import SETTINGS
from tools.given_stages import labels_in

TRAIN = TrainSettings.model_validate(SETTINGS["train"])
METRICS = ("loss", "accuracy", "grad_norm", "learning_rate")


@dataclass
class Offered:
    """What an iteration offers to the next one."""

    folder: RunFolder
    stage: TrainStage
    checkpoints: list[Checkpoint]
    outcome: Outcome


def write_metrics(stage: TrainStage, values: dict[int, float]) -> None:
    """Write the training's log: one line per step."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    lines = ({"step": step, "time": 1e9 + step, **dict.fromkeys(METRICS, value)} for step, value in values.items())
    (stage.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def stage_of(root: Path, number: int = 1, table_key: str = "t") -> TrainStage:
    """Return the training stage of an iteration."""
    folder = RunFolder(root)
    return TrainStage(parent=folder.iteration(number), labels=labels_in(root / "table", 20, key=table_key), train=TRAIN)


def write_offered(root: Path, *, num_checkpoints: int = 3, number: int = 1) -> Offered:
    """Write an iteration whose last checkpoint is the best one; layer 2 of 2 has its lowest ABX error."""
    stage = stage_of(root, number)
    write_metrics(stage, {step: 5 - step / 100 for step in range(2, 13, 2)})
    checkpoints = []
    for index in range(num_checkpoints):
        step = 4 * (index + 1)
        path = stage.folder / f"step-{step:08d}"
        torch.manual_seed(1000 * number + step)
        HuBERT(build_config("tiny", TRAIN.model)).save_pretrained(path)
        is_best = index == num_checkpoints - 1
        scores = [(1, 11.0, 21.0, 0.1), (2, 10.0, 20.0, 0.2)] if is_best else []
        checkpoints.append(
            Checkpoint(
                step=step,
                checkpoint=str(path),
                sha256=file_digest(path / "model.safetensors"),
                num_layers=2,
                validation_loss=4 - step / 1000,
                masked_accuracy=0.1 + step / 1000,
                layer=2,
                why="lowest ABX" if is_best else "its layers were not scored",
                layers=[LayerScores(**dict(zip(LayerScores.model_fields, one, strict=True))) for one in scores],
            )
        )
    best = checkpoints[-1]
    outcome = Outcome(number, best.checkpoint, best.sha256, best.step, 2, "abx", best.why)
    save_checkpoints(RunFolder(root), number, checkpoints)
    outcome.save(RunFolder(root))
    return Offered(RunFolder(root), stage, checkpoints, outcome)
