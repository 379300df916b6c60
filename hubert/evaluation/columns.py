"""The figures that tables show: key, label, unit and number format of each, once for every file, page and service.

A table is a choice of keys. What is projected from a row: text for a person, a number for a spreadsheet.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubert.core.text import value


@dataclass(frozen=True)
class Column:
    """One figure.

    `key` is its name in files and in MLflow; `scale` turns what is stored into `unit`; `digits` are the decimals shown,
    None: as many as `hubert.core.text.value` gives.
    """

    key: str
    label: str
    unit: str = ""
    digits: int | None = None
    scale: float = 1.0

    @property
    def title(self) -> str:
        """The column's head: label and unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def read(self, row: Any) -> Any:
        """Return the stored figure of a row (a mapping or an object); None if it was not measured."""
        return row.get(self.key) if isinstance(row, Mapping) else getattr(row, self.key, None)

    def number(self, row: Any) -> Any:
        """Return the figure in `unit`, rounded to `digits`; None if it was not measured."""
        found = self.read(row)
        return found if found is None or self.digits is None else round(self.scale * found, self.digits)

    def text(self, row: Any, *, absent: str = "-") -> str:
        """Write the figure in `unit`, without the unit."""
        found = self.read(row)
        if found is None or self.digits is None:
            return value(found, absent=absent)
        return f"{self.scale * found:,.{self.digits}f}"


def _share(key: str, label: str) -> Column:
    return Column(key, label, "%", 1, scale=100.0)


COLUMNS = {
    column.key: column
    for column in (
        Column("step", "step"),
        Column("validation_loss", "validation loss", "nats", 3),
        Column("unigram_entropy", "unigram entropy", "nats", 3),
        Column("unmasked_loss", "unmasked loss", "nats", 3),
        _share("masked_accuracy", "masked accuracy"),
        _share("majority_accuracy", "accuracy of the most frequent unit"),
        _share("unmasked_accuracy", "unmasked accuracy"),
        Column("prediction_perplexity", "prediction perplexity", "units", 1),
        Column("feature_penalty", "feature penalty"),
        Column("layer", "layer"),
        Column("abx_within", "ABX within", "%", 2),
        Column("abx_across", "ABX across", "%", 2),
        Column("selection_across", "ABX across, choosing", "%", 2),
        Column("num_items", "items"),
        Column("num_cells", "cells"),
        Column("pnmi", "PNMI", "", 3),
        Column("phone_purity", "phone purity", "", 3),
        Column("cluster_purity", "cluster purity", "", 3),
        Column("pnmi_units", "clusters"),
        Column("num_unused_units", "unused units"),
        Column("majority_unit", "most frequent unit"),
        _share("majority_share", "share of the most frequent unit"),
        Column("usage_perplexity", "usage perplexity", "units"),
        Column("mean_run_length", "mean run length", "frames", 2),
        Column("mean_phone_length", "mean phone length", "frames", 2),
        Column("mean_unit_length", "mean unit length", "frames", 2),
        Column("mean_squared_distance", "mean squared distance of a frame from its unit"),
        Column("num_overrun_files", "files whose alignment outlasts their units"),
        Column("num_unaligned_frames", "frames without a phone"),
        Column("mutual_information", "mutual information", "nats", 3),
        Column("phone_entropy", "phone entropy", "nats", 3),
        Column("unit_entropy", "unit entropy", "nats", 3),
        Column("phone_entropy_given_unit", "phone entropy given the unit", "nats", 3),
        Column("unit_entropy_given_phone", "unit entropy given the phone", "nats", 3),
        Column("unit_nmi", "unit NMI", "", 3),
    )
}

VALIDATION = (
    "validation_loss",
    "masked_accuracy",
    "unmasked_loss",
    "unmasked_accuracy",
    "prediction_perplexity",
    "feature_penalty",
)
CHECKPOINT = ("step", *VALIDATION, "layer", "abx_within", "abx_across", "pnmi")
CHECKPOINT_IN_BRIEF = ("step", "validation_loss", "masked_accuracy", "layer", "abx_within", "abx_across")
LAYER_SCORES = ("abx_within", "abx_across", "pnmi")
LAYER = (
    "abx_within",
    "abx_across",
    "selection_across",
    "num_items",
    "num_cells",
    "pnmi",
    "phone_purity",
    "cluster_purity",
    "pnmi_units",
)

# MFCC beside the iterations: heads that span columns, and below each the label and the key of its columns.
COMPARISON: tuple[tuple[str, dict[str, str]], ...] = (
    ("ABX error (%)", {"within": "abx_within", "across": "abx_across"}),
    ("PNMI", {"": "pnmi"}),
    ("validation loss (nats)", {"model": "validation_loss", "unigram entropy": "unigram_entropy"}),
    ("masked accuracy (%)", {"model": "masked_accuracy", "most frequent unit": "majority_accuracy"}),
)

_ABBREVIATIONS = {"pnmi": "PNMI", "nmi": "NMI", "abx": "ABX", "mfcc": "MFCC", "num": "number of"}


def column(key: str) -> Column:
    """Return the column of a figure; one that is not listed is shown as it is: `num_files` as `number of files`."""
    return COLUMNS.get(key) or Column(key, " ".join(_ABBREVIATIONS.get(word, word) for word in key.split("_")))


def header(keys: Sequence[str]) -> list[str]:
    """Return the heads of columns."""
    return [column(key).title for key in keys]


def cells(keys: Sequence[str], row: Any) -> list[str]:
    """Write the figures of a row."""
    return [column(key).text(row) for key in keys]


def describe(keys: Sequence[str], row: Any, *, label: bool = True) -> str:
    """Write those figures of a row that were measured as a phrase: `ABX across 20.00 %, PNMI 0.200`."""
    measured = [column(key) for key in keys if column(key).read(row) is not None]
    return ", ".join(f"{one.label * label} {one.text(row)} {one.unit}".strip() for one in measured)


def write_csv(path: Path, keys: Sequence[str], rows: Sequence[Any]) -> Path:
    """Write rows as numbers under their heads; what was not measured is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header(keys))
        writer.writerows([column(key).number(row) for key in keys] for row in rows)
    return path
