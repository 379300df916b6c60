"""Check whether the jobs of a run could ever start there, before anything is queued."""

import logging
import re
from dataclasses import dataclass
from typing import Any

from prefect import get_run_logger
from prefect.exceptions import MissingContextError

from hubert.core.errors import ConfigError
from hubert.core.paths import find_cluster
from tasks.clusters.settings import read_cluster
from tasks.slurm.commands import SlurmUnreachable, job_options, refusal, run
from tasks.slurm.settings import (
    DURATION,
    SECTIONS,
    Resources,
    Site,
    SlurmSettings,
    TrainingSection,
    megabytes_of,
    seconds_of,
)

# What a job asks for at the least, in the order in which keys are suspected: the partition last, as another one may have more.
LEAST: dict[str, Any] = {
    "directives": (),
    "constraint": "",
    "gpus": 0,
    "tasks_per_node": 1,
    "nodes": 1,
    "memory": "1M",
    "cpus": 1,
    "qos": "",
    "account": "",
    "partition": "",
}
# Refusals that Slurm gives both for what no node has and for what no node has at the moment.
AMBIGUOUS = (
    "node configuration is not available",
    "Required node not available",
    "Requested nodes are busy",
    "Required partition not available",
    "partition configuration not available now",
    "Requested reservation is invalid",
)
# States of nodes that are not there for new jobs; they come back.
AWAY = ("down", "drain", "maint", "reserved", "fail", "unknown", "inval", "boot", "reboot", "power")


def check_cluster(cluster: str) -> None:
    """Read a cluster file, and have Slurm judge the job of every section.

    A Slurm that does not answer, and nodes that are away for the moment, are only warned of: the jobs wait for them.

    Raises:
        ConfigError: the file is missing or wrong, or a section asks for what the site does not have; names the key.
    """
    settings = read_cluster(cluster)
    if not isinstance(settings, SlurmSettings):
        return
    for name in SECTIONS:
        try:
            problem = find_problem(getattr(settings, name))
        except SlurmUnreachable as error:
            _logger().warning("%s. The section %s of the cluster file was not checked, nor those after it", error, name)
            return  # each question to a silent Slurm takes as long
        if problem is None:
            continue
        shared = f" (or site.{problem.key})" if problem.key in Site.model_fields else ""
        where = f"cluster {find_cluster(cluster)}: {name}{f'.{problem.key}' if problem.key else ''}{shared}"
        if problem.may_pass:
            _logger().warning(
                "%s: %s; Slurm would not start such a job now: %s (%s). The jobs wait; `sinfo -R` says why",
                where,
                problem.what,
                problem.why,
                problem.may_pass,
            )
            continue
        raise ConfigError(
            f"{where}: {problem.what}, and Slurm would never start such a job: {problem.why}. Nothing was queued. `sinfo` "
            "shows what there is"
        )


@dataclass(frozen=True)
class Problem:
    """Why a section's job could not start: the key (empty: no single one), what it asks for, what Slurm said.

    `may_pass`: what is away for the moment and may be the whole reason; empty if the job could never start.
    """

    key: str
    what: str
    why: str
    may_pass: str = ""


def find_problem(section: Resources) -> Problem | None:
    """Return why a section's job could not start; None if it could.

    Raises:
        SlurmUnreachable: Slurm does not answer.
    """
    why = refusal(job_options(section))
    if why:
        key = _guilty_key(section, why)
        what = f"it is {getattr(section, key)!r}" if key else f"it asks for {' '.join(job_options(section))}"
        return Problem(key, what, why, _away(section) if _is_ambiguous(why) else "")
    limits = _time_limits(section.partition)
    if limits and all(seconds_of(section.walltime) > limit for limit in limits.values()):
        longest = ", ".join(f"{partition} allows {limit // 60} minutes" for partition, limit in limits.items())
        return Problem("walltime", f"it is {section.walltime!r}", f"partition {longest}")
    return None


def _logger() -> Any:
    """Return the flow run's logger; the module's where the check is made before a run is created."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger(__name__)


def _away(section: Resources) -> str:
    """Name what is away for the moment and would be enough, such as `n1 drained`; empty if the job could never start.

    Whether nodes are enough is judged by their number, CPUs, memory and GPUs; constraints and directives are left to Slurm.
    """
    nodes, per_node = (section.nodes, section.tasks_per_node) if isinstance(section, TrainingSection) else (1, 1)
    fitting: set[str] = set()
    away = {}
    for line in run(["sinfo", "--noheader", "--Node", "--format=%N|%P|%a|%T|%c|%m|%G"]).splitlines():
        node, partition, available, state, cpus, memory, gres = line.split("|")
        names = section.partition.split(",")
        if not (partition.rstrip("*") in names if section.partition else partition.endswith("*")):
            continue
        gpus = sum(int(count) for count in re.findall(r"gpu:(?:[^:,()]+:)?(\d+)", gres))
        if (
            int(cpus) < section.cpus * per_node
            or int(memory) < megabytes_of(section.memory)
            or gpus < section.gpus * per_node
        ):
            continue
        fitting.add(node)
        if available != "up":
            away[f"partition {partition.rstrip('*')}"] = available
        if state.endswith("*") or any(state.startswith(word) for word in AWAY):
            away[node] = state.rstrip("*")
    return ", ".join(f"{name} is {state}" for name, state in away.items()) if len(fitting) >= nodes else ""


def _is_ambiguous(why: str) -> bool:
    return any(sign in why for sign in AMBIGUOUS)


def _guilty_key(section: Resources, why: str) -> str:
    """Return the key without which Slurm would take the job; of several, the first that it minds; empty if none is to blame."""

    def is_taken(other: Resources) -> bool:
        refused = refusal(job_options(other))
        # an ambiguous refusal instead of a clear one: what is left may be nodes that are away
        return not refused or (_is_ambiguous(refused) and not _is_ambiguous(why))

    keys = [key for key, least in LEAST.items() if getattr(section, key, least) != least]
    for key in keys:
        if is_taken(section.model_copy(update={key: LEAST[key]})):
            return key
    kept = section
    for key in keys:  # several are wrong: leave out one after the other until it is taken; the last one was wrong
        kept = kept.model_copy(update={key: LEAST[key]})
        if is_taken(kept):
            return key
    return ""


def _time_limits(partitions: str) -> dict[str, int]:
    """Return the time limits in seconds of some partitions (names with commas; empty: the default); empty if one has none."""
    lines = run(["sinfo", "--noheader", "--format=%P|%l"]).splitlines()
    known = dict(line.split("|") for line in lines)
    wanted = partitions.split(",") if partitions else [name.rstrip("*") for name in known if name.endswith("*")]
    limits = {name.rstrip("*"): limit for name, limit in known.items() if name.rstrip("*") in wanted}
    if not all(DURATION.fullmatch(limit) for limit in limits.values()):
        return {}
    return {name: seconds_of(limit) for name, limit in limits.items()}
