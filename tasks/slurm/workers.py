"""Dask workers in Slurm jobs: submitted as a section of the cluster file says, replaced when they end, given back when idle.

dask-jobqueue starts the scheduler here and writes the job script. What it does not do is to notice that a job ended, was
cancelled or never started, so every few seconds `SlurmWorkers` compares three things: the jobs that it wants, the jobs that Slurm
has, and the workers that have answered. What is lost is submitted anew, as long as there is work for it.

Who reaches a Dask scheduler can run programs as its user. So scheduler and workers speak TLS only, with certificates that
are made for this cluster and lie in the log folder, readable by the user alone, as long as it lasts.

A job's comment begins with `hubert <id of the flow run at the top>`: by it jobs are found again and cancelled, whoever
submitted them.
"""

import asyncio
import logging
import math
import subprocess
import time
import uuid
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from dask_jobqueue.slurm import SLURMCluster
from distributed.deploy.cluster import Cluster
from prefect import get_run_logger, runtime

from tasks.service.settings import service_folder
from tasks.slurm.certificates import clock_problem, temporary_security
from tasks.slurm.commands import SlurmJob, SlurmUnreachable, cancel, escaped, find_job, find_jobs, job_options
from tasks.slurm.nodes import MAX_FAILURES, can_do_without, keep_off, leaving_out
from tasks.slurm.settings import WorkerSection
from tasks.slurm.worker_job import CONFIG_NAME, WorkerJob, job_arguments

LOST_SECONDS = 15.0  # a job whose workers are all gone for so long is cancelled and replaced
ENDING_SECONDS = (
    60.0  # how long an epilog may take before its job is replaced; how the job ended is only known after it
)
# Ends of a job that nobody outside it brought about (None: Slurm has forgotten it).
FRUITLESS = {"COMPLETED", "FAILED", "TIMEOUT", "OUT_OF_MEMORY", None}
CLOSE_SECONDS = 60.0  # how long the end of a stage waits for a Slurm that does not answer
MAX_FRUITLESS = 3  # jobs in a row that ended without a worker having answered
LOG_LINES = 15

Logger = logging.Logger | logging.LoggerAdapter[Any]


class SlurmWorkers(SLURMCluster):
    """The workers of one section for one flow run."""

    job_cls = WorkerJob
    scheduler: Any

    def __init__(self, section: WorkerSection, *, name: str, owner: str, poll_seconds: float, logger: Logger) -> None:
        """Start the scheduler and submit the first jobs.

        Args:
            section: what to ask for.
            name: the section's name, for people.
            owner: the id of the flow run that the jobs belong to.
            poll_seconds: how often Slurm is asked about the jobs.
            logger: gets what happens to the jobs.
        """
        self.section = section
        self.section_name = name
        self.comment = f"hubert {owner} {name} {uuid.uuid4().hex[:8]}"
        self.logs = section.log_folder or service_folder() / "logs" / "slurm"
        self.logger = logger
        self.poll_seconds = poll_seconds
        self.seen: dict[str, SlurmJob] = {}
        self.trouble = ""
        self.failure = ""
        self._fruitless = 0
        self._failures: dict[str, int] = {}  # fruitless jobs in a row by node
        self._left_out: set[str] = set()  # nodes that new jobs keep off
        self._ending: list[WorkerJob] = []  # replaced already, and their epilogs still run
        self._first_answer: float | None = None
        self._wishes: deque[tuple[float, int]] = deque()  # when, and how many jobs there was work for
        self._keeper: asyncio.Task[None] | None = None
        self._stop: asyncio.Event | None = None
        self.logs.mkdir(parents=True, exist_ok=True)
        self._options = job_options(section)
        options = [
            *self._options,  # first: of an option that is given twice Slurm takes the last
            f"--job-name=hubert-{name}",
            f"--comment={self.comment}",
            f"--output={escaped(self.logs)}/{name}-%j.log",
            "--no-requeue",  # what is lost is replaced at once, under a new id
        ]
        super().__init__(
            sbatch_options=options,
            config_name=CONFIG_NAME,
            name=f"hubert-{name}",
            security=temporary_security(),
            shared_temp_directory=str(self.logs),
            **job_arguments(section),
        )

    # What flows ask ---------------------------------------------------------------------------------------------

    def waits_for(self) -> str:
        """Return what is waited for, such as `job 17 is pending in partition gpu (Resources)`; empty if a worker is there."""
        if self.scheduler.workers:
            return ""
        if self.trouble:
            return self.trouble
        silent = " and its workers have not answered yet"
        jobs = [job.describe() + ("" if job.is_waiting else silent) for job in self.seen.values()]
        left_out = [f"nodes left out, as jobs ended there at once: {', '.join(sorted(self._left_out))}"] * bool(
            self._left_out
        )
        return "; ".join([*(jobs or ["the first job is being submitted"]), *left_out])

    # Keeping the jobs -------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        await super()._start()
        self._stop = asyncio.Event()
        self._keeper = asyncio.create_task(self._keep())

    async def _close(self) -> None:
        if self._keeper is not None and self._stop is not None:
            self._stop.set()
            await self._keeper
            self._keeper = None
        await super()._close()
        await self._cancel_leftovers()

    def _update_worker_status(self, op: str, msg: Any) -> None:
        """Take note; SpecCluster's own replacement of lost workers is `_keep`'s task here."""
        Cluster._update_worker_status(self, op, msg)  # noqa: SLF001

    def new_worker_spec(self) -> dict[str, Any]:
        """Return the next job, under a name that was never used before: the scheduler may still know the old one."""
        self._i += 1
        options = self.new_spec["options"]
        wanted = leaving_out(options["sbatch_options"], self._left_out)
        spec = {**self.new_spec, "options": {**options, "sbatch_options": wanted}}
        return {self._new_worker_name(self._i): spec}

    async def _keep(self) -> None:
        """Compare and mend until the cluster is closed. Whatever goes wrong, the next round may go well."""
        stop = self._stop
        while stop is not None and not stop.is_set():
            try:
                await self._mend()
                self.trouble = ""
            except SlurmUnreachable as error:
                self._complain(str(error))
            except Exception:
                self.logger.exception("The jobs of %s could not be looked after; trying again", self.name)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), self.poll_seconds)

    async def _mend(self) -> None:
        found = await asyncio.to_thread(find_jobs, comment=self.comment)
        self.seen = {job.job_id: job for job in found if job.is_live and job.state != "COMPLETING"}
        now = time.monotonic()
        for name, job in list(self.workers.items()):
            await self._check(name, job, now)
        ours = {job.job_id for job in self.workers.values()}
        if strangers := self.seen.keys() - ours:  # sbatch did not answer in time, and submitted nevertheless
            await asyncio.to_thread(cancel, strangers)
        for job in list(self._ending):
            ended = await asyncio.to_thread(find_job, str(job.job_id))
            if ended is None or ended.state != "COMPLETING":
                self._ending.remove(job)
                await self._ended(job, ended)
        await self._scale(now)

    async def _check(self, name: str, job: WorkerJob, now: float) -> None:
        """Forget a job that has ended; cancel one whose workers are gone although Slurm says that it runs."""
        if job.job_id is None:
            self._forget(name)
            self._blame(job.problem)
        elif job.job_id not in self.seen:
            ended = await asyncio.to_thread(find_job, job.job_id)
            if ended and ended.state == "COMPLETING" and not job.answered:
                if job.ending_since is None:
                    job.ending_since = now
                    self.logger.info("%s: job %s has ended, and its epilog runs", self.name, job.job_id)
                if now - job.ending_since >= ENDING_SECONDS:
                    self._forget(name)
                    self._ending.append(job)
                return
            self._forget(name)
            await self._ended(job, ended)
        elif self._workers_of(name):
            job.answered, job.silent_since = True, None
            self._fruitless = 0
            self._failures.pop(self.seen[job.job_id].nodes, None)
            self._first_answer = self._first_answer or now
        elif job.answered:
            job.silent_since = job.silent_since or now
            if now - job.silent_since > LOST_SECONDS:
                self.logger.warning("The workers of job %s are gone; it is cancelled and replaced", job.job_id)
                self._forget(name)
                await job.close()

    async def _ended(self, job: WorkerJob, ended: SlurmJob | None) -> None:
        how = ended.describe() if ended else f"job {job.job_id} is not known to Slurm any more"
        self.logger.info("%s: %s", self.name, how)
        if job.answered or (ended.state if ended else None) not in FRUITLESS:
            return
        self._fruitless += 1
        node = ended.nodes if ended else ""
        self._failures[node] = self._failures.get(node, 0) + 1
        path = self.logs / f"{self.section_name}-{job.job_id}.log"
        log = _read(path)
        cause = clock_problem(log) or (
            "the Python or the prologue of the section, or a network interface on which the nodes do not reach this machine; "
            "`hubert check` looks for it"
        )
        alone = not await self._leave_out(node, cause)
        if self._fruitless >= MAX_FRUITLESS and not self.scheduler.workers and (alone or len(self._failures) > 1):
            nodes = ", ".join(sorted(filter(None, self._failures)))
            where = f" on {nodes}" if nodes else ""
            self.failure = (
                f"{self._fruitless} jobs in a row ended before a worker answered{where}, the last one: {how}. Likely cause: "
                f"{cause}. The end of {path}:\n" + "\n".join(log.splitlines()[-LOG_LINES:])
            )

    async def _leave_out(self, node: str, cause: str) -> bool:
        """Keep further jobs off a node on which several in a row came to nothing; False if there is no other node."""
        if self._failures[node] < MAX_FAILURES or node in self._left_out:
            return True
        if not node or not await asyncio.to_thread(can_do_without, self._options, {*self._left_out, node}):
            return False
        self._left_out.add(node)
        self.logger.warning(
            "%s: %d jobs in a row ended on node %s before a worker answered; further jobs keep off it. Likely cause: %s",
            self.name,
            self._failures[node],
            node,
            cause,
        )
        waiting = [job.job_id for job in self.seen.values() if job.is_waiting]
        await asyncio.to_thread(keep_off, waiting, self._options, self._left_out)
        return True

    def _blame(self, problem: Exception | None) -> None:
        """Take note of a job that could not be submitted."""
        if isinstance(problem, SlurmUnreachable):
            raise problem
        text = problem.stderr.strip() if isinstance(problem, subprocess.CalledProcessError) else str(problem)
        self._fruitless += 1
        self._complain(f"Slurm refused a job: {text}")
        if self._fruitless >= MAX_FRUITLESS and not self.workers:
            self.failure = f"Slurm refused {self._fruitless} jobs in a row: {text}"

    def _complain(self, text: str) -> None:
        if text != self.trouble:
            self.logger.warning("%s: %s; trying again", self.name, text)
        self.trouble = text

    async def _scale(self, now: float) -> None:
        """Submit what is missing, and give back what there has been no work for in all of the last `idle_seconds`."""
        wanted = 0 if self.failure else self._wanted(now)
        self._wishes.append((now, wanted))
        while self._wishes[0][0] < now - self.section.idle_seconds:
            self._wishes.popleft()
        if wanted > len(self.worker_spec):
            while len(self.worker_spec) < wanted:
                self.worker_spec.update(self.new_worker_spec())
            await self._correct_state()
        surplus = len(self.worker_spec) - max(number for _, number in self._wishes)
        if surplus > 0:
            await self._give_back(surplus)

    def _wanted(self, now: float) -> int:
        """Return the number of jobs that there is work for."""
        section = self.section
        unfinished = sum(task.state in {"processing", "queued", "no-worker"} for task in self.scheduler.tasks.values())
        slots = section.num_workers * section.threads_per_worker
        wanted = min(section.max_jobs, math.ceil(unfinished / slots))
        is_new = self._first_answer is None or now - self._first_answer < section.idle_seconds
        return max(wanted, section.jobs) if is_new else wanted

    async def _give_back(self, count: int) -> None:
        """Cancel jobs that wait in the queue, then jobs whose workers are idle."""
        waiting = [name for name, job in self.workers.items() if self._is_waiting(job)]
        idle = [
            name
            for name in self.workers
            if (workers := self._workers_of(name)) and not any(worker.processing for worker in workers)
        ]
        for name in (waiting + idle)[:count]:
            names = [worker.name for worker in self._workers_of(name)]
            kept = len(names) - len(await self.scheduler.retire_workers(names=names, remove=True, close_workers=True))
            if names and kept:
                continue  # it holds results that nobody else has
            job = self.workers[name]
            self.logger.info("%s: job %s has nothing to do and is given back", self.name, job.job_id)
            self._forget(name)
            await job.close()

    def _is_waiting(self, job: WorkerJob) -> bool:
        return job.job_id in self.seen and self.seen[job.job_id].is_waiting

    def _workers_of(self, name: str) -> list[Any]:
        """Return the workers of a job that the scheduler knows."""
        names = {f"{name}{suffix}" for suffix in self.new_spec.get("group", [""])}
        return [worker for worker in self.scheduler.workers.values() if worker.name in names]

    def _forget(self, name: str) -> None:
        self.workers.pop(name, None)
        self.worker_spec.pop(name, None)

    async def _cancel_leftovers(self) -> None:
        """Cancel whatever carries this cluster's comment: no job may be left."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while True:
            try:
                await asyncio.to_thread(_cancel_by_comment, self.comment)
            except SlurmUnreachable as error:
                if time.monotonic() > deadline:
                    self.logger.warning("%s: %s; the workers end by themselves", self.name, error)
                    return
                await asyncio.sleep(1)
            else:
                return


def start_workers(section: WorkerSection, name: str, poll_seconds: float) -> SlurmWorkers:
    """Start the workers of a section for the surrounding flow run."""
    owner = str(runtime.flow_run.root_flow_run_id or "direct")
    return SlurmWorkers(section, name=name, owner=owner, poll_seconds=poll_seconds, logger=get_run_logger())


def cancel_workers(flow_run_id: str) -> None:
    """Cancel the worker jobs of a flow run and all flows below it.

    Raises:
        SlurmUnreachable: Slurm does not answer.
    """
    _cancel_by_comment(f"hubert {flow_run_id} ")


def _cancel_by_comment(comment: str) -> None:
    cancel([job.job_id for job in find_jobs(comment=comment)])


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        return f"(it cannot be read: {error})"
