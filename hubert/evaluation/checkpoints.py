"""The checkpoints that an iteration offers to the next one: `<run>/itN/checkpoints.json`, and who asks for one of them.

Each validated checkpoint stands there with its losses, what was measured of its layers, and the layer that would be
clustered. The service takes the one of `outcome.json`; a person may take any. `Pick` is what was taken, and why.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from hubert.core.errors import ConfigError
from hubert.core.files import read_json, write_json
from hubert.core.paths import RunFolder, runs_root
from hubert.evaluation.choice import Outcome, choose_layer, read_outcome

RUN_CHECKPOINT = re.compile(r"(?P<run>.+)/it(?P<number>[1-9]\d*)(/step-(?P<step>\d+))?/?")
SERVICE, FORM, ANSWER, ALIAS = "service", "form", "answer", "alias"  # who chose; `Pick.by`


@dataclass(frozen=True)
class LayerScores:
    """What was measured of a layer of a checkpoint; None: it was not. ABX error rates in per cent, as the report has them."""

    layer: int
    within: float | None = None
    across: float | None = None
    pnmi: float | None = None


@dataclass(frozen=True)
class Candidate:
    """A validated checkpoint; `layer` is the one that would be clustered, `why` says by which rule."""

    step: int
    checkpoint: str
    sha256: str
    num_layers: int
    masked_loss: float
    masked_accuracy: float
    layer: int
    why: str
    layers: tuple[LayerScores, ...] = ()

    @property
    def best_layer(self) -> LayerScores | None:
        """The scores of `layer`, if it was scored."""
        return next((scores for scores in self.layers if scores.layer == self.layer), None)

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


def list_candidates(
    outcome: Outcome,
    validated: Sequence[Mapping[str, Any]],
    abx: Sequence[Mapping[str, Any]],
    quality: Sequence[Mapping[str, Any]],
) -> list[Candidate]:
    """Return the candidates of an iteration, one per validated checkpoint, by step.

    A checkpoint whose layers were not scored gets the layer that was chosen for the best one: they are of one training.

    Args:
        outcome: what the iteration ends with.
        validated: the rows of the validate stage.
        abx: the rows of the ABX stage; empty without one.
        quality: the layers that the quality stage measured, of the checkpoint of `outcome`; empty without one.
    """
    return [_candidate(row, outcome, abx, quality if row["step"] == outcome.step else []) for row in validated]


def _candidate(
    row: Mapping[str, Any], outcome: Outcome, abx: Sequence[Mapping[str, Any]], quality: Sequence[Mapping[str, Any]]
) -> Candidate:
    scored = [one for one in abx if one["layer"] and one["step"] == row["step"]]
    layer, why = outcome.layer, outcome.why
    if row["step"] != outcome.step:
        if scored:
            layer, _, why = choose_layer(outcome.iteration, row, {"rows": scored}, None)
        else:
            why = f"its layers were not scored; as for step {outcome.step}: {outcome.why}"
    rates = {one["layer"]: one["reported"] for one in scored}  # what chooses may be other items: `selection`
    pnmi = {one["layer"]: one["pnmi"] for one in quality if one["layer"]}
    scores = (
        LayerScores(number, rates.get(number, {}).get("within"), rates.get(number, {}).get("across"), pnmi.get(number))
        for number in sorted({*rates, *pnmi})
    )
    return Candidate(
        step=row["step"],
        checkpoint=row["path"],
        sha256=row["sha256"],
        num_layers=row["num_layers"],
        masked_loss=row["masked_loss"],
        masked_accuracy=row["masked_accuracy"],
        layer=layer,
        why=why,
        layers=tuple(scores),
    )


def save_candidates(folder: RunFolder, number: int, candidates: Sequence[Candidate]) -> None:
    """Write the candidates of an iteration; the newest ones count."""
    write_json(folder.candidates(number), {"checkpoints": [asdict(candidate) for candidate in candidates]})


def write_comparison(candidates: Sequence[Candidate], path: Path) -> Path:
    """Write losses and best layers of all candidates as CSV; a spreadsheet, or MLflow's page of the file, sorts them."""
    best = [one.best_layer for one in candidates]
    columns = {
        "step": [one.step for one in candidates],
        "validation loss (nats)": [round(one.masked_loss, 4) for one in candidates],
        "masked accuracy (%)": [round(100 * one.masked_accuracy, 2) for one in candidates],
        "ABX across (%)": [layer and layer.across and round(layer.across, 2) for layer in best],
        "ABX within (%)": [layer and layer.within and round(layer.within, 2) for layer in best],
        "layer that suits": [one.layer for one in candidates],
    }
    pl.DataFrame(columns).write_csv(path)
    return path


def read_candidates(folder: RunFolder, number: int) -> list[Candidate]:
    """Return the candidates of an iteration.

    Raises:
        ConfigError: it has none: it is not finished, or was by a version of this project that did not write them.
    """
    content = read_json(folder.candidates(number))
    if content is None:
        raise ConfigError(
            f"iteration {number} of {folder.root} offers no checkpoints: {folder.candidates(number).name} is missing there. "
            f"Likely cause: it is not finished. Fix: run iteration {number} to its end (what is done is not done again), or "
            f"give the path of a checkpoint as `teacher`, and `layer`"
        )
    rows = content["checkpoints"]
    return [Candidate(**{**row, "layers": tuple(LayerScores(**scores) for scores in row["layers"])}) for row in rows]


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


def pick_of(candidate: Candidate, number: int, by: str, what: str = "") -> Pick:
    """Return a candidate of iteration `number` as somebody's choice; `what` says it in other words."""
    words = what or f"step {candidate.step} of iteration {number}"
    return Pick(candidate.checkpoint, candidate.sha256, candidate.layer, words, by, candidate.why)


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
    candidates = read_candidates(folder, number)
    for candidate in candidates:
        if candidate.step == int(found["step"]):
            return replace(pick_of(candidate, number, FORM), name=f"{folder.name}/it{number}/{candidate.name}")
    known = ", ".join(candidate.name for candidate in candidates)
    raise ConfigError(f"teacher {teacher!r}: that iteration validated no checkpoint of this step; there are {known}")
