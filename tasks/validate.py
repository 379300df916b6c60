"""Score every checkpoint: `hubert.validate`, one task per group of checkpoints."""

from hubert.stage import Figures
from hubert.validate import ValidateStage
from tasks.stage import run_stage


def run(stage: ValidateStage) -> Figures:
    """Validate all checkpoints on the same crops and masks."""
    return run_stage(stage)
