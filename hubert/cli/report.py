"""`hubert report RUN`: choose, if an iteration has come so far, and write all pages of the run from its files."""

from hubert.core.errors import HubertError
from hubert.core.paths import RunFolder
from hubert.evaluation.checkpoints import save_checkpoints
from hubert.evaluation.choice import Outcome, read_outcome
from hubert.report.stage import summarise_run
from hubert.runs.pipeline import Iteration
from hubert.runs.rebuild import Rebuilt, rebuild
from hubert.runs.resolved import Resolved
from hubert.runs.status import Chain


def report_iteration(iteration: Iteration) -> None:
    """Choose checkpoint and layer of one iteration, write its report and the run's, and print the comparison."""
    outcome = choose(iteration)
    path, text = summarise_run(iteration.folder)
    print(f"\n{text}\n{_chosen(outcome)}\nreport: {path}")
    _say_next(iteration.folder, iteration.number, iteration.resolved)


def report_run(folder: RunFolder) -> None:
    """Write all pages of a run again, and print the comparison and what is missing.

    Raises:
        DataError: nothing of the run has begun.
    """
    for number in (begun := [number for number in folder.iterations() if folder.settings(number).exists()]):
        if number == begun[-1] or read_outcome(folder, number) is None:
            _choose_if_possible(folder, number)
    rebuilt = rebuild(folder)
    if rebuilt.text:
        print(f"\n{rebuilt.text}")
    for number, path in rebuilt.pages.items():
        outcome = read_outcome(folder, number)
        is_finished = number not in rebuilt.missing and outcome is not None
        print(f"it{number}/report:")
        print(f"  {_chosen(outcome) if is_finished and outcome else describe_missing(rebuilt, number)}")
        print(f"  folder: {path.parent}\n  page: {path}")
    print(f"report: {rebuilt.run_page}")
    newest = max(rebuilt.pages)
    if newest not in rebuilt.missing:
        _say_next(folder, newest, Resolved.load(folder.settings(newest)))


def choose(iteration: Iteration) -> Outcome:
    """Choose checkpoint and layer, write the iteration's report, and write the choice down for the next iteration."""
    outcome = iteration.outcome()
    iteration.report.run()
    save_checkpoints(iteration.folder, iteration.number, iteration.checkpoints())
    outcome.save(iteration.folder)  # last: an iteration with an outcome is finished
    return outcome


def _choose_if_possible(folder: RunFolder, number: int) -> None:
    """Choose where the evaluation is finished; what is missing is said on the page."""
    try:
        iteration = Iteration(Resolved.load(folder.settings(number)))
        if Chain(iteration).missing("report") is None:
            choose(iteration)
    except HubertError as error:
        print(f"it{number}: written from what is in {folder.iteration(number)}, because: {error}")


def describe_missing(rebuilt: Rebuilt, number: int) -> str:
    """Return a line on what an iteration lacks."""
    missing = [
        f"{stage.name} ({stage.detail or stage.state})" for stage in rebuilt.missing[number] if stage.state != "done"
    ]
    return f"not finished; missing: {', '.join(missing)}"


def _say_next(folder: RunFolder, number: int, resolved: Resolved) -> None:
    if number < resolved.recipe.num_iterations:
        print(f"next: hubert features {folder.root} --iteration {number + 1}")


def _chosen(outcome: Outcome) -> str:
    return f"chosen: step {outcome.step:,}, layer {outcome.layer}: {outcome.why}"
