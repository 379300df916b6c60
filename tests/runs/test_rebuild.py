"""Which stage folders `hubert report` shows of a run whose corpus is gone."""

import os
import shutil
from pathlib import Path

import pytest

from hubert.core.paths import RunFolder
from hubert.runs.options import RunOptions
from hubert.runs.pipeline import Iteration
from hubert.runs.rebuild import find_stages, rebuild
from hubert.runs.resolve import settle
from hubert.runs.resolved import Resolved
from tests.support.toy import write_material

BEGUN = ("manifest", "features", "kmeans")


@pytest.fixture
def abandoned(tmp_path: Path) -> tuple[RunFolder, dict[str, Path]]:
    """A run that got as far as the codebook, twice, and whose corpus is gone; with the folders of the settings that count."""
    data, recipe = write_material(tmp_path)
    run = str(tmp_path / "run")
    first = Iteration(settle(RunOptions(run, recipe=str(recipe), data=str(data))))
    other = Iteration(settle(RunOptions(run, overrides={"kmeans.num_units": 10})))
    again = Iteration(settle(RunOptions(run, overrides={"kmeans.num_units": 20})))
    for iteration in (first, other, again):
        for name in BEGUN:
            iteration.begin(getattr(iteration, name)).run()
    assert other.kmeans.folder != again.kmeans.folder
    os.utime(other.kmeans.folder)  # the newest one is not the one that counts
    shutil.rmtree(data)
    return first.folder, {name: getattr(again, name).folder for name in BEGUN}


def stages_of(folder: RunFolder) -> dict[str, Path]:
    return find_stages(folder, 1, Resolved.load(folder.settings(1)), None)


def test_the_stages_that_were_begun_last_are_found_and_not_those_of_the_newest_folder(abandoned):
    folder, expected = abandoned
    assert stages_of(folder) == expected
    assert rebuild(folder).pages == {1: folder.unfinished(1)}


def test_of_a_run_without_notes_a_stage_with_two_folders_is_left_out_instead_of_guessed(abandoned):
    folder, expected = abandoned
    folder.stages(1).unlink()
    del expected["kmeans"]
    assert stages_of(folder) == expected
    assert rebuild(folder).pages == {1: folder.unfinished(1)}


def test_other_settings_strike_out_the_stages_after_them(tmp_path: Path):
    data, recipe = write_material(tmp_path)
    run = str(tmp_path / "run")
    first = Iteration(settle(RunOptions(run, recipe=str(recipe), data=str(data))))
    for name in BEGUN:
        first.begin(getattr(first, name)).run()
    other = Iteration(settle(RunOptions(run, overrides={"kmeans.sample_fraction": 0.5, "kmeans.min_sample_files": 2})))
    other.begin(other.features)
    shutil.rmtree(data)
    assert stages_of(first.folder) == {"manifest": first.manifest.folder}  # the new features have no folder yet
