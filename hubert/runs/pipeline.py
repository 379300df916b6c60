"""How the stages of one iteration hang together: what each one reads, and from where.

    manifest ─> features ─> kmeans ─> units ─> train ─> validate ─┬─> abx ─────┬─> outcome ─> next iteration
                                                                  └─> quality ─┘      └────> report

`hubert.runs.resolve` turns what a person asked for into `Resolved`, which is written down once and obeyed by every retry.
`Iteration` builds the stages from it, each when it is first asked for, since a key needs the finished inputs. The
command line and the flows go through these same objects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hubert.core.errors import ConfigError
from hubert.core.files import read_json, write_record
from hubert.core.paths import RunFolder
from hubert.core.stage import Stage
from hubert.data.stage import ManifestStage
from hubert.evaluation.abx.stage import ABXStage
from hubert.evaluation.checkpoints import Checkpoint, build_checkpoints
from hubert.evaluation.choice import Outcome
from hubert.evaluation.quality.stage import QualityStage
from hubert.evaluation.validate import ValidateStage
from hubert.features.source import FeatureSource
from hubert.features.stage import FeaturesStage
from hubert.report.stage import ReportStage
from hubert.runs.resolved import Resolved
from hubert.settings.recipe import IterationSettings
from hubert.settings.stages import EVALUATED, STAGES
from hubert.training.stage import TrainStage
from hubert.units.assign import UnitsStage
from hubert.units.kmeans import KMeansStage


@dataclass
class Iteration:
    """The stages of one iteration. Each property needs the stages before it to be finished."""

    resolved: Resolved

    @cached_property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(Path(self.resolved.run))

    @property
    def settings(self) -> IterationSettings:
        """The merged settings of this iteration."""
        return self.resolved.settings

    @property
    def source(self) -> FeatureSource:
        """What this iteration clusters."""
        return self.resolved.source

    @property
    def number(self) -> int:
        """The iteration's number, from 1."""
        return self.resolved.number

    @property
    def home(self) -> Path:
        """The iteration's folder."""
        return self.folder.iteration(self.number)

    @cached_property
    def manifest(self) -> ManifestStage:
        """All audio, checked, split into training and validation."""
        data = self.settings.data
        return ManifestStage(
            parent=self.folder.root,
            audio=self._paths(data.audio),
            validation_audio=self._paths(data.validation),
            data=data,
        )

    @cached_property
    def features(self) -> FeaturesStage:
        """Frames of the k-means sample."""
        stage = FeaturesStage(
            parent=self.home,
            manifest=self.manifest,
            source=self.source,
            features=self.settings.features,
            kmeans=self.settings.kmeans,
        )
        # A pruned sample will do where the codebook is there; another codebook needs the frames again.
        stage.accepts_pruned = self._codebook(stage).done() is not None
        return stage

    @cached_property
    def kmeans(self) -> KMeansStage:
        """The codebook."""
        return self._codebook(self.features)

    def _codebook(self, sample: FeaturesStage) -> KMeansStage:
        return KMeansStage(parent=self.home, sample=sample, kmeans=self.settings.kmeans, given=self.resolved.codebook)

    @cached_property
    def units(self) -> UnitsStage:
        """Units of every file."""
        return UnitsStage(parent=self.home, manifest=self.manifest, codebook=self.kmeans, units=self.settings.units)

    @cached_property
    def train(self) -> TrainStage:
        """Masked prediction of the units."""
        return TrainStage(
            parent=self.home,
            labels=self.units,
            train=self.settings.train,
            init=self.resolved.init,
            extend=self.resolved.extend,
        )

    @cached_property
    def validate(self) -> ValidateStage:
        """Losses of every checkpoint on the same crops and masks."""
        return ValidateStage(
            parent=self.home,
            labels=self.units,
            checkpoints=self.train.checkpoints(),
            train=self.settings.train,
            validation=self.settings.validation,
        )

    @cached_property
    def abx_manifest(self) -> ManifestStage | None:
        """The audio of the ABX items; None without an item file."""
        return self._extra_manifest(self.settings.abx.audio) if self.settings.abx.item else None

    @cached_property
    def abx(self) -> ABXStage | None:
        """ABX error rates of MFCC and of each layer; None without an item file."""
        if self.abx_manifest is None or self.settings.abx.item is None:
            return None
        return ABXStage(
            parent=self.home,
            manifest=self.abx_manifest,
            item=self._path(self.settings.abx.item),
            checkpoints=self.scored_checkpoints(),
            abx=self.settings.abx,
            features=self.settings.features,
        )

    @cached_property
    def quality_manifest(self) -> ManifestStage | None:
        """The audio that the alignments cover; None without alignments."""
        if not self.settings.quality.alignments:
            return None
        data = self.settings.data
        return self._extra_manifest(self.settings.quality.audio or (*data.audio, *data.validation))

    @cached_property
    def quality(self) -> QualityStage | None:
        """Purity and PNMI of the units and of each layer; None without alignments."""
        if self.quality_manifest is None or self.settings.quality.alignments is None:
            return None
        return QualityStage(
            parent=self.home,
            manifest=self.quality_manifest,
            alignments=self._path(self.settings.quality.alignments),
            codebook=self.kmeans,
            checkpoint=self.best_checkpoint(),
            # A layer is measured by as many units as the next iteration would cluster it into.
            num_units=self.resolved.recipe.iteration(self.number + 1).kmeans.num_units,
            quality=self.settings.quality,
        )

    @property
    def alignments(self) -> Path | None:
        """Where the phone alignments are, or were; None if the recipe names none."""
        name, data = self.settings.quality.alignments, Path(self.resolved.data)
        return None if not name else data if data.is_file() else data / name

    @cached_property
    def report(self) -> ReportStage:
        """The iteration's page."""
        return ReportStage(
            parent=self.home,
            run_folder=self.folder.root,
            number=self.number,
            resolved=self.resolved.model_dump(mode="json"),
            stages={stage.name: stage.folder for stage in self.evaluated()},
            outcome=self.outcome(),
            alignments=self.alignments,
        )

    def begin[Started: Stage](self, stage: Started) -> Started:
        """Note a stage's folder in `stages.json`, from where `hubert report` finds it without the corpus; return the stage.

        If it has another folder than before, the stages after it will have others too, so they are struck out.
        """
        path, folder = self.folder.stages(self.number), stage.folder.relative_to(self.folder.root).as_posix()
        noted: dict[str, str] = read_json(path) or {}
        if noted.get(stage.name) != folder:
            order = list(STAGES)
            earlier = order[: order.index(stage.name)]
            write_record(path, {name: noted[name] for name in earlier if name in noted} | {stage.name: folder})
        return stage

    def evaluated(self) -> list[Stage]:
        """Return all stages that come before the report."""
        stages: list[Stage | None] = [getattr(self, name) for name in EVALUATED]
        return [stage for stage in stages if stage is not None]

    def best_checkpoint(self) -> dict[str, Any]:
        """Return the checkpoint with the lowest masked cross-entropy: step, path, sha256."""
        return self._here(self.validate.figures()["best"])

    def _here(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a validated checkpoint with its path as it is now: the run may have been moved since."""
        return {**row, "path": self.folder.own(row["path"])}

    def scored_checkpoints(self) -> list[dict[str, Any]]:
        """Return the checkpoints whose layers ABX scores."""
        return self.train.checkpoints() if self.settings.abx.checkpoints == "all" else [self.best_checkpoint()]

    def outcome(self) -> Outcome:
        """Choose checkpoint and layer from the finished evaluation."""
        return Outcome.choose(
            number=self.number,
            best=self.best_checkpoint(),
            abx=self.abx.figures() if self.abx else None,
            quality=self.quality.figures() if self.quality else None,
        )

    def checkpoints(self) -> list[Checkpoint]:
        """Return the validated checkpoints that the next iteration may start from, by step."""
        return build_checkpoints(
            self.outcome(),
            [self._here(row) for row in self.validate.figures()["rows"]],
            self.abx.figures()["rows"] if self.abx else [],
            self.quality.figures().get("layers", []) if self.quality else [],
        )

    def check_paths(self) -> None:
        """Look for everything that the recipe expects in the data, the evaluation's too: not after days of training.

        Raises:
            ConfigError: something is not there; names it.
        """
        settings = self.settings
        self._paths((*settings.data.audio, *settings.data.validation))
        if settings.abx.item:
            self._paths((settings.abx.item, *settings.abx.audio))
        if settings.quality.alignments:
            self._paths((settings.quality.alignments, *settings.quality.audio))

    def _path(self, name: str) -> Path:
        data = Path(self.resolved.data)
        path = data / name if data.is_dir() else data
        if not path.exists():
            raise ConfigError(
                f"{path} does not exist: the recipe {self.resolved.recipe_name!r} expects {name!r} in {data}. Likely cause: that "
                "recipe is for another corpus. Fix: for any folder of audio take one that names no parts, such as 'base'"
            )
        return path

    def _paths(self, names: Sequence[str]) -> list[Path]:
        return [self._path(name) for name in names]

    def _extra_manifest(self, names: Sequence[str]) -> ManifestStage:
        # Items and alignments name whole files, and know their speakers.
        data = self.settings.data.model_copy(update={"max_segment_seconds": None, "speaker": "none"})
        return ManifestStage(parent=self.folder.root, audio=self._paths(names), data=data, split=False)
