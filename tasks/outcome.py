"""Choose checkpoint and layer: `hubert.outcome`, shown on the run's page."""

from prefect import task
from prefect.artifacts import create_markdown_artifact

from hubert.candidates import list_candidates, save_candidates
from hubert.outcome import Outcome, read_outcome
from hubert.pipeline import Iteration
from tasks.stage import cached


def run(iteration: Iteration) -> Outcome:
    """Choose, write the choice down for the next iteration, and say why."""
    outcome = iteration.outcome()
    label = f"it{outcome.iteration}/choose"
    offered = iteration.folder.candidates(outcome.iteration)
    if read_outcome(iteration.folder, outcome.iteration) == outcome and offered.exists():
        cached(label, str(iteration.home))
    else:
        choose(label, iteration, outcome)
    return outcome


@task(task_run_name="{label}")
def choose(label: str, iteration: Iteration, outcome: Outcome) -> None:  # noqa: ARG001  (`label` names the run)
    """Write the choice down and show it."""
    save_candidates(iteration.folder, outcome.iteration, list_candidates(iteration))
    outcome.save(iteration.folder)
    create_markdown_artifact(
        f"**Chosen:** step {outcome.step}, layer {outcome.layer}\n\n{outcome.why}\n\n`{outcome.checkpoint}`",
        key=f"it{outcome.iteration}-choice",
        description="checkpoint and layer for the next iteration",
    )
