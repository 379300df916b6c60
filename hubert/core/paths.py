"""The one place that spells a path, and the one way in which a file is written.

    <runs>/<run>/                     a run: `RunFolder`
        manifest-1a2b3c4d/            one folder per stage and key: `hubert.core.stage`
        it1/
            features-…/ kmeans-…/ units-…/ train-…/ validate-…/ abx-…/ quality-…/ report-…/
            unfinished.html           what `hubert report` shows of an iteration that is not finished
            stages.json               the folders of its stages, each noted when it was started
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

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hubert.core.errors import ConfigError

PROJECT = Path(__file__).resolve().parents[2]
DEPLOYMENTS = PROJECT / "deployments"
PRESETS = DEPLOYMENTS / "recipes" / "presets"
RUN_NAME = r"[\w][\w.+-]*"  # of a run that is given by its name


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by name (`demo`) or by path (`my/recipe.toml`)."""
    path = Path(name).expanduser()
    return path.resolve() if path.suffix == ".toml" or "/" in name else DEPLOYMENTS / "recipes" / f"{name}.toml"


def find_cluster(name: str) -> Path:
    """Return the file of a cluster's settings given by name (`local`) or by path (`my/site.yaml`)."""
    path = Path(name).expanduser()
    is_path = path.suffix in {".yaml", ".yml"} or "/" in name
    return path.resolve() if is_path else DEPLOYMENTS / "clusters" / f"{name}.yaml"


def spell_for_worker(name: str, path: Path) -> str:
    """Return how a worker, in another folder, finds a file of deployments: by its name if it has one there, else by its path."""
    return name if name == path.stem else str(path)


def known_recipes() -> list[str]:
    """Return the names of the recipes in deployments/recipes."""
    return sorted(path.stem for path in (DEPLOYMENTS / "recipes").glob("*.toml"))


def known_clusters() -> list[str]:
    """Return the names of the cluster files in deployments/clusters."""
    return sorted(path.stem for path in (DEPLOYMENTS / "clusters").glob("*.yaml"))


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
        if not re.fullmatch(RUN_NAME, name):
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

    def unfinished(self, number: int) -> Path:
        """Return the page of an iteration that has no report yet."""
        return self.iteration(number) / "unfinished.html"

    def outcome(self, number: int) -> Path:
        """Return the file that says which checkpoint and layer an iteration ends with."""
        return self.iteration(number) / "outcome.json"

    def stages(self, number: int) -> Path:
        """Return the file that names the folders of an iteration's stages."""
        return self.iteration(number) / "stages.json"

    def checkpoints(self, number: int) -> Path:
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

    def own(self, checkpoint: str) -> str:
        """Return where a checkpoint of this run lies now: a run that was moved names its old place."""
        found = re.search(r"/(it\d+)/(train-[0-9a-f]{8})/(step-\d+)/?$", checkpoint)
        return checkpoint if found is None else str(self.root.joinpath(*found.groups()))

    def trainings(self) -> list[Path]:
        """Return the folders of all trainings of the run."""
        return sorted(path for number in self.iterations() for path in self.iteration(number).glob("train-*"))

    def iterations(self) -> list[int]:
        """Return the numbers of the iterations that have a folder."""
        found = (re.fullmatch(r"it(\d+)", path.name) for path in self.root.glob("it*"))
        return sorted(int(match[1]) for match in found if match)
