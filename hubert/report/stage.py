"""The report: one page per iteration and one per run, each a single HTML file that needs no network.

    <run>/report.html                      the whole run: `summarise_run`
    <run>/it1/report-1a2b3c4d/report.html  the iteration: `ReportStage`
                              report.json  the same data for programs: `hubert.report.report_data`
                              example.*    the utterance that the page shows: `hubert.report.facts.example`

Everything comes from the stages' files, so a page can be written again at any time (`hubert.runs.rebuild`).
`hubert.report.facts.collect` gathers the data, `hubert.report.conclusions` states what they mean,
`hubert.report.plots` draws them, and `hubert.report.pages` renders the page.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from hubert.core.errors import DataError
from hubert.core.files import read_json, remove, write_json, write_text
from hubert.core.paths import RunFolder
from hubert.core.stage import Figures, Spec, Stage
from hubert.evaluation.choice import Outcome
from hubert.report import conclusions
from hubert.report.facts.collect import collect
from hubert.report.facts.example import find_example
from hubert.report.pages import iteration_page, run_page
from hubert.report.report_data import ComparisonRow, ReportData, StageRow, find_report


@dataclass(kw_only=True)
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
    outcome: Outcome
    alignments: Path | None = None

    @cached_property
    def _previous(self) -> ComparisonRow | None:
        """The previous iteration's row in the comparison; None in iteration 1, or if it has no report."""
        found = find_report(RunFolder(self.run_folder), self.number - 1)
        return found and found[1].row

    def settings(self) -> dict[str, Any]:
        # Of an older version's row no more than it has: the key of a finished report stays.
        previous = self._previous and self._previous.model_dump(exclude_unset=True)
        return {"outcome": asdict(self.outcome), "previous": previous}

    def inputs(self) -> dict[str, str]:
        done = {name: read_json(folder / "done.json") or {} for name, folder in self.stages.items()}
        return {name: content.get("key", "") for name, content in done.items()}

    def make_plan(self) -> list[Spec]:
        return [{"iteration": self.number}]

    def reads(self) -> list[Path]:
        shown = {"manifest": "rejected.parquet", "units": "tables", "quality": "joint.json"}
        return [self.stages[name] / file for name, file in shown.items() if name in self.stages]

    def work(self, spec: Spec) -> tuple[list[Path], Figures]:  # noqa: ARG002  (there is one shard)
        units = self.stages["units"] / "tables" / "validation"
        kept = [self.folder, *sorted(self.parent.glob(f"{self.name}-*"), reverse=True)]
        example, missing = find_example(units, self.alignments, kept)
        data = collect(
            run=self.run_folder,
            number=self.number,
            resolved=self.resolved,
            stages=self.stages,
            outcome=self.outcome,
            previous=self._previous,
        )
        statements = conclusions.explain(data)
        shown = {"missing": missing} | (example.content() if example else {})
        data = data.model_copy(update={"statements": [text for _, text in statements], "example": shown})
        page, content = self.folder / "report.html", self.folder / "report.json"
        write_text(page, iteration_page(data, statements, self.stages, example))
        write_json(content, data.model_dump(mode="json"))
        remove(RunFolder(self.run_folder).unfinished(self.number))
        return [page, content, *(example.save(self.folder) if example else [])], data.row.model_dump()

    def write_again(self) -> None:
        """Write the page from the stages' files, also if it is there; a kill on the way leaves it to the next start."""
        with self.lock():
            self.check()
            plan = self.plan()
            remove(self.folder / "receipts" / "00000.json")
            self.run_shard(0, plan)
            self.complete(plan)


def summarise_run(folder: RunFolder, unfinished: Mapping[int, ReportData] | None = None) -> tuple[Path, str]:
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
    finished = {number: data for number, (_, data) in reports.items()}
    statements = {number: conclusions.explain(data) for number, data in finished.items()}
    pages = {number: path for number, (path, _) in reports.items()}
    pages |= {number: folder.unfinished(number) for number in unfinished}
    everything = {**unfinished, **finished}
    page = run_page(
        folder.name,
        finished,
        unfinished,
        baseline_of(finished or unfinished),
        statements,
        {number: path.relative_to(folder.root).as_posix() for number, path in pages.items()},
        costs_of(everything),
        {number: metrics_of(folder, number, data) for number, data in everything.items()},
    )
    write_text(folder.report, page)
    return folder.report, text_summary(folder.name, finished, statements) if finished else ""


def metrics_of(folder: RunFolder, number: int, data: ReportData) -> Path:
    """Return the log of an iteration's training, which may have moved with the run since its report was written."""
    stage = data.stage("train")
    name = data.training.folder or (Path(stage.folder).name if stage else "train")
    return folder.iteration(number) / name / "metrics.jsonl"


def is_summarised(folder: RunFolder) -> bool:
    """Return True if the page of the whole run is there and newer than what it shows."""
    if not folder.report.exists():
        return False
    shown = [folder.outcome(number) for number in folder.iterations()]
    shown += [found[0] for number in folder.iterations() if (found := find_report(folder, number))]
    return all(path.stat().st_mtime <= folder.report.stat().st_mtime for path in shown if path.exists())


def baseline_of(reports: Mapping[int, ReportData]) -> ComparisonRow:
    """Return the MFCC row: the newest iteration's, with what only earlier ones measured filled in."""
    merged: dict[str, Any] = {}
    for _, data in sorted(reports.items()):
        merged |= data.baseline.model_dump(exclude_none=True)
    return ComparisonRow.model_validate(merged)


def costs_of(reports: Mapping[int, ReportData]) -> list[tuple[int | None, StageRow]]:
    """Return (iteration, stage) for each stage folder once; the iteration is None for what the whole run shares."""
    costs: dict[str, tuple[int | None, StageRow]] = {}
    for number, data in sorted(reports.items()):
        for stage in data.stages:
            shared = Path(stage.folder).parent.name != f"it{number}"
            costs.setdefault(stage.folder, (None if shared else number, stage))
    return list(costs.values())


def text_summary(
    name: str, reports: Mapping[int, ReportData], statements: Mapping[int, Sequence[tuple[conclusions.Kind, str]]]
) -> str:
    """Return the table of MFCC and all iterations with what it means, for a terminal."""
    rows = [data.row for _, data in sorted(reports.items())]
    parts = [
        f"Run {name}: MFCC and the chosen layer of each iteration",
        conclusions.text_table(baseline_of(reports), rows),
        textwrap.fill(conclusions.explain_columns(rows), conclusions.WIDTH),
        *(conclusions.paragraphs(f"it{number}", statements[number]) for number in sorted(reports)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
