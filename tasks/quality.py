"""Units against phones: `hubert.evaluation.QualityStage`."""

from hubert.evaluation import QualityStage
from hubert.stage import Figures
from tasks.markdown import cell, table
from tasks.stage import run_stage


def run(stage: QualityStage) -> Figures:
    """Measure the units of this iteration, and units clustered on each layer."""
    return run_stage(stage, summary)


def summary(figures: Figures) -> str:
    """Show purity and PNMI of the units and of the layers."""
    names = ("pnmi", "phone_purity", "cluster_purity")
    rows = [["units of this iteration", *(figures["units"][name] for name in names)]]
    rows += [[f"units of {row['representation']}", *(row[name] for name in names)] for row in figures["layers"]]
    units = figures["units"]
    left_out = f"{cell(units['num_files_without_alignment'])} files without alignment"
    unknown = f"{cell(figures['num_unmatched_files'])} alignments of files that are not there"
    beyond = f"{cell(figures['num_files_beyond_max_hours'])} files beyond quality.max_hours"
    layers = (
        f"layers on {cell(figures['layers_num_files'])} of {cell(figures['layers_num_aligned_files'])} aligned files"
    )
    said = f"{cell(units['num_aligned_frames'])} aligned frames; {left_out}, {beyond}, {unknown}; {layers}"
    return f"{said}\n\n{table(['', *names], rows)}"
