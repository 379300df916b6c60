"""The record of each validated checkpoint of an iteration, `<run>/itN/checkpoints.json`, and the choice of one as teacher.

A record holds the losses, what was measured of the layers, and the layer that would be clustered. MLflow, the report,
Prefect's pages and form, and `checkpoints.csv` show columns of it (`hubert.evaluation.columns`). The service takes the
checkpoint of `outcome.json`; a person may take any. `Pick` is what was taken, and why.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from hubert.core.errors import ConfigError
from hubert.core.files import read_json, rename, write_record
from hubert.core.paths import RunFolder, runs_root
from hubert.evaluation.choice import Outcome, choose_layer, read_outcome

RUN_CHECKPOINT = re.compile(r"(?P<run>.+)/it(?P<number>[1-9]\d*)(/step-(?P<step>\d+))?/?")
SERVICE, FORM, ANSWER, ALIAS = "service", "form", "answer", "alias"  # who chose; `Pick.by`


class LayerScores(BaseModel):
    """What was measured of a layer of a checkpoint; None: it was not. ABX error rates are the reported ones, in per cent."""

    model_config = ConfigDict(frozen=True)

    layer: int
    abx_within: float | None = Field(None, validation_alias=AliasChoices("abx_within", "within"))
    abx_across: float | None = Field(None, validation_alias=AliasChoices("abx_across", "across"))
    pnmi: float | None = None


class Checkpoint(BaseModel):
    """A validated checkpoint.

    Losses are in nats, accuracies are shares. `layer` is the one that would be clustered and `why` the rule that chose it;
    None while the iteration has no outcome. Files of older versions have some of the losses only.
    """

    model_config = ConfigDict(frozen=True)

    step: int
    checkpoint: str
    sha256: str
    num_layers: int
    validation_loss: float
    masked_accuracy: float | None = None
    unmasked_loss: float | None = None
    unmasked_accuracy: float | None = None
    prediction_perplexity: float | None = None
    feature_penalty: float | None = None
    layer: int | None = None
    why: str = ""
    layers: tuple[LayerScores, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, content: Any) -> Any:
        """Take the rows of older versions: of checkpoints.json, and of report.json with one scored layer in columns."""
        if not isinstance(content, Mapping):
            return content
        row: dict[str, Any] = rename(dict(content))
        if "path" in row:
            row["checkpoint"] = row.pop("path")
        if layer := row.pop("abx_layer", None):
            scores = {"layer": layer, "abx_within": row.pop("abx_within"), "abx_across": row.pop("abx_across")}
            row |= {"layer": layer, "layers": [scores]}
        return row

    @property
    def best_layer(self) -> LayerScores | None:
        """The scores of `layer`, if it was scored."""
        return next((scores for scores in self.layers if scores.layer == self.layer), None)

    @property
    def abx_within(self) -> float | None:
        """The ABX error rate within speaker of `layer`, in per cent."""
        return None if self.best_layer is None else self.best_layer.abx_within

    @property
    def abx_across(self) -> float | None:
        """The ABX error rate across speakers of `layer`, in per cent."""
        return None if self.best_layer is None else self.best_layer.abx_across

    @property
    def pnmi(self) -> float | None:
        """The PNMI of units clustered on `layer`."""
        return None if self.best_layer is None else self.best_layer.pnmi

    @property
    def name(self) -> str:
        """The folder's name, such as step-00000400."""
        return Path(self.checkpoint).name


@dataclass(frozen=True)
class Pick:
    """A checkpoint and a layer to cluster: what it is in plain words, who chose it, and why this layer."""

    checkpoint: str
    sha256: str
    layer: int
    what: str
    by: str
    layer_why: str = ""
    name: str = ""

    @property
    def why(self) -> str:
        """One sentence for people."""
        reason = f": {self.layer_why}" if self.layer_why else ""
        return f"{self.what}; layer {self.layer}{reason}"

    def with_layer(self, layer: int | None) -> "Pick":
        """Return the same checkpoint with a layer that a person gave; None: as it is."""
        return self if layer in (None, self.layer) else replace(self, layer=layer, layer_why="as was given")


def build_checkpoints(
    outcome: Outcome | None,
    validated: Sequence[Mapping[str, Any]],
    abx: Sequence[Mapping[str, Any]],
    quality: Sequence[Mapping[str, Any]],
) -> list[Checkpoint]:
    """Return the checkpoints of an iteration, by step.

    A checkpoint whose layers were not scored gets the layer that was chosen for the best one: they are of one training.

    Args:
        outcome: what the iteration ends with; None: it is not finished.
        validated: the rows of the validate stage.
        abx: the rows of the ABX stage; empty without one.
        quality: the layers that the quality stage measured, of the checkpoint of `outcome`; empty without one.
    """
    best = None if outcome is None else outcome.step
    records = (_record(row, outcome, abx, quality if row["step"] == best else []) for row in validated)
    return sorted(records, key=lambda record: record.step)


def _record(
    row: Mapping[str, Any],
    outcome: Outcome | None,
    abx: Sequence[Mapping[str, Any]],
    quality: Sequence[Mapping[str, Any]],
) -> Checkpoint:
    scored = [one for one in abx if one["layer"] and one["step"] == row["step"]]
    layer, why = None, ""
    if outcome is not None and row["step"] == outcome.step:
        layer, why = outcome.layer, outcome.why
    elif outcome is not None and scored:
        layer, _, why = choose_layer(outcome.iteration, row, {"rows": scored}, None)
    elif outcome is not None:
        layer, why = outcome.layer, f"its layers were not scored; as for step {outcome.step}: {outcome.why}"
    rates = {one["layer"]: one["reported"] for one in scored}  # what chooses may be other items: `selection`
    pnmi = {one["layer"]: one["pnmi"] for one in quality if one["layer"]}
    layers = [
        {"layer": number, "pnmi": pnmi.get(number), **rates.get(number, {})} for number in sorted({*rates, *pnmi})
    ]
    return Checkpoint.model_validate({**row, "layer": layer, "why": why, "layers": layers})


def save_checkpoints(folder: RunFolder, number: int, checkpoints: Sequence[Checkpoint]) -> None:
    """Write the checkpoints of an iteration; the newest ones count."""
    write_record(folder.checkpoints(number), {"checkpoints": [one.model_dump(mode="json") for one in checkpoints]})


def read_checkpoints(folder: RunFolder, number: int) -> list[Checkpoint]:
    """Return the checkpoints of an iteration.

    Raises:
        ConfigError: it has none: it is not finished, or was by a version of this project that did not write them.
    """
    content = read_json(folder.checkpoints(number))
    if content is None:
        raise ConfigError(
            f"iteration {number} of {folder.root} offers no checkpoints: {folder.checkpoints(number).name} is missing or "
            f"damaged. Likely cause: it is not finished. Fix: run iteration {number} to its end (what is done is not done again) "
            f"or give the path of a checkpoint as `teacher`, and `layer`"
        )
    rows = (Checkpoint.model_validate(row) for row in content["checkpoints"])
    return [row.model_copy(update={"checkpoint": folder.own(row.checkpoint)}) for row in rows]


def default_pick(folder: RunFolder, number: int) -> Pick:
    """Return what the service chose at the end of an iteration.

    Raises:
        ConfigError: it is not finished.
    """
    outcome = read_outcome(folder, number)
    if outcome is None:
        raise ConfigError(
            f"iteration {number} of {folder.root} has chosen no checkpoint yet: it is not finished; run iteration {number} "
            "first, or give `teacher` and `layer`"
        )
    what = f"step {outcome.step} of iteration {number}, its lowest validation loss"
    return Pick(outcome.checkpoint, outcome.sha256, outcome.layer, what, SERVICE, outcome.why)


def pick_of(checkpoint: Checkpoint, number: int, by: str, what: str = "") -> Pick:
    """Return a checkpoint of iteration `number` as somebody's choice; `what` says it in other words.

    Raises:
        ConfigError: no layer of it was chosen, as the iteration is not finished.
    """
    words = what or f"step {checkpoint.step} of iteration {number}"
    if checkpoint.layer is None:
        raise ConfigError(f"{words} has no layer to cluster yet: run iteration {number} to its end, or give `layer`")
    return Pick(checkpoint.checkpoint, checkpoint.sha256, checkpoint.layer, words, by, checkpoint.why)


def find_run_checkpoint(teacher: str) -> Pick | None:
    """Look up `RUN/it1` (what that iteration chose) or `RUN/it1/step-00000400` (any checkpoint that it validated).

    Returns:
        The checkpoint and its layer; None if the name is another kind of name, or there is no such run.

    Raises:
        ConfigError: the run is there, and the iteration or the step is not; names those that are.
    """
    found = RUN_CHECKPOINT.fullmatch(teacher)
    if found is None:
        return None
    try:
        folder = RunFolder.of(found["run"])
    except ConfigError:
        return None
    if not folder.iterations():
        if found["step"] is None:
            return None  # perhaps a model of that name on the Hub
        known = ", ".join(sorted(path.name for path in runs_root().glob("*/") if any(path.glob("it*")))) or "none"
        raise ConfigError(f"teacher {teacher!r}: there is no run {folder.root}; runs in {runs_root()}: {known}")
    number = int(found["number"])
    if number not in folder.iterations():
        known = ", ".join(f"it{other}" for other in folder.iterations())
        raise ConfigError(f"teacher {teacher!r}: the run {folder.root} has no iteration {number}; it has {known}")
    if found["step"] is None:
        return replace(default_pick(folder, number), by=FORM, name=f"{folder.name}/it{number}")
    checkpoints = read_checkpoints(folder, number)
    for one in checkpoints:
        if one.step == int(found["step"]):
            return replace(pick_of(one, number, FORM), name=f"{folder.name}/it{number}/{one.name}")
    known = ", ".join(one.name for one in checkpoints)
    raise ConfigError(f"teacher {teacher!r}: that iteration validated no checkpoint of this step; there are {known}")
