"""What a command on a run goes on with: the recipe, data and teacher that the run was started with, unless told otherwise.

Each start of an iteration, by a command or by a flow, leaves its settings in `<run>/itN/resolved.toml`. A command that
names only the run reads them; `--set`, `--data`, `--teacher` and `--layer` change single things; `--recipe` starts
anew. A new iteration takes recipe and data over from the one before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubert.core.errors import ConfigError
from hubert.core.paths import RunFolder, demo_corpus_folder, find_recipe
from hubert.data.demo.corpus import build_demo_corpus
from hubert.evaluation.checkpoints import FORM
from hubert.features.source import FeatureSource
from hubert.runs.pipeline import Iteration
from hubert.runs.resolve import check_number, resolve, settle_codebook
from hubert.runs.resolved import Resolved
from hubert.settings.recipe import Recipe, apply_overrides, build_recipe, parse_override, read_recipe
from hubert.training.init import settle_init


@dataclass(frozen=True)
class Wishes:
    """What the options of a command ask for; what is empty was not given."""

    run: str
    iteration: int | None = None
    recipe: str = ""
    data: str = ""
    teacher: str = ""
    layer: int | None = None
    overrides: Sequence[str] = ()
    extend: bool = False

    @property
    def change_nothing(self) -> bool:
        """Whether the run's name and number are all that was given."""
        return not (self.recipe or self.data or self.teacher or self.layer is not None or self.overrides)


def settle(wishes: Wishes) -> Resolved:
    """Return what an iteration does, and write it down if anything was asked for.

    The iteration is the newest that was begun, if no number is given.

    Raises:
        ConfigError: the run is new and recipe or data are not given, or something asked for is wrong.
    """
    folder = RunFolder.of(wishes.run)
    begun = [number for number in folder.iterations() if folder.settings(number).exists()]
    number = max(begun, default=1) if wishes.iteration is None else wishes.iteration
    check_number(number)
    before = [other for other in begun if other <= number]
    starts_anew = bool(wishes.recipe and wishes.data)  # then a damaged file is not needed
    remembered = Resolved.load(folder.settings(max(before))) if before and not starts_anew else None
    if remembered is not None and remembered.number == number and wishes.change_nothing:
        return remembered.model_copy(update={"extend": wishes.extend})
    overrides = dict(parse_override(text) for text in wishes.overrides)
    if wishes.recipe:
        name, recipe = wishes.recipe, read_recipe(find_recipe(wishes.recipe), overrides)
    elif remembered is not None:
        name, recipe = remembered.recipe_name, change_recipe(remembered.recipe, overrides)
    else:
        raise ConfigError(
            f"run {wishes.run!r} is new ({folder.root} holds no settings up to iteration {number}), so say what it is: "
            "`--recipe` (a name in deployments/recipes, or a TOML file) and `--data` (a folder of audio)"
        )
    if remembered is not None and remembered.number == number and not wishes.recipe and not wishes.teacher:
        resolved = _change(remembered, recipe, wishes)
    else:
        resolved = resolve(
            wishes.run,
            name,
            wishes.data or (remembered.data if remembered else "") or corpus_of(name, recipe),
            iteration=number,
            teacher=wishes.teacher,
            layer=wishes.layer,
            extend=wishes.extend,
            settings=recipe,
        )
    # `extend` is for one command: a later one must not lengthen a training because this one did.
    resolved.model_copy(update={"extend": False}).remember()
    return resolved


def _change(remembered: Resolved, recipe: Recipe, wishes: Wishes) -> Resolved:
    """Change single things of an iteration that was begun; its teacher stays."""
    source, chosen, chosen_by = FeatureSource(**remembered.source), remembered.chosen, remembered.chosen_by
    if not source.is_mfcc:
        layer = source.layer if wishes.layer is None else wishes.layer
        if layer != source.layer:
            chosen, chosen_by = f"given: layer {layer}", FORM
        features = recipe.iteration(remembered.number).features
        source = FeatureSource.of_layer(Path(source.checkpoint), source.sha256, layer, features, name=source.name)
    elif wishes.layer is not None:
        raise ConfigError(
            f"layer {wishes.layer} was given, but iteration {remembered.number} clusters MFCCs; give `--teacher` too"
        )
    data = Path(wishes.data or remembered.data).expanduser().resolve()
    if not data.exists():
        raise ConfigError(
            f"data {str(data)!r}: expected a folder of audio, an archive or a manifest; it does not exist"
        )
    changes: dict[str, Any] = {"recipe": recipe, "data": str(data), "source": source.record}
    changes |= {"chosen": chosen, "chosen_by": chosen_by}
    settings = recipe.iteration(remembered.number)
    changes["init"] = settle_init(settings.train, remembered.init)
    changes["codebook"] = settle_codebook(settings.kmeans, source, data, remembered.codebook)
    changed = remembered.model_copy(update={**changes, "extend": wishes.extend})
    Iteration(changed).check_paths()
    return changed


def change_recipe(recipe: Recipe, overrides: dict[str, Any]) -> Recipe:
    """Lay overrides over a recipe that was read before.

    Raises:
        ConfigError: unknown names or impossible values.
    """
    tables = recipe.model_dump(mode="json", exclude={"sections", "iterations"})
    tables |= {**recipe.sections, "iterations": list(recipe.iterations)}
    if "preset" in overrides:
        del tables["preset_sections"]  # of the preset before; without it they are read by the new name
    return build_recipe(apply_overrides(tables, overrides), where="--set")


def corpus_of(name: str, recipe: Recipe) -> str:
    """Make the corpus of a recipe that brings its own, and return its folder.

    Raises:
        ConfigError: the recipe needs data from outside.
    """
    if recipe.corpus != "demo":
        raise ConfigError(f"recipe {name!r} needs `--data`: a folder of audio, an archive or a manifest")
    return str(build_demo_corpus(demo_corpus_folder()))
