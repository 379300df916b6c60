"""From options to what an iteration does: what is given wins, what is not is the run's own, whoever starts it."""

from pathlib import Path

import pytest

from hubert.core.errors import ConfigError, DataError
from hubert.core.paths import RunFolder, demo_corpus_folder
from hubert.runs.options import RunOptions, read_request
from hubert.runs.resolve import resolve, settle
from hubert.runs.resolved import Resolved
from hubert.settings.recipe import PAPER_ITERATIONS
from tests.support.toy import write_material, write_noise, write_recipe


@pytest.fixture
def material(tmp_path: Path) -> tuple[str, str]:
    data, recipe = write_material(tmp_path)
    return str(recipe), str(data)


def test_what_is_written_down_is_read_back_with_its_types(material, tmp_path):
    recipe, data = material
    found = settle(RunOptions(str(tmp_path / "run"), recipe=recipe, data=data, overrides={"train.seed": 3}))
    again = Resolved.load(RunFolder(tmp_path / "run").settings(1))
    assert again == found
    assert (again.settings.train.seed, type(again.source)) == (3, type(found.source))


def test_settings_that_were_settled_are_not_merged_again(material, tmp_path, monkeypatch):
    """Another default of the paper's iterations, in a later version, must not change an iteration that was begun."""
    recipe, data = material
    run = str(tmp_path / "run")
    Path(recipe).write_text(Path(recipe).read_text().replace("num_units = 20\n", ""))
    assert settle(RunOptions(run, recipe=recipe, data=data)).settings.kmeans.num_units == 100
    monkeypatch.setitem(PAPER_ITERATIONS[0], "kmeans", {"num_units": 150})
    assert settle(RunOptions(run)).settings.kmeans.num_units == 100
    assert settle(RunOptions(run, overrides={"train.seed": 3})).settings.kmeans.num_units == 150  # settled anew


def test_a_recipe_that_is_given_anew_keeps_the_data_of_the_run(material, tmp_path):
    recipe, data = material
    run = str(tmp_path / "run")
    settle(RunOptions(run, recipe=recipe, data=data))
    other = write_recipe(tmp_path / "other.toml", train={"seed": 8})
    found = resolve(RunOptions(run, recipe=str(other)))
    assert (found.data, found.settings.train.seed, found.recipe_name) == (data, 8, str(other))


def test_recipe_and_data_of_a_run_hold_for_its_next_iteration_too(material, tmp_path):
    recipe, data = material
    run = str(tmp_path / "run")
    settle(RunOptions(run, recipe=recipe, data=data, overrides={"train.seed": 8}))
    name, content, location = read_request(RunOptions(run, iteration=2))
    assert (name, content.iteration(2).train.seed, str(location)) == (recipe, 8, data)


def test_a_run_on_given_data_does_not_fall_back_to_the_corpus_of_the_recipe(material, tmp_path, monkeypatch):
    monkeypatch.setenv("HUBERT_RUNS", str(tmp_path / "runs"))
    own = write_recipe(tmp_path / "own.toml")
    own.write_text(f'corpus = "demo"\n{own.read_text()}')
    assert read_request(RunOptions("new", recipe=str(own)))[2] is None
    settle(RunOptions("given", recipe=str(own), data=material[1]))
    assert str(read_request(RunOptions("given", recipe=str(own)))[2]) == material[1]


def test_the_corpus_of_a_recipe_is_made_when_the_run_starts_and_again_if_it_has_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("HUBERT_RUNS", str(tmp_path / "runs"))
    own = write_recipe(tmp_path / "own.toml")
    own.write_text(f'corpus = "demo"\n{own.read_text()}')
    made = []

    def make(folder: Path) -> Path:
        made.append(folder)
        for number, name in enumerate(("train", "val")):
            if not (folder / name).exists():
                write_noise(folder / name, 2, 0.5, seed=number)
        return folder

    first = resolve(RunOptions("toy", recipe=str(own)), make_corpus=make)
    first.remember()
    assert first.data == str(demo_corpus_folder())
    assert resolve(RunOptions("toy", overrides={"train.seed": 1}), make_corpus=make).data == first.data
    assert made == [demo_corpus_folder()] * 2


def test_a_person_is_not_asked_for_a_teacher_before_recipe_and_data_are_known_to_be_right(material, tmp_path):
    def ask(folder: RunFolder, number: int) -> None:
        raise AssertionError(f"asked for iteration {number} of {folder}")

    for wrong in ({"recipe": "no-such"}, {"data": "/no/such"}, {"iteration": 0}, {"overrides": {"train.stepps": 1}}):
        options = {"recipe": material[0], "data": material[1], **wrong}
        with pytest.raises(ConfigError):
            resolve(RunOptions(str(tmp_path / "run"), **options), choose_teacher=ask)


def test_a_recipe_with_a_setting_that_this_version_does_not_know_is_an_error_of_the_run_not_of_the_program(
    material, tmp_path
):
    recipe, data = material
    content = settle(RunOptions(str(tmp_path / "run"), recipe=recipe, data=data)).model_dump(mode="json")
    del content["settings"]  # as older versions wrote it
    content["recipe"]["sections"]["train"]["gone"] = 1
    with pytest.raises(DataError, match=r"train\.gone.*another version wrote them"):
        Resolved.of(content, tmp_path / "run")
