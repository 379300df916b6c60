"""Keep jobs off nodes on which they end as soon as they start, while others of the site do the work.

A node with a broken driver, a full local disk or a wrong clock is idle again in a second, so Slurm gives it job after job.
"""

import re
import subprocess
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress

from tasks.slurm.commands import SlurmUnreachable, refusal, run

MAX_FAILURES = 2  # jobs in a row that came to nothing on a node, after which it is left out
EXCLUDE = re.compile(r"(?:--exclude[=\s]+|-x[=\s]*)(.+)")


def leaving_out(options: Sequence[str], nodes: Collection[str]) -> list[str]:
    """Return a job's options with nodes left out beside those that the site leaves out already: Slurm takes the last list."""
    if not nodes:
        return list(options)
    own = [match[1].strip() for option in options if (match := EXCLUDE.fullmatch(option))]
    return [*options, f"--exclude={','.join([*own[-1:], *sorted(nodes)])}"]


def can_do_without(options: Sequence[str], nodes: Collection[str]) -> bool:
    """Return True if Slurm could start a job elsewhere than on some nodes.

    Raises:
        SlurmUnreachable: Slurm does not answer.
    """
    return not refusal(leaving_out(options, nodes))


def keep_off(jobs: Iterable[str], options: Sequence[str], nodes: Collection[str]) -> None:
    """Keep jobs that wait already off some nodes; one that has started meanwhile is left alone."""
    names = leaving_out(options, nodes)[-1].removeprefix("--exclude=")
    for job in jobs:
        with suppress(subprocess.CalledProcessError, SlurmUnreachable):
            run(["scontrol", "update", f"JobId={job}", f"ExcNodeList={names}"])
