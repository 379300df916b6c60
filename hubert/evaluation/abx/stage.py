"""What a checkpoint's layers are worth: ABX error rates, and the quality of the units that they give.

ABX compares MFCC and every layer of the scored checkpoints on the same items. Quality compares the units of this
iteration, and units clustered on each layer, with phone alignments. Both extract what they need, and keep only scores.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import polars as pl
import torch

from hubert.core.errors import DataError
from hubert.core.files import read_json, write_record
from hubert.core.frames import num_units_of
from hubert.core.hashing import digest, file_digest
from hubert.core.stage import Figures, Receipt, Spec, Stage
from hubert.data.manifest import read_manifest
from hubert.data.stage import ManifestStage
from hubert.evaluation.abx.features import FeatureWriter
from hubert.evaluation.abx.items import read_items, split_items, write_item
from hubert.evaluation.abx.job import ABXJob, Representation, score_in_subprocess
from hubert.evaluation.abx.score import ABXResult
from hubert.evaluation.choice import MFCC
from hubert.evaluation.layer_features import (
    every_representation,
    frame_rate,
    layer_name,
    layer_source,
    manifest_chunking,
)
from hubert.features.source import FeatureSource
from hubert.settings.sections import ABXSettings, FeatureSettings

ALL, FIRST_HALF, SECOND_HALF = "all items", "first half", "second half"


@dataclass(kw_only=True)
class ABXStage(Stage):
    """ABX error rates, in per cent, of MFCC and of each layer of the scored checkpoints."""

    name: ClassVar[str] = "abx"
    counted: ClassVar[str] = "checkpoints"
    joins_shards: ClassVar[bool] = True
    parent: Path
    manifest: ManifestStage
    item: Path
    checkpoints: list[dict[str, Any]]
    abx: ABXSettings
    features: FeatureSettings

    def settings(self) -> dict[str, Any]:
        used = {
            "before_residual": self.features.before_residual,
            "dtype": self.features.dtype,
            "resample": self.manifest.data.resample,
        }
        return {**self.abx.key_settings(), **used, **manifest_chunking(self.manifest.everything, self.features)}

    def inputs(self) -> dict[str, str]:
        weights = digest([checkpoint["sha256"] for checkpoint in self.checkpoints])
        return {"manifest": self.manifest.key, "item": file_digest(self.item), "checkpoints": weights}

    def make_plan(self) -> list[Spec]:
        shared = digest([self.manifest.key, file_digest(self.item), self.settings() | {"checkpoints": ""}])
        return [{**checkpoint, "digest": digest([checkpoint["sha256"], shared])} for checkpoint in self.checkpoints]

    def reads(self) -> list[Path]:
        return [self.manifest.everything, *(Path(checkpoint["path"]) for checkpoint in self.checkpoints)]

    def work(self, spec: Spec) -> tuple[list[Path], Figures]:
        rows = read_manifest(self.manifest.everything)
        checkpoint = next(one for one in self.checkpoints if one["sha256"] == spec["sha256"])
        source = layer_source(checkpoint, self.features)  # the plan keeps the place of the day when it was made
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
        write_record(output, {"rows": scores})
        return [output], {"num_dropped_items": max(result.num_dropped_items for result in results)}

    def finish(self, receipts: list[Receipt]) -> tuple[list[Path], Figures]:
        rows = []
        for receipt in receipts:
            (name,) = receipt.outputs
            content = read_json(self.folder / name)
            if content is None:
                raise DataError(f"{self.folder / name} is damaged; remove it and run `hubert abx` again")
            scores = content["rows"]
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
        """Write the features of MFCC (float32) and every layer (float16), a folder each; a batch at a time is in memory."""
        folders = {layer: folder / f"layer-{layer}" for layer in range(source.layer + 1)}
        fileids, lengths = rows["fileid"].to_list(), rows["num_samples"].to_numpy()
        with ExitStack() as stack:
            writers = []
            for layer, one in folders.items():
                counts = num_units_of(lengths, frame_rate(layer)).tolist()
                dtype = torch.float32 if layer == MFCC else torch.float16
                writer = FeatureWriter(one, dict(zip(fileids, counts, strict=True)), dtype)
                writers.append(stack.enter_context(writer))
            for piece in every_representation(rows, source, self.features, resample=self.manifest.data.resample):
                writers[piece.layer].write(fileids[piece.row], piece.features, start=piece.start)
        return folders

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
