"""Renders the report's pages: what the templates are given, and how the recipe is shown."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import tomli_w

from hubert.core import text
from hubert.core.files import read_json
from hubert.evaluation.columns import CHECKPOINT, COMPARISON, LAYER, column
from hubert.model.cost import num_parameters
from hubert.report import conclusions
from hubert.report.conclusions import Kind
from hubert.report.facts.example import Example, best_phones
from hubert.report.report_data import ComparisonRow, ReportData, StageRow
from hubert.settings.model import build_config
from hubert.settings.recipe import IterationSettings, Recipe, settled_settings
from hubert.settings.sections import affects

Statements = Sequence[tuple[Kind, str]]

DASH = "\N{EN DASH}"
ATTRIBUTES = {"validate": "validation"}  # sections whose name in a recipe is another one in Python
ALSO_SHOWN = {"steps", "init"}  # they affect what comes out, though not the key


def iteration_page(
    data: ReportData,
    statements: Statements,
    stages: Mapping[str, Path],
    example: Example | None,
    progress: Sequence[Any] = (),
) -> str:
    """Return the page of an iteration.

    Args:
        data: from `hubert.report.facts.collect.collect`.
        statements: from `hubert.report.conclusions.explain`.
        stages: folder of each stage that the pictures are drawn from.
        example: the utterance to show.
        progress: what of an unfinished iteration is there: rows with `name`, `state` and `detail`.
    """
    from hubert.report.plots.curves import draw_iteration  # matplotlib takes a second to import

    resolved, number = data.resolved, data.iteration
    settings = settled_settings(resolved)
    return _render(
        "report.html.j2",
        data=data,
        statements=statements,
        plots=draw_iteration(data, stages),
        columns=conclusions.explain_columns([data.row]),
        asked=asked_for(settings),
        differences=differences(settings, number),
        recipe=recipe_as_toml(resolved),
        settings=settings_as_toml(settings),
        costs=[(None, stage) for stage in data.stages],
        example=None if example is None else example_parts(example, stages.get("quality")),
        progress=progress,
    )


def run_page(
    name: str,
    finished: Mapping[int, ReportData],
    unfinished: Mapping[int, ReportData],
    baseline: ComparisonRow,
    statements: Mapping[int, Statements],
    links: Mapping[int, str],
    costs: Sequence[tuple[int | None, StageRow]],
    metrics: Mapping[int, Path],
) -> str:
    """Return the page of a whole run.

    Args:
        name: of the run.
        finished: the report of each finished iteration.
        unfinished: that of each iteration that was begun and is not finished.
        baseline: the MFCC row.
        statements: what the figures of each finished iteration mean.
        links: address of each iteration's page, relative to the run's.
        costs: (iteration, stage) from `hubert.report.stage.costs_of`.
        metrics: the training's log of each iteration.
    """
    from hubert.report.plots.curves import draw_run

    return _render(
        "run.html.j2",
        name=name,
        finished=finished,
        unfinished=unfinished,
        newest=max({**unfinished, **finished}.items())[1],
        baseline=baseline,
        statements=statements,
        columns=conclusions.explain_columns([data.row for _, data in sorted(finished.items())]),
        links=links,
        plots=draw_run({**unfinished, **finished}, baseline, metrics),
        costs=costs,
    )


def example_parts(example: Example, quality: Path | None) -> dict[str, Any]:
    """Return what a page shows of an utterance: its picture in lines, its sound, its units and phones."""
    from hubert.report.plots.utterance import draw_example, legend

    joint = read_json(quality / "joint.json") if quality else None
    unit_phones = best_phones(joint) if joint else {}
    return example.content() | {
        "seconds": example.seconds,
        "audio": example.address(),
        "lines": draw_example(example, unit_phones),
        "legend": legend(example, unit_phones),
        "runs": list(example.runs()),
        "has_unit_phones": bool(unit_phones),
    }


# The recipe -------------------------------------------------------------------------------------------------------


def asked_for(settings: IterationSettings) -> dict[str, Any]:
    """Return what an iteration was asked to do, in a few lines; the settings in full stand elsewhere."""
    train, kmeans = settings.train, settings.kmeans
    config = build_config(train.size, train.model)
    size = num_parameters(config, kmeans.num_units)
    changed = ", changed" if train.model else ""
    return {
        "targets": f"{kmeans.num_units:,} units",
        "model": f"{train.size}{changed}: {config.num_layers} layers of {config.dim}, {size / 1e6:,.3g} M parameters",
        "training": f"{train.steps:,} steps of {train.batch_seconds:,.10g} s of audio, learning rate up to "
        f"{train.learning_rate:g} after {train.warmup_steps:,} steps, {train.precision}",
        "masks": f"spans of {train.mask_length} frames that would cover {text.percent(train.mask_prob, 0)} % of the frames "
        f"without overlap; loss weights {1:g} masked, {train.unmasked_weight:g} unmasked",
        "ABX items": settings.abx.item or "none",
        "phone alignments": settings.quality.alignments or "none",
    }


def differences(settings: IterationSettings, number: int) -> list[tuple[str, str, str]]:
    """Return (setting, value here, value in the paper's recipe) where the two differ."""
    here = _flat(settings)
    paper = _flat(Recipe().iteration(number))
    return [(name, text.value(value), text.value(paper[name])) for name, value in here.items() if value != paper[name]]


def _flat(settings: IterationSettings) -> dict[str, Any]:
    """Return the settings that change what comes out, by dotted name."""
    found: dict[str, Any] = {}
    for section, values in settings.model_dump(mode="json", by_alias=True).items():
        fields = type(getattr(settings, ATTRIBUTES.get(section, section))).model_fields
        science = {name for name, one in fields.items() if affects(one)} | ALSO_SHOWN
        found |= {f"{section}.{name}": value for name, value in values.items() if name in science}
    return found


def recipe_as_toml(resolved: Mapping[str, Any]) -> str:
    """Write the recipe as the file that it came from says it: what differs from the defaults."""
    recipe = dict(resolved.get("recipe", {}))
    sections = recipe.pop("sections", {})
    iterations = recipe.pop("iterations", ())
    content = _without_nones({**recipe, **sections})
    return tomli_w.dumps(content | ({"iterations": _without_nones(list(iterations))} if iterations else {}))


def settings_as_toml(settings: IterationSettings) -> str:
    """Write all settings of an iteration, defaults included."""
    return tomli_w.dumps(_without_nones(settings.model_dump(mode="json", by_alias=True)))


def _without_nones(content: Any) -> Any:
    """Leave out what is None: TOML has no word for it."""
    if isinstance(content, Mapping):
        return {name: _without_nones(value) for name, value in content.items() if value is not None}
    return [_without_nones(value) for value in content] if isinstance(content, list | tuple) else content


# Templates --------------------------------------------------------------------------------------------------------


def _render(template: str, **content: Any) -> str:
    return _templates().get_template(template).render(**content)


def _device(name: str | None) -> str:
    return DASH if name is None else name.replace("cpu", "CPU")


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hubert.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "fixed": lambda value, digits=3: text.fixed(value, digits, absent=DASH),
        "percent": lambda value, digits=1: text.percent(value, digits, absent=DASH),
        "duration": lambda value: text.duration(value, absent=DASH),
        "size": text.size,
        "device": _device,
        "value": lambda value: text.value(value, absent=DASH),
        "figure": lambda row, key: column(key).text(row, absent=DASH),
        "heading": lambda key: column(key).title,
    }
    environment.globals |= {"CHECKPOINT": CHECKPOINT, "LAYER": LAYER, "COMPARISON": COMPARISON}
    return environment
