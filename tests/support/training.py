"""Small trainings, for the tests of the trainer and of its launcher."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from hubert.settings.sections import TrainSettings
from hubert.training.checkpoint import checkpoint_path
from hubert.training.distributed import World
from hubert.training.exit_states import Exit
from hubert.training.folder import read_metrics
from hubert.training.job import Job, new_attempt
from hubert.training.trainer import Trainer
from tests.support.corpus import NUM_UNITS, write_corpus

ALONE = World(0, 1, 0, torch.device("cpu"))
TIMES = ("seconds", "audio_seconds_per_second", "time")
SETTINGS = TrainSettings(
    size="tiny",
    model={
        "conv_layers": [[16, 10, 5], *[[16, 3, 2]] * 4, *[[16, 2, 2]] * 2],
        "dim": 32,
        "num_layers": 3,
        "num_heads": 2,
    }
    | {"ffn_dim": 64, "final_dim": 16, "pos_conv_kernel": 16, "dropout": 0.1, "layerdrop": 0.3},
    precision="fp32",
    steps=20,
    warmup_steps=4,
    learning_rate=2e-3,
    batch_seconds=12.0,
    micro_batch_seconds=3.0,
    min_seconds=1.0,
    max_seconds=2.0,
    num_crop_lengths=3,
    log_interval=2,
    checkpoint_interval=10,
    num_workers=0,
    num_threads=1,
)


def write_table(folder: Path) -> Path:
    """Write 40 files, two of them too short for the settings."""
    return write_corpus(folder, np.random.default_rng(3).uniform(0.8, 3.0, 40).tolist())


def job_of(folder: Path, table: Path, **changes: Any) -> Job:
    settings = SETTINGS.model_copy(update=changes)
    return Job(
        folder=folder,
        table=table,
        table_key="t",
        num_units=NUM_UNITS,
        settings=settings,
        horizons=((0, settings.steps),),
    )


def train(job: Job) -> Exit:
    """Train in this process, as `python -m hubert.train` started by hand does."""
    return Trainer(job.model_copy(update={"attempt": new_attempt()}), ALONE, take_folder=True).run()


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def assert_same_training(folder: Path, other: Path) -> None:
    assert metrics_of(folder) == metrics_of(other)
    model, expected = (checkpoint_path(path, 20) / "model.safetensors" for path in (folder, other))
    assert model.read_bytes() == expected.read_bytes()
