"""Presets: each holds what another program does otherwise than the defaults, lies under a recipe, and is looked up once."""

import pytest
import tomli_w

from hubert.core.errors import ConfigError
from hubert.core.paths import PRESETS, find_recipe
from hubert.settings.recipe import build_recipe, change_recipe, read_recipe
from hubert.settings.sections import SECTIONS

# Typed from the programs' own files: what the merged settings of iterations 1 and 2 must be where the defaults are not.
STATED = {
    "fairseq": {
        "train.steps": (400_000, 400_000),
        "train.mask_rule": ("fairseq", "fairseq"),
        "kmeans.sample_hours": (1e6, 1e6),
    },
    "torchaudio": {"train.mask_rule": ("fairseq", "fairseq")},
    "minimal-hubert": {
        "train.steps": (400_000, 400_000),
        "train.feature_penalty": (1.0, 1.0),
        "train.mask_rule": ("fairseq", "fairseq"),
        "train.micro_batch_seconds": (175.0, 175.0),
        "train.model": ({"feature_grad_mult": 1.0, "normalize_waveform": True},) * 2,
        "features.before_residual": (True, True),
        "kmeans.sample_hours": (1e6, 1e6),
    },
}


def flat(recipe, number: int) -> dict[str, object]:
    settings = recipe.iteration(number).model_dump(by_alias=True)
    return {f"{section}.{name}": value for section in SECTIONS for name, value in settings[section].items()}


@pytest.mark.parametrize("name", STATED)
def test_a_preset_differs_from_the_defaults_exactly_where_it_says_so(name):
    plain, preset = build_recipe({}), build_recipe({"preset": name})
    for number in (1, 2):
        before, after = flat(plain, number), flat(preset, number)
        changed = {key: value for key, value in after.items() if value != before[key]}
        stated = {key: values[number - 1] for key, values in STATED[name].items()}
        # Where an iteration's default is what the preset says anyway, nothing changes.
        assert changed == {key: value for key, value in stated.items() if value != before[key]}
        assert after.items() >= stated.items()


@pytest.mark.parametrize("name", STATED)
def test_a_preset_says_nothing_that_is_the_default_in_both_iterations(name):
    plain = build_recipe({})
    for section, values in build_recipe({"preset": name}).preset_sections.items():
        for field, value in values.items():
            assert any(flat(plain, number)[f"{section}.{field}"] != value for number in (1, 2)), f"{section}.{field}"


def test_all_presets_are_tested_and_hold_sections_only():
    assert {path.stem for path in PRESETS.glob("*.toml")} == set(STATED)
    for name in STATED:
        assert set(build_recipe({"preset": name}).preset_sections) <= set(SECTIONS)


def test_a_recipe_wins_over_its_preset_and_an_option_lays_one_under_any_recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('preset = "minimal-hubert"\n[train]\nfeature_penalty = 5.0\n[[iterations]]\ntrain = {steps = 7}\n')
    first = read_recipe(path).iteration(1)
    assert (first.train.feature_penalty, first.train.steps, first.features.before_residual) == (5.0, 7, True)
    recipe = read_recipe(find_recipe("librispeech-base"), {"preset": "fairseq"})
    assert recipe.iteration(1).train.mask_rule == "fairseq"
    assert recipe.iteration(1).data.validation == ("dev-clean", "dev-other")


def test_an_unknown_preset_is_refused_with_those_that_there_are():
    with pytest.raises(
        ConfigError, match=r"my recipe: preset = 'espnet'.*presets: fairseq, minimal-hubert, torchaudio"
    ):
        build_recipe({"preset": "espnet"}, where="my recipe")
    with pytest.raises(ConfigError, match=r"no such preset"):
        build_recipe({"preset": "../demo"})


def test_a_run_goes_on_with_the_preset_as_it_was_and_takes_another_one_only_if_told(monkeypatch, tmp_path):
    recipe = build_recipe({"preset": "fairseq", "train": {"seed": 3}})
    (tmp_path / "fairseq.toml").write_text(tomli_w.dumps({"train": {"seed": 1, "eps": 1.0}}))
    (tmp_path / "other.toml").write_text(tomli_w.dumps({"train": {"seed": 1, "eps": 2.0}}))
    monkeypatch.setattr("hubert.settings.recipe.PRESETS", tmp_path)
    same = change_recipe(recipe, {"train.steps": 5}).iteration(1).train
    assert (same.mask_rule, same.eps, same.seed) == ("fairseq", 1e-6, 3)
    other = change_recipe(recipe, {"preset": "other"}).iteration(1).train
    assert (other.mask_rule, other.eps, other.seed) == ("static", 2.0, 3)
    assert change_recipe(recipe, {"preset": ""}).iteration(1).train.mask_rule == "static"
