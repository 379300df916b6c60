"""A launcher that trains in this process: the real trainer, without the seconds that the start of a process takes."""

from dataclasses import dataclass
from pathlib import Path

from hubert.training.exit_states import PROCESS, End, Exit, ExitRecord, judge
from hubert.training.job import Job
from hubert.training.launch import Launcher, RunningTrainer, begin_attempt, log_size
from hubert.training.trainer import Trainer
from tests.support.training import ALONE


@dataclass(frozen=True)
class Ended(RunningTrainer):
    """A trainer that has done its work."""

    folder: Path
    attempt: str
    log_start: int

    @property
    def name(self) -> str:
        return "this process"

    def is_alive(self) -> bool:
        return False

    def stop(self, *, timeout: float = 0) -> None:
        """It has ended."""

    def kill(self) -> None:
        """It has ended."""

    def end(self, code: Exit | None) -> tuple[End, str]:
        return judge(PROCESS, code), ""


class HereLauncher(Launcher):
    """Trains at once."""

    def launch(self, job: Job) -> Ended:
        job = begin_attempt(job)
        start = log_size(job.folder)
        with ExitRecord(job, is_main=True) as record:
            record.finish(Trainer(job, ALONE).run())
        return Ended(job.folder, job.attempt, start)

    def find_running(self, folder: Path) -> None:  # noqa: ARG002
        return None
