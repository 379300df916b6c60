"""A small corpus and a recipe that runs all stages in seconds, for the tests of the pipeline and the flows."""

import json
from pathlib import Path
from typing import Any

from hubert.data.demo.corpus import build_demo_corpus
from hubert.settings.recipe import merge

SETTINGS: dict[str, Any] = {
    "data": {"audio": ["train"], "validation": ["val"], "shard_hours": 0.005},
    "features": {"shard_hours": 0.01},
    "kmeans": {"num_units": 20, "sample_fraction": 1.0, "seeding_frames": 2000},
    "units": {"shard_hours": 0.01},
    "train": {
        "size": "tiny",
        "model": {"num_layers": 2, "dim": 32, "ffn_dim": 64, "num_heads": 2, "final_dim": 16},
        "steps": 12,
        "warmup_steps": 3,
        "learning_rate": 2e-3,
        "batch_seconds": 8,
        "micro_batch_seconds": 4,
        "min_seconds": 1,
        "max_seconds": 3,
        "num_crop_lengths": 2,
        "log_interval": 2,
        "checkpoint_interval": 4,
        "num_workers": 0,
        "num_threads": 1,
        "precision": "fp32",
    },
    "abx": {"item": "phoneme-abx.item", "audio": ["abx"]},
    "quality": {"alignments": "alignments.csv", "audio": ["val", "abx"]},
}


def build_corpus(folder: Path) -> Path:
    """Half a minute of training audio, a few files of validation and ABX."""
    return build_demo_corpus(folder, num_train=24, num_validation=6, num_abx=24)


def write_recipe(path: Path, **changes: Any) -> Path:
    """Write the small recipe, with changes by section, as TOML."""
    import tomli_w

    path.write_text(tomli_w.dumps({"description": "for tests", **merge(SETTINGS, changes)}))
    return path


def write_cluster(path: Path) -> Path:
    """Write the cluster file of one local worker: to start another takes longer than all the work of a small run."""
    one = {"num_workers": 1, "memory_limit": "0"}
    sections = dict.fromkeys(("extraction", "kmeans", "evaluation"), one)
    path.write_text(json.dumps({"kind": "local", **sections}))  # JSON is YAML
    return path


def write_bad_files(folder: Path) -> list[Path]:
    """Write the six files that a manifest must reject: truncated, empty, 8 kHz, stereo, NaN-filled, a text named .wav."""
    import numpy as np
    import soundfile

    noise = np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32)
    names = ["truncated.flac", "empty.wav", "8 kHz.wav", "stereo, of two.wav", "nån.wav", "text.wav"]
    truncated, empty, slow, stereo, nan, text = paths = [folder / name for name in names]
    soundfile.write(truncated, noise, 16_000)
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size // 2])
    empty.touch()
    soundfile.write(slow, noise, 8000)
    soundfile.write(stereo, np.stack([noise, noise], 1), 16_000)
    soundfile.write(nan, np.full(32_000, np.nan, np.float32), 16_000, subtype="FLOAT")
    text.write_text("this is no audio\n" * 100)
    return paths
