"""Extract the frames of the k-means sample: `hubert.features`, one task per group of shards."""

from hubert.features import FeaturesStage
from hubert.stage import Figures
from tasks.stage import run_stage


def run(stage: FeaturesStage) -> Figures:
    """Extract the sampled features."""
    return run_stage(stage)
