"""Score every checkpoint: `hubert.validate`, one task per group of checkpoints."""

from hubert.stage import Figures
from hubert.validate import ValidateStage
from tasks.markdown import cell, table
from tasks.stage import run_stage


def run(stage: ValidateStage) -> Figures:
    """Validate all checkpoints on the same crops and masks."""
    return run_stage(stage, summary)


def summary(figures: Figures) -> str:
    """Show the losses of all checkpoints, beside what a constant prediction reaches."""
    names = ["step", "masked_loss", "masked_accuracy", "unmasked_loss", "unmasked_accuracy", "prediction_perplexity"]
    rows = table(names, [[row[name] for name in names] for row in figures["rows"]])
    return (
        f"best: step {cell(figures['best']['step'])}. A constant prediction reaches a loss of "
        f"{cell(figures['unigram_entropy'])} (unigram entropy) and an accuracy of {cell(figures['majority_accuracy'])}.\n\n{rows}"
    )
