"""Time and memory of everything that is done to a manifest as a whole, at 0.1, 1 and 10 million rows.

    python benchmarks/studies/manifest_scale.py --output benchmarks/results/manifest_scale.json

The manifests are invented (rows, no audio). Each size runs in a process of its own, so that its peak memory is its
own; the peak after a stage is that of the process so far. It fails if ten million rows need 4 GB or more.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from hubert.core.frames import SAMPLE_RATE
from hubert.core.hashing import hash_fileids
from hubert.data.listing import list_audio
from hubert.data.manifest import scan_manifest, write_manifest
from hubert.data.schema import SCHEMA, check_unique, cut_segments
from hubert.data.split import manifest_digest, plan_shards, select_sample, shard_digests, split_manifest
from hubert.data.stage import PLACE
from hubert.settings.sections import TrainSettings
from hubert.training.crops import CropPlan

SIZES = (100_000, 1_000_000, 10_000_000)
LIMIT_GB = 4.0
HASHED_AT_ONCE = 100_000  # fileids; a shard of units is written to the table at once, and is smaller


@dataclass
class Context:
    """What the stages of one size share: the folder, the number of rows, and what earlier stages found."""

    folder: Path
    num_rows: int
    shards: list[tuple[int, int]] = field(default_factory=list)

    @property
    def rows(self) -> pl.LazyFrame:
        """The whole manifest."""
        return scan_manifest(self.folder / "everything.parquet")

    @property
    def train(self) -> Path:
        """The training part, written by the stage `split`."""
        return self.folder / "train.parquet"


Stage = Callable[[Context], str]


def stages() -> list[tuple[str, Stage]]:
    """Return the stages in order: a name, and a function that does the work and says in a few words what came out.

    A stage that needs another part of the project is added here.
    """
    return [
        ("write", write),
        ("read columns", read_columns),
        ("read a CSV", read_csv),
        ("check ids", check_ids),
        ("digest", digest),
        ("cut segments", cut),
        ("split", split),
        ("sample", sample),
        ("plan shards", plan),
        ("shard digests", digest_shards),
        ("hash fileids", hash_ids),
        ("epoch batches", epoch_batches),
    ]


def write(context: Context) -> str:
    """Invent utterances of 2 to 30 s, 112 of each speaker, in LibriSpeech's layout, and write them."""
    row = pl.col("row")
    speaker, utterance = row // 112, row % 112
    mixed = (row * 2_654_435_761) % (1 << 32)
    fileid = pl.format("{}/{}/{}-{}-{}", speaker, utterance // 28, speaker, utterance // 28, utterance)
    invented = pl.LazyFrame({"row": pl.int_range(context.num_rows, eager=True)}).select(
        fileid=fileid,
        path=pl.format("/corpora/LibriSpeech/train/{}.flac", fileid),
        num_samples=2 * SAMPLE_RATE + mixed % (28 * SAMPLE_RATE),
        speaker=speaker.cast(pl.String),
        size=mixed % 500_000,
        mtime_ns=1_700_000_000_000_000_000 + mixed,
    )
    write_manifest(invented, context.folder / "everything.parquet")
    return f"{(context.folder / 'everything.parquet').stat().st_size / 1e6:.0f} MB"


def read_columns(context: Context) -> str:
    """Read fileids and lengths into memory."""
    frame = context.rows.select("fileid", "num_samples").collect(engine="streaming")
    return f"{frame['num_samples'].sum() / SAMPLE_RATE / 3600:.0f} hours"


def read_csv(context: Context) -> str:
    """Write the manifest as CSV and list it as a person's: parsed, checked, every file looked up (none is there)."""
    path = context.folder / "m.csv"
    write_manifest(context.rows, path)
    listing = context.folder / "listing.parquet"
    write_manifest(list_audio([path]), listing)
    return f"{scan_manifest(listing).select(pl.len()).collect().item()} rows from {path.stat().st_size / 1e6:.0f} MB"


def check_ids(context: Context) -> str:
    """Check that fileids and files are unique."""
    check_unique(context.rows)
    return "unique"


def digest(context: Context) -> str:
    """Digest the content, for the stage's key."""
    return manifest_digest(context.rows, "speaker")


def cut(context: Context) -> str:
    """Cut into segments of at most 10 s and count them."""
    cut_rows = cut_segments(context.rows, 10.0)
    write_manifest(cut_rows, context.folder / "segments.parquet")
    return f"{scan_manifest(context.folder / 'segments.parquet').select(pl.len()).collect().item()} segments"


def split(context: Context) -> str:
    """Split off validation and write both parts."""
    train, validation = split_manifest(context.rows)
    write_manifest(train, context.train)
    write_manifest(validation, context.folder / "validation.parquet")
    return f"{scan_manifest(context.folder / 'validation.parquet').select(pl.len()).collect().item()} held out"


def sample(context: Context) -> str:
    """Select the k-means sample, without the cap on hours."""
    return f"{select_sample(scan_manifest(context.train), max_hours=1e9).collect().height} selected"


def plan(context: Context) -> str:
    """Cut the training part into shards of one hour."""
    context.shards = plan_shards(scan_manifest(context.train), hours_per_shard=1.0)
    return f"{len(context.shards)} shards"


def digest_shards(context: Context) -> str:
    """Digest every shard."""
    return f"{len(set(shard_digests(scan_manifest(context.train), context.shards, 'speaker', *PLACE)))} digests"


def hash_ids(context: Context) -> str:
    """Hash every fileid, chunk by chunk, as the trainer's table is written; keep the columns that a plan reads."""
    path = context.folder / "fileid_hash.npy"
    rows = scan_manifest(context.train)
    count = rows.select(pl.len()).collect().item()
    hashes = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint64, shape=(count,))
    for start in range(0, count, HASHED_AT_ONCE):
        fileids = rows.slice(start, HASHED_AT_ONCE).select("fileid").collect()["fileid"]
        hashes[start : start + len(fileids)] = hash_fileids(fileids)
    np.save(context.folder / "num_samples.npy", rows.select("num_samples").collect()["num_samples"].to_numpy())
    return f"{len(np.unique(hashes))} hashes"


def epoch_batches(context: Context) -> str:
    """Build the batches of an epoch as the trainer does: lengths, order, cuts, and the crops of its last step."""
    num_samples, hashes = (
        np.load(context.folder / f"{name}.npy", mmap_mode="r") for name in ("num_samples", "fileid_hash")
    )
    crops = CropPlan(num_samples, hashes, 50, TrainSettings())
    crops.epoch(0)
    step = crops.micro_batches_per_epoch // crops.micro_batches_per_step - 1
    for index in range(crops.micro_batches_per_step):
        crops.micro_batch(step, index)
    return f"{crops.micro_batches_per_epoch} micro-batches"


def peak_gb() -> float:
    """Return the most memory that this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(folder: Path, num_rows: int) -> list[dict[str, Any]]:
    """Run all stages at one size, in this process."""
    context = Context(folder, num_rows)
    results = []
    for name, stage in stages():
        start, start_cpu = time.perf_counter(), time.process_time()
        outcome = stage(context)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gb": peak_gb()}
        results.append({"stage": name, **{key: round(value, 2) for key, value in figures.items()}, "outcome": outcome})
    return results


def table(results: dict[int, list[dict[str, Any]]]) -> str:
    """Lay out each stage's seconds and CPU seconds, and the peak at its end, size by size."""
    lines = [" | ".join([" " * 13, *(f"{rows:>10,} rows: s, CPU s, GB" for rows in results)])]
    for index, (name, _) in enumerate(stages()):
        found = [results[rows][index] for rows in results]
        cells = [f"{one['seconds']:>13.2f} {one['cpu_seconds']:>8.2f} {one['peak_gb']:>7.2f}" for one in found]
        lines.append(" | ".join([f"{name:<13}", *cells]))
    return "\n".join(lines)


def main() -> int:
    """Run every size in a child process, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="where the manifests go (3 GB at 10 million rows); default: a temporary folder"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of rows")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        json.dump(measure(arguments.folder, arguments.child), sys.stdout)
        return 0
    results: dict[int, list[dict[str, Any]]] = {}
    for num_rows in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            command = [sys.executable, __file__, "--child", str(num_rows), "--folder", folder]
            results[num_rows] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(table(results))
    if arguments.output is not None:
        machine = {"python": platform.python_version(), "polars": pl.__version__, "columns": list(SCHEMA)}
        content = {"machine": machine, "sizes": {str(rows): result for rows, result in results.items()}}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    worst = max(result["peak_gb"] for stages_of_size in results.values() for result in stages_of_size)
    if worst >= LIMIT_GB:
        print(f"the peak of {worst} GB is not below {LIMIT_GB} GB")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
