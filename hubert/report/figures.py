"""A stage's figures as short lines for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hubert.core import text
from hubert.core.text import align

HIDDEN = {"path", "sha256", "all", "selection", "items", "num_cells", "source", "sources"}  # in done.json, for programs
SHORT = {"best": ("step", "masked_loss", "masked_accuracy"), "last": ("step", "loss", "accuracy")}  # of these, no more
MAX_ROWS = 30


def format_figures(figures: Mapping[str, Any]) -> list[str]:
    """Write figures as aligned lines `name  value`; lists of rows follow as tables."""
    flat = {name: content for name, content in flatten(figures) if not isinstance(content, list)}
    width = max((len(name) for name in flat), default=0)
    lines = [f"{name:<{width}}  {text.value(content)}" for name, content in flat.items()]
    for name, content in flatten(figures):
        if isinstance(content, list) and content and isinstance(content[0], Mapping):
            lines += [f"{name}:", *(f"  {line}" for line in format_rows(content))]
    return lines


def format_rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write rows as a table, one column per figure that differs between them; of many rows the last ones."""
    flat = [dict(flatten(row)) for row in rows[-MAX_ROWS:]]
    names = dict.fromkeys(name for row in flat for name, content in row.items() if not isinstance(content, list))
    columns = [name for name in names if len(flat) == 1 or len({str(row.get(name)) for row in flat}) > 1]
    cells = [tuple(columns), *(tuple(text.value(row.get(name)) for name in columns) for row in flat)]
    left = [f"({len(rows) - MAX_ROWS} earlier rows are in done.json)"] if len(rows) > MAX_ROWS else []
    return [*left, *align(cells, right=range(len(columns)))]


def flatten(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values of nested figures, without those that only programs want."""
    for name, content in figures.items():
        if name in HIDDEN:
            continue
        if isinstance(content, Mapping):
            shown = {key: content[key] for key in SHORT.get(name, content) if key in content}
            yield from flatten(shown, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", content
