"""What the stages read, made once: python -m benchmarks.inputs FOLDER SPEC.json (the runner calls it).

audio/{flac,wav}/u0000.flac …, audio/corpus.tar      the corpus of `benchmarks.signals`
subset-N/flac.parquet, .csv, .jsonl, table-flac/    its first N minutes: manifests and labelled manifests for both sides
model/own, torchaudio, transformers                 one base model with a head of 500 units, random weights
codebooks/mfcc, layer-float32, layer-bfloat16       for both sides
frames-mfcc, frames-layer                           frames for k-means: ours in one file, the peer's file by file
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import signals

NUM_UNITS = 500
KINDS = ("flac", "wav", "tar")


def prepare(folder: Path, spec: dict[str, Any]) -> None:
    """Make what a spec names and is not there yet: subsets, kinds, model, codebooks, frames."""
    steps: dict[str, Any] = {}
    if spec["subsets"]:
        minutes, kinds = max(spec["subsets"]), spec["kinds"]
        for kind in kinds:
            steps[f"audio/{kind}-{minutes:g}"] = lambda kind=kind: write_audio(folder, kind, minutes)
        for part in spec["subsets"]:
            for kind in kinds:
                steps[f"subset-{part:g}/{kind}"] = lambda part=part, kind=kind: write_subset(folder, kind, part)
    if spec["model"]:
        steps["model"] = lambda: write_model(folder / "model")
    if spec["codebooks"]:
        steps["codebooks"] = lambda: write_codebooks(folder, spec["layer"])
    for name, number in spec["frames"].items():
        steps[f"frames-{name}-{number}"] = lambda name=name, number=number: write_frames(folder, name, number)
    for name, step in steps.items():
        marker = folder / "made" / name.replace("/", "-")
        if not marker.exists():
            print(f"inputs: {name}", flush=True)
            step()
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()


def file_name(number: int) -> str:
    """Return a fileid, with a letter: the peer takes 0000 in a CSV for a number, and then finds no units for it."""
    return f"u{number:04d}"


def write_audio(folder: Path, kind: str, minutes: float) -> None:
    """Write the corpus as files, or as flac files in a tar."""
    import tarfile

    import soundfile

    suffix = "flac" if kind == "tar" else kind
    target = folder / "audio" / suffix
    target.mkdir(parents=True, exist_ok=True)
    for number, num_samples in enumerate(signals.lengths(minutes)):
        path = target / f"{file_name(number)}.{suffix}"
        if not path.exists():
            soundfile.write(path, signals.waveform(number, num_samples), signals.SAMPLE_RATE, subtype="PCM_16")
    if kind == "tar":
        with tarfile.open(folder / "audio" / "corpus.tar", "w") as archive:
            for path in sorted(target.glob("*.flac")):
                archive.add(path, path.name)


def write_subset(folder: Path, kind: str, minutes: float) -> None:
    """Write the manifests of the first minutes, plain and labelled with random units."""
    import tarfile

    import polars as pl

    from hubert.data.manifest import write_manifest
    from hubert.units.labels import write_table

    lengths = signals.lengths(minutes)
    rng = np.random.default_rng(signals.SEED)
    units = [rng.integers(0, NUM_UNITS, signals.num_frames(length)) for length in lengths]
    names = [file_name(number) for number in range(len(lengths))]
    columns: dict[str, Any] = {"fileid": names, "num_samples": lengths}
    if kind == "tar":
        path = folder / "audio" / "corpus.tar"
        with tarfile.open(path) as archive:
            members = {member.name: member for member in archive}
        chosen = [members[f"{name}.flac"] for name in names]
        columns |= {"path": [member.name for member in chosen], "archive": [str(path)] * len(names)}
        columns |= {"byte_offset": [member.offset_data for member in chosen]}
        columns |= {"byte_size": [member.size for member in chosen]}
    else:
        columns["path"] = [str(folder / "audio" / kind / f"{name}.{kind}") for name in names]
    target = folder / f"subset-{minutes:g}"
    target.mkdir(exist_ok=True)
    rows = pl.DataFrame(columns).select("fileid", "path", "num_samples", pl.exclude("fileid", "path", "num_samples"))
    for suffix in ("parquet", "csv"):
        write_manifest(rows, target / f"{kind}.{suffix}")
    labelled = rows.with_columns(units=pl.Series(units, dtype=pl.List(pl.Int32)))
    labelled.write_ndjson(target / f"{kind}.jsonl")
    chunk = columns | {"units": units}
    write_table(target / f"table-{kind}", [chunk], frame_rate=50, num_units=NUM_UNITS, codebook="benchmark")


def write_model(folder: Path) -> None:
    """Write one model of random weights in three formats."""
    from hubert.model.hubert import HuBERTPretrain

    torch.manual_seed(signals.SEED)
    model = HuBERTPretrain(NUM_UNITS, "base")
    model.save_pretrained(folder / "own")
    for name in ("torchaudio", "transformers"):
        model.save_pretrained(folder / name, format=name)


def write_codebooks(folder: Path, layer: int) -> None:
    """Take frames of the corpus as centroids: 100 of MFCC, 500 of the layer."""
    from hubert.features.mfcc import mfcc
    from hubert.features.source import FeatureSource
    from hubert.model.hubert import HuBERT
    from hubert.model.weights import weights_digest
    from hubert.settings.sections import FeatureSettings
    from hubert.units.codebook import Codebook

    waveforms = [torch.from_numpy(signals.waveform(number, 16 * signals.SAMPLE_RATE)) for number in range(2)]
    target = folder / "codebooks"
    target.mkdir(exist_ok=True)

    def write(name: str, frames: torch.Tensor, source: FeatureSource, num_units: int) -> None:
        order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(0))[:num_units]
        centroids = frames[order].contiguous()
        metadata = {"source": source.identity, "frame_rate": source.frame_rate, "num_units": num_units}
        Codebook(centroids, metadata).save(target / f"{name}.safetensors")
        np.save(target / f"{name}.npy", centroids.numpy())

    write("mfcc", torch.cat([mfcc(waveform) for waveform in waveforms]), FeatureSource(), 100)
    path = folder / "model" / "own"
    model = HuBERT.from_pretrained(path)
    with torch.inference_mode():
        layers = [model.get_intermediate_outputs(waveform[None], num_layers=layer)[-1][0] for waveform in waveforms]
    sha256 = weights_digest(path, "the model")
    for dtype in ("float32", "bfloat16"):
        settings = FeatureSettings(before_residual=True, dtype=dtype)
        source = FeatureSource.of_layer(path, sha256, layer, settings)
        write(f"layer-{dtype}", torch.cat(layers), source, NUM_UNITS)


def write_frames(folder: Path, name: str, number: int) -> None:
    """Write frames: MFCCs of the signals, or 768 numbers that lie around 2,000 points, as a layer's do around phones."""
    from safetensors.torch import save_file

    from hubert.features.mfcc import mfcc

    target = folder / f"frames-{name}"
    if target.exists():
        shutil.rmtree(target)
    (target / "files").mkdir(parents=True)
    rng = np.random.default_rng(signals.SEED)
    points = rng.standard_normal((2000, 768), np.float32)
    parts, total = [], 0
    while total < number:
        if name == "mfcc":
            frames = mfcc(torch.from_numpy(signals.waveform(len(parts), 12 * signals.SAMPLE_RATE)))
        else:
            noise = rng.standard_normal((600, 768), np.float32)
            frames = torch.from_numpy(points[rng.integers(0, 2000, 600)] + 0.7 * noise)
        torch.save(frames, target / "files" / f"{len(parts):05d}.pt")
        parts.append(frames)
        total += len(frames)
    together = torch.cat(parts)
    save_file({"frames": together}, target / "shard.safetensors")
    np.save(target / "all.npy", together.numpy())


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
