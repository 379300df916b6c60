"""Noise to train on for seconds, and the command line called in this process: for the tests of the command line."""

import contextlib
import io
from pathlib import Path

import numpy as np
import soundfile

from hubert.cli import main as cli
from hubert.settings.recipe import merge
from tests.support.small import SETTINGS

CHAIN = ("manifest", "features", "kmeans", "units", "train", "validate", "report")


def write_noise(folder: Path, num_files: int, seconds: float, seed: int) -> None:
    """Write wav files whose loudness changes, so that their frames fall into clusters."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for number in range(num_files):
        loudness = np.repeat(generator.uniform(0.01, 0.3, round(seconds * 10)), 1600)
        waveform = loudness * generator.standard_normal(len(loudness))
        soundfile.write(folder / f"{folder.name} {number}.wav", waveform, 16_000)


def write_recipe(path: Path, **changes) -> Path:
    """Write the small recipe without ABX and alignments."""
    import tomli_w

    settings = {name: section for name, section in SETTINGS.items() if name not in {"abx", "quality"}}
    path.write_text(tomli_w.dumps(merge(settings, {"kmeans": {"backend": "torch"}}, changes)))
    return path


def write_material(root: Path) -> tuple[Path, Path]:
    """Write a data folder and a recipe for it; return both."""
    write_noise(root / "data" / "train", 10, 2.5, seed=0)
    write_noise(root / "data" / "val", 4, 2.5, seed=1)
    return root / "data", write_recipe(root / "small.toml")


def hubert(*words) -> tuple[int, str, str]:
    """Run a command in this process; returns exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()
