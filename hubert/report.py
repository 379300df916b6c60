"""The report: one page per iteration and one per run, each a single HTML file that needs no network.

    <run>/report.html                      the whole run: `summarise_run`
    <run>/it1/report-1a2b3c4d/report.html  the iteration: `ReportStage`
                              report.json  the same figures for programs: `hubert.findings`

Everything comes from the stages' files, so a page can be written again at any time. `hubert.findings` gathers the
figures, `hubert.wording` says what they mean, `hubert.plots` draws, and the templates place.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import jinja2
import tomli_w

from hubert import wording
from hubert.errors import DataError
from hubert.findings import Findings, Row, collect, find_report
from hubert.paths import RunFolder, atomic_write, read_json, write_json
from hubert.recipe import Recipe
from hubert.stage import Figures, Spec, Stage

DASH = "\N{EN DASH}"


@dataclass
class ReportStage(Stage):
    """The page of one iteration: it shows the stages that it is given, beside the previous iteration."""

    name: ClassVar[str] = "report"
    counted: ClassVar[str] = "pages"
    parent: Path
    run_folder: Path
    number: int
    resolved: Mapping[str, Any]
    stages: Mapping[str, Path]
    outcome: Mapping[str, Any]

    @cached_property
    def _previous(self) -> Row | None:
        """The previous iteration's row in the comparison; None in iteration 1, or if it has no report."""
        found = find_report(RunFolder(self.run_folder), self.number - 1)
        return found and found[1]["row"]

    def settings(self) -> dict[str, Any]:
        return {"outcome": dict(self.outcome), "previous": self._previous}

    def inputs(self) -> dict[str, str]:
        done = {name: read_json(folder / "done.json") or {} for name, folder in self.stages.items()}
        return {name: content.get("key", "") for name, content in done.items()}

    def make_plan(self) -> list[Spec]:
        return [{"iteration": self.number}]

    def work(self, spec: Spec) -> tuple[list[Path], Figures]:  # noqa: ARG002  (there is one shard)
        from hubert.pictures import draw_iteration  # matplotlib takes a second to import

        findings = collect(
            run=self.run_folder,
            number=self.number,
            resolved=self.resolved,
            stages=self.stages,
            outcome=self.outcome,
            previous=self._previous,
        )
        statements = wording.explain(findings)
        findings["statements"] = [text for _, text in statements]
        page = (
            _templates()
            .get_template("report.html.j2")
            .render(
                findings=findings,
                statements=statements,
                plots=draw_iteration(findings, self.stages),
                columns=wording.explain_columns([findings["row"]]),
                recipe=recipe_as_toml(self.resolved),
                costs=[(None, stage) for stage in findings["stages"]],
                settings=settings_as_toml(self.resolved, self.number),
            )
        )
        html, figures = self.folder / "report.html", self.folder / "report.json"
        write_text(html, page)
        write_json(figures, findings)
        return [html, figures], findings["row"]


def summarise_run(folder: RunFolder) -> tuple[Path, str]:
    """Write the page of a whole run from its iterations' reports.

    Returns:
        The page's path, and the comparison of MFCC and all iterations as text for a terminal.

    Raises:
        DataError: no iteration has a report.
    """
    from hubert.pictures import draw_run

    found = [(number, find_report(folder, number)) for number in folder.iterations()]
    reports = {number: report for number, report in found if report is not None}
    if not reports:
        raise DataError(
            f"{folder.root} has no report of an iteration, expected one in it1/report-…/report.json. Likely cause: no "
            "iteration is finished. Fix: run `hubert-iteration`, or `hubert report` for a finished one"
        )
    findings = {number: content for number, (_, content) in reports.items()}
    baseline = baseline_of(findings)
    statements = {number: wording.explain(content) for number, content in findings.items()}
    page = (
        _templates()
        .get_template("run.html.j2")
        .render(
            name=folder.name,
            findings=findings,
            baseline=baseline,
            statements=statements,
            columns=wording.explain_columns([content["row"] for _, content in sorted(findings.items())]),
            links={number: path.relative_to(folder.root).as_posix() for number, (path, _) in reports.items()},
            plots=draw_run(findings, baseline),
            costs=costs_of(findings),
        )
    )
    path = folder.report
    write_text(path, page)
    return path, text_summary(folder.name, findings, statements)


def is_summarised(folder: RunFolder) -> bool:
    """Say whether the page of the whole run is there and newer than what it shows."""
    if not folder.report.exists():
        return False
    shown = [folder.outcome(number) for number in folder.iterations()]
    shown += [found[0] for number in folder.iterations() if (found := find_report(folder, number))]
    return all(path.stat().st_mtime <= folder.report.stat().st_mtime for path in shown if path.exists())


def baseline_of(findings: Mapping[int, Findings]) -> Row:
    """Return the MFCC row: the newest iteration's, with what only earlier ones measured filled in."""
    rows = [content["baseline"] for _, content in sorted(findings.items())]
    merged: Row = {}
    for row in rows:
        merged |= {name: value for name, value in row.items() if value is not None or name not in merged}
    return merged


def costs_of(findings: Mapping[int, Findings]) -> list[tuple[int | None, dict[str, Any]]]:
    """Return (iteration, stage) for each stage folder once; the iteration is None for what the whole run shares."""
    costs: dict[str, tuple[int | None, dict[str, Any]]] = {}
    for number, content in sorted(findings.items()):
        for stage in content["stages"]:
            shared = Path(stage["folder"]).parent.name != f"it{number}"
            costs.setdefault(stage["folder"], (None if shared else number, stage))
    return list(costs.values())


def text_summary(
    name: str, findings: Mapping[int, Findings], statements: Mapping[int, Sequence[tuple[wording.Kind, str]]]
) -> str:
    """Return the table of MFCC and all iterations with what it means, for a terminal."""
    rows = [content["row"] for _, content in sorted(findings.items())]
    parts = [
        f"Run {name}: MFCC and the chosen layer of each iteration",
        wording.text_table(baseline_of(findings), rows),
        textwrap.fill(wording.explain_columns(rows), wording.WIDTH),
        *(wording.paragraphs(f"it{number}", statements[number]) for number in sorted(findings)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# Pages ------------------------------------------------------------------------------------------------------------


def recipe_as_toml(resolved: Mapping[str, Any]) -> str:
    """Write the recipe as the file that it came from says it: what differs from the defaults."""
    recipe = dict(resolved.get("recipe", {}))
    sections = recipe.pop("sections", {})
    iterations = recipe.pop("iterations", ())
    content = _without_nones({**recipe, **sections})
    return tomli_w.dumps(content | ({"iterations": _without_nones(list(iterations))} if iterations else {}))


def settings_as_toml(resolved: Mapping[str, Any], number: int) -> str:
    """Write all settings of an iteration, defaults included."""
    settings = Recipe.model_validate(resolved["recipe"]).iteration(number)
    return tomli_w.dumps(_without_nones(settings.model_dump(mode="json", by_alias=True)))


def _without_nones(content: Any) -> Any:
    """Leave out what is None: TOML has no word for it."""
    if isinstance(content, Mapping):
        return {name: _without_nones(value) for name, value in content.items() if value is not None}
    return [_without_nones(value) for value in content] if isinstance(content, list | tuple) else content


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hubert"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "fixed": lambda value, digits=3: wording.fixed(value, digits, absent=DASH),
        "percent": lambda value, digits=1: wording.percent(value, digits, absent=DASH),
        "duration": lambda value: wording.duration(value, absent=DASH),
        "size": wording.size,
        "label": wording.label,
        "value": lambda value: wording.value(value, absent=DASH),
        "combine": lambda row, **more: {"link": None, "here": False, **row, **more},
    }
    return environment
