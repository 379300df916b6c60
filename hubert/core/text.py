"""How numbers, durations and sizes are written for people, in terminals and in reports."""

from collections.abc import Iterable, Sequence
from typing import Any


def fixed(value: float | None, digits: int = 3, *, absent: str = "-") -> str:
    """Write a number with a fixed number of decimals; a dash for what was not measured."""
    return absent if value is None else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 1, *, absent: str = "-") -> str:
    """Write a share as per cent, without the sign."""
    return absent if value is None else f"{100 * value:.{digits}f}"


def duration(seconds: float | None, *, absent: str = "-") -> str:
    """Write a time with its two largest units."""
    if seconds is None:
        return absent
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"


def size(num_bytes: float) -> str:
    """Write bytes with a decimal prefix."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def value(content: Any, *, absent: str = "-") -> str:
    """Write any figure: whole numbers with separators, others with at least four significant digits."""
    if content is None or isinstance(content, bool):
        return {None: absent, True: "yes", False: "no"}[content]
    if isinstance(content, int):
        return f"{content:,}"
    if isinstance(content, float):
        return f"{content:,.0f}" if 1000 <= abs(content) < 1e15 else f"{content:.4g}"
    return str(content)


def align(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Pad the columns of a table; those whose numbers are in `right` to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a table in Markdown; cells are written by `value`."""
    lines = [header, ["---"] * len(header), *([value(cell).replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(amount: float) -> str:
    """Write a rate: whole from 10 on."""
    return f"{amount:,.0f}" if amount >= 9.95 else f"{amount:.1f}"


def time_unit(seconds: float) -> tuple[float, str]:
    """Return the unit that a length of time is written in: its seconds and its name."""
    return (3600, "h") if seconds >= 3600 else (60, "min") if seconds >= 60 else (1, "s")


def audio_length(seconds: float) -> str:
    """Write a length of audio: `98.0 h`, `12.5 min`, `40.0 s`."""
    size, unit = time_unit(seconds)
    return f"{seconds / size:,.1f} {unit}"
