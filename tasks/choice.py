"""Choose checkpoint and layer: `hubert.evaluation.choice`, shown on the run's page."""

from prefect import task

from hubert.core.files import read_json
from hubert.core.text import fixed, percent
from hubert.evaluation.checkpoints import Candidate, save_candidates
from hubert.evaluation.choice import Outcome, read_outcome
from hubert.runs.pipeline import Iteration
from tasks.page.markdown import table
from tasks.page.page import DONE, address_of, key_of, note, show, show_picture, show_table
from tasks.page.prefect_client import costs_nothing
from tasks.stage import cached

PICTURES = {
    "loss": "losses by step, training and validation",
    "abx": "ABX error by layer",
    "pnmi": "what units of each layer say about phones (PNMI)",
}

EXPLAINED = (
    "Loss and accuracy: on masked frames of the validation audio. Layer: the checkpoint's best one, where its layers were "
    "scored; ABX: its error within and across speakers, lower is better, chance is 50 %."
)


def run(iteration: Iteration) -> Outcome:
    """Choose, write the choice down for the next iteration, and say why."""
    outcome = iteration.outcome()
    label = f"it{outcome.iteration}/choose"
    offered = iteration.folder.candidates(outcome.iteration)
    if read_outcome(iteration.folder, outcome.iteration) == outcome and offered.exists():
        cached(label, str(iteration.home))
    else:
        choose(label, iteration, outcome)
    show_choice(iteration, outcome)
    return outcome


@task(task_run_name="{label}")
def choose(label: str, iteration: Iteration, outcome: Outcome) -> None:  # noqa: ARG001  (`label` names the run)
    """Write the choice down and show it."""
    save_candidates(iteration.folder, outcome.iteration, iteration.candidates())
    outcome.save(iteration.folder)


@costs_nothing("the choice")
def show_choice(iteration: Iteration, outcome: Outcome) -> None:
    """Show the choice, the checkpoints that there are to choose from, and the curves behind it."""
    from hubert.report.plots.curves import draw_iteration  # matplotlib takes a second to import
    from hubert.report.plots.style import standalone

    chosen = f"step {outcome.step:,}, layer {outcome.layer}"
    why = f"step {outcome.step:,} has the lowest validation loss; layer {outcome.layer}: {outcome.why}"
    rows = [checkpoint_row(candidate, outcome) for candidate in iteration.candidates()]
    checkpoints = table(list(rows[0]), [list(row.values()) for row in rows])
    text = f"**Chosen: {chosen}**\n\n{why}\n\n{checkpoints}\n\n{EXPLAINED}\n\n`{outcome.checkpoint}`"
    artifact = show("markdown", key_of(iteration.home, "choice"), text, f"{chosen}; {outcome.why}")
    note("choice", DONE, f"{chosen}; {outcome.why}", address_of(artifact))
    show_table(iteration.home, "checkpoints", rows, f"{len(rows):,} checkpoints of it{outcome.iteration}; {why}")
    findings = read_json(iteration.report.folder / "report.json")
    stages = {stage.name: stage.folder for stage in iteration.evaluated()}
    pictures = draw_iteration(findings, stages, PICTURES) if findings is not None else {}
    for name, words in PICTURES.items():
        if name in pictures:
            show_picture(iteration.home, name, standalone(pictures[name]), f"it{outcome.iteration}: {words}")


def checkpoint_row(candidate: Candidate, outcome: Outcome) -> dict[str, str]:
    """Return what the table of checkpoints says of one."""
    best = candidate.best_layer
    return {
        "step": f"{candidate.step:,}",
        "chosen": "chosen" if candidate.sha256 == outcome.sha256 else "",
        "validation loss (nats)": fixed(candidate.masked_loss),
        "accuracy (%)": percent(candidate.masked_accuracy),
        "layer": str(candidate.layer) if best is not None else "not scored",
        "ABX within (%)": fixed(best.within, 2) if best is not None else "-",
        "ABX across (%)": fixed(best.across, 2) if best is not None else "-",
    }
