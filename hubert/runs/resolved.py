"""What one iteration will do, as it is written down: settings, features, starting weights, codebook."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError, field_serializer, model_validator

from hubert.core.errors import ConfigError, DataError
from hubert.core.files import atomic_write, seal, unseal, write_record
from hubert.core.paths import RunFolder
from hubert.evaluation.checkpoints import SERVICE
from hubert.features.source import FeatureSource
from hubert.settings.recipe import IterationSettings, Recipe, settled_settings
from hubert.settings.sections import Section, explain
from hubert.training.init import InitialWeights
from hubert.units.codebook import GivenCodebook

SAY_AGAIN = "Fix: say `--recipe R --data D` as at the start; what was done with the same settings is found again"


class Resolved(Section):
    """What one iteration of a run will do: nothing is merged or looked up again after this.

    `settings` are the merged ones of this iteration. `recipe` stays beside them, as later options change it and the next
    iteration takes it over.
    """

    run: str
    number: int
    data: str
    recipe: Recipe
    recipe_name: str
    settings: IterationSettings
    source: FeatureSource
    chosen: str
    chosen_by: str = SERVICE
    init: InitialWeights | None = None
    codebook: GivenCodebook | None = None
    extend: bool = False

    @model_validator(mode="before")
    @classmethod
    def _read_older_layout(cls, content: Any) -> Any:
        """Fill in what older versions did not write: the merged settings. They wrote empty tables for None."""
        if not isinstance(content, Mapping):
            return content
        content = {**content, "init": content.get("init") or None, "codebook": content.get("codebook") or None}
        return content | {"settings": settled_settings(content)}

    @field_serializer("settings")
    def _differing(self, settings: IterationSettings) -> dict[str, Any]:
        """Write what differs from the defaults: a file with all of them would not survive the removal of a setting."""
        return settings.model_dump(mode="json", by_alias=True, exclude_defaults=True)

    def save(self, path: Path) -> None:
        """Write the content as TOML."""
        content = seal(self.model_dump(mode="json", exclude_none=True))
        with atomic_write(path) as temporary:
            temporary.write_text(tomli_w.dumps(content))

    def remember(self) -> None:
        """Write down in the run's folder what this iteration does, and what it starts from.

        `extend` is for one start: a later one must not lengthen a training because this one did.
        """
        folder = RunFolder(Path(self.run))
        self.model_copy(update={"extend": False}).save(folder.settings(self.number))
        choice = {"source": self.source.record, "why": self.chosen, "by": self.chosen_by}
        write_record(folder.choice(self.number), choice)

    @classmethod
    def load(cls, path: Path) -> "Resolved":
        """Read what `save` wrote, `<run>/itN/resolved.toml` or `<run>/resolved/<attempt>.toml`, wherever the run lies now.

        Raises:
            DataError: the file is missing, damaged, edited, or of a version that had other settings.
        """
        return cls.of(read_settings(path), path.absolute().parents[1])

    @classmethod
    def of(cls, content: Mapping[str, Any], root: Path) -> "Resolved":
        """Return settings that were written down in a run whose folder is `root` now.

        Raises:
            DataError: they are not those of an iteration.
        """
        try:
            return cls.model_validate(relocate(content, root))
        except (ValidationError, ConfigError, KeyError, TypeError) as error:
            reason = explain(error) if isinstance(error, ValidationError) else str(error)
            reason = f"no {error}" if isinstance(error, KeyError) else reason
            raise DataError(
                f"the settings of an iteration in {root} cannot be read ({reason}). Likely cause: another version wrote them. "
                f"{SAY_AGAIN}"
            ) from error


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings of an iteration as plain values, unchecked.

    Raises:
        DataError: the file is missing, or is not what `Resolved.save` wrote.
    """
    try:
        content = unseal(tomllib.loads(path.read_text()))
    except (FileNotFoundError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        content = None
    if not content:
        raise DataError(
            f"{path} is not what was written: it is missing, damaged, or was edited (settings are changed with `--set`). "
            f"{SAY_AGAIN}"
        )
    return content


def relocate(content: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Return settings with the paths inside their run as they are now that its folder is `root`."""
    old, new = str(content.get("run", root)), str(root)

    def moved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: moved(inner) for name, inner in value.items()}
        return f"{new}{value[len(old) :]}" if isinstance(value, str) and value.startswith(f"{old}/") else value

    places = {name: moved(content[name]) for name in ("source", "init", "codebook") if name in content}
    return {**content, **places, "run": new}
