"""Label every file: `hubert.units`, one task per group of shards."""

from hubert.stage import Figures
from hubert.units import UnitsStage
from tasks.markdown import table
from tasks.stage import run_stage


def run(stage: UnitsStage) -> Figures:
    """Label training and validation audio."""
    return run_stage(stage, summary)


def summary(figures: Figures) -> str:
    """Show the key figures of each part side by side."""
    parts = [name for name in ("train", "validation") if name in figures]
    names = [name for name, value in figures[parts[0]].items() if isinstance(value, int | float)]
    return table(["figure", *parts], [[name, *(figures[part].get(name) for part in parts)] for name in names])
