"""What a site's Slurm is asked for: the sections of a cluster file of `kind: slurm`, checked before anything is queued.

Keys of `site` hold for every section that does not say otherwise. Each key is one option of sbatch and srun, with
Slurm's own words and formats.
"""

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

DURATION = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
SECTIONS = ("extraction", "kmeans", "evaluation", "training")
TRAINING_KEYS = {"nodes", "tasks_per_node", "signal_seconds"}
# Options that the service sets itself: by the key that is meant, or empty where jobs could not be found again or kept.
OWN_OPTIONS = {
    **dict.fromkeys(("account", "A"), "account"),
    **dict.fromkeys(("partition", "p"), "partition"),
    **dict.fromkeys(("qos", "q"), "qos"),
    **dict.fromkeys(("constraint", "C"), "constraint"),
    **dict.fromkeys(("time", "t"), "walltime"),
    "mem": "memory",
    **dict.fromkeys(("cpus-per-task", "c"), "cpus"),
    **dict.fromkeys(("nodes", "N"), "nodes"),
    **dict.fromkeys(("ntasks", "n", "ntasks-per-node"), "tasks_per_node"),
    "signal": "signal_seconds",
    **dict.fromkeys(("chdir", "D", "comment", "job-name", "J", "output", "o", "error", "e", "array", "a"), ""),
    **dict.fromkeys(("requeue", "no-requeue", "parsable", "wait", "W", "wrap", "test-only", "open-mode"), ""),
}


def check_duration(value: Any) -> str:
    """Return a duration as Slurm writes it.

    Raises:
        ValueError: it is none; YAML reads an unquoted 24:00:00 as a number.
    """
    if not isinstance(value, str) or not DURATION.fullmatch(value):
        raise ValueError(f'expected [days-]hours:minutes:seconds in quotes, such as "1-00:00:00", found {value!r}')
    return value


def seconds_of(duration: str) -> int:
    """Return the seconds of a duration in one of Slurm's formats.

    M, M:S, H:M:S; after `days-`: H, H:M, H:M:S (man sbatch, --time).
    """
    match = DURATION.fullmatch(duration)
    if match is None:
        raise ValueError(f"{duration!r} is no duration")
    numbers = [int(number) for number in match["rest"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(numbers) < 3:
        return numbers[0] * 60 + (numbers[1] if len(numbers) > 1 else 0)
    return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]


def megabytes_of(memory: str) -> int:
    """Return the megabytes of a size in Slurm's format; 0 where none is asked for."""
    number, unit = memory.rstrip("KMGT") or "0", memory.lstrip("0123456789") or "M"
    return int(int(number) * 1024.0 ** ("KMGT".index(unit) - 1))


class Model(BaseModel):
    """A section: unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Site(Model):
    """What all jobs of a site share."""

    account: str = Field(default="", description="the account that is charged; empty: your default")
    partition: str = Field(default="", description="the partition (queue); empty: the site's default")
    qos: str = Field(default="", description="the quality of service; empty: your default")
    constraint: str = Field(default="", description="features that a node must have, such as a100|h100")
    directives: tuple[str, ...] = Field(
        default=(), description="further options of sbatch and srun, one per line, such as --exclude=node7"
    )
    prologue: tuple[str, ...] = Field(
        default=(), description="shell lines before the program on the node, such as `module load cuda`"
    )
    python: str = Field(default="", description="the Python on the nodes; empty: the one that submits")
    log_folder: Path | None = Field(
        default=None, description="holds the logs of Dask workers; empty: `logs/slurm` of the service"
    )
    interface: str = Field(
        default="",
        description="the network interface of scheduler, workers and ranks, such as ib0; empty: Slurm's choice",
    )
    walltime: str = Field(default="1-00:00:00", description="the time limit of a job: [days-]hours:minutes:seconds")

    @field_validator("walltime", mode="before")
    @classmethod
    def _duration(cls, value: Any) -> Any:
        return check_duration(value)

    @field_validator("directives")
    @classmethod
    def _options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for line in value:
            if not re.fullmatch(r"--?[A-Za-z][^\n]*", line):
                raise ValueError(f"{line!r} is no option: expected one such as --exclude=node7")
            # -pgpu, -p gpu, --partition=gpu, --partition gpu
            name = re.split(r"[=\s]", line[2:])[0] if line.startswith("--") else line[1]
            if (key := OWN_OPTIONS.get(name)) is not None:
                instead = "jobs are found again and kept by it, so leave it out"
                if key:
                    only = " of the section `training` (a worker's job has one node)" if key in TRAINING_KEYS else ""
                    instead = f"write it as the key `{key}`{only}"
                raise ValueError(f"{line!r}: the service sets this option itself; {instead}")
        return value


class Resources(Site):
    """One job of a section."""

    cpus: int = Field(default=4, ge=1, description="CPUs per task (a worker job is one task)")
    memory: str = Field(
        default="16G",
        pattern=r"^(\d+[KMGT]?)?$",
        description="memory per node, such as 64G; 0: all of a node's; empty: the site's default",
    )
    gpus: int = Field(default=0, ge=0, description="GPUs per task")

    @field_validator("memory", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        """YAML reads an unquoted 0 or 64000 as a number."""
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_memory(self) -> Self:
        other = next((line for line in self.directives if line.startswith(("--mem-per-cpu", "--mem-per-gpu"))), "")
        if self.memory and other:
            raise ValueError(
                f"memory is {self.memory!r} and directives has {other!r}: Slurm takes one of the two. Fix: memory = '' (which "
                "leaves it to the directive), or remove the directive"
            )
        return self


class WorkerSection(Resources):
    """The Dask workers of a section: jobs of one node each, one worker process per GPU."""

    workers: int = Field(
        default=0, ge=0, description="worker processes per job; 0: one per GPU, or one per 4 CPUs where there is none"
    )
    threads_per_worker: int = Field(default=1, ge=1, description="shards at once in one worker process")
    jobs: int = Field(default=1, ge=1, description="jobs that are submitted at once")
    max_jobs: int = Field(default=8, ge=1, description="jobs at most: more are submitted while there is work for them")
    idle_seconds: float = Field(
        default=60.0, ge=0, description="a job that has had nothing to do for so many seconds is given back"
    )
    lifetime: str = Field(
        default="",
        description="a worker hands its work on and ends after this time; empty: 5 minutes before the limit",
    )
    lifetime_stagger: str = Field(
        default="00:01:00", description="lifetimes differ by up to this, so that not all end at once"
    )

    @field_validator("lifetime", "lifetime_stagger", mode="before")
    @classmethod
    def _durations(cls, value: Any) -> Any:
        return check_duration(value) if value else ""

    @property
    def num_workers(self) -> int:
        """The worker processes of one job."""
        return self.workers or self.gpus or max(1, self.cpus // 4)

    @property
    def lifetime_seconds(self) -> int:
        """Seconds after which a worker ends by itself."""
        if self.lifetime:
            return seconds_of(self.lifetime)
        walltime = seconds_of(self.walltime)
        return walltime - min(300, walltime // 5) - self.stagger_seconds

    @property
    def stagger_seconds(self) -> int:
        """Seconds by which lifetimes differ."""
        return seconds_of(self.lifetime_stagger) if self.lifetime_stagger else 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_jobs < self.jobs:
            raise ValueError(f"max_jobs is {self.max_jobs} and jobs is {self.jobs}: expected at least as many")
        last = self.lifetime_seconds + self.stagger_seconds
        if self.lifetime_seconds <= 0 or last >= seconds_of(self.walltime):
            raise ValueError(
                f"walltime is {self.walltime}, and a worker's lifetime of {self.lifetime or 'walltime less 5 minutes'} with a "
                f"lifetime_stagger of {self.lifetime_stagger} does not end before it: Slurm would kill workers amid their "
                "shards. Fix: a longer walltime or a shorter lifetime"
            )
        if self.gpus and self.num_workers != self.gpus:
            raise ValueError(
                f"workers is {self.workers} and gpus is {self.gpus}: a GPU takes one worker; set workers to 0"
            )
        return self


class TrainingSection(Resources):
    """The training's job: `nodes` x `tasks_per_node` processes, each with `gpus` GPUs and `cpus` CPUs."""

    nodes: int = Field(default=1, ge=1, description="nodes")
    tasks_per_node: int = Field(default=1, ge=1, description="processes per node; with GPUs: as many as a node has")
    gpus: Literal[0, 1] = Field(default=0, description="GPUs per process: 1, or 0 to train on CPUs")
    detached: bool = Field(
        default=False, description="submit with sbatch instead of srun: outlives the machine that the flow runs on"
    )
    max_restarts: int = Field(default=3, ge=0, description="resubmissions in a row that got no further")
    signal_seconds: int = Field(
        default=180,
        ge=30,
        description="seconds before the time limit at which the training is told to write a checkpoint and end",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if seconds_of(self.walltime) <= self.signal_seconds:
            raise ValueError(
                f"walltime is {self.walltime} and signal_seconds is {self.signal_seconds}: the training would be told to end "
                "as soon as it starts. Fix: a longer walltime"
            )
        return self


class SlurmSettings(Model):
    """A cluster file of `kind: slurm`."""

    kind: Literal["slurm"]
    site: Site = Site()
    extraction: WorkerSection = WorkerSection()
    kmeans: WorkerSection = WorkerSection()
    evaluation: WorkerSection = WorkerSection()
    training: TrainingSection = TrainingSection()
    poll_seconds: float = Field(default=5.0, gt=0, description="seconds between two questions to Slurm about its jobs")

    @model_validator(mode="before")
    @classmethod
    def _share(cls, content: Any) -> Any:
        """Give each section the site's keys that it does not have itself."""
        if not isinstance(content, dict):
            return content
        site = content.get("site") or {}
        sections = {name: content.get(name) or {} for name in SECTIONS}
        if not isinstance(site, dict) or not all(isinstance(section, dict) for section in sections.values()):
            return content
        return {**content, **{name: {**site, **section} for name, section in sections.items()}}
