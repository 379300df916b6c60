"""What one iteration will do, as it is written down: settings, teacher, starting weights, codebook."""

import tomllib
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import Field

from hubert.core.files import atomic_write, write_json
from hubert.core.paths import RunFolder
from hubert.evaluation.checkpoints import SERVICE
from hubert.settings.recipe import Recipe
from hubert.settings.sections import Section


class Resolved(Section):
    """What one iteration of a run will do: nothing is looked up again after this."""

    run: str
    number: int
    data: str
    recipe: Recipe
    recipe_name: str
    source: dict[str, Any]
    chosen: str
    chosen_by: str = SERVICE
    init: dict[str, Any] = Field(default_factory=dict)
    codebook: dict[str, str] = Field(default_factory=dict)
    extend: bool = False

    def save(self, path: Path) -> None:
        """Write the settings as TOML."""
        content = self.model_dump(mode="json", exclude_none=True)
        with atomic_write(path) as temporary:
            temporary.write_text(tomli_w.dumps(content))

    def remember(self) -> None:
        """Write down in the run's folder what this iteration does, and what it starts from."""
        folder = RunFolder(Path(self.run))
        self.save(folder.settings(self.number))
        choice = {"source": self.source, "why": self.chosen, "by": self.chosen_by}
        write_json(folder.choice(self.number), choice)

    @classmethod
    def load(cls, path: Path) -> "Resolved":
        """Read what `save` wrote."""
        return cls.model_validate(tomllib.loads(path.read_text()))
