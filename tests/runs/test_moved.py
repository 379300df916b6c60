"""A run whose folder was moved works where it is, and damaged settings are named."""

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from hubert.core.errors import DataError
from hubert.core.files import read_json
from hubert.core.paths import RunFolder
from hubert.evaluation.choice import Outcome, read_outcome
from hubert.features.source import FeatureSource
from hubert.runs.options import RunOptions
from hubert.runs.resolve import settle
from hubert.runs.resolved import Resolved
from hubert.runs.status import format_status, read_status
from hubert.training.init import InitialWeights
from tests.support.damage import DAMAGES, damage
from tests.support.toy import hubert, write_material


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def begun(material, tmp_path):
    """A run of which the audio is listed and the frames are sampled."""
    data, recipe = material
    run = tmp_path / "old" / "run"
    assert hubert("manifest", run, "--recipe", recipe, "--data", data)[0] == 0
    assert hubert("features", run)[0] == 0
    return run


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_moved_run_goes_on_where_it_is_and_nothing_is_written_to_the_old_place(begun, tmp_path):
    new = tmp_path / "new" / "place"
    new.parent.mkdir()
    begun.rename(new)
    for stage in ("features", "kmeans"):
        code, said, error = hubert(stage, new)
        assert code == 0, error
        assert f"folder: {new}/it1/{stage}-" in said
        assert ("was finished before" in said) == (stage == "features")
    assert hubert("units", new, "--set", "units.shard_hours=0.02")[0] == 0
    assert not begun.exists()


def test_a_copied_run_leaves_its_original_alone(begun, tmp_path):
    before = content_of(begun)
    copy = shutil.copytree(begun, tmp_path / "copy")
    assert hubert("kmeans", copy)[0] == 0
    assert content_of(begun) == before


def test_paths_inside_a_moved_run_are_those_of_its_new_place_and_others_stay(begun, material, tmp_path):
    folder = RunFolder(begun)
    own, foreign = f"{begun}/it1/train-12345678/step-00000012", "/models/it1/train-12345678/step-00000012"
    resolved = Resolved.load(folder.settings(1))
    resolved.model_copy(update={"source": FeatureSource(own, "0"), "init": InitialWeights("x", foreign, "0", {})}).save(
        folder.settings(1)
    )
    outcome = Outcome(1, own, "0", 12, 3, "paper", "why")
    outcome.save(folder)
    assert read_outcome(folder, 1) == outcome
    moved = RunFolder(begun.rename(tmp_path / "moved"))
    loaded = Resolved.load(moved.settings(1))
    assert loaded.run == str(moved.root)
    assert loaded.source.checkpoint == f"{moved.root}/it1/train-12345678/step-00000012"
    assert loaded.init.checkpoint == foreign
    assert asdict(read_outcome(moved, 1)) == {**asdict(outcome), "checkpoint": loaded.source.checkpoint}


@pytest.mark.parametrize("how", [how for how in DAMAGES if how != "removed"])
def test_damaged_settings_are_named_and_not_needed_beside_recipe_and_data(begun, material, how):
    data, recipe = material
    path = RunFolder(begun).settings(1)
    whole = Resolved.load(path)
    damage(path, how)
    with pytest.raises(DataError, match=rf"{path} is not what was written.*--recipe R --data D"):
        Resolved.load(path)
    code, _, error = hubert("kmeans", begun)
    assert (code, str(path) in error) == (3, True)
    assert str(path) in format_status(read_status(RunFolder(begun)))
    assert settle(RunOptions(str(begun), recipe=str(recipe), data=str(data))) == whole
    assert Resolved.load(path) == whole


def test_settings_of_an_older_version_have_no_hash_and_are_read(begun):
    path = RunFolder(begun).settings(1)
    whole = Resolved.load(path)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "content_sha256" not in line))
    assert Resolved.load(path) == whole


@pytest.mark.parametrize("how", DAMAGES)
def test_kmeans_never_takes_part_of_the_frames_because_a_receipt_of_the_features_is_damaged(begun, how):
    for receipt in begun.glob("it1/features-*/receipts/*.json"):
        damage(receipt, how)
    code, _, error = hubert("kmeans", begun)
    assert code == 0, error
    (features,) = (read_json(path)["figures"] for path in begun.glob("it1/features-*/done.json"))
    (codebook,) = (read_json(path)["figures"] for path in begun.glob("it1/kmeans-*/done.json"))
    assert codebook["num_frames"] == features["num_frames"]
