"""Choose checkpoint and layer: `hubert.evaluation.choice`, shown on the run's page."""

from prefect import task

from hubert.core.text import markdown_table
from hubert.evaluation.checkpoints import Checkpoint, save_checkpoints
from hubert.evaluation.choice import Outcome, read_outcome
from hubert.evaluation.columns import CHECKPOINT_IN_BRIEF, cells, header
from hubert.runs.pipeline import Iteration
from tasks.page.page import DONE, address_of, key_of, note, show, show_picture, show_table
from tasks.page.prefect_client import costs_nothing
from tasks.stage import cached

PICTURES = {
    "loss": "losses by step, training and validation",
    "abx": "ABX error by layer",
    "pnmi": "what units of each layer say about phones (PNMI)",
}

EXPLAINED = (
    "Loss and accuracy: on masked frames of the validation audio. Layer: the one that would be clustered, the checkpoint's "
    "best where its layers were scored; ABX: its error within and across speakers, lower is better, chance is 50 %."
)


def run(iteration: Iteration) -> Outcome:
    """Choose, write the choice down for the next iteration, and say why."""
    outcome = iteration.outcome()
    label = f"it{outcome.iteration}/choose"
    offered = iteration.folder.checkpoints(outcome.iteration)
    if read_outcome(iteration.folder, outcome.iteration) == outcome and offered.exists():
        cached(label, str(iteration.home))
    else:
        choose(label, iteration, outcome)
    show_choice(iteration, outcome)
    return outcome


@task(task_run_name="{label}")
def choose(label: str, iteration: Iteration, outcome: Outcome) -> None:  # noqa: ARG001  (`label` names the run)
    """Write the choice down and show it."""
    save_checkpoints(iteration.folder, outcome.iteration, iteration.checkpoints())
    outcome.save(iteration.folder)


@costs_nothing("the choice")
def show_choice(iteration: Iteration, outcome: Outcome) -> None:
    """Show the choice, the checkpoints that there are to choose from, and the curves behind it."""
    from hubert.report.plots.curves import draw_iteration  # matplotlib takes a second to import
    from hubert.report.report_data import ReportData

    chosen = f"step {outcome.step:,}, layer {outcome.layer}"
    why = f"step {outcome.step:,} has the lowest validation loss; layer {outcome.layer}: {outcome.why}"
    rows = [checkpoint_row(one, outcome) for one in iteration.checkpoints()]
    checkpoints = markdown_table(list(rows[0]), [list(row.values()) for row in rows])
    text = f"**Chosen: {chosen}**\n\n{why}\n\n{checkpoints}\n\n{EXPLAINED}\n\n`{outcome.checkpoint}`"
    artifact = show("markdown", key_of(iteration.home, "choice"), text, f"{chosen}; {outcome.why}")
    note("choice", DONE, f"{chosen}; {outcome.why}", address_of(artifact))
    show_table(iteration.home, "checkpoints", rows, f"{len(rows):,} checkpoints of it{outcome.iteration}; {why}")
    if (data := ReportData.load(iteration.report.folder)) is None:
        return
    stages = {stage.name: stage.folder for stage in iteration.evaluated()}
    for name, plot in draw_iteration(data, stages, PICTURES).items():
        show_picture(iteration.home, name, plot, f"it{outcome.iteration}: {PICTURES[name]}")


def checkpoint_row(checkpoint: Checkpoint, outcome: Outcome) -> dict[str, str]:
    """Return the figures of a checkpoint by the heads of their columns, and whether it was chosen."""
    keys = CHECKPOINT_IN_BRIEF
    chosen = "chosen" if checkpoint.sha256 == outcome.sha256 else ""
    return dict(zip(header(keys), cells(keys, checkpoint), strict=True)) | {"chosen": chosen}
