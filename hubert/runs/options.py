"""What a command, a form or `prefect deployment run` asks of a run, and what the run's own settings add to it.

What is given anew wins; what is not given is taken from the newest `resolved.toml` up to the iteration.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubert.core.errors import ConfigError, DataError
from hubert.core.paths import RunFolder, demo_corpus_folder, find_recipe
from hubert.settings.recipe import Recipe, change_recipe, read_recipe

if TYPE_CHECKING:
    from hubert.runs.resolved import Resolved


@dataclass(frozen=True)
class RunOptions:
    """What is asked of a run; what is empty was not given, and `hubert.runs.resolve` takes it from the run's own settings.

    Attributes:
        run: name or path of the run.
        iteration: number from 1; None: the newest that was begun.
        recipe: name or path of the recipe; starts the settings anew.
        data: folder of audio, archive or manifest; empty for a new run: the corpus that the recipe makes.
        teacher: checkpoint whose layer is clustered: `RUN/it1`, `RUN/it1/step-00000400`, its folder or file, a Hugging Face
            id or a URL; empty: the previous iteration's outcome (MFCC in iteration 1). With one, no earlier iteration is
            needed.
        layer: layer of the teacher, from 1; None: the one that the teacher's run chose.
        overrides: settings that win over the recipe, as nested tables or by dotted names.
        extend: continue a finished training to more steps.
    """

    run: str
    iteration: int | None = None
    recipe: str = ""
    data: str = ""
    teacher: str = ""
    layer: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    extend: bool = False

    @property
    def changes_nothing(self) -> bool:
        """Whether the run, the iteration and `extend` are all that was given."""
        return not (self.recipe or self.data or self.teacher or self.layer is not None or self.overrides)


def find_settings(options: RunOptions) -> "tuple[int, Resolved | None]":
    """Return the number of the iteration that the options mean, and the newest settings up to it; None for a new run.

    Raises:
        ConfigError: the number is below 1.
        DataError: the settings are damaged, and recipe and data are not both given.
    """
    folder = RunFolder.of(options.run)
    begun = [number for number in folder.iterations() if folder.settings(number).exists()]
    number = max(begun, default=1) if options.iteration is None else options.iteration
    if number < 1:
        raise ConfigError(f"iteration {number}: iterations count from 1")
    newest = max((other for other in begun if other <= number), default=None)
    if newest is None:
        return number, None
    from hubert.runs.resolved import Resolved  # imports torch, which a new run's check does without

    try:
        return number, Resolved.load(folder.settings(newest))
    except DataError:
        if not (options.recipe and options.data):
            raise
        return number, None  # all of it is given anew, so a damaged file is not needed


def read_request(options: RunOptions) -> tuple[str, Recipe, Path | None]:
    """Return the name of the recipe, its content with the overrides, and where the data are.

    The place is None where the recipe brings its own corpus, which is made when the run starts.

    Raises:
        ConfigError: recipe or data are missing or wrong, or a new run does not name them.
    """
    number, before = find_settings(options)
    if options.recipe:
        name, recipe = options.recipe, read_recipe(find_recipe(options.recipe), options.overrides)
    elif before is not None:
        name, recipe = before.recipe_name, change_recipe(before.recipe, options.overrides)
    else:
        raise ConfigError(
            f"run {options.run!r} is new ({RunFolder.of(options.run).root} holds no settings up to iteration {number}), so say "
            "what it is: `--recipe` (a name in deployments/recipes, or a TOML file) and `--data` (a folder of audio)"
        )
    own = demo_corpus_folder()
    data = options.data or (before.data if before else "")
    if recipe.corpus == "demo" and not options.data and Path(data or own).name == own.name:
        return name, recipe, None
    if not data:
        raise ConfigError(f"recipe {name!r} needs `data` (`--data`): a folder of audio, an archive or a manifest")
    location = Path(data).expanduser().resolve()
    if not location.exists():
        raise ConfigError(
            f"data {data!r}: expected a folder of audio, an archive or a manifest; {location} does not exist"
        )
    return name, recipe, location
