"""A parser whose help lists the settings of a stage."""

import argparse
import json
import textwrap
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """A parser whose help ends with the settings of a stage, read from the settings themselves."""

    sections: tuple[str, ...] = ()

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})

    def format_help(self) -> str:
        """Return the help, with a line per setting: name, default, meaning with its unit."""
        return super().format_help() + (describe_settings(self.sections) if self.sections else "")


def describe_settings(sections: Sequence[str]) -> str:
    """Return the settings of some sections of a recipe as text: name, default, meaning with its unit."""
    from hubert.settings.sections import SECTIONS

    lines = ["", "settings (`--set NAME=VALUE`, or in the recipe under [section]), with their defaults:"]
    for section in sections:
        for name, field in SECTIONS[section].model_fields.items():
            default = json.dumps(field.get_default(call_default_factory=True), default=str)
            head = f"  {section}.{name} = {'none' if default == 'null' else default}"
            width = 40
            text = textwrap.wrap(field.description or "", 110 - width)
            lines += [f"{head:<{width - 1}} {text[0]}"] if len(head) < width else [head, " " * width + text[0]]
            lines += [" " * width + line for line in text[1:]]
    return "\n".join(lines) + "\n"
