"""What is clustered: Kaldi MFCCs at 100 Hz without a teacher, one layer of the teacher at 50 Hz with one.

`FeatureSource` says which, `FeatureExtractor` computes it, and `FeaturesStage` writes the frames of the k-means
sample. Features of the other files are never stored: labelling computes them and keeps only the units.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import polars as pl
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hubert.audio import AudioRef, read_waveform
from hubert.config import FeatureSettings, KMeansSettings
from hubert.errors import ConfigError
from hubert.manifest import audio_refs, manifest_digest, plan_shards, scan_manifest, select_sample, shard_digests
from hubert.model import HuBERT
from hubert.origins import read_config
from hubert.paths import atomic_write
from hubert.sizes import SAMPLE_RATE
from hubert.stage import Figures, Receipt, Spec, Stage, digest

MFCC_FRAME_RATE = 100
HUBERT_FRAME_RATE = 50


def mfcc(waveform: Tensor) -> Tensor:
    """Compute 13 Kaldi MFCCs with their first and second differences (paper, section IV-B).

    Window 25 ms, hop 10 ms, 23 mel bins, no energy, no dither: `torchaudio.compliance.kaldi.mfcc` on samples in
    [-1, 1], as fairseq's `dump_mfcc_feature.py` calls it.

    Args:
        waveform: (T,) samples at 16 kHz, T >= 400.

    Returns:
        (F, 39) float32 with F = (T - 400) // 160 + 1.
    """
    from torchaudio.compliance import kaldi  # a second of import time that labelling by layers is spared
    from torchaudio.functional import compute_deltas

    static = kaldi.mfcc(waveform[None], sample_frequency=SAMPLE_RATE, use_energy=False).T
    first = compute_deltas(static)
    return torch.cat([static, first, compute_deltas(first)]).T.contiguous()


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
        return MFCC_FRAME_RATE if self.is_mfcc else HUBERT_FRAME_RATE

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two sources the same: the weights' hash, not the place where they lie."""
        if self.is_mfcc:
            return {"kind": "mfcc", "dimension": 39}
        places = ("checkpoint", "name")
        return {"kind": "layer", **{name: value for name, value in asdict(self).items() if name not in places}}

    def describe(self) -> str:
        """Return a short name for people."""
        return "MFCC" if self.is_mfcc else f"layer {self.layer} of {self.name or Path(self.checkpoint).name}"


class FeatureExtractor:
    """Computes the features of a source; holds the teacher on the GPU if there is one."""

    def __init__(self, source: FeatureSource) -> None:
        self.source = source
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def _teacher(self) -> HuBERT:
        return HuBERT.from_pretrained(self.source.checkpoint).eval().to(self.device)

    def __call__(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Return the features (F, D) float32 on the device of each waveform (T,). Padding does not change them."""
        if self.source.is_mfcc:
            return [mfcc(waveform) for waveform in waveforms]
        return self.layers(waveforms, num_layers=self.source.layer)[-1]

    @torch.inference_mode()
    def layers(self, waveforms: Sequence[Tensor], *, num_layers: int | None = None) -> list[list[Tensor]]:
        """Return, for each layer up to `num_layers`, the features (F, D) of each waveform."""
        padded, mask = pad(waveforms)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.source.dtype == "bfloat16"):
            outputs = self._teacher.get_intermediate_outputs(
                padded.to(self.device),
                attention_mask=None if mask is None else mask.to(self.device),
                num_layers=num_layers,
                before_residual=self.source.before_residual,
            )
        lengths = [(len(waveform) - 400) // 320 + 1 for waveform in waveforms]
        return [[row[:length].float() for row, length in zip(output, lengths, strict=True)] for output in outputs]


def pad(waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack waveforms (T_i,) to (B, T) with a mask (B, T) of the true samples; no mask where all are equally long."""
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    padded = torch.nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True)
    mask = torch.arange(padded.shape[1])[None] < lengths[:, None]
    return padded, None if bool(mask.all()) else mask


def batches_by_length(rows: pl.DataFrame, seconds: float) -> Iterator[list[tuple[int, AudioRef]]]:
    """Yield (row number, audio) batches of similar length whose padded audio stays within `seconds`."""
    order = rows["num_samples"].arg_sort().to_list()
    lengths = rows["num_samples"].to_list()
    refs = list(audio_refs(rows))
    batch: list[tuple[int, AudioRef]] = []
    for index in order:  # shortest first, so the newest is the longest
        if batch and lengths[index] * (len(batch) + 1) > seconds * SAMPLE_RATE:
            yield batch
            batch = []
        batch.append((index, refs[index]))
    if batch:
        yield batch


def extract(
    rows: pl.DataFrame, extractor: FeatureExtractor, *, batch_seconds: float, resample: bool
) -> Iterator[tuple[int, Tensor]]:
    """Yield (row number, features (F, D)) for all rows of a manifest, in order of length."""
    for batch in batches_by_length(rows, batch_seconds):
        waveforms = [torch.as_tensor(read_waveform(ref, resample=resample)) for _, ref in batch]
        yield from zip((index for index, _ in batch), extractor(waveforms), strict=True)


@dataclass
class FeaturesStage(Stage):
    """Frames of the k-means sample: some utterances (paper: 10 %), chosen by a hash of seed and fileid."""

    name: ClassVar[str] = "features"
    parent: Path
    manifest: Path
    source: FeatureSource
    features: FeatureSettings
    kmeans: KMeansSettings
    seed: int
    resample: bool

    @cached_property
    def _sample(self) -> pl.DataFrame:
        return select_sample(
            scan_manifest(self.manifest),
            fraction=self.kmeans.sample_fraction,
            max_hours=self.kmeans.sample_hours,
            min_files=self.kmeans.min_sample_files,
            seed=self.seed,
        ).collect(engine="streaming")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the sample's rows behind: a shard reads its own part from the plan's folder."""
        _ = self.key
        return {name: value for name, value in vars(self).items() if name != "_sample"}

    def settings(self) -> dict[str, Any]:
        return {"resample": self.resample} if self.resample else {}

    def inputs(self) -> dict[str, str]:
        # The rows that were drawn, not the manifest: a file that was added and not drawn changes nothing here.
        return {"sample": manifest_digest(self._sample), "source": digest(self.source.identity)}

    def make_plan(self) -> list[Spec]:
        rows = self._sample
        with atomic_write(self.folder / "sample.parquet") as temporary:
            rows.write_parquet(temporary)
        bounds = plan_shards(rows, hours_per_shard=self.features.shard_hours)
        return [
            {"start": start, "end": end, "digest": digest([content, self.source.identity, self.resample])}
            for (start, end), content in zip(bounds, shard_digests(rows, bounds), strict=True)
        ]

    def work(self, spec: Spec) -> tuple[list[Path], Figures]:
        rows = pl.read_parquet(self.folder / "sample.parquet")[spec["start"] : spec["end"]]
        found = dict(
            extract(
                rows,
                FeatureExtractor(self.source),
                batch_seconds=self.features.batch_seconds,
                resample=self.resample,
            )
        )
        dtype = torch.float32 if self.source.is_mfcc else torch.float16
        frames = torch.cat([found[index] for index in range(len(rows))]).to("cpu", dtype)
        output = self.folder / "shards" / f"{spec['digest'][:16]}.safetensors"
        with atomic_write(output) as temporary:
            save_file({"frames": frames.contiguous()}, temporary)
        hours = rows["num_samples"].sum() / SAMPLE_RATE / 3600
        return [output], {"num_files": len(rows), "num_frames": len(frames), "hours": hours}

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
