"""ABX error rates of speech representations, as in ZeroSpeech 2021, computed by fastabx.

Three occurrences A, B and X of phones (or triphones) in the same context: X is the phone of A and not of B. It is an
error if the representation of X is farther from A than from B (dynamic time warping over angular distances); a tie
counts half. *Within* speaker all three are of one speaker; *across*, X is of another. Chance is 0.5, but on few items
not exactly, so a rate is always shown with its number of items and cells.

Scores are made in a process of their own, `python -m hubert.evaluation.abx.job job.json`, because they depend on the
order in which polars builds the cells, which several threads leave to chance: 28.48 to 28.53 % were seen on the same
features. One job scores many representations (MFCC and every layer), so the imports are paid once:

    results = score_in_subprocess(ABXJob(items=..., representations=..., output=...))

All representations of a job are scored on the same items: those that have all their frames in every one of them.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import polars as pl
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from tqdm import tqdm

from hubert.core.errors import ConfigError, DataError, HubertError, TransientError
from hubert.core.files import read_json, write_json
from hubert.core.paths import PROJECT
from hubert.evaluation.abx.features import FeatureFolder
from hubert.evaluation.abx.items import read_items
from hubert.evaluation.abx.score import ABXResult, ScoreSettings, score_representations

_EXIT_CODES = {DataError: 65, ConfigError: 78}  # of sysexits.h: EX_DATAERR, EX_CONFIG


class Representation(BaseModel):
    """Features to score: a folder that `FeatureFolder` reads, and their frame rate in Hz."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    features: Path
    frame_rate: float = Field(gt=0)


class ABXJob(ScoreSettings):
    """What `python -m hubert.evaluation.abx.job` scores: each representation on each item file (name -> path)."""

    items: dict[str, Path] = Field(min_length=1)
    representations: tuple[Representation, ...] = Field(min_length=1)
    output: Path
    num_threads: int = Field(default=0, ge=0, description="torch's threads; 0: its default")

    @field_validator("output")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return path.absolute()

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [representation.name for representation in self.representations]
        if len(set(names)) < len(names):
            raise ValueError(f"representations must have different names, found {names}")
        return self


def score_in_subprocess(job: ABXJob) -> list[ABXResult]:
    """Run a job in a process of its own; write `job.output` (JSON, atomically) and return its results.

    Raises:
        ConfigError, DataError: what the process raised, in its words.
        TransientError: the process was killed (memory, a lost machine).
        HubertError: it failed otherwise; with the end of what it wrote.
    """
    search_path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"POLARS_MAX_THREADS": "1", "PYTHONPATH": search_path}
    with tempfile.TemporaryDirectory(prefix="hubert-abx-") as scratch:
        job_file, error_file = Path(scratch) / "job.json", Path(scratch) / "stderr"
        job_file.write_text(job.model_dump_json(), encoding="utf-8")
        with error_file.open("wb") as errors:
            code = _run(
                [sys.executable, "-m", "hubert.evaluation.abx.job", str(job_file)],
                environment,
                errors,
                len(job.representations) * len(job.items),
            )
        message = error_file.read_text(encoding="utf-8", errors="replace").strip()
    for kind, exit_code in _EXIT_CODES.items():
        if code == exit_code:
            raise kind(message)
    if code < 0:
        raise TransientError(
            f"the ABX process was killed by signal {-code} (likely cause of 9: memory); "
            f"it had written: {message[-500:]!r}"
        )
    if code:
        raise HubertError(f"the ABX process ended with exit code {code}:\n{message[-4000:]}")
    return read_results(job.output)


def read_results(path: Path) -> list[ABXResult]:
    """Read what a job has written.

    Raises:
        DataError: the file is missing or something else.
    """
    content = read_json(path)
    if content is None or "results" not in content:
        raise DataError(
            f"{path}: expected the results of an ABX job, found {'something else' if content else 'nothing'}"
        )
    return [ABXResult(**row) for row in content["results"]]


def _run(command: list[str], environment: dict[str, str], errors: Any, total: int) -> int:
    """Run the job's process with a progress bar, one step per line that it prints. It never outlives this call."""
    with (
        tqdm(total=total, desc="ABX", unit="score", disable=None) as bar,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        try:
            for _ in process.stdout or ():
                bar.update()
            return process.wait()
        finally:
            process.kill()  # nothing, if it has ended


def run_job(job: ABXJob) -> list[ABXResult]:
    """Run a job in this process, printing each result, and write `job.output`."""
    if job.num_threads:
        torch.set_num_threads(job.num_threads)
    folders = {one.name: (FeatureFolder(one.features), one.frame_rate) for one in job.representations}
    fileids = list(next(iter(folders.values()))[0])
    item_sets = {name: read_items(path, fileids) for name, path in job.items.items()}
    results = []
    for result in score_representations(folders, item_sets, job):
        print(result, flush=True)
        results.append(result)
    versions = {name: version(name) for name in ("fastabx", "polars", "torch", "torchdtw")}
    settings = job.model_dump(mode="json", include=set(ScoreSettings.model_fields))
    write_json(
        job.output, {"results": [asdict(result) for result in results], "settings": settings, "versions": versions}
    )
    return results


def main(arguments: list[str]) -> int:
    """Run the job file named on the command line; its errors go to stderr, their kind into the exit code."""
    try:
        if len(arguments) != 1:
            raise ConfigError(f"expected one argument, the job file; found {arguments}")
        try:
            job = ABXJob.model_validate(json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
        except (ValidationError, json.JSONDecodeError, OSError) as error:
            raise ConfigError(f"{arguments[0]}: expected an ABX job: {error}") from error
        if pl.thread_pool_size() > 1:  # started by hand: again, with one thread
            score_in_subprocess(job)
        else:
            run_job(job)
    except HubertError as error:
        print(error, file=sys.stderr)
        return _EXIT_CODES.get(type(error), 1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
