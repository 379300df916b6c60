"""A page that holds figures between two marker lines: written from the results, or checked against them."""

import argparse
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def insert(text: str, content: str, start: str, end: str, page: Path) -> str:
    """Return a page's text with the content between its markers."""
    before, found_start, rest = text.partition(start)
    _, found_end, after = rest.partition(end)
    if not found_start or not found_end:
        sys.exit(f"{page}: expected the lines {start} and {end}, between which the figures stand")
    return f"{before}{start}\n\n{content}\n\n{end}{after}"


def keep(page: Path, content: str, start: str, end: str, *, module: str) -> None:
    """Write the page; with --check only fail if it would change. `module` is the command that writes it."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page is not up to date")
    args = parser.parse_args()
    text = page.read_text()
    wanted = insert(text, content, start, end, page)
    if args.check and text != wanted:
        sys.exit(f"{page.relative_to(PROJECT)} and benchmarks/results differ; run: python -m {module}")
    page.write_text(wanted)
