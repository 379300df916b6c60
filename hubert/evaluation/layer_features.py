"""MFCC and all layers of a checkpoint at once: what evaluation compares. The teacher runs once per file or chunk."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from torch import Tensor

from hubert.core.frames import FRAME_RATE, MFCC_FRAME_RATE
from hubert.data.manifest import scan_manifest
from hubert.evaluation.choice import MFCC
from hubert.features.chunks import ChunkRule, chunking
from hubert.features.extract import FeatureExtractor, read_batches
from hubert.features.source import FeatureSource
from hubert.settings.sections import FeatureSettings


def layer_source(checkpoint: Mapping[str, Any], features: FeatureSettings) -> FeatureSource:
    """Return the source for all layers of a checkpoint: its last layer, so that one pass computes every layer."""
    return FeatureSource.of_layer(Path(checkpoint["path"]), checkpoint["sha256"], checkpoint["num_layers"], features)


def layer_name(layer: int) -> str:
    """Return a layer's name for people."""
    return "MFCC" if layer == MFCC else f"layer {layer}"


class LayerPiece(NamedTuple):
    """Features (F, D) float32 on the CPU: of a layer (0: MFCC) and row, from frame `start` on."""

    layer: int
    row: int
    start: int
    features: Tensor


def frame_rate(layer: int) -> int:
    """Return the frames per second of a layer, or of MFCC."""
    return MFCC_FRAME_RATE if layer == MFCC else FRAME_RATE


def every_representation(
    rows: pl.DataFrame, source: FeatureSource, features: FeatureSettings, *, resample: bool
) -> Iterator[LayerPiece]:
    """Yield the features of MFCC and each layer, in one pass of the teacher; several pieces for a long file.

    For each layer the pieces of a file follow each other and leave nothing out.
    """
    chunks = ChunkRule.of(features)
    mfcc, teacher = FeatureExtractor(FeatureSource(), chunks), FeatureExtractor(source, chunks)
    reading = read_batches(rows, teacher, batch_seconds=features.batch_seconds, resample=resample)
    with closing(reading) as batches:
        for batch, waveforms in batches:
            if waveforms:
                for layer, outputs in enumerate([mfcc(waveforms), *teacher.layers(waveforms)]):
                    for (row, _), output in zip(batch, outputs, strict=True):
                        yield LayerPiece(layer, row, 0, output.cpu())
                continue
            ((row, ref),) = batch
            for start, output in mfcc.long_file(ref, resample=resample):
                yield LayerPiece(MFCC, row, start, output)
            for start, outputs in teacher.long_file_layers(ref, resample=resample):
                for layer, output in enumerate(outputs, 1):
                    yield LayerPiece(layer, row, start, output.cpu())


def manifest_chunking(manifest: Path, features: FeatureSettings) -> dict[str, Any]:
    """Return what a key has to hold about long files; nothing while the manifest is missing, as then nothing is done."""
    return chunking(scan_manifest(manifest), features) if manifest.exists() else {}
