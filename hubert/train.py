"""The training stage, and the trainer's command: `python -m hubert.train JOB.json`.

`TrainStage` starts the trainer as a process of its own (`hubert.training.launch`), follows it, and starts it again from its last
checkpoint when it was killed. The process itself is `main`: it needs torch, numpy, soundfile, pydantic and safetensors,
talks to no server, and says how it ended by its exit code and in `exit.json` (`hubert.training.exit_states.Exit`).
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hubert.core.errors import ConfigError
from hubert.training.distributed import join_world
from hubert.training.exit_states import Exit, ExitRecord
from hubert.training.job import new_attempt, read_job
from hubert.training.ranks import find_place
from hubert.training.trainer import Trainer

# The trainer's command --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as a job file says. Returns the exit code, one of `hubert.training.exit_states.Exit`."""
    parser = argparse.ArgumentParser(prog="python -m hubert.train", description="Train as a job file says.")
    parser.add_argument("job", type=Path, help="job file (JSON or TOML), as the training stage writes it")
    parser.add_argument("--attempt", default="", help="only if the job file is still this attempt's")
    options = parser.parse_args(arguments)
    try:
        job = read_job(options.job)
        rank, _, _ = find_place(os.environ)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return Exit.CONFIG
    if options.attempt and job.attempt != options.attempt:
        print(f"{options.job} is attempt {job.attempt}'s now, this is {options.attempt}: it ends", file=sys.stderr)
        return Exit.LOST
    by_hand = not job.attempt
    if by_hand:
        job = job.model_copy(update={"attempt": _attempt_of(os.environ)})
    with ExitRecord(job, is_main=rank == 0) as record, join_world(job.device) as world:
        trainer = Trainer(job, world, take_folder=by_hand)
        with _stopped_by_signals(trainer):
            code = trainer.run()
            record.finish(code, trainer.stop_reason if code is Exit.INTERRUPTED else "")
    if record.message:
        print(f"{record.code.name.lower()}: {record.message}", file=sys.stderr)
    if record.code is Exit.INTERRUPTED and rank:
        # Else srun and torchrun would end the main process, which still writes the checkpoint, because this one failed.
        return Exit.FINISHED
    return record.code


def _attempt_of(environment: Mapping[str, str]) -> str:
    """Return an attempt id that all processes of one start by hand agree on."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return f"torchrun-{environment['TORCHELASTIC_RUN_ID']}-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if "SLURM_STEP_NUM_TASKS" in environment:
        return "-".join(
            ("slurm", *(environment.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")))
        )
    return new_attempt()


@contextmanager
def _stopped_by_signals(trainer: Trainer) -> Iterator[None]:
    """Let SIGTERM, SIGUSR1 and Ctrl-C end the training after the step and a checkpoint; a second Ctrl-C ends it at once."""

    def request(number: int, _: FrameType | None) -> None:
        trainer.stop_requested = True
        trainer.stop_reason = f"the signal was {signal.Signals(number).name}"
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
