"""Summarises a finished stage: one sentence, a table or two of its figures with their units, and remarks.

For the terminal and for the pages that people look at while a run goes on; the report states what the figures mean together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hubert.core.stage import Figures, Stage
from hubert.core.text import align, audio_length, duration, fixed, markdown_table, percent, value
from hubert.evaluation.columns import VALIDATION, cells, column, header
from hubert.report.report_data import ReportData

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # header, rows


@dataclass(frozen=True)
class StageSummary:
    """One sentence, tables with a header each, and remarks."""

    headline: str
    tables: Sequence[Table] = ()
    remarks: Sequence[str] = ()

    def as_markdown(self) -> list[str]:
        """Return tables and remarks as paragraphs."""
        return [*(markdown_table(head, rows) for head, rows in self.tables), *self.remarks]

    def as_lines(self) -> list[str]:
        """Return everything as lines for a terminal; a table's columns after the first are to the right."""
        tables = (align([head, *rows], right=range(1, len(head))) for head, rows in self.tables)
        return [self.headline, *(line for table in tables for line in table if line.strip()), *self.remarks]


def summarise_stage(stage: Stage, figures: Figures) -> StageSummary:
    """Return the summary of a finished stage.

    Of a stage that has no words here, or that an older version finished without the figures they need, all plain figures.
    """
    write, needed = _STAGES.get(stage.name, (None, ()))
    if write is None or not figures.keys() >= set(needed):
        plain = {name: figure for name, figure in figures.items() if not isinstance(figure, dict | list)}
        return StageSummary("finished", [_pairs({column(name).title: column(name).text(plain) for name in plain})])
    return write(stage, figures)


def _pairs(rows: Mapping[str, str]) -> Table:
    return ("", "value"), list(rows.items())


def _hours(hours: float) -> str:
    return audio_length(3600 * hours)


def files(count: int) -> str:
    """Write a number of files."""
    return "1 file" if count == 1 else f"{count:,} files"


def _manifest(_stage: Stage, figures: Figures) -> StageSummary:
    rejected = figures["num_rejected"]
    said = f"{files(rejected)} rejected" if rejected else "none rejected"
    parts = {"all": figures} | {part: figures[part] for part in ("train", "validation") if part in figures}
    names = {"all": "all audio", "train": "for training", "validation": "held out for validation"}
    rows = [[names[part], value(one["num_files"]), _hours(one["hours"])] for part, one in parts.items()]
    remarks = [f"read from {', '.join(f'`{source}`' for source in figures.get('sources', []))}"]
    if rejected:
        remarks.append("path and reason of each rejected file: `rejected.parquet` in the folder below")
    if skipped := sum(figures.get(f"num_skipped_{kind}", 0) for kind in ("suffixes", "macos", "copies")):
        suffixes = ", ".join(
            f"{count:,} {suffix or 'without one'}" for suffix, count in figures["skipped_suffixes"].items()
        )
        remarks.append(f"{files(skipped)} not taken" + (f", by suffix: {suffixes}" if suffixes else ""))
    headline = f"{files(figures['num_files'])}, {_hours(figures['hours'])} of audio; {said}"
    return StageSummary(headline, [(("", "files", "audio"), rows)], remarks)


def _features(_stage: Stage, figures: Figures) -> StageSummary:
    source = figures["source"]
    name = "MFCC" if source["kind"] == "mfcc" else f"layer {source['layer']} of the teacher"
    rows = {
        "features": name,
        "files drawn for the codebook": value(figures["num_files"]),
        "their audio": _hours(figures["hours"]),
        "frames": value(figures["num_frames"]),
        "frames per second": value(figures["frame_rate"]),
    }
    headline = (
        f"{name} of {files(figures['num_files'])}, {_hours(figures['hours'])} of audio: what the codebook is fitted to"
    )
    return StageSummary(headline, [_pairs(rows)])


def _kmeans(_stage: Stage, figures: Figures) -> StageSummary:
    units, empty = figures["num_units"], figures["num_unused_units"]
    rows = {
        "units": value(units),
        "units that no frame is nearest to": value(empty),
        "frames": value(figures["num_frames"]),
        "mean squared distance of a frame from its unit": value(figures["mean_squared_distance"]),
        f"usage perplexity (at most {units:,}: all units equally frequent)": value(figures["usage_perplexity"]),
    }
    if "num_iterations" in figures:
        rows["iterations of k-means"] = value(figures["num_iterations"])
    used = "all are used" if not empty else f"{empty:,} of them unused"
    return StageSummary(f"{units:,} units from {figures['num_frames']:,} frames; {used}", [_pairs(rows)])


def _units(_stage: Stage, figures: Figures) -> StageSummary:
    parts = [part for part in ("train", "validation") if part in figures]
    written: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "files": lambda part: value(part["num_files"]),
        "frames": lambda part: value(part["num_frames"]),
        "units that never occur": lambda part: f"{part['num_unused_units']:,} of {part['num_units']:,}",
        "unigram entropy (nats): the loss of guessing by frequency": lambda part: fixed(part["unigram_entropy"]),
        "usage perplexity (units)": lambda part: value(part["usage_perplexity"]),
        "share of the most frequent unit (%)": lambda part: percent(part["majority_share"]),
        "mean length of a run of one unit (frames)": lambda part: fixed(part["mean_run_length"], 2),
    }
    rows = [[name, *(write(figures[part]) for part in parts)] for name, write in written.items()]
    count = sum(figures[part]["num_files"] for part in parts)
    frames = sum(figures[part]["num_frames"] for part in parts)
    headline = f"{files(count)} labelled: {frames:,} frames, {figures['frame_rate']} per second"
    return StageSummary(headline, [(("", *parts), rows)])


def _train(_stage: Stage, figures: Figures) -> StageSummary:
    last, seconds = figures["last"], figures["seconds"]
    processes = figures["world_size"]
    rows = {
        "steps": value(figures["steps"]),
        "passes over the audio (epochs)": value(figures["epochs"]),
        "audio heard, counted each time": _hours(figures["audio_hours"]),
        "time at work": duration(seconds),
        "audio per second of work": audio_length(3600 * figures["audio_hours"] / max(seconds, 1e-9)),
        "loss on masked frames at the last step (nats)": fixed(last["loss"]),
        "accuracy on masked frames at the last step (%)": percent(last["accuracy"]),
        "parameters": value(figures["num_parameters"]),
        "files trained on": value(figures["num_files"]),
        "files left out (too short)": value(figures["num_left_out"]),
        "steps skipped because the loss was not finite": value(figures["num_nonfinite"]),
        "runs on": f"{figures['device']}, {processes:,} {'process' if processes == 1 else 'processes'}",
        "checkpoints": value(len(figures["checkpoints"])),
    }
    headline = (
        f"{figures['steps']:,} steps in {duration(seconds)}; at the last one a loss of {fixed(last['loss'])} nats on masked "
        f"frames and {percent(last['accuracy'])} % of their units right"
    )
    return StageSummary(headline, [_pairs(rows)])


def _validate(_stage: Stage, figures: Figures) -> StageSummary:
    best = figures["best"]
    rows = [
        [f"{row['step']:,}{' (lowest loss)' if row['step'] == best['step'] else ''}", *cells(VALIDATION, row)]
        for row in figures["rows"]
    ]
    headline = f"lowest validation loss: {fixed(best['validation_loss'])} nats, at step {best['step']:,}"
    remarks = [
        f"Guessing by frequency alone reaches {fixed(figures['unigram_entropy'])} nats.",
        f"Always naming the most frequent unit is right for {percent(figures['majority_accuracy'])} %.",
        f"All checkpoints have the same {files(figures['num_files'])}, {_hours(figures['hours'])} of audio, and the same masks.",
        f"{files(figures['num_too_short'])} too short, {files(figures['num_over_limit'])} beyond the limit.",
    ]
    return StageSummary(headline, [(("step", *header(VALIDATION)), rows)], remarks)


def _abx(_stage: Stage, figures: Figures) -> StageSummary:
    rows = [
        [
            "" if row["step"] is None else value(row["step"]),
            row["representation"],
            *(fixed(row["reported"][speaker], 2) for speaker in ("within", "across")),
            value(row["reported"]["num_items"]),
            value(row["reported"]["num_cells"]),
            fixed(row["selection"]["across"], 2),
        ]
        for row in figures["rows"]
    ]
    chosen_on = figures["rows"][0]["selection"]["items"]
    header = (
        "step",
        "representation",
        "error within speaker (%)",
        "error across speakers (%)",
        "items",
        "cells",
        f"across speakers on {chosen_on}, which choose (%)",
    )
    layers = [row for row in figures["rows"] if row["layer"]]
    best = min(layers, key=lambda row: row["selection"]["across"])
    mfcc = next((row["reported"]["across"] for row in figures["rows"] if not row["layer"]), None)
    headline = (
        f"lowest ABX error across speakers: {fixed(best['reported']['across'], 2)} %, {best['representation']} at step "
        f"{best['step']:,}" + (f" (MFCC: {fixed(mfcc, 2)} %)" if mfcc is not None else "")
    )
    remarks = [
        "ABX: how often a phone is nearer to another phone than to itself said again. Lower is better, chance is 50 %."
    ]
    if dropped := figures["num_dropped_items"]:
        remarks.append(f"{dropped:,} items at the ends of files have no frame and were left out.")
    return StageSummary(headline, [(header, rows)], remarks)


def _quality(_stage: Stage, figures: Figures) -> StageSummary:
    names = ("pnmi", "phone_purity", "cluster_purity")
    units = figures["units"]
    rows = [["units of this iteration", *(fixed(units[name]) for name in names)]]
    rows += [
        [f"{row['num_units']:,} units clustered on {row['representation']}", *(fixed(row[name]) for name in names)]
        for row in figures["layers"]
    ]
    header = ("", "PNMI", "phone purity", "cluster purity")
    remarks = [
        "PNMI: the share of the phones' uncertainty that the units take away, from 0 to 1. Higher is better.",
        f"{units['num_aligned_frames']:,} frames have a phone.",
        f"{files(units['num_files_without_alignment'])} without an alignment.",
        *(
            []
            if (beyond := figures.get("num_files_beyond_max_hours")) is None
            else [f"{files(beyond)} beyond `quality.max_hours`."]
        ),
        f"{figures['num_unmatched_files']:,} alignments of files that are not there.",
        f"Layers are measured on {figures['layers_num_files']:,} of {figures['layers_num_aligned_files']:,} aligned files.",
    ]
    headline = f"PNMI of the units: {fixed(units['pnmi'])} ({units['num_phones']:,} phones)"
    return StageSummary(headline, [(header, rows)], remarks)


def _report(stage: Stage, _figures: Figures) -> StageSummary:
    data = ReportData.load(stage.folder)
    row = data and data.row
    headline = f"layer {row.layer} of step {row.step:,} was chosen" if row and row.step is not None else "written"
    remarks = [*(data.statements if data is not None else ()), "The page: `report.html` in the folder below."]
    return StageSummary(headline, remarks=remarks)


# How each stage is summarised, and the figures that this needs.
_STAGES: dict[str, tuple[Callable[[Stage, Figures], StageSummary], Sequence[str]]] = {
    "manifest": (_manifest, ("num_files", "hours", "num_rejected")),
    "features": (_features, ("source", "num_files", "hours", "num_frames", "frame_rate")),
    "kmeans": (_kmeans, ("num_units", "num_unused_units", "num_frames", "mean_squared_distance", "usage_perplexity")),
    "units": (_units, ("frame_rate", "train")),
    "train": (
        _train,
        ("last", "seconds", "world_size", "epochs", "audio_hours", "num_nonfinite", "device", "checkpoints"),
    ),
    "validate": (_validate, ("best", "rows", "unigram_entropy", "majority_accuracy", "num_files", "hours")),
    "abx": (_abx, ("rows", "num_dropped_items")),
    "quality": (_quality, ("units", "layers", "num_unmatched_files", "layers_num_files", "layers_num_aligned_files")),
    "report": (_report, ()),
}
