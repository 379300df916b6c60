"""`hubert check CLUSTER`: does a site give what its cluster file asks for?

For each section one small job is submitted with that section's options, all at once. On its node
`tasks.clusters.probe` tries what the section's work will need. The answer comes back over the shared folder, which is
one of the things that are tried.
"""

import json
import os
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from socket import create_server
from typing import Any

import psutil

from hubert.core.errors import ConfigError
from hubert.core.files import read_json, remove
from hubert.core.paths import PROJECT, find_cluster, runs_root
from hubert.core.text import align
from tasks.clusters import probe as site_probe
from tasks.clusters.preflight import find_problem
from tasks.clusters.settings import AddressSettings, LocalSettings, read_cluster
from tasks.service.settings import find_service
from tasks.slurm.commands import SlurmJob, SlurmUnreachable, cancel, escaped, find_jobs, job_options, run
from tasks.slurm.settings import SECTIONS, Resources, SlurmSettings, TrainingSection, seconds_of

POLL_SECONDS = 0.5
JOB_MINUTES = 10  # time limit of a job: imports from a slow shared disk take minutes
SYNC_SECONDS = 10.0  # how long a file may take to be seen on this side of a shared folder
LEAST_PYTHON = [3, 12]
LOG_LINES = 8
WORKERS = ("distributed", "prefect_dask", "tasks.stage")
PACKAGES = {
    "extraction": (*WORKERS, "torchaudio", "hubert.data.stage", "hubert.features.stage", "hubert.units.assign"),
    "kmeans": (*WORKERS, "dask_ml.cluster", "tasks.kmeans"),
    "evaluation": (
        *WORKERS,
        "fastabx",
        "hubert.evaluation.validate",
        "hubert.evaluation.abx.stage",
        "hubert.evaluation.quality.stage",
    ),
    "training": ("torch", "hubert.train"),
}
CHECKS = ("queue", "node", "python", "packages", "GPU", "shared folder", "Prefect API", "scheduler")
CAUSES = {
    "queue": "the partition is busy, or the section asks for what is seldom free; `squeue --start` says when to expect it",
    "job": "the prologue or the Python of the section does not work on the node",
    "python": "`python` or `prologue` of the section leads to another Python; name one of version 3.12 or later",
    "packages": "the project is not installed in the Python of the nodes: set `python` to one on a shared disk that has it",
    "GPU": "the partition has no GPUs or fewer, or torch is built without CUDA; see `gpus`, `partition`, `constraint`",
    "shared folder": "the runs do not lie on a disk that the nodes share: set HUBERT_RUNS to a folder that all of them see",
    "Prefect API": "the service listens on 127.0.0.1, which nodes cannot reach: `hubert up --host` on an internal interface",
    "scheduler": "a firewall, or the wrong network: set `interface` to the one by which nodes and this machine reach each other",
    "workers": "too little memory, or another library than the locked one",
}

Result = tuple[bool, str]
Say = Callable[[str], object]


@dataclass
class Column:
    """What was found for one section; `job` is its job on Slurm."""

    section: str
    found: dict[str, Result] = field(default_factory=dict)
    job_id: str = ""
    submitted: float = 0.0
    over: bool = False

    def note(self, check: str, text: str, *, works: bool = True) -> None:
        """Write down one result."""
        self.found[check] = (works, text)

    def end(self, check: str, text: str) -> None:
        """Write down why nothing more can be found out."""
        self.note(check, text, works=False)
        self.over = True


def check(cluster: str, wait_seconds: float, say: Say = print) -> bool:
    """Try a cluster, print the table and what is wrong; returns whether all of it works.

    Raises:
        ConfigError: the cluster file is missing or wrong.
        SlurmUnreachable: Slurm does not answer.
    """
    settings = read_cluster(cluster)
    if isinstance(settings, SlurmSettings):
        columns = _check_slurm(settings, wait_seconds, say)
    else:
        columns = [_check_workers(cluster, settings)]
    for line in report(find_cluster(cluster), columns):
        say(line)
    return all(works for column in columns for works, _ in column.found.values())


def report(path: Path, columns: list[Column]) -> Iterator[str]:
    """Give the lines of the table, and under it what does not work, the likely cause and the fix."""
    checks = [check for check in (*CHECKS, "workers", "job") if any(check in column.found for column in columns)]
    rows = [("", *(column.section for column in columns))]
    for name in checks:
        cells = (column.found.get(name) for column in columns)
        rows.append((name, *("-" if cell is None else _cell(name, cell) for cell in cells)))
    yield from align(rows)
    wrong = [
        (column.section, name, text) for column in columns for name, (works, text) in column.found.items() if not works
    ]
    if not wrong:
        yield f"\nall of it works: {path}"
        return
    yield f"\n{len(wrong)} of the checks failed for {path}:"
    causes = dict.fromkeys(name for _, name, _ in wrong)
    for name in causes:
        yield from (f"  {section}: {name}: {text}" for section, failed, text in wrong if failed == name)
        if name in CAUSES:
            yield f"    likely cause: {CAUSES[name]}"


def _cell(name: str, result: Result) -> str:
    works, text = result
    if not works:
        return "FAILED"
    return text if name in {"queue", "node", "workers"} else f"ok: {text.split(' (')[0]}"


# Slurm ------------------------------------------------------------------------------------------------------------


def _check_slurm(settings: SlurmSettings, wait_seconds: float, say: Say) -> list[Column]:
    folder = runs_root() / f"check-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    token = uuid.uuid4().hex
    (folder / "here").write_text(token)
    columns = [Column(name) for name in SECTIONS]
    comment = f"hubert check {folder.name}"
    try:
        with ExitStack() as listeners:
            for column in columns:
                section = getattr(settings, column.section)
                address = listeners.enter_context(_listening(section.interface))
                wanted = _wanted(column.section, section, folder, token) | {"scheduler": address}
                _submit(column, section, wanted, comment)
            jobs = ", ".join(f"{column.section} {column.job_id}" for column in columns if column.job_id)
            say(f"submitted: {jobs or 'nothing'}")
            _follow(columns, comment, folder, wait_seconds, say)
    finally:
        cancel([job.job_id for job in find_jobs(comment=comment)])
        remove(folder)
    return columns


def _submit(column: Column, section: Resources, wanted: Mapping[str, Any], comment: str) -> None:
    try:
        problem = find_problem(section)
    except SlurmUnreachable as error:
        column.end("job", str(error))
        return
    if problem is not None and not problem.may_pass:
        column.end(problem.key or "job", f"{problem.what}, and Slurm would never start such a job: {problem.why}")
        return
    limit = f"{min(JOB_MINUTES, max(1, seconds_of(section.walltime) // 60))}:00"
    options = job_options(section.model_copy(update={"walltime": limit}))
    log = Path(wanted["folder"]) / f"{column.section}.log"
    lines = [
        "#!/usr/bin/env bash",
        *section.prologue,
        f"export HUBERT_PROBE={shlex.quote(json.dumps(dict(wanted)))}",
        f"{shlex.quote(section.python or sys.executable)} - <<'END_OF_PROBE'",
        Path(site_probe.__file__).read_text(),
        "END_OF_PROBE",
    ]
    script = log.with_suffix(".sh")
    script.write_text("\n".join(lines) + "\n")
    named = [
        f"--job-name=hubert-check-{column.section}",
        f"--comment={comment}",
        f"--output={escaped(log)}",
        f"--chdir={PROJECT}",
    ]
    column.submitted = time.time()
    try:
        column.job_id = run(["sbatch", "--parsable", *named, *options, str(script)]).strip().split(";")[0]
    except SlurmUnreachable as error:
        column.end("job", str(error))
    except subprocess.CalledProcessError as error:
        column.end("job", error.stderr.strip())


def _follow(columns: list[Column], comment: str, folder: Path, wait_seconds: float, say: Say) -> None:
    """Wait until every job has answered, ended without an answer, or has waited for too long."""
    reasons: dict[str, str] = {}
    ended: dict[str, float] = {}
    while waiting := [column for column in columns if not column.over]:
        jobs = {job.job_id: job for job in find_jobs(comment=comment)}
        for column in waiting:
            job = jobs.get(column.job_id)
            answer = read_json(folder / f"{column.section}.json")
            if answer is not None:
                column.note("queue", f"{max(0.0, answer.pop('started') - column.submitted):.0f} s")
                column.found |= {name: (bool(works), str(text)) for name, (works, text) in answer.items()}
                column.over = True
            elif job is None or not job.is_live:
                if time.time() - ended.setdefault(column.section, time.time()) > SYNC_SECONDS:
                    _note_silence(column, folder)
            elif job.is_waiting:
                _note_waiting(column, job, wait_seconds, reasons, say)
        time.sleep(POLL_SECONDS)


def _note_waiting(column: Column, job: SlurmJob, wait_seconds: float, reasons: dict[str, str], say: Say) -> None:
    if reasons.get(job.job_id) != job.reason:
        reasons[job.job_id] = job.reason
        say(f"{column.section}: {job.describe()}")
    if time.time() - column.submitted > wait_seconds:
        column.end("queue", f"{job.describe()} after {wait_seconds:.0f} s; it was cancelled")
        cancel([job.job_id])


def _note_silence(column: Column, folder: Path) -> None:
    log = folder / f"{column.section}.log"
    if log.exists():
        lines = log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:]
        column.end(
            "job", f"job {column.job_id} ended without an answer; the end of its log:\n      " + "\n      ".join(lines)
        )
    else:
        column.end("shared folder", f"job {column.job_id} ended, and nothing that it wrote is seen in {folder}")


@contextmanager
def _listening(interface: str) -> Iterator[list[Any]]:
    """Listen where a stage's Dask scheduler would; gives the address."""
    with create_server((_own_address(interface), 0), backlog=16) as server:
        yield list(server.getsockname())


def _own_address(interface: str) -> str:
    """Return this machine's IPv4 address on an interface; without one the address by which others see it, as Dask does.

    Raises:
        ConfigError: there is no such interface here.
    """
    if not interface:
        from distributed.utils import get_ip

        return str(get_ip())
    known = psutil.net_if_addrs()
    found = [each.address for each in known.get(interface, ()) if each.family.name == "AF_INET"]
    if not found:
        raise ConfigError(
            f"interface is {interface!r}, and this machine has none such with an IPv4 address: {', '.join(known)}"
        )
    return found[0]


# Without Slurm ----------------------------------------------------------------------------------------------------


def _check_workers(cluster: str, settings: LocalSettings | AddressSettings) -> Column:
    """Try what the flows would run on: this machine's workers, or a running scheduler's."""
    from tasks.local import connected

    folder = runs_root() / f"check-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    token = uuid.uuid4().hex
    (folder / "here").write_text(token)
    column = Column("local" if isinstance(settings, LocalSettings) else settings.address)
    packages = tuple(dict.fromkeys(name for names in PACKAGES.values() for name in names))
    try:
        with _listening("lo" if isinstance(settings, LocalSettings) else "") as address, connected(cluster) as client:
            client.wait_for_workers(1, timeout=60)
            wanted = _wanted("local", Resources(), folder, token) | {"packages": packages, "scheduler": address}
            workers = list(client.scheduler_info(n_workers=-1)["workers"])
            answer = client.run(site_probe.probe, wanted, workers=workers[:1])[workers[0]]
            answer.pop("started")
            column.note("workers", f"{len(workers)} started")
            column.found |= {name: (bool(works), str(text)) for name, (works, text) in answer.items()}
    except (OSError, TimeoutError) as error:
        column.end("workers", f"{type(error).__name__}: {error}")
    finally:
        remove(folder)
    return column


def _wanted(name: str, section: Resources, folder: Path, token: str) -> dict[str, Any]:
    service = find_service()
    per_node = section.tasks_per_node if isinstance(section, TrainingSection) else 1
    return {
        "section": name,
        "python": LEAST_PYTHON,
        "packages": PACKAGES.get(name, ()),
        "folder": str(folder),
        "token": token,
        "api": os.environ.get("PREFECT_API_URL") or (service.settings.api_url if service else ""),
        "interface": section.interface,
        "gpus": section.gpus * per_node,
    }
