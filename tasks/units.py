"""Label every file: `hubert.units`, one task per group of shards."""

from hubert.stage import Figures
from hubert.units import UnitsStage
from tasks.stage import run_stage


def run(stage: UnitsStage) -> Figures:
    """Label training and validation audio."""
    return run_stage(stage)
