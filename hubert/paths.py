"""The one place that spells a path, and the one way in which a file is written.

    <runs>/<run>/                     a run: `RunFolder`
        manifest-1a2b3c4d/            one folder per stage and key: `hubert.stage`
        it1/
            features-…/ kmeans-…/ units-…/ train-…/ validate-…/ abx-…/ quality-…/ report-…/
            outcome.json              the checkpoint and layer that the iteration ends with, and why
            checkpoints.json          all checkpoints that the next iteration may start from
        it2/…
            choice.json               what this iteration started from, who chose it and why, settled once
            answer.json               what a person answered when `hubert-pretraining` asked
            resolved.toml             its settings, of the newest start; the command line goes on with them
        resolved/<attempt>.toml       what each start of a flow was asked to do

Every file is written under a temporary name that is unique to the attempt, flushed to disk and renamed, so a reader
sees a whole file or none, and two writers of the same content cannot hurt each other.
"""

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubert.errors import ConfigError

PROJECT = Path(__file__).resolve().parent.parent
DEPLOYMENTS = PROJECT / "deployments"
PRESETS = DEPLOYMENTS / "recipes" / "presets"


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by name (`demo`) or by path (`my/recipe.toml`)."""
    path = Path(name).expanduser()
    return path.resolve() if path.suffix == ".toml" or "/" in name else DEPLOYMENTS / "recipes" / f"{name}.toml"


def find_cluster(name: str) -> Path:
    """Return the file of a cluster's settings given by name (`local`) or by path (`my/site.yaml`)."""
    path = Path(name).expanduser()
    is_path = path.suffix in {".yaml", ".yml"} or "/" in name
    return path.resolve() if is_path else DEPLOYMENTS / "clusters" / f"{name}.yaml"


def runs_root() -> Path:
    """Return the folder that holds the runs: the variable HUBERT_RUNS, else `runs` in the project."""
    return Path(os.environ.get("HUBERT_RUNS") or PROJECT / "runs").expanduser().resolve()


def demo_corpus_folder() -> Path:
    """Return the folder of the speech that the demo makes: beside the runs, since all runs share it."""
    return runs_root() / "demo-corpus"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    root: Path

    @classmethod
    def of(cls, name: str) -> "RunFolder":
        """Return the folder of a run given by name (under `runs_root()`) or by path.

        Raises:
            ConfigError: the name would not be a plain folder name.
        """
        if "/" in name:
            return cls(Path(name).expanduser().resolve())
        if not re.fullmatch(r"[\w][\w.+-]*", name):
            raise ConfigError(f"run {name!r}: expected letters, digits, '.', '_', '+', '-' (or a path with '/')")
        return cls(runs_root() / name)

    @property
    def name(self) -> str:
        """The run's name, as it stands in MLflow and in the reports."""
        return self.root.name

    @property
    def report(self) -> Path:
        """The page of the whole run."""
        return self.root / "report.html"

    def iteration(self, number: int) -> Path:
        """Return the folder of an iteration."""
        return self.root / f"it{number}"

    def outcome(self, number: int) -> Path:
        """Return the file that says which checkpoint and layer an iteration ends with."""
        return self.iteration(number) / "outcome.json"

    def candidates(self, number: int) -> Path:
        """Return the file with the checkpoints of an iteration that the next one may start from."""
        return self.iteration(number) / "checkpoints.json"

    def answer(self, number: int) -> Path:
        """Return the file with what a person answered when asked for the teacher of an iteration."""
        return self.iteration(number) / "answer.json"

    def choice(self, number: int) -> Path:
        """Return the file that says which teacher an iteration started from."""
        return self.iteration(number) / "choice.json"

    def settings(self, number: int) -> Path:
        """Return the file with the resolved settings of the newest start of an iteration."""
        return self.iteration(number) / "resolved.toml"

    def resolved(self, attempt: str) -> Path:
        """Return the file with the resolved settings of one start of a flow."""
        return self.root / "resolved" / f"{attempt}.toml"

    def trainings(self) -> list[Path]:
        """Return the folders of all trainings of the run."""
        return sorted(path for number in self.iterations() for path in self.iteration(number).glob("train-*"))

    def iterations(self) -> list[int]:
        """Return the numbers of the iterations that have a folder."""
        found = (re.fullmatch(r"it(\d+)", path.name) for path in self.root.glob("it*"))
        return sorted(int(match[1]) for match in found if match)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush it to disk and rename it to `path`.

    Folders work too. An exception (or a kill) leaves `path` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        yield temporary
        for file in [temporary] if temporary.is_file() else [*temporary.rglob("*")]:
            flush(file)
        if temporary.is_dir():
            flush(temporary)
        temporary.rename(path)
    except BaseException:
        remove(temporary)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Ask the system to put a file or folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> int:
    """Remove a file or folder if it is there; return the bytes that it held."""
    if path.is_dir() and not path.is_symlink():
        size = sum(remove(child) for child in path.iterdir())
        path.rmdir()
        return size
    if not path.exists() and not path.is_symlink():
        return 0
    size = path.lstat().st_size
    path.unlink(missing_ok=True)
    return size


def folder_size(path: Path) -> int:
    """Return the bytes of all files below a folder; files that vanish meanwhile count as 0."""
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                total += (Path(directory) / name).lstat().st_size
            except FileNotFoundError:
                continue
    return total


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def look_again(folder: Path) -> None:
    """Open a folder: a machine on a shared disk (NFS) may remember for a minute that a name is not there, until it does."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        next(entries, None)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if the file is missing or not one (an interrupted write of another tool)."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return content if isinstance(content, dict) else None
