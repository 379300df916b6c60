"""Time parts of the CPU stages beside other ways to do them.

MFCC beside torchaudio's, the search for the nearest centroid beside scikit-learn's, first centroids from float32 and float64
frames, dask-ml in one process beside workers, a teacher in bfloat16 beside float32.

    python benchmarks/studies/cpu_speed.py mfcc
    python benchmarks/studies/cpu_speed.py search
    python benchmarks/studies/cpu_speed.py seeds
    python benchmarks/studies/cpu_speed.py kmeans --audio /path/to/speech
    python benchmarks/studies/cpu_speed.py units --audio /path/to/speech --teacher runs/mine/it1/train-…/step-00005000 --layer 2

Times are CPU seconds of one thread; candidates alternate, and the cheapest of several rounds counts, since other
processes only ever make one dearer.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", PREFECT_PLUGINS_ENABLED="false")

import soundfile
import torch
from safetensors.torch import save_file
from torch import Tensor

from hubert.core.hashing import file_digest
from hubert.features.extract import FeatureExtractor
from hubert.features.mfcc import batch_mfcc
from hubert.features.source import FeatureSource
from hubert.settings.sections import FeatureSettings, KMeansSettings
from hubert.units.codebook import Codebook, nearest_centroids
from hubert.units.kmeans import choose_seeds, codebook_figures, draw_frames, torch_lloyd


def cheapest(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the CPU seconds of each candidate's cheapest round."""
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(rounds):
        for name, candidate in candidates.items():
            start = time.process_time()
            candidate()
            best[name] = min(best[name], time.process_time() - start)
    return best


def torchaudio_mfcc(waveform: Tensor) -> Tensor:
    """Return the same 39 numbers per frame by torchaudio, file by file."""
    from torchaudio.compliance import kaldi
    from torchaudio.functional import compute_deltas

    static = kaldi.mfcc(waveform[None], sample_frequency=16_000, use_energy=False).T
    first = compute_deltas(static)
    return torch.cat([static, first, compute_deltas(first)]).T.contiguous()


def time_mfcc(_: argparse.Namespace) -> None:
    """Print microseconds per frame for batches of several shapes."""
    for seconds, count in ((2, 1), (2, 60), (5, 1), (5, 24), (15, 1), (15, 8)):
        waveforms = [0.1 * torch.randn(seconds * 16_000) for _ in range(count)]
        frames = sum(map(len, batch_mfcc(waveforms)))
        candidates = {
            "torchaudio": lambda waveforms=waveforms: [torchaudio_mfcc(waveform) for waveform in waveforms],
            "ours": lambda waveforms=waveforms: batch_mfcc(waveforms),
        }
        cheapest(candidates, 5)  # the first rounds only make the heap grow
        found = {name: 1e6 * value / frames for name, value in cheapest(candidates, max(20, 60_000 // frames)).items()}
        error = max(float((batch_mfcc([one])[0] - torchaudio_mfcc(one)).abs().max()) for one in waveforms)
        ratio = found["torchaudio"] / found["ours"]
        print(
            f"{count:3} x {seconds:2} s: torchaudio {found['torchaudio']:.2f}, ours {found['ours']:.2f} us per frame, "
            f"ratio {ratio:.1f}, largest difference {error:.0e}",
            flush=True,
        )


def time_search(_: argparse.Namespace) -> None:
    """Print the time of the search for the nearest centroid."""
    from sklearn.metrics import pairwise_distances_argmin_min

    for num_frames, dimension, num_units in ((65_536, 39, 100), (65_536, 39, 500), (16_384, 768, 500)):
        frames = torch.randn(num_frames, dimension)
        centroids = frames[:num_units] + 0.1 * torch.randn(num_units, dimension)
        wide = centroids.double().numpy()  # as dask-ml has them
        found = cheapest(
            {
                "scikit-learn": lambda frames=frames, wide=wide: pairwise_distances_argmin_min(frames.numpy(), wide),
                "ours": lambda frames=frames, centroids=centroids: nearest_centroids(frames, centroids),
            },
            10,
        )
        theirs, ours = (1e6 * value / num_frames for value in found.values())
        print(
            f"{num_frames} frames of {dimension}, {num_units} units: scikit-learn {theirs:.2f}, ours {ours:.2f} us per frame, "
            f"ratio {theirs / ours:.1f}",
            flush=True,
        )


def time_seeds(_: argparse.Namespace) -> None:
    """Print the time of k-means++ on 20,000 frames of a layer's size."""
    from sklearn.cluster import kmeans_plusplus

    frames = torch.randn(20_000, 768)
    found = cheapest(
        {
            "float32": lambda: kmeans_plusplus(frames.numpy(), 500, random_state=0),
            "float64": lambda: choose_seeds(frames, 500, 0),
        },
        1,
    )
    print(
        f"500 of 20,000 x 768: from float32 frames {found['float32']:.1f}, from float64 frames {found['float64']:.1f} CPU s"
    )


def read_audio(folder: Path) -> list[Tensor]:
    """Read all flac files of a folder, shortest first."""
    files = sorted(folder.rglob("*.flac"))
    return sorted((torch.from_numpy(soundfile.read(file, dtype="float32")[0]) for file in files), key=len)


def fit_on_a_worker(shards: list[Path], megabytes: float, iterations: int) -> tuple[Tensor, float]:
    """Run dask-ml's Lloyd as a Dask task; return the centroids and the seconds."""
    from distributed import worker_client

    from tasks.kmeans import dask_lloyd

    seeds = choose_seeds(draw_frames(shards, 20_000, 0), 100, 0)
    settings = KMeansSettings(local_megabytes=megabytes, max_iterations=iterations)
    start = time.perf_counter()
    centroids, _ = dask_lloyd(shards, seeds, settings, worker_client)
    return centroids, time.perf_counter() - start


def time_kmeans(arguments: argparse.Namespace) -> None:
    """Print the CPU and wall seconds of 100 iterations over the MFCCs of the audio, in one process and over workers."""
    from distributed import Client, LocalCluster

    from tasks.slurm.worker_environment import worker_environment

    frames = torch.cat(batch_mfcc(read_audio(arguments.audio)))
    with tempfile.TemporaryDirectory() as folder:
        shards = [Path(folder) / f"{number}.safetensors" for number in range(2)]
        for path, part in zip(shards, frames.chunk(2), strict=True):
            save_file({"frames": part.contiguous()}, path)
        with (
            LocalCluster(
                n_workers=2, threads_per_worker=1, env=worker_environment(2, 2, 1), dashboard_address=None
            ) as workers,
            Client(workers) as client,
        ):

            def cpu() -> float:
                return time.process_time() + sum(client.run(time.process_time).values())

            for megabytes in (0, 256):
                client.submit(fit_on_a_worker, shards, megabytes, 1, pure=False).result()  # imports and compiles
            for megabytes in (0, 256, 0, 256):
                before = cpu()
                centroids, wall = client.submit(fit_on_a_worker, shards, megabytes, 100, pure=False).result()
                distance = codebook_figures(shards, Codebook(centroids, {}))["mean_squared_distance"]
                print(
                    f"{len(frames)} frames, local_megabytes={megabytes}: {cpu() - before:.1f} CPU s, Lloyd {wall:.1f} s, "
                    f"mean squared distance {distance:.3f}",
                    flush=True,
                )


def time_units(arguments: argparse.Namespace) -> None:
    """Print the CPU time of a layer's features in both arithmetics, and how often their units agree."""
    waveforms = read_audio(arguments.audio)[: arguments.files]
    seconds = sum(map(len, waveforms)) / 16_000
    sha256 = file_digest(arguments.teacher / "model.safetensors")
    candidates, features = {}, {}
    for dtype in ("float32", "bfloat16"):
        source = FeatureSource.of_layer(arguments.teacher, sha256, arguments.layer, FeatureSettings(dtype=dtype))
        extractor = FeatureExtractor(source)

        def extract(extractor: FeatureExtractor = extractor) -> Tensor:
            batches = [waveforms[start : start + 4] for start in range(0, len(waveforms), 4)]
            return torch.cat([frames for batch in batches for frames in extractor(batch)])

        features[dtype] = extract()
        candidates[dtype] = extract
    frames = features["float32"]
    seeds = choose_seeds(frames, arguments.num_units, 0)
    centroids, _ = torch_lloyd(lambda: [frames], seeds, max_iterations=30, tolerance=1e-4)
    plain, short = (Codebook(centroids, {}).assign(features[dtype]) for dtype in features)
    times = cheapest(candidates, 3)
    print(
        f"{seconds:.0f} s of audio: {times['float32'] / seconds:.4f} CPU s per second in float32, "
        f"{times['bfloat16'] / seconds:.4f} in bfloat16; {float((plain == short).float().mean()):.2%} of the units agree"
    )


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarks = {
        "mfcc": time_mfcc,
        "search": time_search,
        "seeds": time_seeds,
        "kmeans": time_kmeans,
        "units": time_units,
    }
    parser.add_argument("stage", choices=benchmarks)
    parser.add_argument("--audio", type=Path, help="a folder of flac files, 16 kHz mono")
    parser.add_argument("--files", type=int, default=8, help="units: the shortest ones")
    parser.add_argument("--teacher", type=Path, help="units: a checkpoint's folder")
    parser.add_argument("--layer", type=int, default=6, help="units: which one, from 1")
    parser.add_argument("--num-units", type=int, default=50, help="units: of the codebook that is fitted on the spot")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    benchmarks[arguments.stage](arguments)


if __name__ == "__main__":
    main()
