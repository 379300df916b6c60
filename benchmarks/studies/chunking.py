"""What cutting long files does to units, and how much memory extraction takes.

    python benchmarks/studies/chunking.py units CHECKPOINT --layer 2 --audio FOLDER [--minutes 5] [--files 3]
    python benchmarks/studies/chunking.py causes CHECKPOINT --layer 2 --audio FOLDER [--minutes 3] [--files 1]
    python benchmarks/studies/chunking.py memory --size tiny [--minutes 10 60] [--normalize]

`units` joins short recordings of speech to long files, labels them whole and in chunks with one codebook (k-means of the
short recordings), and prints how many frames get the same unit. `causes` cuts only the convolutions, whose statistics
(group norm) are then those of the chunk, or only the attention. `memory` prints the peak memory of a process that
extracts the last layer of a random model from noise and writes it, as the features stage does.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import soundfile
import torch
from torch import Tensor

from hubert.core.frames import FRAME_RATE, HOP, SAMPLE_RATE, num_frames
from hubert.data.audio_file import AudioRef
from hubert.data.schema import SCHEMA
from hubert.features.chunks import ChunkRule
from hubert.features.extract import FeatureExtractor
from hubert.features.source import FeatureSource
from hubert.features.stage import FeaturesStage
from hubert.model.hubert import HuBERT
from hubert.settings.model import build_config
from hubert.settings.sections import FeatureSettings, KMeansSettings
from hubert.units.codebook import Codebook
from hubert.units.kmeans import choose_seeds, torch_lloyd
from tools.given_stages import manifest_in

WHOLE = 1e9  # seconds


def join_recordings(audio: Path, folder: Path, *, minutes: float, num_files: int) -> list[list[np.ndarray]]:
    """Write the long files as wav; return the recordings that each one consists of."""
    paths = sorted(audio.rglob("*.flac"))
    parts: list[list[np.ndarray]] = []
    for number in range(num_files):
        mine: list[np.ndarray] = []
        while paths and sum(map(len, mine)) < minutes * 60 * SAMPLE_RATE:
            mine.append(soundfile.read(paths.pop(0), dtype="float32")[0])
        soundfile.write(folder / f"{number}.wav", np.concatenate(mine), SAMPLE_RATE)
        parts.append(mine)
    return parts


def extract_file(source: FeatureSource, path: Path, rule: ChunkRule) -> Tensor:
    """Return the features of a file under a rule."""
    ref = AudioRef(path.stem, str(path), soundfile.info(path).frames)
    return torch.cat([part for _, part in FeatureExtractor(source, rule).long_file(ref, resample=False)])


def compare_units(args: argparse.Namespace) -> None:
    """Print the table of agreements."""
    source = FeatureSource(str(args.checkpoint), "benchmark", args.layer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = join_recordings(args.audio, folder, minutes=args.minutes, num_files=args.files)
        files = sorted(folder.glob("*.wav"))
        single, codebook = label_recordings(source, parts, args.units)
        whole = [codebook.assign(extract_file(source, path, ChunkRule(WHOLE, 0))) for path in files]

        print(f"{len(files)} files of {args.minutes} minutes, {sum(map(len, whole)):,} frames, {args.units} units\n")
        print("| chunk | context | same unit | within 1 s of a cut | same unit as in the recording alone |")
        print("|---|---|---|---|---|")
        for seconds, context in [(WHOLE, 0), *((s, c) for s in args.seconds for c in args.contexts)]:
            rule = ChunkRule(seconds, context)
            units = [codebook.assign(extract_file(source, path, rule)) for path in files]
            same = torch.cat([a == b for a, b in zip(units, whole, strict=True)])
            near = torch.cat(
                [near_cuts(len(path_units), path, rule) for path_units, path in zip(units, files, strict=True)]
            )
            alone = agreement_with_parts(units, parts, single, codebook)
            close = f"{100 * float(same[near].float().mean()):.2f} %" if near.any() else ""
            length = "whole file" if seconds == WHOLE else f"{seconds:g} s"
            print(
                f"| {length} | {context:g} s | {100 * float(same.float().mean()):.2f} % | {close} | {100 * alone:.2f} % |",
                flush=True,
            )


def label_recordings(
    source: FeatureSource, parts: list[list[np.ndarray]], num_units: int
) -> tuple[list[list[Tensor]], Codebook]:
    """Return the features of each recording alone, and a codebook of all of them."""
    extractor = FeatureExtractor(source)
    single = [[extractor([torch.from_numpy(one)])[0] for one in mine] for mine in parts]
    frames = torch.cat([features for mine in single for features in mine])
    seeds = choose_seeds(frames[:: 1 + len(frames) // 20_000], num_units, seed=0)
    centroids, _ = torch_lloyd(lambda: frames.split(1 << 16), seeds, max_iterations=50, tolerance=1e-4)
    return single, Codebook(centroids, {})


@torch.inference_mode()
def compare_causes(args: argparse.Namespace) -> None:
    """Print the agreement with the whole file where only one part of the model sees chunks."""
    source = FeatureSource(str(args.checkpoint), "benchmark", args.layer)
    model = HuBERT.from_pretrained(args.checkpoint)
    print("| chunk | sees chunks | same unit | same unit as in the recording alone |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        parts = join_recordings(args.audio, Path(name), minutes=args.minutes, num_files=args.files)
        single, codebook = label_recordings(source, parts, args.units)
        waveforms = [torch.from_numpy(np.concatenate(mine)) for mine in parts]
    whole = [model.extract(waveform[None])[0] for waveform in waveforms]
    reference = [codebook.assign(run_layers(model, features, args.layer)) for features in whole]

    def report(chunk: str, cause: str, units: list[Tensor]) -> None:
        same = torch.cat([a == b for a, b in zip(units, reference, strict=True)]).float().mean()
        alone = agreement_with_parts(units, parts, single, codebook)
        print(f"| {chunk} | {cause} | {100 * float(same):.1f} % | {100 * alone:.1f} % |", flush=True)

    report("whole file", "nothing", reference)
    for seconds in args.seconds:
        convolutions, attention = [], []
        for waveform, features in zip(waveforms, whole, strict=True):
            chunks = ChunkRule(seconds, 2).chunks(len(waveform))
            spans = [slice(chunk.start, chunk.start + chunk.num_samples) for chunk in chunks]
            kept = [slice(chunk.skip, chunk.skip + chunk.num_frames) for chunk in chunks]
            cut = [model.extract(waveform[None, span])[0][:, keep] for span, keep in zip(spans, kept, strict=True)]
            convolutions.append(codebook.assign(run_layers(model, torch.cat(cut, 1), args.layer)))
            frames = [
                slice(span.start // HOP, span.start // HOP + num_frames(span.stop - span.start)) for span in spans
            ]
            layers = [run_layers(model, features[:, span], args.layer) for span in frames]
            attention.append(
                codebook.assign(torch.cat([layer[keep] for layer, keep in zip(layers, kept, strict=True)]))
            )
        report(f"{seconds:g} s", "convolutions", convolutions)
        report(f"{seconds:g} s", "attention", attention)


def run_layers(model: HuBERT, features: Tensor, num_layers: int) -> Tensor:
    """Return the output (F, D) of layer `num_layers` for the convolutions' output (1, F, C)."""
    x, _ = model._project(features, None)  # noqa: SLF001  (to cut between the parts of the model)
    x = model.transformer.embed(x)
    for layer in model.transformer.layers[:num_layers]:
        x, _ = layer(x)
    return x[0]


def near_cuts(num_frames: int, path: Path, rule: ChunkRule) -> Tensor:
    """Return the mask (F,) of the frames within a second of a cut."""
    cuts = [chunk.first_frame for chunk in rule.chunks(soundfile.info(path).frames)[1:]]
    mask = torch.zeros(num_frames, dtype=torch.bool)
    for cut in cuts:
        mask[max(cut - FRAME_RATE, 0) : cut + FRAME_RATE] = True
    return mask


def agreement_with_parts(
    units: list[Tensor], parts: list[list[np.ndarray]], single: list[list[Tensor]], codebook: Codebook
) -> float:
    """Return the share of frames whose unit is that of the recording alone, at the nearest frame."""
    same = total = 0
    for mine, recordings, features in zip(units, parts, single, strict=True):
        start = 0
        for recording, frames in zip(recordings, features, strict=True):
            first = round(start / 320)
            count = min(len(frames), len(mine) - first)
            same += int((codebook.assign(frames)[:count] == mine[first : first + count]).sum())
            total += count
            start += len(recording)
    return same / total


def measure_memory(args: argparse.Namespace) -> None:
    """Print the peak memory and the time of one process per length."""
    print("| audio | peak memory | memory before | seconds |\n|---|---|---|---|")
    for minutes in args.minutes:
        command = [sys.executable, __file__, "child", "--size", args.size, "--minutes", str(minutes)]
        command += ["--normalize"] if args.normalize else []
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(f"| {minutes:g} min | {output.strip()} |", flush=True)


def run_child(args: argparse.Namespace) -> None:
    """Extract one file as the features stage does; print the peak, what was there before, and the time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = build_config(args.size, {"normalize_waveform": args.normalize})
        HuBERT(config).save_pretrained(folder / "model")
        path = folder / "long.wav"
        generator = np.random.default_rng(0)
        num_samples = round(args.minutes[0] * 60 * SAMPLE_RATE)
        with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1) as sound:
            for start in range(0, num_samples, SAMPLE_RATE):
                sound.write(generator.normal(0, 0.1, min(SAMPLE_RATE, num_samples - start)))
        values = {"fileid": "long", "path": str(path), "num_samples": num_samples}
        pl.DataFrame([values], schema=SCHEMA).write_parquet(folder / "manifest.parquet")
        source = FeatureSource(str(folder / "model"), "random", config.num_layers)
        kmeans = KMeansSettings(sample_fraction=1.0)
        stage = FeaturesStage(
            parent=folder,
            manifest=manifest_in(folder / "manifest.parquet"),
            source=source,
            features=FeatureSettings(),
            kmeans=kmeans,
        )
        stage.plan()
        before, start_time = peak_megabytes(), time.perf_counter()
        stage.run()
        print(f"{peak_megabytes():,.0f} MB | {before:,.0f} MB | {time.perf_counter() - start_time:.0f}")


def peak_megabytes() -> float:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, minutes, files in (("units", 5, 3), ("causes", 3, 1)):
        units = commands.add_parser(name)
        units.add_argument("checkpoint", type=Path)
        units.add_argument("--layer", type=int, required=True)
        units.add_argument("--audio", type=Path, required=True)
        units.add_argument("--minutes", type=float, default=minutes)
        units.add_argument("--files", type=int, default=files)
        units.add_argument("--units", type=int, default=100)
        units.add_argument("--seconds", type=float, nargs="+", default=[100, 30])
        units.add_argument("--contexts", type=float, nargs="+", default=[0, 1.28, 2, 5])
    for name in ("memory", "child"):
        memory = commands.add_parser(name)
        memory.add_argument("--size", default="tiny")
        memory.add_argument("--minutes", type=float, nargs="+", default=[10, 60])
        memory.add_argument("--normalize", action="store_true")
    args = parser.parse_args()
    {"units": compare_units, "causes": compare_causes, "memory": measure_memory, "child": run_child}[args.command](args)


if __name__ == "__main__":
    main()
