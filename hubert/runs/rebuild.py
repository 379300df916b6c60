"""Writing a run's pages again, from its files alone: no service, no network, and no corpus if that is gone.

A finished iteration gets its report; one that was only begun gets `unfinished.html`, which shows what is there and says
what is missing. Nothing is trained or scored here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubert.core.errors import DataError, HubertError
from hubert.core.files import read_json, write_text
from hubert.core.paths import RunFolder
from hubert.evaluation.choice import Outcome, read_outcome
from hubert.report import conclusions
from hubert.report.facts.collect import collect
from hubert.report.facts.example import find_example
from hubert.report.pages import iteration_page
from hubert.report.report_data import ReportData, find_report
from hubert.report.stage import ReportStage, summarise_run
from hubert.runs.pipeline import Iteration
from hubert.runs.resolved import Resolved
from hubert.runs.status import Chain, StageStatus, read_folder
from hubert.settings.stages import EVALUATED, STAGES


@dataclass(frozen=True)
class Rebuilt:
    """The pages of a run: of each iteration, of the run, the comparison as text, and what is missing of each iteration."""

    pages: dict[int, Path]
    run_page: Path
    text: str
    missing: dict[int, list[StageStatus]] = field(default_factory=dict)


def rebuild(folder: RunFolder) -> Rebuilt:
    """Write the pages of all iterations and of the run again.

    Raises:
        DataError: no iteration was begun.
    """
    pages: dict[int, Path] = {}
    unfinished: dict[int, ReportData] = {}
    missing: dict[int, list[StageStatus]] = {}
    for number in folder.iterations():
        resolved = settings_of(folder, number)
        if resolved is None:
            continue
        outcome = read_outcome(folder, number)
        stages = find_stages(folder, number, resolved, outcome)
        if outcome is not None and is_whole(stages):
            pages[number] = write_report(folder, number, resolved, stages, outcome)
        else:
            missing[number] = progress_of(stages, resolved)
            pages[number], unfinished[number] = write_unfinished(folder, number, resolved, stages, missing[number])
    if not pages:
        raise DataError(
            f"{folder.root} has no iteration with settings, expected it1/resolved.toml. Likely cause: nothing was started. Fix: "
            "start it with `hubert run`, or with `hubert manifest RUN --recipe R --data D`"
        )
    run_page, text = summarise_run(folder, unfinished)
    return Rebuilt(pages, run_page, text, missing)


def write_report(
    folder: RunFolder, number: int, resolved: Resolved, stages: Mapping[str, Path], outcome: Outcome
) -> Path:
    """Write the report of a finished iteration; return its page."""
    stage = ReportStage(
        parent=folder.iteration(number),
        run_folder=folder.root,
        number=number,
        resolved=resolved.model_dump(mode="json"),
        stages=stages,
        outcome=outcome,
        alignments=Iteration(resolved).alignments,
    )
    stage.write_again()
    return stage.folder / "report.html"


def write_unfinished(
    folder: RunFolder,
    number: int,
    resolved: Resolved,
    stages: Mapping[str, Path],
    progress: Sequence[StageStatus],
) -> tuple[Path, ReportData]:
    """Write the page of an iteration that is not finished; return it and its figures."""
    previous = find_report(folder, number - 1)
    data = collect(
        run=folder.root,
        number=number,
        resolved=resolved.model_dump(mode="json"),
        stages=stages,
        outcome=None,
        previous=previous and previous[1].row,
    )
    example, missing = None, "The audio has no units yet."
    if "units" in stages and (stages["units"] / "done.json").exists():
        example, missing = find_example(stages["units"] / "tables" / "validation", Iteration(resolved).alignments)
    shown: dict[str, Any] = {"example": {"missing": missing}}
    if previous is not None and not data.layers:
        shown["baseline"] = previous[1].baseline  # until this iteration has measured MFCC itself
    data = data.model_copy(update=shown)
    path = folder.unfinished(number)
    write_text(path, iteration_page(data, conclusions.explain(data), stages, example, progress))
    return path, data


# Which folders ----------------------------------------------------------------------------------------------------


def settings_of(folder: RunFolder, number: int) -> Resolved | None:
    """Return what an iteration was asked to do: as its report says, else as its newest start says; None if never begun."""
    report = find_report(folder, number)
    if report is not None and report[1].outcome == read_outcome(folder, number) and report[1].resolved:
        return Resolved.of(report[1].resolved, folder.root)
    path = folder.settings(number)
    if not path.exists():
        return None
    return Resolved.load(path)


def find_stages(folder: RunFolder, number: int, resolved: Resolved, outcome: Outcome | None) -> dict[str, Path]:
    """Return the folder of each stage that was begun: those of the report, else by the keys, else as they were noted."""
    report = find_report(folder, number)
    if report is not None and outcome is not None and report[1].outcome == outcome:
        keys = (read_json(report[0].parent / "done.json") or {}).get("inputs", {})
        found = {name: _folder_of(folder, number, name, key) for name, key in keys.items()}
        if all(path.is_dir() for path in found.values()):
            return found
    try:
        known = {name: stage for name, stage, _ in Chain(Iteration(resolved)).known() if stage is not None}
        found = {name: known[name].folder for name in EVALUATED if name in known}
    except HubertError:  # the corpus is gone, so that the manifest's key is not known
        noted = read_json(folder.stages(number)) or {}
        found = {name: folder.root / noted[name] for name in EVALUATED if name in noted}
        found = found or _without_notes(folder, number, outcome)
    return {name: path for name, path in found.items() if path.is_dir()}


def _folder_of(folder: RunFolder, number: int, name: str, key: str) -> Path:
    home = folder.root if name == "manifest" else folder.iteration(number)
    return home / f"{name}-{key[:8]}"


def _without_notes(folder: RunFolder, number: int, outcome: Outcome | None) -> dict[str, Path]:
    """Return the folders that are certain in a run of an older version: the only one of a stage, and where keys lead."""
    found: dict[str, Path] = {}
    for name in EVALUATED:
        home = folder.root if name == "manifest" else folder.iteration(number)
        folders = [path for path in home.glob(f"{name}-*") if re.fullmatch(rf"{name}-[0-9a-f]{{8}}", path.name)]
        folders = [path for path in folders if name != "manifest" or (path / "train.parquet").exists()]
        if len(folders) == 1:
            found[name] = folders[0]
    if outcome is not None:
        found["train"] = folder.iteration(number) / Path(outcome.checkpoint).parent.name
    for name, source, key in (("train", "units", "table"), ("units", "manifest", "manifest")):
        inputs = (read_json(found[name] / "plan.json") or {}).get("inputs", {}) if name in found else {}
        if key in inputs:
            found[source] = _folder_of(folder, number, source, inputs[key])
    return found


def is_whole(stages: Mapping[str, Path]) -> bool:
    """Return True if every stage that a report needs is finished. ABX and quality are there if the recipe has them."""
    needed = {name for name in EVALUATED if not STAGES[name].setting} | {*stages}
    return all(name in stages and (stages[name] / "done.json").exists() for name in needed)


def progress_of(stages: Mapping[str, Path], resolved: Resolved) -> list[StageStatus]:
    """Return the state of every stage that the recipe has, those that were not begun too."""
    return [
        read_folder(stages[name], name) if name in stages else StageStatus(name, "missing")
        for name, entry in STAGES.items()
        if entry.is_in(resolved.settings)
    ]
