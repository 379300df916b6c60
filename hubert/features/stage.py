"""What is clustered: Kaldi MFCCs at 100 Hz without a teacher, one layer of the teacher at 50 Hz with one.

`FeatureSource` says which, `FeatureExtractor` computes it, and `FeaturesStage` writes the frames of the k-means
sample. Features of the other files are never stored: labelling computes them and keeps only the units.

Short files go through in batches, long ones (`hubert.features.chunks`) chunk by chunk, so memory does not grow with a file.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch

from hubert.core.files import atomic_write
from hubert.core.frames import SAMPLE_RATE, num_units_of
from hubert.core.hashing import digest
from hubert.core.stage import Figures, Receipt, Spec, Stage
from hubert.data.manifest import read_parquet, reading, scan_manifest
from hubert.data.split import manifest_digest, plan_shards, select_sample, shard_digests
from hubert.data.stage import ManifestStage
from hubert.features.chunks import ChunkRule, chunking
from hubert.features.extract import FeatureExtractor, extract
from hubert.features.frames_file import FrameWriter
from hubert.features.source import FeatureSource
from hubert.settings.sections import FeatureSettings, KMeansSettings


@dataclass(kw_only=True)
class FeaturesStage(Stage):
    """Frames of the k-means sample: some utterances (paper: 10 %), chosen by a hash of seed and fileid."""

    name: ClassVar[str] = "features"
    counted: ClassVar[str] = "files"
    parent: Path
    manifest: ManifestStage
    source: FeatureSource
    features: FeatureSettings
    kmeans: KMeansSettings

    @cached_property
    def _sample(self) -> pl.DataFrame:
        with reading(self.manifest.train, "manifest"):
            return select_sample(
                scan_manifest(self.manifest.train),
                fraction=self.kmeans.sample_fraction,
                max_hours=self.kmeans.sample_hours,
                min_files=self.kmeans.min_sample_files,
                seed=self.kmeans.seed,
            ).collect(engine="streaming")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the sample's rows behind: a shard reads its own part from the plan's folder."""
        _ = self.key
        return {name: value for name, value in vars(self).items() if name != "_sample"}

    def settings(self) -> dict[str, Any]:
        resample = {"resample": self.manifest.data.resample} if self.manifest.data.resample else {}
        return resample | self._chunking(self._sample)

    def _chunking(self, rows: pl.DataFrame) -> dict[str, Any]:
        return {} if self.source.is_mfcc else chunking(rows, self.features)

    def inputs(self) -> dict[str, str]:
        # The rows that were drawn, not the manifest: a file that was added and not drawn changes nothing here.
        return {"sample": manifest_digest(self._sample), "source": digest(self.source.identity)}

    def make_plan(self) -> list[Spec]:
        rows = self._sample
        with atomic_write(self.folder / "sample.parquet") as temporary:
            rows.write_parquet(temporary)
        bounds = plan_shards(rows, hours_per_shard=self.features.shard_hours)
        specs = []
        for (start, end), content in zip(bounds, shard_digests(rows, bounds), strict=True):
            rule = self._chunking(rows[start:end])
            shared = [self.source.identity, self.manifest.data.resample, *rule.values()]
            specs.append({"start": start, "end": end, "digest": digest([content, *shared])})
        return specs

    def tables(self) -> dict[str, Path]:
        return {"": self.folder / "sample.parquet"}

    def planned_files(self) -> list[Path]:
        return list(self.tables().values())

    def reads(self) -> list[Path]:
        return [self.manifest.train, *self.source.files]

    def work(self, spec: Spec) -> tuple[list[Path], Figures]:
        rows = read_parquet(self.folder / "sample.parquet", self.name)[spec["start"] : spec["end"]]
        extractor = FeatureExtractor(self.source, ChunkRule.of(self.features))
        pieces = extract(
            rows, extractor, batch_seconds=self.features.batch_seconds, resample=self.manifest.data.resample
        )
        ends = np.cumsum(num_units_of(rows["num_samples"].to_numpy(), self.source.frame_rate)).tolist()
        starts = [0, *ends]
        dtype = torch.float32 if self.source.is_mfcc else torch.float16
        output = self.folder / "shards" / f"{spec['digest'][:16]}.safetensors"
        with atomic_write(output) as temporary, FrameWriter(temporary, ends[-1], dtype) as writer:
            for piece in pieces:
                writer.write(starts[piece.row] + piece.start, piece.features)
        hours = rows["num_samples"].sum() / SAMPLE_RATE / 3600
        return [output], {"num_files": len(rows), "num_frames": ends[-1], "hours": hours}

    def finish(self, receipts: list[Receipt]) -> tuple[list[Path], Figures]:
        total = {
            name: sum(receipt.figures[name] for receipt in receipts) for name in ("num_files", "num_frames", "hours")
        }
        return [self.folder / "sample.parquet"], {
            **total,
            "frame_rate": self.source.frame_rate,
            "source": self.source.identity,
        }

    def shards(self) -> list[Path]:
        """Return the files that hold the frames, in the order of the plan."""
        outputs = (self.done() or {"outputs": {}})["outputs"]  # none while the stage is not finished, or was pruned
        return [self.folder / name for name in outputs if name.startswith("shards/")]
