"""Small markdown helpers for the pages that runs show."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from prefect.settings import PREFECT_UI_URL


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join(cell(value) for value in row)} |" for row in rows]
    return "\n".join(lines)


def pairs(figures: Mapping[str, Any]) -> str:
    """Return names and values as a two-column table."""
    return table(["figure", "value"], figures.items())


def cell(value: Any) -> str:
    """Format one value: thousands separated, fractions with four significant digits."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def path_of(page: str, identity: Any) -> str:
    """Return where a page of Prefect is (`runs/flow-run`, `artifacts/artifact`), for a link on another page of Prefect.

    Without host and port: the browser may have others for the server than this process (`ssh -L`, a proxy).
    """
    return f"{urlsplit(PREFECT_UI_URL.value() or '').path.rstrip('/')}/{page}/{identity}"
