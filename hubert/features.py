"""What is clustered: Kaldi MFCCs at 100 Hz without a teacher, one layer of the teacher at 50 Hz with one.

`FeatureSource` says which, `FeatureExtractor` computes it, and `FeaturesStage` writes the frames of the k-means
sample. Features of the other files are never stored: labelling computes them and keeps only the units.

Short files go through in batches, long ones (`hubert.chunks`) chunk by chunk, so memory does not grow with a file.
"""

import copy
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import polars as pl
import torch
from safetensors import safe_open
from torch import Tensor

from hubert.audio import AudioRef, read_waveform
from hubert.batches import CPU_BATCH_SECONDS, MAX_PADDING, Heap, batches_by_length, pad
from hubert.chunks import DEFAULT_RULE, ChunkRule, chunking, cut, level, read_chunks
from hubert.config import FeatureSettings, KMeansSettings
from hubert.data import read_ahead
from hubert.encoder import keep_products_in_bfloat16
from hubert.errors import ConfigError, DataError
from hubert.frame_files import FrameWriter
from hubert.manifest import audio_refs, manifest_digest, plan_shards, scan_manifest, select_sample, shard_digests
from hubert.mfcc import DIMENSION, MFCC_CONTEXT, MFCC_FRAME_RATE, batch_mfcc, mfcc
from hubert.model import HuBERT
from hubert.origins import check_weights, read_config
from hubert.paths import atomic_write
from hubert.sizes import FRAME_RATE, SAMPLE_RATE, num_frames
from hubert.stage import Figures, Receipt, Spec, Stage, digest
from hubert.table import num_units_of

MFCC_CHUNK = 100 * SAMPLE_RATE  # for bounded memory; it changes no bit of a value

Batch = list[tuple[int, AudioRef]]


@dataclass(frozen=True)
class FeatureSource:
    """Which features: MFCC (no checkpoint), or a layer of a checkpoint with the convention that the layer is read by.

    Mixing conventions goes wrong silently: units of `before_residual=False` clustered with centroids of `True` are
    noise. So the source is stored in the codebook, and a codebook refuses features of another source.
    """

    checkpoint: str = ""
    sha256: str = ""
    layer: int = 0
    before_residual: bool = False
    dtype: str = "float32"
    name: str = ""

    @classmethod
    def of_layer(
        cls, checkpoint: Path, sha256: str, layer: int, settings: FeatureSettings, *, name: str = ""
    ) -> "FeatureSource":
        """Return the source for a layer (from 1) of a checkpoint on this machine, in any format that `HuBERT` loads.

        Args:
            checkpoint: its folder or file.
            sha256: of its weights.
            layer: from 1.
            settings: the convention by which the layer is read.
            name: what people call it, such as a Hugging Face id; empty: the name of its folder.

        Raises:
            ConfigError: it has no such layer.
            DataError: it cannot be loaded.
        """
        num_layers = read_config(checkpoint).num_layers
        if not 1 <= layer <= num_layers:
            raise ConfigError(f"layer {layer}: the teacher {name or checkpoint} has layers 1 to {num_layers}")
        return cls(str(checkpoint), sha256, layer, settings.before_residual, settings.dtype, name)

    @property
    def is_mfcc(self) -> bool:
        """Whether the features are MFCCs."""
        return not self.checkpoint

    @property
    def frame_rate(self) -> int:
        """Frames per second."""
        return MFCC_FRAME_RATE if self.is_mfcc else FRAME_RATE

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two sources the same: the weights' hash, not the place where they lie."""
        if self.is_mfcc:
            return {"kind": "mfcc", "dimension": DIMENSION}
        places = ("checkpoint", "name")
        return {"kind": "layer", **{name: value for name, value in asdict(self).items() if name not in places}}

    def check_dimension(self, dimension: int, where: Path) -> None:
        """Compare a codebook's dimension with that of the features, where the checkpoint is here.

        Raises:
            DataError: they differ; names both.
        """
        if not self.is_mfcc and not Path(self.checkpoint).exists():
            return
        expected = self.identity["dimension"] if self.is_mfcc else read_config(Path(self.checkpoint)).dim
        if dimension != expected:
            raise DataError(
                f"{where}: its centroids have {dimension} dimensions, {self.describe()} has {expected}; "
                "the codebook was fitted on other features"
            )

    def describe(self) -> str:
        """Return a short name for people."""
        return "MFCC" if self.is_mfcc else f"layer {self.layer} of {self.name or Path(self.checkpoint).name}"


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
        teacher = HuBERT.from_pretrained(self.source.checkpoint).eval().to(self.device)
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
        """Say whether a file goes through in chunks."""
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


@dataclass
class FeaturesStage(Stage):
    """Frames of the k-means sample: some utterances (paper: 10 %), chosen by a hash of seed and fileid."""

    name: ClassVar[str] = "features"
    counted: ClassVar[str] = "files"
    parent: Path
    manifest: Path
    source: FeatureSource
    features: FeatureSettings
    kmeans: KMeansSettings
    resample: bool

    @cached_property
    def _sample(self) -> pl.DataFrame:
        return select_sample(
            scan_manifest(self.manifest),
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
        resample = {"resample": self.resample} if self.resample else {}
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
            shared = [self.source.identity, self.resample, *rule.values()]
            specs.append({"start": start, "end": end, "digest": digest([content, *shared])})
        return specs

    def tables(self) -> dict[str, Path]:
        return {"": self.folder / "sample.parquet"}

    def work(self, spec: Spec) -> tuple[list[Path], Figures]:
        rows = pl.read_parquet(self.folder / "sample.parquet")[spec["start"] : spec["end"]]
        extractor = FeatureExtractor(self.source, ChunkRule.of(self.features))
        pieces = extract(rows, extractor, batch_seconds=self.features.batch_seconds, resample=self.resample)
        ends = np.cumsum(num_units_of(rows["num_samples"].to_numpy(), self.source.frame_rate)).tolist()
        starts = [0, *ends]
        dtype = torch.float32 if self.source.is_mfcc else torch.float16
        output = self.folder / "shards" / f"{spec['digest'][:16]}.safetensors"
        with atomic_write(output) as temporary, FrameWriter(temporary, "frames", ends[-1], dtype) as writer:
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
        plan = self.plan()
        receipts = (self.receipt(index, plan) for index in range(len(plan)))
        return [self.folder / name for receipt in receipts if receipt for name in receipt.outputs]


def frame_counts(shards: Sequence[Path]) -> list[int]:
    """Return the number of frames of each feature shard, from the files' headers."""
    return [shard_shape(path)[0] for path in shards]


def shard_shape(path: Path) -> tuple[int, int]:
    """Return (number of frames, dimension) of a feature shard from its header."""
    with safe_open(path, framework="pt") as file:
        num_frames, dimension = file.get_slice("frames").get_shape()
    return num_frames, dimension


def read_frames(path: Path, start: int = 0, end: int | None = None) -> Tensor:
    """Read frames [start, end) of a feature shard as (N, D) float32; only they are read from disk."""
    with safe_open(path, framework="pt") as file:
        frames: Tensor = file.get_slice("frames")[start:end]
    return frames.float()


def describe_source(identity: Mapping[str, Any]) -> str:
    """Return a source's identity as one line for errors and reports."""
    return ", ".join(f"{name}={value}" for name, value in identity.items())
