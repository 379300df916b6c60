"""What an iteration ends with: the checkpoint and the layer that the next one starts from, and the rule that chose.

Checkpoint: the lowest masked cross-entropy on validation. Layer: the lowest ABX error across speakers; without an item
file the highest PNMI; without alignments the paper's layer (section IV-C: 6 of 12 after the first iteration, 9 of 12
after the second).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hubert.core.files import read_json, write_record
from hubert.core.paths import RunFolder

MFCC = 0  # the "layer" of the MFCC baseline in tables of layers


@dataclass(frozen=True)
class Outcome:
    """Checkpoint and layer of an iteration, and why."""

    iteration: int
    checkpoint: str
    sha256: str
    step: int
    layer: int
    rule: str
    why: str

    @classmethod
    def choose(
        cls, *, number: int, best: Mapping[str, Any], abx: Mapping[str, Any] | None, quality: Mapping[str, Any] | None
    ) -> "Outcome":
        """Choose by the first rule whose measurements exist."""
        layer, rule, why = choose_layer(number, best, abx, quality)
        return cls(number, best["path"], best["sha256"], best["step"], layer, rule, why)

    def save(self, folder: RunFolder) -> None:
        """Write the outcome; the newest one counts."""
        write_record(folder.outcome(self.iteration), asdict(self))


def choose_layer(
    number: int, best: Mapping[str, Any], abx: Mapping[str, Any] | None, quality: Mapping[str, Any] | None
) -> tuple[int, str, str]:
    """Return layer (from 1), rule, and one sentence that says why."""
    if abx is not None:
        rows = [row for row in abx["rows"] if row["step"] == best["step"] and row["layer"]]
        row = min(rows, key=lambda row: (row["selection"]["across"], row["layer"]))
        score = row["selection"]["across"]
        return (
            row["layer"],
            "abx",
            f"lowest ABX across speakers of {len(rows)} layers on {row['selection']['items']}: {score:.2f} %",
        )
    if quality is not None and quality.get("layers"):
        rows = [row for row in quality["layers"] if row["layer"] != MFCC]  # which stands there for comparison
        row = max(rows, key=lambda row: (row["pnmi"], -row["layer"]))
        why = f"highest PNMI of {len(rows)} layers: {row['pnmi']:.3f} (no ABX items were given)"
        return row["layer"], "pnmi", why
    depth = int(best["num_layers"])
    share = 0.5 if number == 1 else 0.75
    layer = max(1, round(depth * share))
    return layer, "paper", f"the paper's layer ({share:.0%} of {depth}): neither ABX items nor alignments were given"


def read_outcome(folder: RunFolder, number: int) -> Outcome | None:
    """Return the outcome of an iteration; None if it is not finished."""
    content = read_json(folder.outcome(number))
    return None if content is None else Outcome(**{**content, "checkpoint": folder.own(content["checkpoint"])})
