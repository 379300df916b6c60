"""What two runs must have in common to be equal (times, paths, ids and hosts aside)."""

import json
from pathlib import Path
from typing import Any

import polars as pl

from hubert.units.codebook import Codebook

TIMES = {
    "seconds",
    "time",
    "audio_seconds_per_second",
    "finished_at",
    "host",
    "jobs",
    "path",
    "checkpoint",
    "sources",
    "sha256",
}


def plain(content: Any) -> Any:
    """Drop what may differ between equal runs."""
    if isinstance(content, dict):
        return {name: plain(value) for name, value in content.items() if name not in TIMES}
    return [plain(value) for value in content] if isinstance(content, list) else content


def outputs(run: Path, numbers: tuple[int, ...] = (1,)) -> dict[str, Any]:
    """Return manifest, codebooks, units, weights and metrics of a run, by name."""
    found: dict[str, Any] = {}
    for manifest in sorted(run.glob("manifest-*")):
        for path in sorted(manifest.glob("[etv]*.parquet")):  # everything, train, validation
            found[f"{manifest.name}/{path.stem}"] = pl.read_parquet(path)["fileid"].to_list()
    for number in numbers:
        home = run / f"it{number}"
        for path in sorted(home.glob("kmeans-*/codebook.safetensors")):
            found[f"{number}/codebook"] = Codebook.load(path).centroids.tolist()  # the metadata name the teacher's path
        for table in sorted(home.glob("units-*/tables/*/units.npy")):
            found[f"{number}/units/{table.parent.name}"] = table.read_bytes()
        for path in sorted(home.glob("train-*/step-*/model.safetensors")):
            found[f"{number}/{path.parent.name}"] = path.read_bytes()
        for path in sorted(home.glob("train-*/metrics.jsonl")):
            found[f"{number}/metrics"] = [plain(json.loads(line)) for line in path.read_text().splitlines()]
        for stage in ("validate", "abx", "quality"):
            for path in sorted(home.glob(f"{stage}-*/done.json")):
                found[f"{number}/{stage}"] = plain(json.loads(path.read_text())["figures"])
    return found


def assert_equal_runs(one: Path, other: Path, numbers: tuple[int, ...] = (1,)) -> None:
    """Compare two runs, naming the first thing that differs."""
    ours, theirs = outputs(one, numbers), outputs(other, numbers)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if ours[name] != theirs[name]]
    assert different == []
