"""Names of figures in the files of older versions."""

from typing import Any

RENAMED = {
    "masked_loss": "validation_loss",
    "num_dead_units": "num_unused_units",
    "num_empty_units": "num_unused_units",
}


def rename(content: Any) -> Any:
    """Return JSON-like content in which every figure has the name of this version, in nested objects and lists too."""
    if isinstance(content, dict):
        return {RENAMED.get(name, name): rename(value) for name, value in content.items()}
    return [rename(value) for value in content] if isinstance(content, list) else content
