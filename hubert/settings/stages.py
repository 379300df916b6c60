"""The stages of an iteration in their order: what each one needs, which settings it reads, and what leaves it out.

The order stands here alone. The command line, `hubert status`, the report and `hubert rebuild` read it; `--help` does so
without importing torch, so this module imports nothing of the project.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StageEntry:
    """One stage of an iteration.

    Attributes:
        needs: the stages that must be finished before.
        sections: sections of the recipe that it reads, for `--help`.
        description: what it does, for `--help`.
        setting: the setting that names its input, such as `abx.item`: where it is empty, the iteration has no such stage.
    """

    needs: tuple[str, ...]
    sections: tuple[str, ...]
    description: str
    setting: str = ""

    def is_in(self, settings: Any) -> bool:
        """Return whether an iteration with these settings (`IterationSettings`) has the stage."""
        section, _, name = self.setting.partition(".")
        return not self.setting or bool(getattr(getattr(settings, section), name))


STAGES: Mapping[str, StageEntry] = {
    "manifest": StageEntry((), ("data",), "list the audio, check every file, hold validation out"),
    "features": StageEntry(
        ("manifest",), ("features", "kmeans"), "compute the frames that are clustered: MFCC, or a layer of the teacher"
    ),
    "kmeans": StageEntry(("features",), ("kmeans",), "fit the codebook on the sampled frames"),
    "units": StageEntry(("kmeans",), ("units", "features"), "label every file with the nearest centroid of each frame"),
    "train": StageEntry(("units",), ("train",), "train the model to predict the units of masked spans"),
    "validate": StageEntry(("train",), ("validate",), "score every checkpoint on the same crops and masks"),
    "abx": StageEntry(
        ("validate",), ("abx",), "score the layers by ABX error rates, and MFCC beside them", setting="abx.item"
    ),
    "quality": StageEntry(
        ("validate",), ("quality",), "compare the units with phones: purity and PNMI", setting="quality.alignments"
    ),
    "report": StageEntry(
        ("abx", "quality"), (), "choose checkpoint and layer; with RUN alone, write all pages of the run again"
    ),
}
EVALUATED = tuple(name for name in STAGES if name != "report")  # what the report shows
# The audio of the optional stages has manifests of its own, in properties of `Iteration` with these names.
EXTRA_MANIFESTS = {name: f"{name}_manifest" for name, entry in STAGES.items() if entry.setting}
