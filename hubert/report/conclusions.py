"""What the figures mean, in plain sentences, and how numbers are written: for the report and for the terminal."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from hubert.core.text import fixed, percent, value
from hubert.settings.recipe import PAPER_ITERATIONS
from hubert.settings.sections import TrainSettings

Row = Mapping[str, Any]
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


def explain(findings: Mapping[str, Any]) -> list[tuple[Kind, str]]:
    """Return one plain statement per question: did it learn, is it still learning, does it beat MFCC, what was chosen."""
    row, baseline = findings["row"], findings["baseline"]
    statements = [
        explain_loss(row),
        explain_accuracy(row),
        explain_checkpoints(findings["checkpoints"]),
        explain_abx(row, baseline, findings["previous"], findings["training"]),
        explain_pnmi(row, baseline),
    ]
    if findings.get("unfinished"):  # what was not measured may come yet, and no layer is chosen
        statements = statements[:3]
    return [statement for statement in statements if statement is not None]


def explain_loss(row: Row) -> tuple[Kind, str] | None:
    """Compare the validation loss with what a model reaches that knows only how frequent each unit is."""
    loss, entropy = row["validation_loss"], row["unigram_entropy"]
    if loss is None or entropy is None:
        return None
    figures = f"The validation loss is {loss:.3f} nats, the units' unigram entropy {entropy:.3f} nats"
    if entropy - loss >= CLEAR_NATS:
        return "good", f"{figures}: clearly below, so the model predicts masked units from their context."
    if loss < entropy:
        return "plain", f"{figures}: only just below; the model knows little more than how frequent each unit is."
    return "bad", f"{figures}: not below, so the model has not learned more yet than how frequent each unit is."


def explain_accuracy(row: Row) -> tuple[Kind, str] | None:
    """Compare the accuracy on masked frames with always naming the most frequent unit."""
    accuracy, majority = row["masked_accuracy"], row["majority_accuracy"]
    if accuracy is None or majority is None:
        return None
    figures = (
        f"The model names {percent(accuracy)} % of the masked units; always naming the most frequent one would give "
        f"{percent(majority)} %"
    )
    return ("good", f"{figures}.") if accuracy > majority else ("bad", f"{figures}: that is no better.")


def explain_checkpoints(rows: Sequence[Row]) -> tuple[Kind, str] | None:
    """Say whether the validation loss was still falling at the end."""
    if len(rows) < 2:
        return None
    first, last = rows[0], rows[-1]
    best = min(rows, key=lambda row: row["masked_loss"])
    if best is last:
        return "plain", (
            f"The validation loss fell from {first['masked_loss']:.3f} at step {first['step']:,} to {last['masked_loss']:.3f} at "
            f"step {last['step']:,}, the last checkpoint: it was still falling, so more steps would probably lower it further."
        )
    return "plain", (
        f"The validation loss was lowest at step {best['step']:,} ({best['masked_loss']:.3f}) and "
        f"{last['masked_loss']:.3f} at the last checkpoint, step {last['step']:,}: the steps after the lowest did not help."
    )


def explain_abx(row: Row, baseline: Row, previous: Row | None, training: Mapping[str, Any]) -> tuple[Kind, str] | None:
    """Compare ABX across speakers with MFCC's, and say plainly what it takes to get below."""
    across, mfcc = row["abx_across"], baseline["abx_across"]
    if across is None or mfcc is None:
        return (
            "plain",
            "ABX was not measured (the recipe names no item file), so nothing is said about MFCC or the layers.",
        )
    text = f"The ABX error across speakers is {across:.2f} % for layer {row['layer']} and {mfcc:.2f} % for MFCC"
    if across < mfcc:
        text += ": the layer tells phones apart better than MFCC."
        kind: Kind = "good"
    else:
        text += ": the layer does not tell phones apart better than MFCC yet"
        text += " (it is close to chance, 50 %)." if across > NEAR_CHANCE else "."
        text += f" {explain_shortness(row['iteration'], training)}"
        kind = "plain"
    before = previous["abx_across"] if previous else None
    if before is not None:
        text += f" The previous iteration came to {before:.2f} %."
    return kind, text


def explain_shortness(iteration: int, training: Mapping[str, Any]) -> str:
    """Put the audio that a training has seen beside the paper's."""
    paper_steps = PAPER_ITERATIONS[min(iteration, len(PAPER_ITERATIONS)) - 1]["train"]["steps"]
    paper_seconds = TrainSettings().batch_seconds
    paper_hours = paper_steps * paper_seconds / 3600
    hours = training["audio_hours"]
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


def explain_pnmi(row: Row, baseline: Row) -> tuple[Kind, str] | None:
    """Compare how much units of the chosen layer and units of MFCC say about phones."""
    layer, mfcc = row["pnmi"], baseline["pnmi"]
    if layer is None or mfcc is None:
        return None
    text = f"The PNMI of units is {layer:.3f} clustered on layer {row['layer']} and {mfcc:.3f} clustered on MFCC"
    if layer > mfcc:
        return "good", f"{text}: the layer gives better targets for the next iteration."
    return "plain", f"{text}: the layer does not give better targets for the next iteration yet."


def explain_columns(rows: Sequence[Row]) -> str:
    """Say what the rates of the comparison rest on: items, cells and clusters."""
    parts = []
    measured = [row for row in rows if row["num_items"] is not None]
    if measured:
        on = "; ".join(
            dict.fromkeys(
                f"{row['abx_items']}: {row['num_items']:,} items in {value(row['num_cells'])} cells" for row in measured
            )
        )
        parts.append(f"ABX error rates on {on}; chance is about 50 %, on few items not exactly.")
    clusters = list(dict.fromkeys(f"{row['pnmi_units']:,}" for row in rows if row["pnmi_units"] is not None))
    if clusters:
        parts.append(f"PNMI of {' or '.join(clusters)} clusters of each representation.")
    return " ".join(parts)


# Numbers ----------------------------------------------------------------------------------------------------------


# The terminal -----------------------------------------------------------------------------------------------------

_HEADS = ("", "ABX error (%)", "", "PNMI", "validation loss (nats)", "", "masked accuracy (%)", "")
_SUBHEADS = ("", "within", "across", "", "model", "unigram entropy", "model", "most frequent unit")


def text_table(baseline: Row, rows: Sequence[Row]) -> str:
    """Write the table that compares MFCC and the iterations, for a terminal. All lines are shorter than 100 letters."""
    body = [_cells("MFCC", baseline), *(_cells(f"{row['name']} layer {row['layer']}", row) for row in rows)]
    widths = [max(len(line[column]) for line in (*body, _SUBHEADS)) for column in range(len(_SUBHEADS))]
    widths[3] = max(widths[3], len("PNMI"))
    spans = ((0,), (1, 2), (3,), (4, 5), (6, 7))
    heads = "   ".join(
        _HEADS[span[0]].center(sum(widths[column] for column in span) + 2 * (len(span) - 1)) for span in spans
    )
    lines = [heads, _line(_SUBHEADS, widths, spans), *(_line(line, widths, spans) for line in body)]
    return "\n".join(line.rstrip() for line in lines)


def _cells(name: str, row: Row) -> list[str]:
    return [
        name,
        fixed(row["abx_within"], 2),
        fixed(row["abx_across"], 2),
        fixed(row["pnmi"]),
        fixed(row["validation_loss"]),
        fixed(row["unigram_entropy"]),
        percent(row["masked_accuracy"]),
        percent(row["majority_accuracy"]),
    ]


def _line(cells: Sequence[str], widths: Sequence[int], spans: Sequence[Sequence[int]]) -> str:
    padded = [
        cells[0].ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)),
    ]
    return "   ".join("  ".join(padded[column] for column in span) for span in spans)


def paragraphs(name: str, statements: Sequence[tuple[Kind, str]]) -> str:
    """Write statements under a name, wrapped for a terminal."""
    indent = " " * (len(name) + 2)
    wrapped = [textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent) for _, text in statements]
    return "\n".join(wrapped).replace(indent, f"{name}: ", 1)
