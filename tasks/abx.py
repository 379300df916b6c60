"""ABX error rates by layer: `hubert.evaluation.ABXStage`, one task per group of checkpoints."""

from hubert.evaluation import ABXStage
from hubert.stage import Figures
from tasks.stage import run_stage


def run(stage: ABXStage) -> Figures:
    """Score MFCC and every layer."""
    return run_stage(stage)
