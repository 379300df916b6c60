"""The beginning of an iteration 2: who chooses its teacher, and what is written down; no stage is run."""

from prefect import flow

from hubert.runs.options import RunOptions
from tasks.resolve import settle
from tasks.teacher import Choose, ask_before


@flow(name="asking")
def asking(
    run: str, recipe: str, data: str, choose: Choose = "auto", teacher: str = "", layer: int | None = None
) -> None:
    """Ask as hubert-pretraining does, then settle as hubert-iteration does."""
    ask_before(run, 2, choose)
    settle(RunOptions(run, 2, recipe, data, teacher, layer), choose)
