"""Units against phones: `hubert.evaluation.QualityStage`."""

from hubert.evaluation import QualityStage
from hubert.stage import Figures
from tasks.stage import run_stage


def run(stage: QualityStage) -> Figures:
    """Measure the units of this iteration, and units clustered on each layer."""
    return run_stage(stage)
