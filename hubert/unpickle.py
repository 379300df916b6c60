"""Reading `.pt` files without running what they hold: a stand-in until the real one lands."""

from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251  (only the error with which torch refuses to unpickle)
from typing import Any

import torch

from hubert.errors import DataError


def load_torch(path: str | Path) -> dict[str, Any]:
    """Return the content of a file that `torch.save` wrote."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return content
