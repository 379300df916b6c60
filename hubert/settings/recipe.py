"""A recipe: the science of a whole run, read from TOML, merged by iteration, and checked before anything starts.

A recipe is a TOML file (`deployments/recipes/*.toml`) that holds only what differs from the defaults of
`hubert.settings.sections`, which are the paper's. These layers are merged, later ones win:

    PAPER_ITERATIONS[n]  <  the recipe's preset  <  its sections ([train], [kmeans], ...)  <  its n-th [[iterations]] table

A preset (`preset = "fairseq"` in a recipe, or `--set preset=fairseq`) holds what another program does otherwise than the
defaults, as far as these settings can say it: `deployments/recipes/presets/*.toml`.

`Recipe.iteration(n)` gives the merged settings of one iteration.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from hubert.core.errors import ConfigError
from hubert.core.paths import PRESETS
from hubert.settings.sections import (
    SECTIONS,
    ABXSettings,
    DataSettings,
    FeatureSettings,
    KMeansSettings,
    QualitySettings,
    Section,
    TrackingSettings,
    TrainSettings,
    UnitSettings,
    ValidateSettings,
    explain,
    setting,
)

SHARED = ("data",)  # sections that all iterations have in common

PAPER_ITERATIONS: tuple[dict[str, dict[str, Any]], ...] = (
    {"kmeans": {"num_units": 100}, "train": {"steps": 250_000}},
    {"kmeans": {"num_units": 500}, "train": {"steps": 400_000}},
)


class IterationSettings(Section):
    """The merged settings of one iteration."""

    data: DataSettings = DataSettings()
    features: FeatureSettings = FeatureSettings()
    kmeans: KMeansSettings = KMeansSettings()
    units: UnitSettings = UnitSettings()
    train: TrainSettings = TrainSettings()
    validation: ValidateSettings = Field(default=ValidateSettings(), alias="validate")
    abx: ABXSettings = ABXSettings()
    quality: QualitySettings = QualitySettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _size_exists(self) -> Self:
        from hubert.settings.model import SIZES, ModelConfig  # kept out of the import of every CLI call

        config = SIZES[self.train.size].model_dump() | self.train.model
        ModelConfig.model_validate(config)
        return self


class Recipe(Section):
    """A whole run: the number of iterations, shared sections, and what single iterations change."""

    description: str = setting("", "one line that the run form and the report show", affects=False)
    corpus: Literal["", "demo"] = setting("", "corpus that is made on the spot when no data is given", affects=False)
    num_iterations: int = setting(2, "iterations of `hubert-pretraining`", affects=False, ge=1)
    preset: str = setting("", "name of a preset that lies under the sections", affects=False)
    # Read when the recipe is, so that a run which goes on does not look the name up again.
    preset_sections: dict[str, dict[str, Any]] = setting({}, "settings of the preset, by section")
    sections: dict[str, dict[str, Any]] = setting({}, "settings of all iterations, by section")
    iterations: tuple[dict[str, dict[str, Any]], ...] = setting((), "what single iterations change, by section")

    def iteration(self, number: int) -> IterationSettings:
        """Return the settings of iteration `number` (from 1); past the last [[iterations]] table the last one holds.

        Raises:
            ConfigError: a section or field does not exist, or values contradict each other; names field and value.
        """
        paper = _at(PAPER_ITERATIONS, number)
        merged = merge(paper, self.preset_sections, self.sections, _at(self.iterations, number))
        try:
            return IterationSettings.model_validate(merged)
        except ValidationError as error:
            raise ConfigError(f"iteration {number} of the recipe: {explain(error)}") from error

    def check_chain(self) -> None:
        """Make sure that all iterations can follow each other: a codebook fits the features of one iteration only.

        Raises:
            ConfigError: two iterations name the same codebook.
        """
        codebooks = [self.iteration(number).kmeans.codebook for number in range(1, self.num_iterations + 1)]
        for number, codebook in enumerate(codebooks[1:], start=2):
            if codebook and codebook in codebooks[: number - 1]:
                raise ConfigError(
                    f"kmeans.codebook = {codebook!r} in iteration {number} and in an earlier one: each iteration clusters other "
                    "features. Name it in the [[iterations]] table that it is for, or run that iteration alone"
                )


def settled_settings(resolved: Mapping[str, Any]) -> IterationSettings:
    """Return the merged settings of an iteration from what was written down of it; older versions wrote the recipe alone.

    Args:
        resolved: content of `resolved.toml`, or what a report says of it.
    """
    if "settings" in resolved:
        return IterationSettings.model_validate(resolved["settings"])
    return Recipe.model_validate(resolved["recipe"]).iteration(resolved["number"])


def _at(tables: tuple[dict[str, dict[str, Any]], ...], number: int) -> dict[str, dict[str, Any]]:
    return tables[min(number, len(tables)) - 1] if tables else {}


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested tables; later ones win, field by field."""
    result: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
            result[name] = merge(result[name], value) if both else value
    return result


def build_recipe(tables: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Build a recipe from parsed TOML and check each of its iterations.

    Raises:
        ConfigError: unknown names or impossible values, with the place.
    """
    tables = dict(tables)
    per_iteration = tuple(tables.pop("iterations", ()))
    for table in per_iteration:
        for name in SHARED:
            if name in table:
                raise ConfigError(
                    f"{where}: [[iterations]] sets {name!r}, but all iterations share it; move it to [{name}] at the top level"
                )
    sections = {name: tables.pop(name) for name in list(tables) if name in SECTIONS}
    if tables.get("preset"):
        tables.setdefault("preset_sections", read_preset(tables["preset"], where=where))
    try:
        recipe = Recipe.model_validate({**tables, "sections": sections, "iterations": per_iteration})
    except ValidationError as error:
        known = ", ".join([*SECTIONS, "description", "corpus", "num_iterations", "preset", "[[iterations]]"])
        raise ConfigError(f"{where}: {explain(error)}. Known names: {known}") from error
    for number in range(1, max(recipe.num_iterations, len(per_iteration)) + 1):
        try:
            recipe.iteration(number)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    return recipe


def read_preset(name: str, *, where: str) -> dict[str, dict[str, Any]]:
    """Read the sections of a preset by its name.

    Raises:
        ConfigError: there is none of that name; names those that there are.
    """
    path = PRESETS / f"{name}.toml"
    known = sorted(other.stem for other in PRESETS.glob("*.toml"))
    if name not in known:
        raise ConfigError(f"{where}: preset = {name!r}: there is no such preset; presets: {', '.join(known)}")
    return tomllib.loads(path.read_text())


def read_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file and lay `overrides` (nested tables, or dotted names as keys) over all iterations.

    Raises:
        ConfigError: the file is missing, not TOML, or fails the checks.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.toml"))) or "none"
        raise ConfigError(f"recipe {path} does not exist; recipes beside it: {known}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {path} is not TOML: {error}") from error
    where = f"{path} with the overrides {dict(overrides)}" if overrides else str(path)
    return build_recipe(apply_overrides(tables, overrides or {}), where=where)


def change_recipe(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """Lay overrides over a recipe that was read before.

    Raises:
        ConfigError: unknown names or impossible values.
    """
    tables = recipe.model_dump(mode="json", exclude={"sections", "iterations"})
    tables |= {**recipe.sections, "iterations": list(recipe.iterations)}
    if "preset" in overrides:
        del tables["preset_sections"]  # of the preset before; without it they are read by the new name
    return build_recipe(apply_overrides(tables, overrides), where="--set")


def apply_overrides(tables: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Lay overrides over a recipe's tables; they win over its [[iterations]] too.

    `{"train": {"steps": 10}}` and `{"train.steps": 10}` mean the same.
    """
    nested: dict[str, Any] = {}
    for name, value in overrides.items():
        head, *rest = name.split(".")
        for part in reversed(rest):
            value = {part: value}  # noqa: PLW2901  (wraps the value once per dot)
        nested = merge(nested, {head: value})
    result = merge(tables, nested)
    sections = {name: value for name, value in nested.items() if name in SECTIONS and name not in SHARED}
    if "iterations" in tables and "iterations" not in nested:
        result["iterations"] = [merge(table, sections) for table in tables["iterations"]]
    return result


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Parse the overrides of a command line, `NAME=VALUE` each; the last one of a name counts.

    Raises:
        ConfigError: one of them has no `=`.
    """
    return dict(parse_override(text) for text in texts)


def parse_override(text: str) -> tuple[str, Any]:
    """Parse `train.steps=500` as a shell gives it; the value is read as TOML, else taken as text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"override {text!r}: expected NAME=VALUE, for instance train.steps=500")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value
