"""Which pictures a report shows, and from which figures each one is drawn. A picture without data is left out."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from hubert.core.files import read_json
from hubert.report.facts.collect import Findings, Row, unit_usage
from hubert.report.facts.phone_order import order_phones
from hubert.report.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SERIES,
    Curve,
    Level,
    heat_map,
    line_plot,
    standalone,
    usage_plot,
)
from hubert.training.folder import read_metrics

Pictures = dict[str, Markup]
LAYER_AXIS = "layer (the chosen one is ringed)"
STEP_AXIS = "optimizer steps"


ALL = ("loss", "accuracy", "abx", "pnmi", "usage", "heat")


def draw_iteration(findings: Findings, stages: Mapping[str, Path], names: Collection[str] = ALL) -> Pictures:
    """Draw the pictures of an iteration's page, or some of them: loss, accuracy, abx, pnmi, usage, heat."""
    metrics = read_metrics(stages["train"] / "metrics.jsonl") if "train" in stages else []
    draw: dict[str, Callable[[], str | None]] = {
        "loss": lambda: _draw_loss(findings, metrics),
        "accuracy": lambda: _draw_accuracy(findings, metrics),
        "abx": lambda: _draw_abx(findings),
        "pnmi": lambda: _draw_pnmi(findings),
        "usage": lambda: _draw_usage(findings, stages.get("units")),
        "heat": lambda: _draw_heat(stages.get("quality")),
    }
    return _present({name: draw[name]() for name in ALL if name in names})


def draw_run(findings: Mapping[int, Findings], baseline: Row, metrics: Mapping[int, Path]) -> Pictures:
    """Draw the pictures of a run's page: loss, accuracy, abx, pnmi, gain."""
    logs = {number: read_metrics(path) for number, path in metrics.items()}
    losses, accuracies = (
        ("loss", "masked_loss", "unigram_entropy"),
        ("accuracy", "masked_accuracy", "majority_accuracy"),
    )
    drawn = {
        "loss": _draw_trainings("loss", findings, logs, losses, y_label="cross-entropy (nats)"),
        "accuracy": _draw_trainings("accuracy", findings, logs, accuracies, y_label="accuracy (%)", percent=True),
        "abx": _draw_iterations(findings, baseline, "abx_across", name="abx", y_label="ABX error across speakers (%)"),
        "pnmi": _draw_iterations(findings, baseline, "pnmi", name="pnmi", y_label="PNMI"),
        "gain": _draw_gains(findings),
    }
    return _present(drawn)


def draw_training(metrics: Path) -> str | None:
    """Draw the losses of a training so far, as a picture of its own; None before the first line of its log."""
    curves = [_curve("training, masked", read_metrics(metrics), "loss", colour=BLUE)]
    plot = line_plot("loss", "loss by step", curves, x_label=STEP_AXIS, y_label="cross-entropy (nats)")
    return standalone(plot) if plot else None


def _present(drawn: Mapping[str, str | None]) -> Pictures:
    return {name: Markup(text) for name, text in drawn.items() if text}  # noqa: S704  (our own SVG; its texts are escaped)


def _curve(label: str, rows: Sequence[Mapping[str, Any]], measure: str, *, x: str = "step", **style: Any) -> Curve:
    """Return a measure over the rows that have it."""
    points = [(float(row[x]), float(row[measure])) for row in rows if row.get(measure) is not None]
    return Curve(label, [point[0] for point in points], [point[1] for point in points], **style)


def _level(label: str, height: float | None, colour: str) -> list[Level]:
    return [] if height is None else [Level(label, height, colour)]


def _layers(findings: Findings) -> list[Row]:
    return [row for row in findings["layers"] if row["layer"]]


def _draw_loss(findings: Findings, metrics: Sequence[Mapping[str, Any]]) -> str | None:
    rows = findings["checkpoints"]
    curves = [
        _curve("training, masked", metrics, "loss", colour=BLUE, faint=True),
        _curve("validation, masked", rows, "masked_loss", colour=BLUE, marked=True),
        _curve("validation, unmasked", rows, "unmasked_loss", colour=GREEN, marked=True),
    ]
    levels = _level("unigram entropy", findings["row"]["unigram_entropy"], ORANGE)
    return line_plot("loss", "loss by training step", curves, levels, x_label=STEP_AXIS, y_label="cross-entropy (nats)")


def _draw_accuracy(findings: Findings, metrics: Sequence[Mapping[str, Any]]) -> str | None:
    rows = findings["checkpoints"]
    curves = [
        _curve("training, masked", metrics, "accuracy", colour=BLUE, faint=True),
        _curve("validation, masked", rows, "masked_accuracy", colour=BLUE, marked=True),
        _curve("validation, unmasked", rows, "unmasked_accuracy", colour=GREEN, marked=True),
    ]
    levels = _level("most frequent unit", findings["row"]["majority_accuracy"], ORANGE)
    alt = "accuracy by training step"
    return line_plot("accuracy", alt, curves, levels, x_label=STEP_AXIS, y_label="accuracy (%)", percent=True)


def _draw_abx(findings: Findings) -> str | None:
    layers, baseline, chosen = _layers(findings), findings["baseline"], findings["outcome"]["layer"]
    curves, levels = [], []
    for label, measure, colour in (("across", "abx_across", BLUE), ("within", "abx_within", ORANGE)):
        curves.append(_curve(f"{label} speaker", layers, measure, x="layer", colour=colour, marked=True, chosen=chosen))
        levels += _level(f"MFCC {label}", baseline[measure], colour)
    alt = "ABX error by layer"
    return line_plot("abx", alt, curves, levels, x_label=LAYER_AXIS, y_label="ABX error (%)", integer_x=True)


def _draw_pnmi(findings: Findings) -> str | None:
    chosen = findings["outcome"]["layer"]
    curve = _curve("units of the layer", _layers(findings), "pnmi", x="layer", colour=BLUE, marked=True, chosen=chosen)
    levels = _level("units of MFCC", findings["baseline"]["pnmi"], BLUE)
    alt = "PNMI by layer"
    return line_plot("pnmi", alt, [curve], levels, x_label=LAYER_AXIS, y_label="PNMI", integer_x=True)


def _draw_usage(findings: Findings, units: Path | None) -> str | None:
    stage = next((stage for stage in findings["stages"] if stage["name"] == "units"), None)
    num_units = stage["figures"].get("num_units") if stage else None
    usage = unit_usage(units, num_units) if units and num_units else None
    return None if usage is None else usage_plot("usage", "share of frames of each unit, sorted", usage)


def _draw_heat(quality: Path | None) -> str | None:
    joint = read_json(quality / "joint.json") if quality else None
    if joint is None:
        return None
    phones = joint["phones"]
    counts = np.asarray(joint["counts"], dtype=np.int64).reshape(len(phones), joint["units"])
    return heat_map("heat", "how likely each phone is, given the unit", counts, phones, order_phones(phones))


def _draw_trainings(
    name: str,
    findings: Mapping[int, Findings],
    logs: Mapping[int, Sequence[Mapping[str, Any]]],
    measures: tuple[str, str, str],
    *,
    y_label: str,
    percent: bool = False,
) -> str | None:
    """Draw a measure of all trainings in one picture: in training, in validation, and what it is compared with."""
    trained, validated, compared = measures
    curves, levels = [], []
    for place, (number, content) in enumerate(sorted(findings.items())):
        colour = SERIES[place % len(SERIES)]
        checked = _curve(f"iteration {number}", content["checkpoints"], validated, colour=colour, marked=True)
        label = "" if checked.x else f"iteration {number}, in training only"  # one entry of the legend each
        curves += [_curve(label, logs[number], trained, colour=colour, faint=True), checked]
        levels += _level("", content["row"][compared], colour)
    alt = f"{name} by training step, of each iteration"
    return line_plot(name, alt, curves, levels, x_label=STEP_AXIS, y_label=y_label, percent=percent)


def _draw_iterations(
    findings: Mapping[int, Findings], baseline: Row, measure: str, *, name: str, y_label: str
) -> str | None:
    curves = [
        _curve(
            f"iteration {number}",
            _layers(content),
            measure,
            x="layer",
            colour=SERIES[place % len(SERIES)],
            marked=True,
            chosen=content["outcome"]["layer"],
        )
        for place, (number, content) in enumerate(sorted(findings.items()))
    ]
    levels = _level("MFCC", baseline[measure], GREY)
    alt = f"{y_label} by layer and iteration"
    return line_plot(name, alt, curves, levels, x_label=LAYER_AXIS, y_label=y_label, integer_x=True)


def _draw_gains(findings: Mapping[int, Findings]) -> str | None:
    """Draw how far the validation loss is below the entropy: losses on different units do not compare, gains nearly do."""
    curves = []
    for place, (number, content) in enumerate(sorted(findings.items())):
        entropy = content["row"]["unigram_entropy"]
        rows = [{**row, "gain": entropy - row["masked_loss"]} for row in content["checkpoints"] if entropy is not None]
        curves.append(_curve(f"iteration {number}", rows, "gain", colour=SERIES[place % len(SERIES)], marked=True))
    alt = "unigram entropy minus validation loss, by training step"
    levels = [Level("no better than frequencies", 0.0, GREY)]
    return line_plot("gain", alt, curves, levels, x_label=STEP_AXIS, y_label="entropy minus loss (nats)")
