"""The plots of a report, and the figures that each one is drawn from. A plot without data is left out."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hubert.core.files import read_json
from hubert.report.facts.collect import unit_usage
from hubert.report.facts.phone_order import order_phones
from hubert.report.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SERIES,
    Curve,
    Level,
    Plot,
    heat_map,
    line_plot,
    usage_plot,
)
from hubert.report.report_data import ComparisonRow, ReportData
from hubert.training.folder import read_metrics

Plots = dict[str, Plot]
Log = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
LAYER_AXIS = "layer (the chosen one is ringed)"
STEP_AXIS = "optimizer steps"


ALL = ("loss", "accuracy", "abx", "pnmi", "usage", "heat")


def draw_iteration(data: ReportData, stages: Mapping[str, Path], names: Collection[str] = ALL) -> Plots:
    """Draw the plots of an iteration's page, or some of them: loss, accuracy, abx, pnmi, usage, heat."""
    metrics = read_metrics(stages["train"] / "metrics.jsonl") if "train" in stages else []
    draw: dict[str, Callable[[], Plot | None]] = {
        "loss": lambda: _draw_loss(data, metrics),
        "accuracy": lambda: _draw_accuracy(data, metrics),
        "abx": lambda: _draw_abx(data),
        "pnmi": lambda: _draw_pnmi(data),
        "usage": lambda: _draw_usage(data, stages.get("units")),
        "heat": lambda: _draw_heat(stages.get("quality")),
    }
    return _present({name: draw[name]() for name in ALL if name in names})


def draw_run(reports: Mapping[int, ReportData], baseline: ComparisonRow, metrics: Mapping[int, Path]) -> Plots:
    """Draw the plots of a run's page: loss, accuracy, abx, pnmi, gain."""
    logs = {number: read_metrics(path) for number, path in metrics.items()}
    losses = ("loss", "validation_loss", "unigram_entropy")
    accuracies = ("accuracy", "masked_accuracy", "majority_accuracy")
    drawn = {
        "loss": _draw_trainings(reports, logs, losses, y_label="cross-entropy (nats)"),
        "accuracy": _draw_trainings(reports, logs, accuracies, y_label="accuracy (%)", percent=True),
        "abx": _draw_iterations(reports, baseline, "abx_across", y_label="ABX error across speakers (%)"),
        "pnmi": _draw_iterations(reports, baseline, "pnmi", y_label="PNMI"),
        "gain": _draw_gains(reports),
    }
    return _present(drawn)


def draw_training(metrics: Path) -> Plot | None:
    """Draw the losses of a training so far; None before the first line of its log."""
    curve = _logged("training, masked", read_metrics(metrics), "loss", colour=BLUE)
    return line_plot("loss by step", [curve], x_label=STEP_AXIS, y_label="cross-entropy (nats)")


def _present(drawn: Mapping[str, Plot | None]) -> Plots:
    return {name: plot for name, plot in drawn.items() if plot is not None}


def _curve(label: str, points: Iterable[tuple[float, float | None]], **style: Any) -> Curve:
    """Return a curve through those points that were measured."""
    measured = [(float(x), float(y)) for x, y in points if y is not None]
    return Curve(label, [x for x, _ in measured], [y for _, y in measured], **style)


def _logged(label: str, log: Log, measure: str, **style: Any) -> Curve:
    return _curve(label, [(line["step"], line.get(measure)) for line in log], **style)


def _validated(label: str, data: ReportData, measure: str, **style: Any) -> Curve:
    return _curve(label, [(one.step, getattr(one, measure)) for one in data.checkpoints], marked=True, **style)


def _by_layer(label: str, data: ReportData, measure: str, **style: Any) -> Curve:
    points = [(row.layer, getattr(row, measure)) for row in data.layers if row.layer]
    return _curve(label, points, marked=True, chosen=data.row.layer, **style)


def _level(label: str, height: float | None, colour: str) -> list[Level]:
    return [] if height is None else [Level(label, height, colour)]


def _draw_loss(data: ReportData, log: Log) -> Plot | None:
    curves = [
        _logged("training, masked", log, "loss", colour=BLUE, faint=True),
        _validated("validation, masked", data, "validation_loss", colour=BLUE),
        _validated("validation, unmasked", data, "unmasked_loss", colour=GREEN),
    ]
    levels = _level("unigram entropy", data.row.unigram_entropy, ORANGE)
    return line_plot("loss by training step", curves, levels, x_label=STEP_AXIS, y_label="cross-entropy (nats)")


def _draw_accuracy(data: ReportData, log: Log) -> Plot | None:
    curves = [
        _logged("training, masked", log, "accuracy", colour=BLUE, faint=True),
        _validated("validation, masked", data, "masked_accuracy", colour=BLUE),
        _validated("validation, unmasked", data, "unmasked_accuracy", colour=GREEN),
    ]
    levels = _level("most frequent unit", data.row.majority_accuracy, ORANGE)
    alt = "accuracy by training step"
    return line_plot(alt, curves, levels, x_label=STEP_AXIS, y_label="accuracy (%)", percent=True)


def _draw_abx(data: ReportData) -> Plot | None:
    curves, levels = [], []
    for label, measure, colour in (("across", "abx_across", BLUE), ("within", "abx_within", ORANGE)):
        curves.append(_by_layer(f"{label} speaker", data, measure, colour=colour))
        levels += _level(f"MFCC {label}", getattr(data.baseline, measure), colour)
    alt = "ABX error by layer"
    return line_plot(alt, curves, levels, x_label=LAYER_AXIS, y_label="ABX error (%)", integer_x=True)


def _draw_pnmi(data: ReportData) -> Plot | None:
    curve = _by_layer("units of the layer", data, "pnmi", colour=BLUE)
    levels = _level("units of MFCC", data.baseline.pnmi, BLUE)
    return line_plot("PNMI by layer", [curve], levels, x_label=LAYER_AXIS, y_label="PNMI", integer_x=True)


def _draw_usage(data: ReportData, units: Path | None) -> Plot | None:
    stage = data.stage("units")
    num_units = stage.figures.get("num_units") if stage else None
    usage = unit_usage(units, int(num_units)) if units and num_units else None
    return None if usage is None else usage_plot("share of frames of each unit, sorted", usage)


def _draw_heat(quality: Path | None) -> Plot | None:
    joint = read_json(quality / "joint.json") if quality else None
    if joint is None:
        return None
    phones = joint["phones"]
    counts = np.asarray(joint["counts"], dtype=np.int64).reshape(len(phones), joint["units"])
    return heat_map("how likely each phone is, given the unit", counts, phones, order_phones(phones))


def _draw_trainings(
    reports: Mapping[int, ReportData],
    logs: Mapping[int, Log],
    measures: tuple[str, str, str],
    *,
    y_label: str,
    percent: bool = False,
) -> Plot | None:
    """Draw a measure of all trainings in one plot: in training, in validation, and what it is compared with."""
    trained, validated, compared = measures
    curves, levels = [], []
    for (number, data), colour in _coloured(reports):
        checked = _validated(f"iteration {number}", data, validated, colour=colour)
        label = "" if checked.x else f"iteration {number}, in training only"  # one entry of the legend each
        curves += [_logged(label, logs[number], trained, colour=colour, faint=True), checked]
        levels += _level("", getattr(data.row, compared), colour)
    alt = f"{trained} by training step, of each iteration"
    return line_plot(alt, curves, levels, x_label=STEP_AXIS, y_label=y_label, percent=percent)


def _coloured(reports: Mapping[int, ReportData]) -> list[tuple[tuple[int, ReportData], str]]:
    return [(one, SERIES[place % len(SERIES)]) for place, one in enumerate(sorted(reports.items()))]


def _draw_iterations(
    reports: Mapping[int, ReportData], baseline: ComparisonRow, measure: str, *, y_label: str
) -> Plot | None:
    curves = [
        _by_layer(f"iteration {number}", data, measure, colour=colour) for (number, data), colour in _coloured(reports)
    ]
    levels = _level("MFCC", getattr(baseline, measure), GREY)
    alt = f"{y_label} by layer and iteration"
    return line_plot(alt, curves, levels, x_label=LAYER_AXIS, y_label=y_label, integer_x=True)


def _draw_gains(reports: Mapping[int, ReportData]) -> Plot | None:
    """Draw how far the validation loss is below the entropy: losses on different units do not compare, gains nearly do."""
    curves = []
    for (number, data), colour in _coloured(reports):
        if (entropy := data.row.unigram_entropy) is not None:
            points = [(one.step, entropy - one.validation_loss) for one in data.checkpoints]
            curves.append(_curve(f"iteration {number}", points, colour=colour, marked=True))
    alt = "unigram entropy minus validation loss, by training step"
    levels = [Level("no better than frequencies", 0.0, GREY)]
    return line_plot(alt, curves, levels, x_label=STEP_AXIS, y_label="entropy minus loss (nats)")
