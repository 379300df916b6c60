"""What a checkpoint's layers are worth: ABX error rates, and the quality of the units that they give.

ABX compares MFCC and every layer of the scored checkpoints on the same items. Quality compares the units of this
iteration, and units clustered on each layer, with phone alignments. Both extract what they need, and keep only scores.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch

from hubert.abx import ABXJob, ABXResult, Representation, score_in_subprocess
from hubert.alignments import Alignments, Place, aligned_rows, places, read_alignments
from hubert.chunks import ChunkRule, chunking
from hubert.config import ABXSettings, FeatureSettings, QualitySettings
from hubert.features import FeatureExtractor, FeatureSource
from hubert.items import read_items, split_items, write_item
from hubert.kmeans import CHUNK, Codebook, choose_seeds, torch_lloyd
from hubert.manifest import read_manifest, scan_manifest, select_sample
from hubert.paths import atomic_write, write_json
from hubert.quality import PhoneCounter, PhoneStatistics
from hubert.representations import (
    MFCC,
    LayerFolder,
    LayerPiece,
    every_representation,
    frame_rate,
    layer_name,
    layer_source,
)
from hubert.rows import recording
from hubert.stage import Figures, Receipt, Spec, Stage, digest, file_digest
from hubert.table import num_units_of
from hubert.units import label

ALL, FIRST_HALF, SECOND_HALF = "all items", "first half", "second half"
CLUSTERED_SECONDS = 1000  # of audio, whose units tell layers apart: 50,000 frames of each layer, and they fit in memory
SEEDING_FRAMES = 10_000
MAX_ITERATIONS = 30


def manifest_chunking(manifest: Path, features: FeatureSettings) -> dict[str, Any]:
    """Return what a key has to hold about long files; nothing while the manifest is missing, as then nothing is done."""
    return chunking(scan_manifest(manifest), features) if manifest.exists() else {}


@dataclass
class ABXStage(Stage):
    """ABX error rates, in per cent, of MFCC and of each layer of the scored checkpoints."""

    name: ClassVar[str] = "abx"
    counted: ClassVar[str] = "checkpoints"
    parent: Path
    manifest: Path
    manifest_key: str
    item: Path
    checkpoints: list[dict[str, Any]]
    abx: ABXSettings
    features: FeatureSettings
    resample: bool = False

    def settings(self) -> dict[str, Any]:
        used = {
            "before_residual": self.features.before_residual,
            "dtype": self.features.dtype,
            "resample": self.resample,
        }
        return {**self.abx.key_settings(), **used, **manifest_chunking(self.manifest, self.features)}

    def inputs(self) -> dict[str, str]:
        weights = digest([checkpoint["sha256"] for checkpoint in self.checkpoints])
        return {"manifest": self.manifest_key, "item": file_digest(self.item), "checkpoints": weights}

    def make_plan(self) -> list[Spec]:
        shared = digest([self.manifest_key, file_digest(self.item), self.settings() | {"checkpoints": ""}])
        return [{**checkpoint, "digest": digest([checkpoint["sha256"], shared])} for checkpoint in self.checkpoints]

    def work(self, spec: Spec) -> tuple[list[Path], Figures]:
        rows = read_manifest(self.manifest)
        source = layer_source(spec, self.features)
        with tempfile.TemporaryDirectory(prefix="features-", dir=self.folder) as scratch:
            items = self._item_files(rows, Path(scratch))
            wanted = read_items(items[ALL])["fileid"].unique()
            rows = rows.filter(pl.col("fileid").is_in(wanted.implode()))
            folders = self._write_representations(rows, source, Path(scratch))
            job = ABXJob(
                items=items,
                representations=tuple(
                    Representation(name=layer_name(layer), features=folder, frame_rate=frame_rate(layer))
                    for layer, folder in folders.items()
                ),
                output=Path(scratch) / "results.json",
                max_size_group=self.abx.max_size_group,
                max_x_across=self.abx.max_x_across,
                seed=self.abx.seed,
                num_threads=torch.get_num_threads(),
            )
            results = score_in_subprocess(job)
        output = self.folder / "scores" / f"{spec['digest'][:16]}.json"
        scores = [self._row(layer, spec["step"], results) for layer in folders]
        write_json(output, {"rows": scores})
        return [output], {"num_dropped_items": max(result.num_dropped_items for result in results)}

    def finish(self, receipts: list[Receipt]) -> tuple[list[Path], Figures]:
        rows = []
        for receipt in receipts:
            (name,) = receipt.outputs
            scores = json.loads((self.folder / name).read_text())["rows"]
            rows += [row for row in scores if row["layer"] != MFCC or receipt.index == 0]
        return [], {
            "rows": rows,
            "num_dropped_items": receipts[0].figures["num_dropped_items"],
            "item": self.item.name,
            "before_residual": self.features.before_residual,
            "selection": self.abx.selection,
        }

    def _item_files(self, rows: pl.DataFrame, folder: Path) -> dict[str, Path]:
        """Write the items under the manifest's fileids: all of them and, if the settings ask for it, two halves."""
        items = read_items(self.item, rows["fileid"])
        parts = {ALL: items}
        if self.abx.selection == "half":
            parts[FIRST_HALF], parts[SECOND_HALF] = split_items(items, self.abx.seed)
        paths = {name: folder / f"{name.replace(' ', '-')}.item" for name in parts}
        for name, part in parts.items():
            write_item(paths[name], part)
        return paths

    def _write_representations(self, rows: pl.DataFrame, source: FeatureSource, folder: Path) -> dict[int, Path]:
        """Write the features of MFCC and every layer, one folder each; a batch at a time is in memory."""
        folders = {layer: LayerFolder(folder / f"layer-{layer}", layer) for layer in range(source.layer + 1)}
        fileids, lengths = rows["fileid"].to_list(), rows["num_samples"].to_numpy()
        for piece in every_representation(rows, source, self.features, resample=self.resample):
            (num_frames,) = num_units_of(lengths[[piece.row]], frame_rate(piece.layer))
            folders[piece.layer].add(fileids[piece.row], piece, int(num_frames))
        for one in folders.values():
            one.close()
        return {layer: one.folder for layer, one in folders.items()}

    def _row(self, layer: int, step: int, results: Sequence[ABXResult]) -> dict[str, Any]:
        """Return one line of the table: rates on all items, those that choose, and those that are reported."""
        mine = {result.items: result for result in results if result.representation == layer_name(layer)}
        choosing, reported = (FIRST_HALF, SECOND_HALF) if self.abx.selection == "half" else (ALL, ALL)
        return {
            "step": None if layer == MFCC else step,
            "layer": layer,
            "representation": layer_name(layer),
            "all": rates(mine[ALL]),
            "selection": rates(mine[choosing]),
            "reported": rates(mine[reported]),
        }


def rates(result: ABXResult) -> dict[str, Any]:
    """Return a result's error rates in per cent, with what they rest on."""
    return {
        "within": None if result.within is None else 100 * result.within,
        "across": None if result.across is None else 100 * result.across,
        "items": result.items,
        "num_items": result.num_items,
        "num_cells": result.num_cells_within + result.num_cells_across,
    }


@dataclass
class QualityStage(Stage):
    """Purity and PNMI against phone alignments: of this iteration's units, and of units clustered on each layer."""

    name: ClassVar[str] = "quality"
    counted: ClassVar[str] = "parts"
    parent: Path
    manifest: Path
    manifest_key: str
    alignments: Path
    source: FeatureSource
    codebook: Path
    codebook_key: str
    checkpoint: dict[str, Any]
    num_units: int
    features: FeatureSettings
    quality: QualitySettings = field(default_factory=QualitySettings)
    resample: bool = False

    @cached_property
    def _alignments_digest(self) -> str:
        files = sorted(path for path in self.alignments.rglob("*") if path.is_file()) or [self.alignments]
        return digest([[path.name, file_digest(path)] for path in files])

    def settings(self) -> dict[str, Any]:
        used = {
            "before_residual": self.features.before_residual,
            "dtype": self.features.dtype,
            "resample": self.resample,
        }
        long_files = manifest_chunking(self.manifest, self.features)
        return {"num_units": self.num_units, **self.quality.key_settings(), **used, **long_files}

    def inputs(self) -> dict[str, str]:
        return {
            "manifest": self.manifest_key,
            "alignments": self._alignments_digest,
            "codebook": self.codebook_key,
            "checkpoint": self.checkpoint["sha256"],
        }

    def make_plan(self) -> list[Spec]:
        return [{"part": "units"}, {"part": "layers"}]

    def work(self, spec: Spec) -> tuple[list[Path], Figures]:
        rows = read_manifest(self.manifest).with_columns(recording=recording())
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
        codebook = Codebook.load(self.codebook)
        counter = PhoneCounter(alignments, num_units=len(codebook), frame_rate=codebook.frame_rate)
        extractor = FeatureExtractor(self.source, ChunkRule.of(self.features))
        labelled = label(
            rows,
            extractor,
            codebook,
            codebook_key=self.codebook_key,
            batch_seconds=self.features.batch_seconds,
            resample=self.resample,
        )
        for place, units in zip(places(rows, alignments), labelled["units"], strict=True):
            counter.update(place.name, units.to_numpy(), offset=place.offset)
        return counter.statistics

    def _layers(self, rows: pl.DataFrame, alignments: Alignments) -> list[dict[str, Any]]:
        """Cluster each layer's frames of some aligned audio, the same for all, and compare the units with the phones."""
        source = layer_source(self.checkpoint, self.features)
        pieces: dict[int, list[LayerPiece]] = {layer: [] for layer in range(source.layer + 1)}
        for piece in every_representation(rows, source, self.features, resample=self.resample):
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
        centroids, _ = torch_lloyd(lambda: stacked.split(CHUNK), seeds, max_iterations=MAX_ITERATIONS, tolerance=1e-4)
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
