"""Units: the codebook's nearest centroid for every frame of every file.

Labelling runs the features and the centroid search in one pass per shard and writes only units: parquet shards for
people and other tools, and flat memory-mapped tables for the trainer (`hubert.units.labels`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl

from hubert.core.errors import DataError
from hubert.core.files import atomic_write
from hubert.core.hashing import digest
from hubert.core.stage import Figures, Receipt, Spec, Stage
from hubert.data.manifest import read_manifest, read_parquet, scan_manifest
from hubert.data.split import plan_shards, shard_digests
from hubert.data.stage import ManifestStage
from hubert.features.chunks import ChunkRule, chunking
from hubert.features.extract import FeatureExtractor, extract
from hubert.features.source import FeatureSource
from hubert.settings.sections import FeatureSettings, UnitSettings
from hubert.units.codebook import Codebook
from hubert.units.kmeans import KMeansStage
from hubert.units.labels import write_table
from hubert.units.statistics import UnitStatistics

UNITS_SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "fileid": pl.String,
    "units": pl.List(pl.UInt16),
    "frame_rate": pl.Int32,
    "codebook": pl.String,
}


def label(
    rows: pl.DataFrame,
    extractor: FeatureExtractor,
    codebook: Codebook,
    *,
    codebook_key: str,
    batch_seconds: float,
    resample: bool,
) -> pl.DataFrame:
    """Label all rows of a manifest.

    Returns:
        `fileid, units, frame_rate, codebook` in the order of `rows`: (F,) units per file with F the number of frames,
        and in `codebook` the `codebook_key`, which says what made them.
    """
    codebook.check_source(extractor.source)
    found: list[list[np.ndarray]] = [[] for _ in range(len(rows))]
    for piece in extract(rows, extractor, batch_seconds=batch_seconds, resample=resample):
        found[piece.row].append(codebook.assign(piece.features).cpu().numpy().astype(np.uint16))
    return pl.DataFrame(
        {
            "fileid": rows["fileid"],
            "units": pl.Series([np.concatenate(pieces) for pieces in found], dtype=pl.List(pl.UInt16)),
            "frame_rate": pl.Series([codebook.frame_rate] * len(rows), dtype=pl.Int32),
            "codebook": pl.Series([codebook_key] * len(rows), dtype=pl.String),
        },
        schema=UNITS_SCHEMA,
    )


def write_units(path: Path, units: pl.DataFrame) -> None:
    """Write labelled files as one parquet shard."""
    with atomic_write(path) as temporary:
        units.write_parquet(temporary)


@dataclass(kw_only=True)
class UnitsStage(Stage):
    """Label the files of a manifest, training and validation, with a codebook."""

    name: ClassVar[str] = "units"
    counted: ClassVar[str] = "files"
    joins_shards: ClassVar[bool] = True
    parent: Path
    manifest: ManifestStage
    codebook: KMeansStage
    units: UnitSettings

    @property
    def num_units(self) -> int:
        """The number of units that files are labelled with."""
        return self.codebook.kmeans.num_units

    @property
    def _source(self) -> FeatureSource:
        return self.codebook.source

    @property
    def _features(self) -> FeatureSettings:
        return self.codebook.sample.features

    @property
    def _resample(self) -> bool:
        return self.manifest.data.resample

    @cached_property
    def _content(self) -> dict[str, str]:
        """What shards of equal rows share, whatever manifest they stand in."""
        return {
            "codebook": self.codebook.codebook_key,
            "source": digest(self._source.identity),
            "resample": str(self._resample),
        }

    @cached_property
    def _rule(self) -> dict[str, Any]:
        """The rule for long files, where it matters."""
        return self._chunking(
            pl.concat(scan_manifest(path).select("num_samples") for path in self.manifest.parts.values())
        )

    def _chunking(self, rows: pl.LazyFrame) -> dict[str, Any]:
        return {} if self._source.is_mfcc else chunking(rows, self._features)

    def settings(self) -> dict[str, Any]:
        return ({"resample": self._resample} if self._resample else {}) | self._rule

    def inputs(self) -> dict[str, str]:
        return {"manifest": self.manifest.key, **self._content}

    def make_plan(self) -> list[Spec]:
        specs = []
        for part, manifest in self.manifest.parts.items():
            rows = scan_manifest(manifest)
            bounds = plan_shards(rows, hours_per_shard=self.units.shard_hours)
            for (start, end), content in zip(bounds, shard_digests(rows, bounds), strict=True):
                shared = self._content | (self._chunking(rows.slice(start, end - start)) if self._rule else {})
                specs.append({"part": part, "start": start, "end": end, "digest": digest([content, shared])})
        return specs

    def tables(self) -> Mapping[str, Path]:
        return self.manifest.parts

    def reads(self) -> list[Path]:
        return [*self.manifest.parts.values(), self.codebook.path, *self._source.files]

    def work(self, spec: Spec) -> tuple[list[Path], Figures]:
        rows = read_manifest(self.manifest.parts[spec["part"]], start=spec["start"], end=spec["end"])
        codebook = Codebook.load(self.codebook.path)
        labelled = label(
            rows,
            FeatureExtractor(self._source, ChunkRule.of(self._features)),
            codebook,
            codebook_key=self.codebook.codebook_key,
            batch_seconds=self._features.batch_seconds,
            resample=self._resample,
        )
        output = self.folder / "shards" / f"{spec['digest'][:16]}.parquet"
        write_units(output, labelled)
        return [output], {"num_files": len(rows), "num_frames": int(labelled["units"].list.len().sum())}

    def finish(self, receipts: list[Receipt]) -> tuple[list[Path], Figures]:
        plan = self.plan()
        codebook = Codebook.load(self.codebook.path)
        figures: Figures = {"num_units": len(codebook), "frame_rate": codebook.frame_rate, **self._rule}
        outputs = []
        for part, manifest in self.manifest.parts.items():
            statistics = UnitStatistics(len(codebook))
            mine = [receipt for receipt in receipts if plan.specs[receipt.index]["part"] == part]
            shards = [(plan.specs[receipt.index], self.folder / next(iter(receipt.outputs))) for receipt in mine]
            write_table(
                self.table(part),
                self._chunks(manifest, shards, statistics),
                frame_rate=codebook.frame_rate,
                num_units=len(codebook),
                codebook=self.codebook.codebook_key,
                resample=self._resample,
            )
            outputs.append(self.table(part))
            figures[part] = {
                "num_files": sum(receipt.figures["num_files"] for receipt in mine),
                "num_frames": sum(receipt.figures["num_frames"] for receipt in mine),
                **statistics.figures(),
            }
        if "train" in figures:
            self._check_usage(figures["train"])
        return outputs, figures

    def _check_usage(self, usage: Figures) -> None:
        """Make sure that there is something to predict.

        Raises:
            DataError: nearly all training frames have one unit.
        """
        share, limit = usage["majority_share"], self.units.max_majority_share
        if share > limit:
            raise DataError(
                f"{share:.2%} of the {usage['num_frames']:,} training frames have the unit {usage['majority_unit']} (usage "
                f"perplexity {usage['usage_perplexity']:.2f} of {usage['num_units']} units); at most units.max_majority_share = "
                f"{limit} ({limit:.0%}) may: a model learns nothing from a label that is nearly always the same. Likely cause: "
                "the audio is silence, a constant (DC) or one file many times over; or the codebook was made from features of "
                "another scale or kind. Fix: listen to some files of the manifest, or fit the codebook on this corpus; if it is "
                "meant, raise `max_majority_share` under `units`"
            )

    def _chunks(
        self, manifest: Path, shards: list[tuple[Spec, Path]], statistics: UnitStatistics
    ) -> Iterator[dict[str, Any]]:
        """Yield the manifest's rows with their units, shard by shard, joined by `fileid`."""
        for spec, path in shards:
            rows = read_manifest(manifest, start=spec["start"], end=spec["end"])
            joined = rows.join(
                read_parquet(path, self.name), on="fileid", how="left", maintain_order="left", validate="1:1"
            )
            for units in joined["units"]:
                statistics.update(units.to_numpy())
            yield joined.to_dict(as_series=True)

    def table(self, part: str) -> Path:
        """Return the folder of the trainer's table of a part."""
        return self.folder / "tables" / part
