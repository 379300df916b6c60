"""The run form of the Prefect UI: what each field accepts, and how the page shows it.

Prefect makes the form from the flows' signatures; their docstrings say what a field means. This file adds what a Python
type cannot say. Three facts of Prefect 3.8 decide how (a test reads the form from the server, another one in a browser):

- the server refuses at once, naming the field, what breaks the form's JSON schema, from the page as from the shell;
- `int | None` shows as a choice between "int" and "None"; an integer without a default shows as an empty field, and an
  empty field is not sent;
- a drop-down accepts nothing but its entries, so that a name or a path needs two tabs.
"""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from hubert.core.paths import RUN_NAME, known_clusters, known_recipes
from hubert.settings.recipe import Recipe
from hubert.settings.sections import SECTIONS

# The settings that people change most. Any other one is given as JSON, or in a recipe.
SETTINGS = (
    "train.size",
    "train.steps",
    "train.learning_rate",
    "train.batch_seconds",
    "train.checkpoint_interval",
    "train.num_processes",
    "train.seed",
    "kmeans.num_units",
    "data.resample",
    "data.max_rejected",
)


class _NoDefault(dict[str, Any]):
    """A field's schema that does not take the parameter's default over: `None` would be no valid value of it."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key != "default":
            super().__setitem__(key, value)


class Shown:
    """Annotates a parameter with the JSON schema of its field; `optional` fields start empty, and mean None."""

    def __init__(self, *, optional: bool = False, **schema: Any) -> None:
        self.optional, self.schema = optional, schema

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return _NoDefault(self.schema) if self.optional else dict(self.schema)


def name_or_file(names: list[str]) -> Shown:
    """Return a field with two tabs: a drop-down of names, and a text field for a path (or a name that is new)."""
    return Shown(
        anyOf=[
            {"type": "string", "title": "name", "enum": names},
            {"type": "string", "title": "file", "minLength": 1},
        ]
    )


def overrides_form(*own: str) -> Shown:
    """Return the group of settings: those of the recipe itself that a flow has use for, then the common ones."""
    fields = [*_describe(Recipe, own), *_describe_settings()]
    return Shown(
        optional=True,
        type="object",
        properties={name: {**field, "position": position} for position, (name, field) in enumerate(fields)},
    )


def _describe_settings() -> Iterator[tuple[str, dict[str, Any]]]:
    for setting in SETTINGS:
        section, _, name = setting.partition(".")
        yield from _describe(SECTIONS[section], (name,), f"{section}.")


def _describe(section: Any, names: tuple[str, ...], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Give single settings as fields: the type, the limits and the words of `hubert.settings.sections`, but not the default.

    The default would be sent with the form, and win over the recipe.
    """
    known = section.model_json_schema()["properties"]
    for name in names:
        field = {key: value for key, value in known[name].items() if key not in {"default", "affects"}}
        words = field["description"].partition(" [")[0]  # what follows is fairseq's name of it
        words = f"{words[0].upper()}{words[1:]}"
        if {"minimum", "maximum"} <= field.keys():
            words += f", from {field['minimum']:g} to {field['maximum']:g}"
        yield f"{prefix}{name}", {**field, "title": f"{prefix}{name}", "description": words}


RunName = Annotated[str, Shown(type="string", pattern=f"^({RUN_NAME}|.*/.*)$")]
RecipeName = Annotated[str, name_or_file(known_recipes())]
ClusterName = Annotated[str, name_or_file(known_clusters())]
Number = Annotated[int | None, Shown(optional=True, type="integer", minimum=1)]
IterationOverrides = Annotated[dict[str, Any] | None, overrides_form()]
RunOverrides = Annotated[dict[str, Any] | None, overrides_form("num_iterations")]
