"""Why the bytes of a file are not to be trusted."""

from typing import NamedTuple

COPY_AGAIN = "Copy or convert it again, or leave it out."


class Fault(NamedTuple):
    """Why a file cannot be used: a reason that starts with its kind ("truncated or damaged: ..."), and what to do."""

    reason: str
    advice: str


def truncated(detail: str) -> Fault:
    """Build the fault of a file that lacks bytes."""
    return Fault(f"truncated or damaged: {detail}", COPY_AGAIN)
