"""The README tells the truth: its commands exist, its files exist, its Python runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parent.parent
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def shell_commands(text: str) -> list[str]:
    """Return the commands of all shell blocks and of inline code, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`((?:hubert|make|prefect) [^`]*)`", text)
    return [line for line in lines + inline if line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_hubert_command_is_understood_by_the_command_line(page):
    from flows.cli import add_service_commands
    from hubert.cli import build_parser

    parser, commands = build_parser()
    add_service_commands(commands)
    known = set(commands.choices)
    for command in shell_commands(page.read_text()):
        words = shlex.split(command)
        if words[0] != "hubert" or len(words) < 2 or words[1].isupper():
            continue
        names = words[1].strip(",").split("|")
        assert set(names) <= known, command
        placeholders = any(word.isupper() or "[" in word or "|" in word or "," in word for word in words[1:])
        if not placeholders and (len(words) > 2 or words[1] in ("demo", "up", "down", "status")):
            parser.parse_args(words[1:])


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        command.split()[1]
        for page in PAGES
        for command in shell_commands(page.read_text())
        if command.startswith("make ")
    }
    assert {"demo", "test"} <= named <= targets


def test_every_file_that_the_readme_names_exists():
    text = (PROJECT / "README.md").read_text()
    for name in re.findall(r"`((?:hubert|tasks|flows|deployments|tests|docs|benchmarks)/[\w/.-]*\.\w+)`", text):
        assert (PROJECT / name).exists(), name
    for link in re.findall(r"\]\(([^):]+)\)", text):
        assert (PROJECT / link).exists(), link


def test_the_readmes_python_runs_as_it_stands(tmp_path):
    from hubert import HuBERTPretrain

    (block,) = re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), flags=re.DOTALL)
    folder = tmp_path / "step-00000400"
    HuBERTPretrain(20, "tiny").save_pretrained(folder)
    code = re.sub(r'"runs/[^"]*"', repr(str(folder)), block)
    names = {"waveforms": torch.zeros(1, 16_000)}
    exec(code, names)  # noqa: S102  (the README's own example)
    assert [tuple(layer.shape) for layer in names["layers"]] == [(1, 49, 192)] * 4
