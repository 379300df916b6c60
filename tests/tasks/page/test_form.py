"""The run form: what the server has of it, what it refuses, and what a run that was started with it is called."""

import pytest

from hubert.core.errors import ConfigError
from hubert.settings.recipe import apply_overrides, build_recipe
from hubert.settings.sections import SECTIONS
from tasks.page.form import SETTINGS
from tasks.service.prefect_api import connect

FIELDS = ["run", "recipe", "data", "iteration", "teacher", "layer", "cluster", "choose", "overrides", "extend"]
FAR = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2100-01-01T00:00:00Z"}}  # no worker takes it


@pytest.fixture(scope="module")
def api(deployed):
    with connect(deployed.settings.api_url) as api:
        yield api


@pytest.fixture(scope="module")
def deployments(api):
    return {f"{found['flow_name']}/{found['name']}": found for found in api.deployments()}


@pytest.fixture(scope="module")
def form(deployments):
    return deployments["hubert-iteration/local"]["parameter_openapi_schema"]["properties"]


def in_order(properties):
    """Return the fields as the page shows them: it sorts by `position`, as databases may reorder keys."""
    assert sorted(field["position"] for field in properties.values()) == list(range(len(properties)))
    return sorted(properties, key=lambda name: properties[name]["position"])


def test_the_form_has_the_fields_of_the_design_in_order_each_with_a_description(form, deployments):
    assert in_order(form) == FIELDS
    whole = deployments["hubert-pretraining/local"]["parameter_openapi_schema"]["properties"]
    assert in_order(whole) == [name for name in FIELDS if name not in {"iteration", "teacher", "layer"}]
    for field in [*form.values(), *whole.values()]:
        assert len(field["description"]) > 40


def test_choices_are_drop_downs_and_recipe_and_cluster_take_a_file_too(form):
    assert form["choose"]["enum"] == ["auto", "ask"]
    for name, known in {"recipe": {"demo", "base", "librispeech-base"}, "cluster": {"local", "slurm"}}.items():
        names, file = form[name]["anyOf"]
        assert known <= set(names["enum"])
        assert form[name]["default"] in names["enum"]  # the page opens the tab that has the value
        assert "enum" not in file


def test_optional_numbers_start_as_empty_fields_and_not_as_a_choice_of_types(form):
    for name in ("iteration", "layer"):
        assert (form[name]["type"], form[name]["minimum"]) == ("integer", 1)
        assert "default" not in form[name]


def test_the_settings_have_types_limits_and_words_of_the_config_but_no_defaults_which_would_win_over_the_recipe(form):
    settings = form["overrides"]["properties"]
    assert in_order(settings) == list(SETTINGS)
    for name, field in settings.items():
        section, _, setting = name.partition(".")
        known = SECTIONS[section].model_json_schema()["properties"][setting]
        assert field["type"] == known["type"]
        assert field["title"] == name
        assert "default" not in field
        assert "[" not in field["description"]  # fairseq's names
        assert field["description"].lower().startswith(known["description"].partition(" [")[0].lower())
    assert settings["train.size"]["enum"] == ["base", "large", "xlarge", "tiny"]
    assert settings["data.max_rejected"]["description"].endswith("from 0 to 1")


def test_the_forms_names_of_settings_are_obeyed():
    recipe = build_recipe(apply_overrides({}, {"train.steps": 7, "kmeans.num_units": 20, "train": {"seed": 3}}))
    settings = recipe.iteration(2)
    assert (settings.train.steps, settings.train.seed, settings.kmeans.num_units) == (7, 3, 20)
    with pytest.raises(ConfigError, match=r"with the overrides .*trian.steps.*: trian"):
        build_recipe(apply_overrides({}, {"trian.steps": 7}), where="demo.toml with the overrides {'trian.steps': 7}")


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"run": "my run"}, "run"),
        ({"run": ""}, "run"),
        ({"recipe": ""}, "recipe"),
        ({"recipe": 3}, "recipe"),
        ({"iteration": 0}, "iteration"),
        ({"layer": 0}, "layer"),
        ({"layer": "nine"}, "layer"),
        ({"choose": "me"}, "choose"),
        ({"overrides": {"train.steps": 0}}, "train.steps"),
        ({"overrides": {"data.max_rejected": 5}}, "data.max_rejected"),
        ({"overrides": "train.steps=5"}, "overrides"),
        ({"extend": "yes"}, "extend"),
    ],
)
def test_a_wrong_value_is_refused_before_a_run_is_made_and_the_field_is_named(api, deployments, wrong, field):
    path = f"/deployments/{deployments['hubert-iteration/local']['id']}/create_flow_run"
    answer = api.post(path, {"parameters": wrong, "state": FAR}, accepted=(409,))
    assert "id" not in answer
    assert f"for field '{field}'" in answer["detail"] or f"overrides['{field}']" in answer["detail"]


@pytest.mark.parametrize(
    "right",
    [
        {},
        {"run": "/some where/my run", "recipe": "/a/recipe.toml", "cluster": "site.yaml"},
        {"recipe": "a-recipe-that-was-added-since"},
        {"iteration": 2, "layer": 9, "teacher": "facebook/hubert-base-ls960"},
        {"iteration": None, "layer": None, "overrides": None},
        {"overrides": {"train": {"steps": 500}, "abx.max_size_group": 5, "train.learning_rate": 0.002}},
    ],
)
def test_what_a_shell_or_a_program_may_ask_for_is_taken(api, deployments, right):
    path = f"/deployments/{deployments['hubert-iteration/slurm']['id']}/create_flow_run"
    run = api.post(path, {"parameters": right, "state": FAR})
    assert run["parameters"] == {"cluster": "slurm", **right}


def test_deployments_say_what_goes_in_and_out_carry_tags_and_have_no_schedule(deployments):
    for flow in ("hubert-iteration", "hubert-pretraining"):
        for name in ("local", "slurm"):
            found = deployments[f"{flow}/{name}"]
            assert all(
                word in found["description"] for word in ("**In:**", "**Out:**", "docs/choosing.md", "docs/cli.md")
            )
            assert found["tags"] == ["hubert", name]
            assert found["schedules"] == []
            assert found["enforce_parameter_schema"]
