"""Every stage's key stays what it was: an iteration that an older version finished is found, and not done again.

`tests/golden/stage_keys/` holds, for each case, the keys and the `resolved.toml` that commit 3d365d5 made of it. A change
of them discards people's finished work; to write new ones after a STAGE version was raised on purpose:

    python -m tests.runs.test_keys
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from hubert.core.files import write_json
from hubert.core.hashing import file_digest
from hubert.core.paths import RunFolder
from hubert.core.stage import Stage
from hubert.features.source import FeatureSource
from hubert.runs.options import RunOptions
from hubert.runs.pipeline import Iteration
from hubert.runs.resolve import resolve
from hubert.runs.resolved import Resolved
from hubert.settings.model import build_config
from hubert.units.codebook import Codebook
from tests.support.small import SETTINGS as SMALL

GOLDEN = Path(__file__).parents[1] / "golden" / "stage_keys"
MODEL = SMALL["train"]["model"]
RECIPE = """
description = "for the keys"

[data]
audio = ["train"]
validation = ["val"]

[kmeans]
num_units = 20
sample_fraction = 0.5
min_sample_files = 2
seeding_frames = 500

[train]
size = "tiny"
model = {num_layers = 2, dim = 32, ffn_dim = 64, num_heads = 2, final_dim = 16}
warmup_steps = 3

[abx]
item = "phones.item"

[quality]
alignments = "phones.item"
audio = ["abx"]

[[iterations]]
kmeans = {seed = 1}

[[iterations]]
kmeans = {num_units = 30}
train = {seed = 7}
"""
TEACHER = {"iteration": 2, "teacher": "teacher", "layer": 1}
CASES: dict[str, dict[str, Any]] = {
    "iteration-1-mfcc": {"iteration": 1},
    "iteration-2-teacher": TEACHER,
    "given-codebook": {"iteration": 1, "overrides": {"kmeans.codebook": "codebook.safetensors"}},
    "preset-fairseq": {"iteration": 1, "overrides": {"preset": "fairseq"}},
    "init-from-an-encoder": {"iteration": 1, "overrides": {"train.init": "./teacher"}},
    "overrides": TEACHER
    | {
        "overrides": {
            "data.resample": True,
            "features": {"before_residual": True, "max_chunk_seconds": 1.2, "chunk_context_seconds": 0.2},
            "kmeans.num_units": 25,
            "kmeans.backend": "torch",
            "train.seed": 3,
            "train.steps": 5,
            "validate.seed": 2,
            "abx.checkpoints": "all",
            "quality.max_hours": 1.0,
        }
    },
}
TIME = 1_700_000_000_000_000_000  # of all audio files, in ns: the manifest's key knows it


def write_material(folder: Path) -> None:
    """Write into a folder what all cases need: audio, items, a recipe, a teacher and a codebook, the same bytes each time."""
    generator = np.random.default_rng(0)
    for name, count in (("train", 6), ("val", 3), ("abx", 2)):
        (folder / "data" / name).mkdir(parents=True)
        for number in range(count):
            path = folder / "data" / name / f"{name}-{number}.wav"
            noise = generator.integers(-9000, 9000, 24_000 + 400 * number).astype(np.int16)
            soundfile.write(path, noise, 16_000, subtype="PCM_16")
            os.utime(path, ns=(TIME, TIME))
    rows = [
        f"abx-{file} {0.1 + 0.2 * n:.1f} {0.3 + 0.2 * n:.1f} {'ab'[n % 2]} x y s" for file in (0, 1) for n in (0, 1, 2)
    ]
    (folder / "data" / "phones.item").write_text("\n".join(["#file onset offset #phone prev next speaker", *rows, ""]))
    (folder / "recipe.toml").write_text(RECIPE)
    write_checkpoint(folder / "teacher", b"a teacher's weights")
    centroids = torch.arange(20 * 39, dtype=torch.float32).reshape(20, 39)
    Codebook(centroids, {"source": FeatureSource().identity, "frame_rate": 100}).save(
        folder / "data" / "codebook.safetensors"
    )


def write_checkpoint(folder: Path, weights: bytes, step: int = 0) -> dict[str, Any]:
    """Write a complete checkpoint whose weights nobody loads: a key needs only their hash."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    write_json(folder / "config.json", {"model": build_config("tiny", MODEL).model_dump(mode="json")})
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in sorted(folder.iterdir())
    }
    write_json(folder / "checkpoint.json", {"step": step, "files": files})
    return {
        "step": step,
        "path": str(folder),
        "sha256": files["model.safetensors"]["sha256"],
        "num_layers": 2,
        "masked_loss": 3.0 - step,
    }


def finish(stage: Stage, figures: dict[str, Any]) -> None:
    """Mark a stage as done with such figures."""
    write_json(stage.folder / "done.json", {"key": stage.key, "outputs": {}, "figures": figures})


def keys_of(resolved: Resolved) -> dict[str, str]:
    """Return the key of every stage of an iteration. Manifests are made; what takes longer is marked as done."""
    iteration = Iteration(resolved)
    iteration.manifest.run()
    rows = [write_checkpoint(iteration.train.folder / f"step-{step:08d}", b"%d" % step, step) for step in (1, 2)]
    finish(iteration.validate, {"rows": rows, "best": rows[1]})
    iteration.abx_manifest.run()
    iteration.quality_manifest.run()
    rates = {"across": 20.0, "items": "all items"}
    finish(iteration.abx, {"rows": [{"step": 2, "layer": 1, "selection": rates}]})
    finish(iteration.quality, {"layers": []})
    stages = [*iteration.evaluated(), iteration.abx_manifest, iteration.quality_manifest, iteration.report]
    names = [*(stage.name for stage in stages[:-3]), "abx_manifest", "quality_manifest", "report"]
    return dict(zip(names, (stage.key for stage in stages), strict=True))


def settle(case: str) -> Resolved:
    """Resolve a case in the current folder, with the places as they are seen from there."""
    return seen_from_here(resolve(RunOptions("./run", recipe="./recipe.toml", data="./data", **CASES[case])))


def seen_from_here(resolved: Resolved) -> Resolved:
    return Resolved.model_validate(json.loads(resolved.model_dump_json().replace(f"{Path.cwd()}/", "")))


@pytest.fixture
def material(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The material, in the current folder: so no key, and no file, names a folder of this machine."""
    write_material(tmp_path)
    monkeypatch.chdir(tmp_path)


def golden(case: str) -> dict[str, str]:
    keys: dict[str, str] = json.loads((GOLDEN / "keys.json").read_text())[case]
    return keys


def read_old(case: str) -> Resolved:
    """Read the file of an older version from its place in a run."""
    path = RunFolder.of("./run").settings(CASES[case]["iteration"])
    path.parent.mkdir(parents=True)
    shutil.copy(GOLDEN / f"{case}.toml", path)
    return seen_from_here(Resolved.load(path))


@pytest.mark.usefixtures("material")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("source", [settle, read_old], ids=["asked for today", "written down by an older version"])
def test_each_stage_has_the_key_that_an_older_version_gave_it(case: str, source: Callable[[str], Resolved]):
    assert keys_of(source(case)) == golden(case)


def test_the_cases_tell_all_stages_apart():
    """Else a case might miss that its settings do not reach a key."""
    found = json.loads((GOLDEN / "keys.json").read_text())
    first, second = found["iteration-1-mfcc"], found["overrides"]
    assert not {name for name in first if first[name] == second[name]}


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_material(Path(folder))
        yield


if __name__ == "__main__":
    keys = {}
    for name in CASES:
        with _elsewhere():
            asked = settle(name)
            asked.save(GOLDEN / f"{name}.toml")
            keys[name] = keys_of(asked)
    write_json(GOLDEN / "keys.json", keys)
