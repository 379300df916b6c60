"""The report: one page per iteration and one per run, each a single HTML file that needs no network.

    <run>/report.html                      the whole run: `summarise_run`
    <run>/it1/report-1a2b3c4d/report.html  the iteration: `ReportStage`
                              report.json  the same figures for programs: `hubert.report.facts.collect`
                              example.*    the utterance that the page shows: `hubert.report.facts.example`

Everything comes from the stages' files, so a page can be written again at any time (`hubert.runs.rebuild`).
`hubert.report.facts.collect` gathers the figures, `hubert.report.conclusions` says what they mean,
`hubert.report.plots.style` draws, and `hubert.report.pages` places.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from hubert.core.errors import DataError
from hubert.core.files import read_json, remove, write_json, write_text
from hubert.core.paths import RunFolder
from hubert.core.stage import Figures, Spec, Stage
from hubert.report import conclusions
from hubert.report.facts.collect import Findings, Row, collect, find_report
from hubert.report.facts.example import find_example
from hubert.report.pages import iteration_page, run_page


@dataclass
class ReportStage(Stage):
    """The page of one iteration: it shows the stages that it is given, beside the previous iteration."""

    name: ClassVar[str] = "report"
    version: ClassVar[int] = 2  # 2: an utterance, hashes, what differs from the paper
    counted: ClassVar[str] = "pages"
    parent: Path
    run_folder: Path
    number: int
    resolved: Mapping[str, Any]
    stages: Mapping[str, Path]
    outcome: Mapping[str, Any]
    alignments: Path | None = None

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
        units = self.stages["units"] / "tables" / "validation"
        kept = [self.folder, *sorted(self.parent.glob(f"{self.name}-*"), reverse=True)]
        example, missing = find_example(units, self.alignments, kept)
        findings = collect(
            run=self.run_folder,
            number=self.number,
            resolved=self.resolved,
            stages=self.stages,
            outcome=self.outcome,
            previous=self._previous,
        )
        statements = conclusions.explain(findings)
        findings["statements"] = [text for _, text in statements]
        findings["example"] = {"missing": missing} | (example.content() if example else {})
        html, figures = self.folder / "report.html", self.folder / "report.json"
        write_text(html, iteration_page(findings, statements, self.stages, example))
        write_json(figures, findings)
        remove(RunFolder(self.run_folder).unfinished(self.number))
        return [html, figures, *(example.save(self.folder) if example else [])], findings["row"]

    def write_again(self) -> None:
        """Write the page from the stages' files, also if it is there; a kill on the way leaves it to the next start."""
        with self.lock():
            plan = self.plan()
            remove(self.folder / "receipts" / "00000.json")
            self.run_shard(0, plan)
            self.complete(plan)


def summarise_run(folder: RunFolder, unfinished: Mapping[int, Findings] | None = None) -> tuple[Path, str]:
    """Write the page of a whole run from its iterations' reports.

    Args:
        folder: the run's.
        unfinished: what is known of iterations that were begun and have no report yet.

    Returns:
        The page's path, and the comparison of MFCC and all iterations as text for a terminal.

    Raises:
        DataError: no iteration has a report, and none is given as unfinished.
    """
    unfinished = unfinished or {}
    found = [(number, find_report(folder, number)) for number in folder.iterations() if number not in unfinished]
    reports = {number: report for number, report in found if report is not None}
    if not reports and not unfinished:
        raise DataError(
            f"{folder.root} has no report of an iteration, expected one in it1/report-…/report.json. Likely cause: no "
            "iteration is finished. Fix: run `hubert-iteration`, or `hubert report` for a finished one"
        )
    findings = {number: content for number, (_, content) in reports.items()}
    statements = {number: conclusions.explain(content) for number, content in findings.items()}
    pages = {number: path for number, (path, _) in reports.items()}
    pages |= {number: folder.unfinished(number) for number in unfinished}
    everything = {**unfinished, **findings}
    page = run_page(
        folder.name,
        findings,
        unfinished,
        baseline_of(findings or unfinished),
        statements,
        {number: path.relative_to(folder.root).as_posix() for number, path in pages.items()},
        costs_of(everything),
        {number: metrics_of(folder, number, content) for number, content in everything.items()},
    )
    write_text(folder.report, page)
    return folder.report, text_summary(folder.name, findings, statements) if findings else ""


def metrics_of(folder: RunFolder, number: int, findings: Findings) -> Path:
    """Return the log of an iteration's training, which may have moved with the run since its report was written."""
    trained = [Path(stage["folder"]).name for stage in findings["stages"] if stage["name"] == "train"]
    name = findings["training"].get("folder") or next(iter(trained), "train")
    return folder.iteration(number) / name / "metrics.jsonl"


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
    name: str, findings: Mapping[int, Findings], statements: Mapping[int, Sequence[tuple[conclusions.Kind, str]]]
) -> str:
    """Return the table of MFCC and all iterations with what it means, for a terminal."""
    rows = [content["row"] for _, content in sorted(findings.items())]
    parts = [
        f"Run {name}: MFCC and the chosen layer of each iteration",
        conclusions.text_table(baseline_of(findings), rows),
        textwrap.fill(conclusions.explain_columns(rows), conclusions.WIDTH),
        *(conclusions.paragraphs(f"it{number}", statements[number]) for number in sorted(findings)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
