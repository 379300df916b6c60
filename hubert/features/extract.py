"""Compute the features of a source: in batches for short files, chunk by chunk for long ones."""

import copy
import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor

from hubert.core.frames import MFCC_FRAME_RATE, SAMPLE_RATE, num_frames
from hubert.core.machine import Heap
from hubert.data.audio import read_waveform
from hubert.data.audio_file import AudioRef
from hubert.data.read_ahead import read_ahead
from hubert.data.schema import audio_refs
from hubert.features.batches import CPU_BATCH_SECONDS, MAX_PADDING, batches_by_length, pad
from hubert.features.chunks import DEFAULT_RULE, ChunkRule, cut, level, read_chunks
from hubert.features.mfcc import MFCC_CONTEXT, batch_mfcc, mfcc
from hubert.features.source import FeatureSource
from hubert.model.encoder import keep_products_in_bfloat16
from hubert.model.hubert import HuBERT
from hubert.model.weights import check_weights

MFCC_CHUNK = 100 * SAMPLE_RATE  # for bounded memory; it changes no bit of a value

Batch = list[tuple[int, AudioRef]]


class FeatureExtractor:
    """Computes the features of a source; holds the teacher on the GPU if there is one.

    `chunks` says which files are long, and how they are cut for the teacher.
    """

    def __init__(self, source: FeatureSource, chunks: ChunkRule = DEFAULT_RULE) -> None:
        self.source = source
        self.chunks = chunks
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._heap = Heap(self.device)

    @cached_property
    def _teacher(self) -> HuBERT:
        check_weights(Path(self.source.checkpoint), self.source.sha256)
        normalize = self.source.normalize_waveform
        teacher = HuBERT.from_pretrained(self.source.checkpoint, normalize_waveform=normalize).eval().to(self.device)
        if self.source.dtype == "bfloat16":
            keep_products_in_bfloat16(teacher)
        return teacher

    def __call__(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Return the features (F, D) float32 on the device of each waveform (T,). Padding does not change them."""
        if self.source.is_mfcc:
            return batch_mfcc(waveforms)
        return self.layers(waveforms, num_layers=self.source.layer)[-1]

    def layers(self, waveforms: Sequence[Tensor], *, num_layers: int | None = None) -> list[list[Tensor]]:
        """Return, for each layer up to `num_layers`, the features (F, D) of each waveform."""
        return self._layers(self._teacher, waveforms, num_layers)

    @torch.inference_mode()
    def _layers(self, teacher: HuBERT, waveforms: Sequence[Tensor], num_layers: int | None) -> list[list[Tensor]]:
        padded, mask = pad(waveforms)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.source.dtype == "bfloat16"):
            outputs = teacher.get_intermediate_outputs(
                padded.to(self.device),
                attention_mask=None if mask is None else mask.to(self.device),
                num_layers=num_layers,
                before_residual=self.source.before_residual,
            )
        self._heap.give_back()
        lengths = [num_frames(len(waveform)) for waveform in waveforms]
        return [[row[:length].float() for row, length in zip(output, lengths, strict=True)] for output in outputs]

    @property
    def max_batch_seconds(self) -> float:
        """Audio per batch beyond which nothing is gained."""
        return math.inf if self.source.is_mfcc or self.device.type != "cpu" else CPU_BATCH_SECONDS

    @property
    def max_padding(self) -> float:
        """Share of a batch that may be padding: any where none is computed."""
        return 1.0 if self.source.is_mfcc else MAX_PADDING

    def is_long(self, num_samples: int) -> bool:
        """Return True if a file goes through in chunks."""
        return num_samples > (MFCC_CHUNK if self.source.is_mfcc else self.chunks.max_samples)

    def long_file(self, ref: AudioRef, *, resample: bool) -> Iterator[tuple[int, Tensor]]:
        """Yield (first frame, features (F, D)) of one file in order, chunk by chunk; only a chunk is in memory."""
        if not self.source.is_mfcc:
            for start, layers in self.long_file_layers(ref, resample=resample, num_layers=self.source.layer):
                yield start, layers[-1]
            return
        hop = SAMPLE_RATE // MFCC_FRAME_RATE
        chunks = cut(ref.num_samples, hop=hop, max_samples=MFCC_CHUNK, context=MFCC_CONTEXT)
        for chunk, waveform in read_chunks(ref, chunks, resample=resample):
            yield chunk.first_frame, mfcc(waveform)[chunk.skip : chunk.skip + chunk.num_frames]

    def long_file_layers(
        self, ref: AudioRef, *, resample: bool, num_layers: int | None = None
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield (first frame, features (F, D) of each layer up to `num_layers`) of one file in order, chunk by chunk.

        Where the teacher wants normalised waveforms (large, xlarge), the whole file is normalised before it is cut, as
        in fairseq: a quiet chunk stays quiet. That reads the file twice.
        """
        teacher, mean, scale = self._teacher, 0.0, 1.0
        if teacher.config.normalize_waveform:
            mean, scale = level(ref, resample=resample)
            teacher = copy.copy(teacher)  # the weights are shared
            teacher.config = teacher.config.model_copy(update={"normalize_waveform": False})
        for chunk, waveform in read_chunks(ref, self.chunks.chunks(ref.num_samples), resample=resample):
            kept = slice(chunk.skip, chunk.skip + chunk.num_frames)
            layers = self._layers(teacher, [(waveform - mean) * scale], num_layers)
            yield chunk.first_frame, [features[kept] for (features,) in layers]


def read_batches(
    rows: pl.DataFrame, extractor: FeatureExtractor, *, batch_seconds: float, resample: bool
) -> Generator[tuple[Batch, list[Tensor]]]:
    """Yield `batches_by_length` with the waveforms; a thread reads the next batches while this one is computed.

    A long file comes without its samples: it is read chunk by chunk. Close it to end the thread.
    """
    refs = list(audio_refs(rows))
    lengths = rows["num_samples"].to_list()
    seconds = min(batch_seconds, extractor.max_batch_seconds)

    def read(indices: list[int]) -> tuple[Batch, list[Tensor]]:
        batch = [(index, refs[index]) for index in indices]
        if extractor.is_long(lengths[indices[0]]):
            return batch, []
        return batch, [read_waveform(ref, resample=resample) for _, ref in batch]

    batches = batches_by_length(lengths, seconds, extractor.is_long, max_padding=extractor.max_padding)
    return read_ahead(batches, read, num_workers=1)


class Piece(NamedTuple):
    """Features (F, D) of a file or of a stretch of it: of row `row` of the manifest, from frame `start` on."""

    row: int
    start: int
    features: Tensor


def extract(
    rows: pl.DataFrame, extractor: FeatureExtractor, *, batch_seconds: float, resample: bool
) -> Generator[Piece]:
    """Yield the features of all rows of a manifest, in order of length: one piece a file, more for a long one.

    The pieces of a file follow each other and leave nothing out. Memory is a few batches of samples, and the features of
    one batch or of one chunk of a long file.
    """
    with closing(read_batches(rows, extractor, batch_seconds=batch_seconds, resample=resample)) as batches:
        for batch, waveforms in batches:
            if waveforms:
                for (index, _), features in zip(batch, extractor(waveforms), strict=True):
                    yield Piece(index, 0, features)
                continue
            ((index, ref),) = batch
            for start, features in extractor.long_file(ref, resample=resample):
                yield Piece(index, start, features)
