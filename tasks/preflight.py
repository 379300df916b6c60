"""Ask a site whether the jobs of a run could ever start there, before anything is queued."""

from typing import Any

from hubert.errors import ConfigError
from hubert.paths import find_cluster
from tasks.cluster_settings import read_cluster
from tasks.slurm import job_options, refusal, run
from tasks.slurm_settings import DURATION, SECTIONS, Resources, Site, SlurmSettings, seconds_of

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


def check_cluster(cluster: str) -> None:
    """Read a cluster file, and have Slurm judge the job of every section.

    Raises:
        ConfigError: the file is missing or wrong, or a section asks for what the site does not have; names the key.
        SlurmUnreachable: Slurm does not answer.
    """
    settings = read_cluster(cluster)
    if not isinstance(settings, SlurmSettings):
        return
    for name in SECTIONS:
        problem = find_problem(getattr(settings, name))
        if problem is not None:
            key, value, why = problem
            shared = f" (or site.{key})" if key in Site.model_fields else ""
            raise ConfigError(
                f"cluster {find_cluster(cluster)}: {name}.{key}{shared} is {value!r}, and Slurm would never start such a "
                f"job: {why}. Nothing was queued. `sinfo` shows what there is"
            )


def find_problem(section: Resources) -> tuple[str, Any, str] | None:
    """Return the key for which a section's job could never start, its value and the reason; None if it could."""
    why = refusal(job_options(section))
    if why:
        key = _guilty_key(section)
        return key, getattr(section, key), why
    limits = _time_limits(section.partition)
    if limits and all(seconds_of(section.walltime) > limit for limit in limits.values()):
        longest = ", ".join(f"{partition} allows {limit // 60} minutes" for partition, limit in limits.items())
        return "walltime", section.walltime, f"partition {longest}"
    return None


def _guilty_key(section: Resources) -> str:
    """Return the key without which Slurm would take the job; of several, the first one that it minds."""
    keys = [key for key, least in LEAST.items() if getattr(section, key, least) != least]
    for key in keys:
        if not refusal(job_options(section.model_copy(update={key: LEAST[key]}))):
            return key
    kept = section
    for key in keys:  # several are wrong: leave out one after the other until it is taken; the last one was wrong
        kept = kept.model_copy(update={key: LEAST[key]})
        if not refusal(job_options(kept)):
            return key
    return "walltime"


def _time_limits(partitions: str) -> dict[str, int]:
    """Return the time limits in seconds of some partitions (names with commas; empty: the default); empty if one has none."""
    lines = run(["sinfo", "--noheader", "--format=%P|%l"]).splitlines()
    known = dict(line.split("|") for line in lines)
    wanted = partitions.split(",") if partitions else [name.rstrip("*") for name in known if name.endswith("*")]
    limits = {name.rstrip("*"): limit for name, limit in known.items() if name.rstrip("*") in wanted}
    if not all(DURATION.fullmatch(limit) for limit in limits.values()):
        return {}
    return {name: seconds_of(limit) for name, limit in limits.items()}
