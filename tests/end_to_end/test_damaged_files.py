"""Every kind of file in a run folder, damaged in every way: equal outputs, or an error that names it and then equal outputs."""

import os
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from hubert.core.files import read_json
from hubert.training import stage as training
from tests.support.damage import DAMAGES, SILENT, damage
from tests.support.here import HereLauncher
from tests.support.outputs import outputs, plain
from tests.support.toy import CHAIN, hubert, write_material

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

STAGE_FILES = ("plan.json", "done.json", "receipts/00000.json", "lock")
KINDS = {
    "manifest": (
        *STAGE_FILES,
        "listing-train.parquet",
        "shards/*-good.parquet",
        "shards/*-rejected.parquet",
        "everything.parquet",
        "train.parquet",
        "validation.parquet",
        "rejected.parquet",
    ),
    "features": (*STAGE_FILES, "sample.parquet", "shards/*.safetensors"),
    "kmeans": (*STAGE_FILES, "codebook.safetensors"),
    "units": (
        *STAGE_FILES,
        "shards/*.parquet",
        "tables/train/table.json",
        "tables/train/units.npy",
        "tables/train/archives.json",
        "tables/train/num_samples.npy",
        "tables/train/paths.npy",
        "tables/validation/units.npy",
    ),
    "train": (
        *STAGE_FILES,
        "attempt.json",
        "exit.json",
        "horizons.json",
        "job.json",
        "metrics.jsonl",
        "summary.json",
        "trainer.json",
        "trainer.lock",
        *(
            f"step-{step:08d}/{name}"
            for step in (4, 8, 12)
            for name in ("checkpoint.json", "config.json", "model.safetensors", "state.pt")
        ),
    ),
    "validate": (*STAGE_FILES, "validation.json"),
    "report": (*STAGE_FILES, "report.html", "report.json", "example.json", "example.flac"),
    "": ("resolved.toml", "outcome.json", "checkpoints.json", "choice.json"),
}
# In the cases "before it is read": what reads the files of a stage and is done again, and which files it reads.
READERS = {
    "manifest": (("features", "units"), ("train.parquet", "validation.parquet")),
    "features": (("kmeans",), ("shards/*.safetensors",)),
    "kmeans": (("units",), ("codebook.safetensors",)),
    "units": (("train", "validate"), ("tables/*",)),
    "train": (("validate",), ("*/checkpoint.json", "*/config.json", "*/model.safetensors")),
}


def is_read(stage: str, name: str) -> bool:
    return stage in READERS and any(fnmatch(name, pattern) for pattern in READERS[stage][1])


CASES = [
    (stage, name, how, when)
    for stage, names in KINDS.items()
    for name in names
    for how in DAMAGES
    for when in ("finished", "unfinished", "before it is read")
    if when == "finished" or stage
    if when != "before it is read" or (how in SILENT and is_read(stage, name))
]


class Toy:
    """A finished run, which every case gets back as it was."""

    def __init__(self, root: Path) -> None:
        self.run = root / "run"
        self.pristine = root / "pristine"
        data, recipe = write_material(root)
        self.anew = ("--recipe", str(recipe), "--data", str(data))
        assert not self.commands(CHAIN, anew=True)
        self.expected = self.outputs()
        shutil.copytree(self.run, self.pristine)

    def commands(self, stages: Sequence[str], *, anew: bool = False) -> str:
        """Run commands, one after the other; returns the error of the first that fails."""
        for stage in stages:
            code, _, error = hubert(stage, self.run, *(self.anew if anew and stage == stages[0] else ()))
            if code:
                return f"{stage}: {error}"
        return ""

    def outputs(self) -> dict[str, Any]:
        choice = {name: plain(read_json(self.run / "it1" / name)) for name in ("outcome.json", "checkpoints.json")}
        return outputs(self.run) | choice

    def restore(self) -> None:
        shutil.rmtree(self.run)
        shutil.copytree(self.pristine, self.run)

    def folder(self, stage: str) -> Path:
        if not stage:
            return self.run / "it1"
        (found,) = self.run.glob(f"{stage}-*" if stage == "manifest" else f"it1/{stage}-*")
        return found

    def unfinish(self, stage: str) -> None:
        """Leave a stage as a kill leaves it, before its last shard; a training after its second checkpoint."""
        folder = self.folder(stage)
        gone = [folder / "done.json", max((folder / "receipts").iterdir())]
        if stage == "train":
            gone += [folder / "summary.json", folder / "exit.json"]
            shutil.rmtree(folder / "step-00000012")
        for path in gone:
            path.unlink()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LocalLauncher", HereLauncher)
        yield Toy(tmp_path_factory.mktemp("damaged"))


@pytest.mark.parametrize(("stage", "name", "how", "when"), CASES)
def test_a_damaged_file_changes_nothing_or_is_named_and_then_changes_nothing(toy, stage, name, how, when):
    toy.restore()
    if when == "unfinished":
        toy.unfinish(stage)
    if when == "before it is read":
        for reader in READERS[stage][0]:
            shutil.rmtree(toy.folder(reader))
    path = next(iter(sorted(toy.folder(stage).glob(name))), None)
    if path is None or (how != "removed" and not path.stat().st_size):
        pytest.skip("there is no such file at this point, or it is empty anyway")
    damage(path, how, keep_times=when == "before it is read")
    commands = [stage or ("manifest" if name == "resolved.toml" else "report")]
    commands += READERS[stage][0] if when == "before it is read" else ()
    error = toy.commands(commands)
    outcome = "equal"
    if error:
        outcome = "error, then equal"
        is_gone = (name, how) == (
            "resolved.toml",
            "removed",
        )  # then the run is a new one, and the error names its folder
        assert str(toy.run if is_gone else path) in error
        assert not toy.commands(commands, anew=name == "resolved.toml")
    found = toy.outputs()
    assert found.keys() == toy.expected.keys()
    assert [name for name in found if found[name] != toy.expected[name]] == []
    if log := os.environ.get("HUBERT_DAMAGE_LOG"):
        with Path(log).open("a") as file:
            file.write(f"{outcome}\t{stage}\t{name}\t{how}\t{when}\t{error[:300]!r}\n")
