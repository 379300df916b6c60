"""List and check the audio: `hubert.manifest_stage`, one task per group of files."""

from hubert.manifest_stage import ManifestStage
from hubert.stage import Figures
from tasks.markdown import pairs
from tasks.stage import run_stage


def run(stage: ManifestStage) -> Figures:
    """Build the manifest."""
    return run_stage(stage, pairs)
