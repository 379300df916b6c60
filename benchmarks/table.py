"""The table of docs/benchmarks.md from the JSON of `benchmarks.run`: python -m benchmarks.table [--check]

Without --check it is written between the page's two markers; with it the command fails if it is not what stands there.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.page import PROJECT, keep

PAGE = PROJECT / "docs" / "benchmarks.md"
RESULTS = [PROJECT / "benchmarks" / "results" / f"peers-{device}.json" for device in ("cpu", "cuda")]
START = "<!-- benchmarks: made by `python -m benchmarks.table` -->"
END = "<!-- end of benchmarks -->"
NONE = "No results have been recorded yet; `make bench` makes them."
OURS, PEER = "ours", "minimal-hubert"


def read_results(paths: Sequence[Path] = RESULTS) -> list[dict[str, Any]]:
    """Return the results that are there."""
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def render(results: list[dict[str, Any]], *, whole: bool = False) -> str:
    """Return the tables as Markdown, one per device. `whole`: with the other peers' rows and the errors, for a terminal."""
    return "\n\n".join(_table(result, whole=whole) for result in results) or NONE


def _table(result: dict[str, Any], *, whole: bool) -> str:
    header = ["stage", "", "ours", "peer", "times as fast", "by CPU time", "peak memory, ours / peer"]
    lines = [_describe(result), "", _line(header), _line(["---", "---", *["--:"] * 5])]
    notes: list[str] = []
    for row in result["rows"]:
        lines += [_line(cells) for cells in _cells(row, result["device"])]
        notes += _notes(row, whole=whole)
    lines += [_line(cells) for row in result["rows"] for cells in _disk(row)]
    if found := result.get("orchestration"):
        what = f"{found['num_shards']} shards of {found['shard_seconds']:g} s on {found['num_workers']} workers"
        lines.append(
            _line(["overhead of Prefect, Dask and Slurm", "%", _number(found["overhead_percent"]), *["-"] * 3, ""])
        )
        notes.append(f"overhead: {what}; nothing to compare it with, since no peer has an orchestrator.")
    return "\n".join([*lines, *(["", *(f"- {note}" for note in notes)] if notes else [])])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _describe(result: dict[str, Any]) -> str:
    """Return one sentence: on what, with what, when."""
    machine = result["machine"]
    where = machine["gpu"] or f"{machine['threads']} threads on {machine['cores']} cores of {machine['processor']}"
    bf16 = ", bfloat16 in hardware" if {"avx512_bf16", "amx_bf16"} & set(machine["flags"]) else ""
    size = "" if result["size"] == "quick" else f", size {result['size']}"
    busy = f"; the machine was busy (load {machine['load_before']:g})" if machine.get("load_before", 0) >= 1 else ""
    return (
        f"{where}{'' if machine['gpu'] else bf16}; torch {machine['torch']}; commit {result['commit']}, {result['date']}{size}; "
        f"peer: {result['peer'].replace('==', ' ')}{busy}."
    )


def _cells(row: dict[str, Any], device: str) -> list[list[str]]:
    """Return the lines of a row: ours beside the peer, then ours beside each other program."""
    mine = row["sides"].get(OURS)
    if mine is None:
        return []
    others = [side for side in row["sides"] if side != OURS] or [PEER]
    lines = []
    for other in others:
        theirs, ratios = row["sides"].get(other), row.get("ratios", {}).get(other)
        title = row["title"] if other == others[0] else f"… beside {other}"
        if other == others[0] and other != PEER:
            title = f"{row['title']}, beside {other}"
        lines.append(
            [
                title,
                row["unit"],
                _speed(mine, row["unit"]),
                _speed(theirs, row["unit"]) if theirs else "-",
                f"{ratios['wall']:.2f}" if ratios else "-",
                f"{ratios['cpu']:.2f}" if ratios else "-",
                f"{_memory(mine, device)} / {_memory(theirs, device) if theirs else '-'}",
            ]
        )
    return lines


def _speed(side: dict[str, Any], unit: str) -> str:
    value = side["wall_seconds"] if unit == "s" else side["audio_seconds"] / side["wall_seconds"]
    return _number(value)


def _number(value: float) -> str:
    """Write three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _memory(side: dict[str, Any], device: str) -> str:
    """Write the peak: the GPU's where there is one, else the process's."""
    return f"{side['gpu_peak_bytes' if device == 'cuda' else 'peak_bytes'] / 1e9:.2f} GB"


def _notes(row: dict[str, Any], *, whole: bool) -> list[str]:
    """Return what a row's numbers need beside them."""
    sides, parts = row["sides"], []
    distances = {side: found["figures"].get("mean_squared_distance") for side, found in sides.items()}
    if all(distances.values()):
        parts.append(
            "mean squared distance " + ", ".join(f"{_name(side)} {value:.5g}" for side, value in distances.items())
        )
    if "agreement" in row:
        parts.append(f"{row['agreement']:.1%} of the units of a file are equal")
    if "agrees" in row:
        parts.append(
            f"values {'agree' if row['agrees'] else 'DIFFER'}, by at most {row['difference']:.1g}"
            if whole or not row["agrees"]
            else ""
        )
    if row["stage"] == "checkpoint":
        written = ", ".join(f"{_name(side)} {found['bytes_written'] / 1e9:.2f} GB" for side, found in sides.items())
        parts.append(f"on disk at the end: {written}")
    parts.append(row["comment"])
    parts += [f"{side}: {error}" for side, error in row["errors"].items()] if whole else []
    if not whole and PEER in row["errors"]:
        parts.append("the peer could not run")
    parts = [part for part in parts if part]
    return [f"{row['title']}: {'; '.join(parts)}."] if parts else []


def _name(side: str) -> str:
    return "ours" if side == OURS else side


def _disk(row: dict[str, Any]) -> list[list[str]]:
    """Return the line of what labelling leaves on disk."""
    found = {side: values["figures"].get("bytes_per_hour") for side, values in row["sides"].items()}
    if row["name"] not in {"units-mfcc", "units-float32"} or not found.get(OURS) or not found.get(PEER):
        return []
    kind = "MFCC" if row["name"] == "units-mfcc" else f"layer {row['options']['layer']}"
    mine, theirs = (found[side] / 1e6 for side in (OURS, PEER))
    title = f"disk after labelling by {kind}"
    return [[title, "MB / h", _number(mine), _number(theirs), f"1/{theirs / mine:.1f} of it", "", ""]]


def main() -> None:
    """Write or check the page."""
    keep(PAGE, render(read_results()), START, END, module="benchmarks.table")


if __name__ == "__main__":
    main()
