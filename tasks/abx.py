"""ABX error rates by layer: `hubert.evaluation.ABXStage`, one task per group of checkpoints."""

from hubert.evaluation import ABXStage
from hubert.stage import Figures
from tasks.markdown import table
from tasks.stage import run_stage


def run(stage: ABXStage) -> Figures:
    """Score MFCC and every layer."""
    return run_stage(stage, summary)


def summary(figures: Figures) -> str:
    """Show the error rates in per cent, with the number of items and cells that they rest on."""
    names = ("within", "across", "num_items", "num_cells")
    rows = [
        [row["step"], row["representation"], *(row["all"][name] for name in names), row["selection"]["across"]]
        for row in figures["rows"]
    ]
    header = ["step", "representation", "within %", "across %", "items", "cells", f"across %, {figures['selection']}"]
    return f"ABX error rates, lower is better (chance: 50 %)\n\n{table(header, rows)}"
