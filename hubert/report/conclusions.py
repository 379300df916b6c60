"""What the figures of a report mean, in plain sentences, and the comparison with MFCC for a terminal."""

import textwrap
from collections.abc import Sequence
from typing import Literal

from hubert.core.text import align, percent, value
from hubert.evaluation.checkpoints import Checkpoint
from hubert.evaluation.columns import COMPARISON, cells
from hubert.report.report_data import ComparisonRow, ReportData, Training
from hubert.settings.recipe import PAPER_ITERATIONS
from hubert.settings.sections import TrainSettings

Kind = Literal["good", "plain", "bad"]

CLEAR_NATS = 0.05  # a loss this much below the entropy is no accident of a small validation set
NEAR_CHANCE = 45.0  # ABX error, in per cent
SHORT_SHARE = 0.01  # of the paper's audio: below this, no gain over MFCC is expected
WIDTH = 96

# Measured by this project: benchmarks/results/librispeech-mini.md, the chosen layer of iteration 1 on all items.
FOR_SCALE = (
    "For scale: a model of 2 M parameters that was trained for 6,000 steps of 32 s of audio on 42 minutes of LibriSpeech "
    "(25 minutes on 2 cores) came to 26.4 % across and 9.8 % within speaker, where MFCC has 24.9 % and 8.3 %: falling "
    "below MFCC takes more speech, and more steps, than that."
)


def explain(data: ReportData) -> list[tuple[Kind, str]]:
    """Return one plain statement per question: did it learn, is it still learning, does it beat MFCC, what was chosen."""
    row, baseline = data.row, data.baseline
    statements = [
        explain_loss(row),
        explain_accuracy(row),
        explain_checkpoints(data.checkpoints),
        explain_abx(row, baseline, data.previous, data.training),
        explain_pnmi(row, baseline),
    ]
    if data.outcome is None:  # what was not measured may come yet, and no layer is chosen
        statements = statements[:3]
    return [statement for statement in statements if statement is not None]


def explain_loss(row: ComparisonRow) -> tuple[Kind, str] | None:
    """Compare the validation loss with what a model reaches that knows only how frequent each unit is."""
    loss, entropy = row.validation_loss, row.unigram_entropy
    if loss is None or entropy is None:
        return None
    figures = f"The validation loss is {loss:.3f} nats, the units' unigram entropy {entropy:.3f} nats"
    if entropy - loss >= CLEAR_NATS:
        return "good", f"{figures}: clearly below, so the model predicts masked units from their context."
    if loss < entropy:
        return "plain", f"{figures}: only just below; the model knows little more than how frequent each unit is."
    return "bad", f"{figures}: not below, so the model has not learned more yet than how frequent each unit is."


def explain_accuracy(row: ComparisonRow) -> tuple[Kind, str] | None:
    """Compare the accuracy on masked frames with always naming the most frequent unit."""
    accuracy, majority = row.masked_accuracy, row.majority_accuracy
    if accuracy is None or majority is None:
        return None
    figures = (
        f"The model names {percent(accuracy)} % of the masked units; always naming the most frequent one would give "
        f"{percent(majority)} %"
    )
    return ("good", f"{figures}.") if accuracy > majority else ("bad", f"{figures}: that is no better.")


def explain_checkpoints(rows: Sequence[Checkpoint]) -> tuple[Kind, str] | None:
    """State whether the validation loss was still falling at the end."""
    if len(rows) < 2:
        return None
    first, last = rows[0], rows[-1]
    best = min(rows, key=lambda row: row.validation_loss)
    if best is last:
        return "plain", (
            f"The validation loss fell from {first.validation_loss:.3f} at step {first.step:,} to {last.validation_loss:.3f} at "
            f"step {last.step:,}, the last checkpoint: it was still falling, so more steps would probably lower it further."
        )
    return "plain", (
        f"The validation loss was lowest at step {best.step:,} ({best.validation_loss:.3f}) and "
        f"{last.validation_loss:.3f} at the last checkpoint, step {last.step:,}: the steps after the lowest did not help."
    )


def explain_abx(
    row: ComparisonRow, baseline: ComparisonRow, previous: ComparisonRow | None, training: Training
) -> tuple[Kind, str] | None:
    """Compare ABX across speakers with MFCC's, and say plainly what it takes to get below."""
    across, mfcc = row.abx_across, baseline.abx_across
    if across is None or mfcc is None:
        return (
            "plain",
            "ABX was not measured (the recipe names no item file), so nothing is said about MFCC or the layers.",
        )
    text = f"The ABX error across speakers is {across:.2f} % for layer {row.layer} and {mfcc:.2f} % for MFCC"
    if across < mfcc:
        text += ": the layer tells phones apart better than MFCC."
        kind: Kind = "good"
    else:
        text += ": the layer does not tell phones apart better than MFCC yet"
        text += " (it is close to chance, 50 %)." if across > NEAR_CHANCE else "."
        text += f" {explain_shortness(row.iteration or 1, training)}"
        kind = "plain"
    before = previous.abx_across if previous else None
    if before is not None:
        text += f" The previous iteration came to {before:.2f} %."
    return kind, text


def explain_shortness(iteration: int, training: Training) -> str:
    """Put the audio that a training has seen beside the paper's."""
    paper_steps = PAPER_ITERATIONS[min(iteration, len(PAPER_ITERATIONS)) - 1]["train"]["steps"]
    paper_seconds = TrainSettings().batch_seconds
    paper_hours = paper_steps * paper_seconds / 3600
    hours = training.audio_hours
    if hours is None:
        return FOR_SCALE
    trained = (
        f"It was trained on {hours:,.3g} hours of audio"
        if hours < 1000
        else f"It was trained on {hours:,.0f} hours of audio"
    )
    paper = f"{paper_hours:,.0f} hours ({paper_steps:,} steps of {paper_seconds:,.0f} s)"
    if hours < SHORT_SHARE * paper_hours:
        return f"{trained}; the paper's takes {paper}. So this is expected, and it is what a longer run is for. {FOR_SCALE}"
    return (
        f"{trained}, {percent(hours / paper_hours, 0)} % of the paper's {paper}, so this is not expected: "
        "compare the losses, the units' usage and the recipe with the paper's."
    )


def explain_pnmi(row: ComparisonRow, baseline: ComparisonRow) -> tuple[Kind, str] | None:
    """Compare how much units of the chosen layer and units of MFCC say about phones."""
    layer, mfcc = row.pnmi, baseline.pnmi
    if layer is None or mfcc is None:
        return None
    text = f"The PNMI of units is {layer:.3f} clustered on layer {row.layer} and {mfcc:.3f} clustered on MFCC"
    if layer > mfcc:
        return "good", f"{text}: the layer gives better targets for the next iteration."
    return "plain", f"{text}: the layer does not give better targets for the next iteration yet."


def explain_columns(rows: Sequence[ComparisonRow]) -> str:
    """Describe what the rates of the comparison rest on: items, cells and clusters."""
    parts = []
    measured = [row for row in rows if row.num_items is not None]
    if measured:
        on = "; ".join(
            dict.fromkeys(
                f"{row.abx_items}: {row.num_items:,} items in {value(row.num_cells)} cells" for row in measured
            )
        )
        parts.append(f"ABX error rates on {on}; chance is about 50 %, on few items not exactly.")
    clusters = list(dict.fromkeys(f"{row.pnmi_units:,}" for row in rows if row.pnmi_units is not None))
    if clusters:
        parts.append(f"PNMI of {' or '.join(clusters)} clusters of each representation.")
    return " ".join(parts)


# The terminal -----------------------------------------------------------------------------------------------------


def text_table(baseline: ComparisonRow, rows: Sequence[ComparisonRow]) -> str:
    """Write the table that compares MFCC and the iterations, for a terminal. All lines are shorter than 100 letters."""
    names = ["MFCC", *(f"{row.name} layer {row.layer}" for row in rows)]
    blocks = [["", "", *names]]
    for head, columns in COMPARISON:
        table = [list(columns), *(cells(list(columns.values()), row) for row in (baseline, *rows))]
        lines = align(table, right=range(len(columns)))
        width = max(map(len, (head, *lines)))
        blocks.append([head.center(width), *(line.rjust(width) for line in lines)])
    blocks[0] = [name.ljust(max(map(len, names))) for name in blocks[0]]
    return "\n".join("   ".join(parts).rstrip() for parts in zip(*blocks, strict=True))


def paragraphs(name: str, statements: Sequence[tuple[Kind, str]]) -> str:
    """Write statements under a name, wrapped for a terminal."""
    indent = " " * (len(name) + 2)
    wrapped = [textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent) for _, text in statements]
    return "\n".join(wrapped).replace(indent, f"{name}: ", 1)
