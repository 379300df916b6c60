"""List and check the audio: `hubert.manifest_stage`, one task per group of files."""

from hubert.manifest_stage import ManifestStage
from hubert.stage import Figures
from tasks.stage import run_stage


def run(stage: ManifestStage, name: str = "") -> Figures:
    """Build the manifest; `name` tells it from the others of the run."""
    return run_stage(stage, name)
