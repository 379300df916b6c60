"""The quality stage: units compared with phone alignments, of the iteration's codebook and of each layer."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch

from hubert.core.files import atomic_write
from hubert.core.frames import num_units_of
from hubert.core.hashing import digest, file_digest
from hubert.core.stage import Figures, Receipt, Spec, Stage
from hubert.data.manifest import read_manifest
from hubert.data.schema import recording
from hubert.data.split import select_sample
from hubert.data.stage import ManifestStage
from hubert.evaluation.layer_features import (
    LayerPiece,
    every_representation,
    frame_rate,
    layer_name,
    layer_source,
    manifest_chunking,
)
from hubert.evaluation.quality.alignments import Alignments, Place, aligned_rows, places, read_alignments
from hubert.evaluation.quality.phones import PhoneCounter, PhoneStatistics
from hubert.features.chunks import ChunkRule
from hubert.features.extract import FeatureExtractor
from hubert.settings.sections import FeatureSettings, QualitySettings
from hubert.units.assign import label
from hubert.units.codebook import CHUNK_FRAMES, Codebook
from hubert.units.kmeans import KMeansStage, choose_seeds, torch_lloyd

CLUSTERED_SECONDS = 1000  # of audio, whose units tell layers apart: 50,000 frames of each layer, and they fit in memory

SEEDING_FRAMES = 10_000

MAX_ITERATIONS = 30


@dataclass(kw_only=True)
class QualityStage(Stage):
    """Purity and PNMI against phone alignments: of this iteration's units, and of units clustered on each layer."""

    name: ClassVar[str] = "quality"
    counted: ClassVar[str] = "parts"
    parent: Path
    manifest: ManifestStage
    alignments: Path
    codebook: KMeansStage
    checkpoint: dict[str, Any]
    num_units: int  # of the layers' units
    quality: QualitySettings

    @property
    def _features(self) -> FeatureSettings:
        return self.codebook.sample.features

    @property
    def _resample(self) -> bool:
        return self.manifest.data.resample

    @cached_property
    def _alignments_digest(self) -> str:
        root = self.alignments if self.alignments.is_dir() else self.alignments.parent
        files = sorted(path for path in self.alignments.rglob("*") if path.is_file()) or [self.alignments]
        return digest([[path.relative_to(root).as_posix(), file_digest(path)] for path in files])

    def settings(self) -> dict[str, Any]:
        used = {
            "before_residual": self._features.before_residual,
            "dtype": self._features.dtype,
            "resample": self._resample,
        }
        long_files = manifest_chunking(self.manifest.everything, self._features)
        return {"num_units": self.num_units, **self.quality.key_settings(), **used, **long_files}

    def inputs(self) -> dict[str, str]:
        return {
            "manifest": self.manifest.key,
            "alignments": self._alignments_digest,
            "codebook": self.codebook.codebook_key,
            "checkpoint": self.checkpoint["sha256"],
        }

    def make_plan(self) -> list[Spec]:
        return [{"part": "units"}, {"part": "layers"}]

    def reads(self) -> list[Path]:
        checkpoint = Path(self.checkpoint["path"])
        return [self.manifest.everything, self.codebook.path, checkpoint, *self.codebook.source.files]

    def work(self, spec: Spec) -> tuple[list[Path], Figures]:
        rows = read_manifest(self.manifest.everything).with_columns(recording=recording())
        alignments = read_alignments(self.alignments, {*rows["fileid"], *rows["recording"]})
        aligned = rows.filter(aligned_rows(rows, alignments))
        num_unaligned = len(rows) - len(aligned)
        hours = self.quality.max_hours
        hours = min(hours, CLUSTERED_SECONDS / 3600) if spec["part"] == "layers" else hours
        num_aligned = len(aligned)
        aligned = select_sample(aligned, fraction=1.0, max_hours=hours, min_files=1)
        if spec["part"] == "layers":
            heard = {"layers_num_files": len(aligned), "layers_num_aligned_files": num_aligned}
            return [], {"layers": self._layers(aligned, alignments), "num_units": self.num_units, **heard}
        counts = self._units(aligned, alignments)
        counts.num_files_without_alignment += num_unaligned
        output = self.folder / "joint.json"
        joint = {"phones": counts.phones, "units": counts.num_units, "counts": counts.joint.tolist()}
        with atomic_write(output) as temporary:
            temporary.write_text(json.dumps(joint, ensure_ascii=False))
        left_out = {"num_unmatched_files": alignments.num_unmatched}
        left_out["num_files_beyond_max_hours"] = num_aligned - len(aligned)
        return [output], {"units": counts.figures(), **left_out}

    def finish(self, receipts: list[Receipt]) -> tuple[list[Path], Figures]:
        merged: Figures = {}
        for receipt in receipts:
            merged |= receipt.figures
        return [], merged

    def _units(self, rows: pl.DataFrame, alignments: Alignments) -> PhoneStatistics:
        codebook = Codebook.load(self.codebook.path)
        counter = PhoneCounter(alignments, num_units=len(codebook), frame_rate=codebook.frame_rate)
        extractor = FeatureExtractor(self.codebook.source, ChunkRule.of(self._features))
        labelled = label(
            rows,
            extractor,
            codebook,
            codebook_key=self.codebook.codebook_key,
            batch_seconds=self._features.batch_seconds,
            resample=self._resample,
        )
        for place, units in zip(places(rows, alignments), labelled["units"], strict=True):
            counter.update(place.name, units.to_numpy(), offset=place.offset)
        return counter.statistics

    def _layers(self, rows: pl.DataFrame, alignments: Alignments) -> list[dict[str, Any]]:
        """Cluster each layer's frames of some aligned audio, the same for all, and compare the units with the phones."""
        source = layer_source(self.checkpoint, self._features)
        pieces: dict[int, list[LayerPiece]] = {layer: [] for layer in range(source.layer + 1)}
        for piece in every_representation(rows, source, self._features, resample=self._resample):
            if sum(len(one.features) for one in pieces[piece.layer]) < CLUSTERED_SECONDS * frame_rate(piece.layer):
                pieces[piece.layer].append(piece)  # of a single file that is longer, no more than that
        where = places(rows, alignments)
        return [self._layer(layer, mine, where, alignments) for layer, mine in pieces.items()]

    def _layer(
        self, layer: int, pieces: list[LayerPiece], where: list[Place], alignments: Alignments
    ) -> dict[str, Any]:
        stacked = torch.cat([piece.features for piece in pieces])
        num_units = min(self.num_units, len(stacked) // 2)
        seeds = choose_seeds(stacked[:: 1 + len(stacked) // SEEDING_FRAMES], num_units, seed=0)
        centroids, _ = torch_lloyd(
            lambda: stacked.split(CHUNK_FRAMES), seeds, max_iterations=MAX_ITERATIONS, tolerance=1e-4
        )
        codebook = Codebook(centroids, {})
        counter = PhoneCounter(alignments, num_units=num_units, frame_rate=frame_rate(layer))
        units: dict[int, list[np.ndarray]] = {}
        for piece in pieces:
            units.setdefault(piece.row, []).append(codebook.assign(piece.features).numpy())
        for row, parts in units.items():
            values, place = np.concatenate(parts), where[row]
            (num_frames,) = num_units_of(np.array([place.num_samples]), frame_rate(layer))
            is_cut = len(values) < num_frames  # the last file, where the frames were enough
            counter.update(place.name, values, offset=0 if is_cut and place.offset is None else place.offset)
        figures = counter.statistics.figures()
        return {"layer": layer, "representation": layer_name(layer), "num_units": num_units, **figures}
