"""Stages whose files exist already, under a key that is given: inputs of other stages, for tests and benchmarks.

They are the real stages; only the key and the place of the files are not their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hubert.data.stage import ManifestStage
from hubert.features.source import FeatureSource
from hubert.features.stage import FeaturesStage
from hubert.settings.sections import DataSettings, FeatureSettings, KMeansSettings, UnitSettings
from hubert.units.assign import UnitsStage
from hubert.units.kmeans import KMeansStage


@dataclass(kw_only=True)
class GivenManifest(ManifestStage):
    """One manifest file, which is all parts."""

    file: Path
    given_key: str

    @cached_property
    def key(self) -> str:
        """The key that was given."""
        return self.given_key

    @property
    def everything(self) -> Path:
        """The file."""
        return self.file

    train = validation = everything

    @property
    def parts(self) -> Mapping[str, Path]:
        """The file as training data."""
        return {"train": self.file}


@dataclass(kw_only=True)
class GivenFrames(FeaturesStage):
    """Frames in some files."""

    files: list[Path]
    given_key: str

    @cached_property
    def key(self) -> str:
        """The key that was given."""
        return self.given_key

    def shards(self) -> list[Path]:
        """Return the files."""
        return self.files


@dataclass(kw_only=True)
class GivenCodebookStage(KMeansStage):
    """A codebook in a file."""

    file: Path
    given_key: str

    @property
    def path(self) -> Path:
        """The file."""
        return self.file

    @property
    def codebook_key(self) -> str:
        """The key that was given."""
        return self.given_key


@dataclass(kw_only=True)
class GivenLabels(UnitsStage):
    """One table of labelled audio, which is every part."""

    folder_of_table: Path
    given_key: str

    @cached_property
    def key(self) -> str:
        """The key that was given."""
        return self.given_key

    def table(self, part: str) -> Path:  # noqa: ARG002  (it is every part)
        """Return the table."""
        return self.folder_of_table


def manifest_in(file: Path, key: str = "m") -> GivenManifest:
    """Return a manifest file as a stage."""
    return GivenManifest(parent=file.parent, audio=(), data=DataSettings(), file=file, given_key=key)


def frames_in(
    files: list[Path],
    source: FeatureSource | None = None,
    features: FeatureSettings | None = None,
    *,
    key: str = "f",
) -> GivenFrames:
    """Return files of frames as a stage; MFCCs unless another source is given."""
    folder = files[0].parent if files else Path()
    return GivenFrames(
        parent=folder,
        manifest=manifest_in(folder / "manifest.parquet"),
        source=source or FeatureSource(),
        features=features or FeatureSettings(),
        kmeans=KMeansSettings(),
        files=files,
        given_key=key,
    )


def codebook_in(
    file: Path,
    source: FeatureSource | None = None,
    features: FeatureSettings | None = None,
    *,
    key: str = "c",
    num_units: int = 100,
) -> GivenCodebookStage:
    """Return a codebook's file as a stage, with what it was fitted on."""
    kmeans = KMeansSettings(num_units=num_units)
    sample = frames_in([], source, features)
    return GivenCodebookStage(parent=file.parent, sample=sample, kmeans=kmeans, file=file, given_key=key)


def labels_in(table: Path, num_units: int, *, key: str = "t") -> GivenLabels:
    """Return a table of labelled audio as a stage."""
    return GivenLabels(
        parent=table.parent,
        manifest=manifest_in(table / "manifest.parquet"),
        codebook=codebook_in(table / "codebook.safetensors", num_units=num_units),
        units=UnitSettings(),
        folder_of_table=table,
        given_key=key,
    )
