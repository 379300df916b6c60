"""What a command, a form or `prefect deployment run` asks of a run, before anything of it is looked up."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
