"""Trainings as Slurm jobs: submitted with srun (or the same srun inside sbatch), found again, watched, stopped.

<training's folder>/
    slurm.json      all jobs of this training, newest last: attempt, job id, srun's process, how it ended in Slurm's words
    launch.sh       what each task runs: prologue, environment, the trainer
    cancelled.json  the attempt that this service itself stopped, so that nobody takes it for a person's scancel

srun is a process in a session of its own, so the death of the flow does not touch it. An attempt is written down before it
is submitted and stands in the job's comment, so that a flow which dies in between finds its job all the same.
"""

import platform
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hubert.core.errors import ConfigError, TransientError
from hubert.core.files import look_again, read_json, write_record
from hubert.core.process import ProcessId, exit_status
from hubert.training.exit_states import FORGOTTEN, REFUSED, End, Exit, judge
from hubert.training.job import Job
from hubert.training.launch import (
    MAX_BACKOFF_SECONDS,
    STOP_SECONDS,
    Launcher,
    RunningTrainer,
    begin_attempt,
    find_running,
    log_size,
    slurm_jobs,
    was_cancelled,
)
from tasks.slurm import commands as slurm
from tasks.slurm.nodes import MAX_FAILURES, can_do_without
from tasks.slurm.settings import SlurmSettings
from tasks.slurm.training_job import COMMENT, comment, sbatch, script, srun, start

QUICK_SECONDS = 0.5  # between two questions as long as a job is not in the queue, or is about to end
KILL_SECONDS = 15.0  # between the end of a stop's patience and the end of ours
BACKOFF_SECONDS = 10.0  # a node that died is only marked after a while
# Ends of a job that its node may have brought about.
AT_ONCE = {"COMPLETED", "FAILED", "NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED"}

Say = Callable[[str], object]


class SlurmLauncher(Launcher):
    """Trainings as jobs of a cluster file's section `training`. `say` is told when Slurm does not answer."""

    def __init__(self, settings: SlurmSettings, say: Say) -> None:
        self.section = settings.training
        self.poll_seconds = settings.poll_seconds
        self._say = say

    def launch(self, job: Job) -> RunningTrainer:
        """Submit a job; as long as Slurm is silent, or its queue full, try again.

        Raises:
            ConfigError: Slurm refuses it.
        """
        return self._patiently(lambda: self._submit(job), "The training is not submitted yet")

    def _submit(self, job: Job) -> RunningTrainer:
        job = begin_attempt(job)
        folder, attempt = job.folder, job.attempt
        left_out = self._nodes_left_out(folder)
        (folder / "launch.sh").write_text(script(self.section, folder))
        log_start = log_size(folder)
        entry = {"attempt": attempt, "job_id": "", "submitted_at": time.time(), "srun": None, "ended": ""}
        if left_out:
            entry["left_out"] = sorted(left_out)
        write_jobs(folder, [*slurm_jobs(folder), entry])
        try:
            if self.section.detached:
                entry["job_id"] = slurm.run(sbatch(self.section, folder, attempt, left_out)).strip().split(";")[0]
            else:
                entry["srun"] = start(srun(self.section, folder, attempt, left_out), folder).as_dict()
        except subprocess.CalledProcessError as error:
            raise refused(folder, entry, error.stderr) from error
        write_entry(folder, entry)
        trainer = SlurmTrainer(folder, entry, log_start, self.poll_seconds)
        while not trainer.is_seen() and trainer.is_alive():
            time.sleep(QUICK_SECONDS)
        if not trainer.is_seen():
            with (folder / "train.log").open("rb") as log:
                log.seek(log_start)
                raise refused(folder, entry, log.read().decode(errors="replace"))
        return trainer

    def _nodes_left_out(self, folder: Path) -> set[str]:
        """Return the nodes on which the last jobs of a training ended before a trainer had started, if there are others."""
        failures: dict[str, int] = {}
        for entry in slurm_jobs(folder):
            node = entry.get("node", "")
            failures[node] = failures.get(node, 0) + 1 if entry.get("started") is False else 0
        found = {node for node, count in failures.items() if node and count >= MAX_FAILURES}
        if not found or not can_do_without(slurm.job_options(self.section), found):
            return set()
        self._say(
            f"the training's job keeps off {', '.join(sorted(found))}: {MAX_FAILURES} jobs in a row ended there before the "
            "trainer had started (see its log)"
        )
        return found

    def find_running(self, folder: Path) -> RunningTrainer | None:
        """Return the live job of a folder, else a live trainer that was started on this machine.

        A job of an older attempt is cancelled: it could only find out that it lost the folder.
        """
        folder = folder.resolve()
        entries = {entry["attempt"]: entry for entry in slurm_jobs(folder)}
        if entries:
            owner = (read_json(folder / "attempt.json") or {}).get("attempt")
            question = "Whether the training's job is alive is not known"
            live = self._patiently(lambda: slurm.find_jobs(comment=f"{COMMENT} "), question)
            ours = {attempt: job for job in live if (attempt := job.comment.split()[-1]) in entries and job.is_live}
            slurm.cancel(job.job_id for attempt, job in ours.items() if attempt != owner)
            if owner in entries and not entries[owner]["ended"]:
                trainer = SlurmTrainer(folder, entries[owner], log_size(folder), self.poll_seconds)
                if trainer.is_alive():
                    return trainer
        local = find_running(folder)
        # A rank on this very machine has a record too; its job has ended, or it would have been found above.
        return local if local is not None and local.attempt not in entries else None

    def pause(self, failures: int) -> float:
        return min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2 ** (failures - 1))

    def _patiently[Result](self, ask: Callable[[], Result], so: str) -> Result:
        """Ask Slurm until it answers: nothing may be concluded from its silence; `so` says what that means meanwhile."""
        pause, said = self.poll_seconds, ""
        while True:
            try:
                return ask()
            except slurm.SlurmUnreachable as error:
                if str(error) != said:
                    self._say(f"{error}. {so}; trying again")
                said = str(error)
                time.sleep(pause)
                pause = min(MAX_BACKOFF_SECONDS, 1.5 * pause)


class SlurmTrainer(RunningTrainer):
    """A training's job, from its submission to its end."""

    def __init__(self, folder: Path, entry: dict[str, Any], log_start: int, poll_seconds: float) -> None:
        self.folder = folder
        self.attempt = entry["attempt"]
        self.log_start = log_start
        self._entry = entry
        self._poll_seconds = poll_seconds
        self._srun = ProcessId.read(entry["srun"]) if entry["srun"] else None
        self._job: slurm.SlurmJob | None = None
        self._alive = True
        self._forgotten = False
        self._orphaned = ""  # how the job lost its srun, if it did and nothing was left that runs in it
        self._silence = ""
        self._asked_at = -poll_seconds

    @property
    def name(self) -> str:
        return f"job {self._entry['job_id']}" if self._entry["job_id"] else "a job that Slurm does not know yet"

    def is_seen(self) -> bool:
        """Return True if Slurm knows the job."""
        return self._job is not None

    def state(self) -> str:
        if self._silence:
            return self._silence
        if self._job is None:
            return ""
        left_out = self._entry.get("left_out")
        return self._job.describe() + (
            f"; it keeps off {', '.join(left_out)}, where jobs ended at once" if left_out else ""
        )

    def is_alive(self) -> bool:
        """Return True if the job waits or runs; Slurm is asked every few seconds, and its silence changes nothing."""
        wait = self._poll_seconds if self.is_seen() else min(QUICK_SECONDS, self._poll_seconds)
        if time.monotonic() - self._asked_at >= wait:
            self._ask()
        return self._alive

    def _ask(self) -> None:
        srun_lives = self._srun is None or self._srun.is_alive()  # before the question: its job may appear meanwhile
        try:
            job = self._find()
            self._silence = ""
            if job is None:
                # Not in the queue yet, or forgotten; srun submits only while it lives, sbatch has submitted.
                self._forgotten = bool(self._entry["job_id"])
                self._alive = not self._forgotten and self._srun is not None and srun_lives
                return
            self._job = job
            if not self._entry["job_id"]:
                self._entry["job_id"] = job.job_id
                write_entry(self.folder, self._entry)
            if job.is_live and not srun_lives and self._is_here():
                self._give_up_orphan(job)
            self._alive = job.is_live and not self._orphaned
        except slurm.SlurmUnreachable as error:
            self._silence = f"{error}. Nothing is concluded from that; {self.name} is followed by its files"
        finally:
            self._asked_at = time.monotonic()
        if not self._alive and not self._entry["ended"]:
            self._entry["ended"] = self._job.state if self._job is not None else FORGOTTEN
            self._note_node()
            write_entry(self.folder, self._entry)

    def _note_node(self) -> None:
        """Write down where a job of one node ended, and whether a trainer had started in it."""
        if (
            self._job is not None
            and self._job.state in AT_ONCE
            and self._job.nodes
            and not set("[,") & set(self._job.nodes)
        ):
            look_again(self.folder)  # the node wrote there
            trainer = read_json(self.folder / "trainer.json") or {}
            self._entry |= {"node": self._job.nodes, "started": trainer.get("attempt") == self.attempt}

    def _give_up_orphan(self, job: slurm.SlurmJob) -> None:
        """Cancel a job whose srun is gone if no trainer is left in it: it would wait, or hold its nodes, for nothing."""
        if job.is_waiting or (job.state == "RUNNING" and not slurm.steps_of(job.job_id)):
            self._orphaned = f"its srun died, and {self.name} was left without a trainer"
            slurm.cancel([job.job_id])

    def _find(self) -> slurm.SlurmJob | None:
        if self._entry["job_id"]:
            return slurm.find_job(self._entry["job_id"])
        found = slurm.find_jobs(comment=comment(self.folder, self.attempt), every_state=True)
        return found[0] if found else None

    def _is_here(self) -> bool:
        """Return True if srun was started on this machine, so that its death can be seen."""
        return self._srun is not None and self._srun.host == platform.node()

    def end(self, code: Exit | None) -> tuple[End, str]:
        asked = was_cancelled(self)
        if self._orphaned:
            return judge("FAILED", code, asked=asked), self._orphaned
        if self._job is None or self._forgotten:
            return judge(FORGOTTEN, code, asked=asked), f"Slurm does not know {self.name} any more"
        where = f" on {self._job.nodes}" if self._job.nodes else ""
        number = exit_status(self._srun) if self._srun is not None else None
        if self._job.state == "CANCELLED" and number is not None and number < 0:
            # Slurm takes back the job of an srun that is killed, and calls that as it calls a person's scancel.
            killed = f"its srun was killed by {signal.Signals(-number).name}, and with it {self.name}{where}"
            return judge("FAILED", code, asked=asked), killed
        return judge(self._job.state, code, asked=asked), f"Slurm says {self._job.state} of {self.name}{where}"

    def stop(self, *, timeout: float = STOP_SECONDS) -> None:
        """Stop it: a job that waits at once, one that runs after its step and a checkpoint, by force after `timeout`."""
        write_record(self.folder / "cancelled.json", {"attempt": self.attempt, "at": time.time()})
        self._poll_seconds = QUICK_SECONDS
        self._ask()
        if not self.is_seen() and self._srun is not None:
            self._srun.signal(signal.SIGTERM)  # srun takes back what it has submitted meanwhile
        if self._job is not None and self._alive:
            with_patience = not self._job.is_waiting
            self._send(["--signal=TERM"] if with_patience else [])
            if with_patience:
                self._wait(timeout)
        for options in ([], ["--signal=KILL", "--full"]):
            if self._alive and self.is_seen():
                self._send(options)
        self._wait(KILL_SECONDS)

    def is_waiting(self) -> bool:
        return self._job is None or self._job.is_waiting or self._job.state in {"SUSPENDED", "STOPPED"}

    def kill(self) -> None:
        """Kill all its processes; a job that is still there after that is cancelled."""
        self._poll_seconds = QUICK_SECONDS
        for options in (["--signal=KILL", "--full"], []):
            if self.is_alive():
                self._send(options)
                self._wait(KILL_SECONDS)

    def _send(self, options: list[str]) -> None:
        """Give the job's id to scancel. Slurm's silence is waited out: a job that was cancelled must not go on.

        Raises:
            SlurmUnreachable: it was silent for STOP_SECONDS.
        """
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            try:
                slurm.run(["scancel", "--quiet", *options, self._entry["job_id"]])
            except subprocess.CalledProcessError:
                self._ask()  # it has ended meanwhile
            except slurm.SlurmUnreachable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(self._poll_seconds)
                continue
            return

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.is_alive() and time.monotonic() < deadline:
            time.sleep(QUICK_SECONDS / 2)


# What is written down -------------------------------------------------------------------------------------------------


def refused(folder: Path, entry: dict[str, Any], said: str) -> ConfigError | TransientError:
    """Return the error for a submission that came to nothing, and write that down."""
    write_entry(folder, {**entry, "ended": REFUSED})
    if slurm.may_pass(said):
        return slurm.SlurmUnreachable(f"the training in {folder} could not be submitted: {said.strip()}")
    end = judge(REFUSED, None)
    return ConfigError(f"training in {folder}: {end.name}: {end.says}. Slurm said: {said.strip()}")


def write_jobs(folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Write down all jobs of a training."""
    write_record(folder / "slurm.json", {"jobs": jobs})


def write_entry(folder: Path, entry: dict[str, Any]) -> None:
    """Write down what is new of one job."""
    write_jobs(folder, [entry if other["attempt"] == entry["attempt"] else other for other in slurm_jobs(folder)])
