"""The manifest stage: list the audio, check every file once, split off validation.

    manifest-1a2b3c4d/
        listing-train.parquet …     what was found, before the check
        shards/                     checked rows and rejected files, per shard
        everything.parquet          all usable rows
        train.parquet, validation.parquet
        rejected.parquet            path, fileid, reason of every file that cannot be used

The key is a digest of what was found (fileid, size, time of change, span, speaker), so a changed or added file leads to a
new manifest, and only the shards that it falls into are checked again.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import polars as pl

from hubert.core.errors import ConfigError
from hubert.core.files import atomic_write
from hubert.core.frames import SAMPLE_RATE
from hubert.core.hashing import digest
from hubert.core.stage import Figures, Receipt, Spec, Stage
from hubert.data.listing import COPIES, MACOS, describe_skipped, list_audio
from hubert.data.manifest import (
    MANIFEST_EXTENSIONS,
    read_manifest,
    read_parquet,
    reading,
    scan_manifest,
    write_manifest,
)
from hubert.data.schema import check_unique, cut_segments
from hubert.data.split import manifest_digest, plan_shards, shard_digests, split_manifest
from hubert.data.verify import check_rejected, verify_rows
from hubert.settings.sections import DataSettings

log = logging.getLogger(__name__)

TRAIN, VALIDATION = "train", "validation"
PLACE = ("path", "archive")  # the columns that say where a row's audio is


@dataclass(kw_only=True)
class ManifestStage(Stage):
    """All audio of a run, checked. With `split`, its training and validation parts; else only `everything`."""

    name: ClassVar[str] = "manifest"
    counted: ClassVar[str] = "files"
    joins_shards: ClassVar[bool] = True
    parent: Path
    audio: Sequence[Path]
    validation_audio: Sequence[Path] = ()
    data: DataSettings
    split: bool = True

    @cached_property
    def _listing(self) -> dict[str, pl.LazyFrame]:
        parts = {TRAIN: self.audio, VALIDATION: self.validation_audio}
        self._skipped: Counter[str] = Counter()
        return {
            part: list_audio(paths, speaker=self.data.speaker, skipped=self._skipped)
            for part, paths in parts.items()
            if paths
        }

    def __getstate__(self) -> dict[str, Any]:
        """Leave the listing behind: a shard reads its rows from the stage's folder."""
        _ = self.key
        return {name: value for name, value in vars(self).items() if name != "_listing"}

    def settings(self) -> dict[str, Any]:
        splitting = {"validation_fraction", "min_validation_files"}
        used = self.data.key_settings()
        if not self.split or self.validation_audio:
            used = {name: value for name, value in used.items() if name not in splitting}
        return used | {"split": self.split}

    def inputs(self) -> dict[str, str]:
        return {part: manifest_digest(rows, "speaker") for part, rows in self._listing.items()}

    def done(self) -> Figures | None:
        """Return the content of `done.json`.

        Raises:
            ConfigError: the same files lie elsewhere now: the finished stages name them by their old place.
        """
        content = super().done()
        if content is not None and content["figures"]["sources"] != self._sources:
            raise ConfigError(
                f"{self.folder} was made from {content['figures']['sources']}, and the same files are now given as "
                f"{self._sources}. Give the old place (a link to the new one will do), or use another run"
            )
        if content is not None and content["figures"]["places"] != self._places:
            raise ConfigError(
                f"{self.folder} was made from the same files as {', '.join(self._sources)} now names, with other paths. "
                "Put links at the old paths and the old paths into the manifest, or use another run"
            )
        return content

    @property
    def _sources(self) -> list[str]:
        return [str(path) for path in (*self.audio, *self.validation_audio)]

    @cached_property
    def _places(self) -> dict[str, str]:
        """What stands for the paths that a person's manifests name; a folder's follow from `_sources`."""
        parts = {TRAIN: self.audio, VALIDATION: self.validation_audio}
        return {
            part: manifest_digest(rows, *PLACE)
            for part, rows in self._listing.items()
            if any(path.name.lower().endswith(MANIFEST_EXTENSIONS) for path in parts[part])
        }

    def make_plan(self) -> list[Spec]:
        specs = []
        for part, rows in self._listing.items():
            write_manifest(rows, self._listed(part))
            bounds = plan_shards(rows, hours_per_shard=self.data.shard_hours)
            checks = [self.data.verify, self.data.resample]
            # A shard's file holds whole rows, so only equal rows may take it over: speakers and places too.
            for (start, end), content in zip(bounds, shard_digests(rows, bounds, "speaker", *PLACE), strict=True):
                specs.append({"part": part, "start": start, "end": end, "digest": digest([content, checks])})
        return specs

    def tables(self) -> dict[str, Path]:
        parts = {TRAIN: self.audio, VALIDATION: self.validation_audio}
        return {part: self._listed(part) for part, paths in parts.items() if paths}

    def planned_files(self) -> list[Path]:
        return list(self.tables().values())

    def work(self, spec: Spec) -> tuple[list[Path], Figures]:
        rows = read_manifest(self._listed(spec["part"]), start=spec["start"], end=spec["end"])
        good, rejected = verify_rows(rows, verify=self.data.verify, resample=self.data.resample)
        outputs = [self.folder / "shards" / f"{spec['digest'][:16]}-{kind}.parquet" for kind in ("good", "rejected")]
        for output, frame in zip(outputs, (good, rejected), strict=True):
            with atomic_write(output) as temporary:
                frame.write_parquet(temporary)
        return outputs, {"num_good": len(good), "num_rejected": len(rejected)}

    def finish(self, receipts: list[Receipt]) -> tuple[list[Path], Figures]:
        plan = self.plan()
        parts: dict[str, list[pl.LazyFrame]] = {}
        rejected = []
        for receipt in receipts:
            good_shard, rejected_shard = (self.folder / name for name in receipt.outputs)
            parts.setdefault(plan.specs[receipt.index]["part"], []).append(pl.scan_parquet(good_shard, glob=False))
            rejected.append(read_parquet(rejected_shard, self.name))
        names = pl.concat(rejected)
        with atomic_write(self.rejected) as temporary:  # before the check, so that a person can read it all
            names.write_parquet(temporary)
        total = sum(receipt.figures["num_good"] + receipt.figures["num_rejected"] for receipt in receipts)
        check_rejected(names, num_total=total, max_rejected=self.data.max_rejected)
        usable = {
            part: cut_segments(pl.concat(frames), self.data.max_segment_seconds) for part, frames in parts.items()
        }
        everything = pl.concat(usable.values())
        with reading(self.folder / "shards", self.name):
            check_unique(everything)
            write_manifest(everything, self.everything)
        outputs = [self.everything, self.rejected]
        figures: Figures = {
            "num_rejected": len(names),
            **self._count_skipped(),
            "sources": self._sources,
            "places": self._places,
            **extent(scan_manifest(self.everything)),
        }
        if self.split:
            split = self._split(usable)
            for part, path in ((TRAIN, self.train), (VALIDATION, self.validation)):
                write_manifest(split[part], path)
                figures[part] = extent(scan_manifest(path))
                outputs.append(path)
        return outputs, figures

    def _count_skipped(self) -> Figures:
        """Count the files that were not taken, and say so on one line."""
        _ = self._listing  # counts them
        skipped = self._skipped
        if skipped:
            log.warning("%s: not taken: %s", self.label, describe_skipped(skipped))
        others = {name: count for name, count in skipped.most_common() if name not in {MACOS, COPIES}}
        return {
            "num_skipped_suffixes": sum(others.values()),
            "num_skipped_macos": skipped[MACOS],
            "num_skipped_copies": skipped[COPIES],
            "skipped_suffixes": others,
        }

    def _split(self, usable: dict[str, pl.LazyFrame]) -> dict[str, pl.LazyFrame]:
        if VALIDATION in usable:
            return usable
        train, validation = split_manifest(
            scan_manifest(self.everything),
            validation_fraction=self.data.validation_fraction,
            min_validation_files=self.data.min_validation_files,
        )
        return {TRAIN: train, VALIDATION: validation}

    def _listed(self, part: str) -> Path:
        return self.folder / f"listing-{part}.parquet"

    @property
    def everything(self) -> Path:
        """All usable rows."""
        return self.folder / "everything.parquet"

    @property
    def train(self) -> Path:
        """The rows that are trained on."""
        return self.folder / "train.parquet"

    @property
    def validation(self) -> Path:
        """The rows that are held out."""
        return self.folder / "validation.parquet"

    @property
    def parts(self) -> Mapping[str, Path]:
        """The rows that are labelled, by part."""
        return {TRAIN: self.train, VALIDATION: self.validation}

    @property
    def rejected(self) -> Path:
        """Files that cannot be used, and why."""
        return self.folder / "rejected.parquet"


def extent(rows: pl.LazyFrame) -> dict[str, Any]:
    """Return the number of files (or segments) and hours of a manifest."""
    found = (
        rows.select(pl.len().alias("num_files"), pl.col("num_samples").sum())
        .collect(engine="streaming")
        .row(0, named=True)
    )
    return {"num_files": found["num_files"], "hours": found["num_samples"] / SAMPLE_RATE / 3600}
