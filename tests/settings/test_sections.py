"""Recipes: what is merged over what, which mistakes are refused, and what enters a key."""

import pytest

from hubert.core.errors import ConfigError
from hubert.core.paths import PROJECT, find_recipe
from hubert.settings.recipe import apply_overrides, build_recipe, parse_override, read_recipe
from hubert.settings.sections import TrainSettings

RECIPES = sorted((PROJECT / "deployments" / "recipes").glob("*.toml"))


def test_an_empty_recipe_is_the_papers_run():
    recipe = build_recipe({})
    first, second = recipe.iteration(1), recipe.iteration(2)
    assert (first.kmeans.num_units, first.train.steps) == (100, 250_000)
    assert (second.kmeans.num_units, second.train.steps) == (500, 400_000)
    assert first.train.batch_seconds == 2800
    assert (first.train.size, first.train.learning_rate, first.train.warmup_steps) == ("base", 5e-4, 32_000)
    assert (first.train.feature_penalty, first.train.mask_prob, first.train.mask_length) == (10, 0.8, 10)


def test_a_section_wins_over_the_paper_and_an_iteration_over_the_section():
    recipe = build_recipe({"train": {"steps": 10}, "iterations": [{}, {"train": {"steps": 20}}]})
    assert [recipe.iteration(number).train.steps for number in (1, 2, 3)] == [10, 20, 20]
    assert recipe.iteration(2).kmeans.num_units == 500


def test_overrides_win_over_every_iteration_nested_or_dotted():
    tables = {"train": {"steps": 10}, "iterations": [{"train": {"steps": 20}}]}
    for overrides in ({"train": {"steps": 5}}, {"train.steps": 5}):
        assert build_recipe(apply_overrides(tables, overrides)).iteration(1).train.steps == 5


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"train": {"step": 5}}, r"train\.step"),
        ({"trian": {}}, "trian"),
        (
            {"train": {"log_interval": 200, "checkpoint_interval": 300}},
            r"checkpoint_interval \(300\).*log_interval \(200\)",
        ),
        ({"train": {"max_seconds": 1.0}}, r"max_seconds \(1\.0\).*min_seconds \(2\.0\)"),
        ({"train": {"micro_batch_seconds": 5}}, r"micro_batch_seconds \(5\.0\).*max_seconds"),
        ({"kmeans": {"num_units": 500, "seeding_frames": 100}}, r"seeding_frames \(100\).*num_units \(500\)"),
        ({"iterations": [{"data": {"resample": True}}]}, "all iterations share it"),
        ({"train": {"model": {"num_layer": 3}}}, "num_layer"),
        ({"train": {"size": "medium"}}, r"train\.size = 'medium'"),
        ({"data": {"max_rejected": 2}}, r"data\.max_rejected = 2"),
    ],
)
def test_a_mistake_is_refused_with_the_field_and_its_value(tables, message):
    with pytest.raises(ConfigError, match=message):
        build_recipe(tables)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_that_is_shipped_passes_the_checks(path):
    assert read_recipe(path).description


def test_librispeech_base_is_the_papers_run_and_holds_only_what_differs_from_the_defaults():
    recipe = read_recipe(find_recipe("librispeech-base"))
    assert set(recipe.sections) == {"data"}
    assert [recipe.iteration(number).train.steps for number in (1, 2)] == [250_000, 400_000]
    assert recipe.iteration(1).train == TrainSettings(steps=250_000)


def test_a_recipe_that_does_not_exist_is_refused_with_the_ones_that_do():
    with pytest.raises(ConfigError, match="librispeech-base"):
        read_recipe(find_recipe("nothing"))


def test_only_settings_that_affect_the_outputs_and_differ_from_the_default_enter_a_key():
    assert TrainSettings().key_settings() == {}
    assert TrainSettings(steps=7, log_interval=10, num_workers=9).key_settings() == {}
    assert TrainSettings(learning_rate=1e-3).key_settings() == {"learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.steps=5", ("train.steps", 5)),
        ("train.size=tiny", ("train.size", "tiny")),
        ("a.b=[1, 2]", ("a.b", [1, 2])),
    ],
)
def test_an_override_of_the_shell_is_read_as_toml_or_else_as_text(text, expected):
    assert parse_override(text) == expected


def test_an_override_without_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"train\.steps=500"):
        parse_override("train.steps")


def test_items_that_are_not_there_are_found_missing_before_anything_starts(tmp_path):
    from hubert.runs.options import RunOptions
    from hubert.runs.resolve import resolve

    (tmp_path / "train").mkdir()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[data]\naudio = ["train"]\n[abx]\nitem = "phones.item"\n')
    with pytest.raises(ConfigError, match=r"phones\.item"):
        resolve(RunOptions(str(tmp_path / "run"), recipe=str(recipe), data=str(tmp_path)))
    assert not (tmp_path / "run").exists()


def test_one_codebook_for_two_iterations_is_refused_before_the_first_one_runs():
    recipe = build_recipe({"kmeans": {"codebook": "c.safetensors"}})
    with pytest.raises(ConfigError, match=r"c\.safetensors.*in iteration 2 and in an earlier one.*\[\[iterations\]\]"):
        recipe.check_chain()
    build_recipe(
        {"iterations": [{"kmeans": {"codebook": "c.safetensors"}}, {"kmeans": {"num_units": 50}}]}
    ).check_chain()
    build_recipe({"num_iterations": 1, "kmeans": {"codebook": "c.safetensors"}}).check_chain()
