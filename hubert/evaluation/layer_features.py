"""MFCC and all layers of a checkpoint at once: what evaluation compares. The teacher runs once per file or chunk."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from hubert.core.frames import FRAME_RATE, MFCC_FRAME_RATE
from hubert.data.manifest import scan_manifest
from hubert.evaluation.abx.score import write_features
from hubert.features.chunks import ChunkRule, chunking
from hubert.features.extract import FeatureExtractor, read_batches
from hubert.features.frames_file import FrameWriter
from hubert.features.source import FeatureSource
from hubert.settings.sections import FeatureSettings

MFCC = 0  # "layer" of the MFCC baseline in tables of layers
SHARD_FRAMES = 50_000  # of short files, per file on disk


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


class LayerFolder:
    """The features of MFCC or of one layer as files for the scorer, written as they come: MFCC float32, else float16.

    Short files gather in shards, each in a folder of its own; a long one is a file that is filled piece by piece.
    """

    def __init__(self, folder: Path, layer: int) -> None:
        self.folder = folder
        self._dtype = torch.float32 if layer == MFCC else torch.float16
        self._pending: list[tuple[str, Tensor]] = []
        self._writer: FrameWriter | None = None

    def add(self, fileid: str, piece: LayerPiece, num_frames: int) -> None:
        """Take a piece of a file that has `num_frames` frames."""
        end = piece.start + len(piece.features)
        if piece.start == 0 and end == num_frames:
            self._pending.append((fileid, piece.features.to(self._dtype)))
            if sum(len(frames) for _, frames in self._pending) > SHARD_FRAMES:
                self.close()
            return
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"long-{piece.row:05d}.safetensors"
            self._writer = FrameWriter(path, fileid, num_frames, self._dtype)
        self._writer.write(piece.start, piece.features)
        if end == num_frames:
            self._writer.close()
            self._writer = None

    def close(self) -> None:
        """Write what is pending."""
        write_features(self.folder / f"{len(list(self.folder.glob('*'))):05d}", self._pending)
        self._pending = []


def manifest_chunking(manifest: Path, features: FeatureSettings) -> dict[str, Any]:
    """Return what a key has to hold about long files; nothing while the manifest is missing, as then nothing is done."""
    return chunking(scan_manifest(manifest), features) if manifest.exists() else {}
