"""The benchmarks: what they say is what was measured, and both sides are asked for the same."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import machine, page, scale, signals, table
from benchmarks.cases import DEVICES, OURS, PEER, SIZES, Case, build_cases, inputs_of
from benchmarks.clock import Clock
from benchmarks.measure import Run
from benchmarks.peer import PYTHON as PEER_PYTHON
from benchmarks.run import Runner, summarise
from benchmarks.studies import growth
from hubert.core.paths import PROJECT

TINY = {"minutes": 0.1}


def result_of(wall, cpu, *, audio=60.0, check=(), figures=None, peak=2_000_000_000):
    return {
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "audio_seconds": audio,
        "peak_bytes": peak,
        "before_bytes": 1,
        "gpu_peak_bytes": 0,
        "bytes_written": 10,
        "check": list(check),
        "figures": figures or {},
    }


def recorded(rows):
    about = {
        "gpu": None,
        "threads": 2,
        "cores": 2,
        "processor": "a processor",
        "flags": ["avx512_bf16"],
        "torch": "2.14.1",
    }
    head = {
        "size": "quick",
        "device": "cpu",
        "commit": "0123456789ab",
        "date": "2026-11-26",
        "peer": "minimal-hubert==0.0.8",
    }
    return head | {"machine": about, "rows": rows}


def test_the_readme_shows_what_is_recorded():
    text = table.PAGE.read_text()
    assert page.insert(text, table.render(table.read_results()), table.START, table.END, table.PAGE) == text, (
        "run: python -m benchmarks.table"
    )


def test_the_three_sizes_that_are_recorded_are_those_that_the_program_measures():
    rows = json.loads(scale.GROWTH.read_text())["rows"]
    assert [(row["size"], row["title"]) for row in rows] == [(size, case.title) for size, case in growth.build_cases()]


def test_the_page_on_scale_shows_what_is_recorded():
    text = scale.PAGE.read_text()
    assert page.insert(text, scale.whole_page(), scale.START, scale.END, scale.PAGE) == text, (
        "run: python -m benchmarks.scale"
    )


def test_medians_and_ratios_are_those_of_the_measurements():
    """60 s of audio: ours in 2 s (median of 1, 2, 9), the peer in 6 s: 3 times as fast; 4 s and 6 s of CPU: 1.5."""
    case = Case("a", "A stage", "mfcc", {}, tolerance=0.1)
    found = {
        OURS: [result_of([9.0, 1.0], [4.0, 4.0], check=[1.0, 2.0]), result_of([2.0], [4.0])],
        PEER: [result_of([6.0], [6.0], check=[1.05, 2.0], peak=3_000_000_000)],
    }
    row = summarise(case, found, {})
    assert row["sides"][OURS]["wall_seconds"] == 2.0
    assert row["sides"][OURS]["wall_spread"] == [1.0, 9.0]
    assert row["ratios"][PEER] == {"wall": 3.0, "cpu": 1.5}
    assert row["difference"] == pytest.approx(0.05)
    assert row["agrees"]
    assert not summarise(Case("a", "A stage", "mfcc", {}, tolerance=0.01), found, {})["agrees"]
    lines = table.render([recorded([row])]).splitlines()
    assert lines[0].startswith(
        "2 threads on 2 cores of a processor, bfloat16 in hardware; torch 2.14.1; commit 0123456789ab"
    )
    assert lines[4] == "| A stage | audio s / s | 30 | 10 | 3.00 | 1.50 | 2.00 GB / 3.00 GB |"


def test_times_are_compared_as_times_and_distances_stand_below():
    case = Case("kmeans-mfcc", "k-means", "kmeans", {}, unit="s")
    found = {
        OURS: [result_of([4.0], [8.0], audio=0.0, figures={"mean_squared_distance": 1496.2})],
        PEER: [result_of([6.0], [12.0], audio=0.0, figures={"mean_squared_distance": 1518.0})],
    }
    text = table.render([recorded([summarise(case, found, {})])])
    assert "| k-means | s | 4 | 6 | 1.50 | 1.50 |" in text
    assert "- k-means: mean squared distance ours 1496.2, minimal-hubert 1518." in text


def test_units_show_what_they_leave_on_disk_and_how_many_are_equal():
    case = Case("units-float32", "units", "units", {"layer": 6}, agreement=True)
    found = {
        OURS: [result_of([1.0], [2.0], check=[1, 2, 3, 4], figures={"bytes_per_hour": 28e6, "peak_bytes": 1e9})],
        PEER: [result_of([1.0], [2.0], check=[1, 2, 3, 5, 9], figures={"bytes_per_hour": 560e6})],
    }
    row = summarise(case, found, {})
    assert row["agreement"] == 0.75
    assert row["sides"][OURS]["peak_bytes"] == 1_000_000_000, "the peak of what was timed"
    text = table.render([recorded([row])])
    assert "| disk after labelling by layer 6 | MB / h | 28 | 560 | 1/20.0 of it |  |  |" in text
    assert "- units: 75.0% of the units of a file are equal." in text


def test_a_side_that_fails_leaves_a_dash_and_never_a_number():
    case = Case("a", "A stage", "mfcc", {})
    row = summarise(case, {OURS: [result_of([2.0], [4.0])], PEER: []}, {PEER: "no FFmpeg"})
    text = table.render([recorded([row])])
    assert "| A stage | audio s / s | 30 | - | - | - | 2.00 GB / - |" in text
    assert "the peer could not run" in text


def test_the_machine_is_recorded():
    found = machine.describe("cpu", 2)
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert found["memory_bytes"] > 2**30
    assert found["gpu"] is None
    assert re.fullmatch(r"[0-9a-f]{12}\+?|unknown", machine.commit())


def test_a_clock_counts_the_memory_and_the_cpu_time_of_its_rounds():
    """In a process of its own: what other tests hold comes and goes."""
    code = """if True:
        import json, subprocess, sys
        import numpy as np
        from benchmarks.clock import Clock

        before = np.ones(60_000_000)  # 480 MB, gone before the round
        del before
        clock = Clock()
        with clock:
            held = np.ones(20_000_000)  # 160 MB
            subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True)
        print(json.dumps([clock.peak - clock.before, held.nbytes, clock.wall, clock.cpu]))
    """
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=PROJECT)
    counted, held, wall, cpu = json.loads(done.stdout)
    assert held <= counted < 3 * held
    assert len(wall) == len(cpu) == 1
    assert cpu[0] > 0.02, "the child's time counts"


def test_the_cpu_time_of_a_child_counts_once():
    """While it lives by its own clock, afterwards among those that ended."""
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"
    clock = Clock()
    with clock:
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        child.stdout.readline()
    with clock:
        child.communicate(b"\n")
    living, ended = clock.cpu
    assert living > 0.3
    assert ended < 0.3, "what was counted while it lived is not counted again"
    clock.share(2)
    assert clock.cpu == [living, ended / 2]


def test_a_short_round_lasts_a_second_and_counts_as_one_call():
    from benchmarks.stages.loader import drain

    run = Run(Path(), Path(), "cpu", 1, {"deliver_minutes": 1}, 0.0)
    outcome = drain(run, iter(lambda: 16_000, None))
    assert outcome.audio_seconds == 60
    assert run.clock.wall[0] < 0.1, "60 batches of a second each take no time"


def test_signals_are_the_same_at_every_call_and_survive_16_bits():
    lengths = signals.lengths(0.5)
    assert lengths == signals.lengths(2.0)[: len(lengths)], "the first minutes of a longer corpus are a shorter corpus"
    first = signals.waveform(0, lengths[0])
    assert np.array_equal(first, signals.waveform(0, lengths[0]))
    assert np.array_equal(first, np.rint(first * 32_768).astype(np.int16).astype(np.float32) / 32_768)
    assert 0.005 < np.abs(first).mean() < 0.3
    assert signals.mask(4, 600).mean() == pytest.approx(0.57, abs=0.06)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_case_names_a_stage_and_sides_that_exist(size, device):
    cases = build_cases(size, device)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        tree = ast.parse((PROJECT / "benchmarks" / "stages" / f"{case.stage}.py").read_text())
        sides = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "SIDES")
        assert set(case.sides) <= {key.value for key in sides.keys}, case.name
    spec = inputs_of(cases)
    assert device == "cpu" or not spec["subsets"], "nothing that a bare GPU machine lacks"


def test_the_mfccs_that_are_timed_are_torchaudios():
    from torchaudio.compliance import kaldi
    from torchaudio.functional import compute_deltas

    from benchmarks.stages import mfcc

    outcome = mfcc.ours(Run(Path(), Path(), "cpu", torch.get_num_threads(), TINY, 0.0))
    expected = []
    for waveform in signals.waveforms(TINY["minutes"])[:4]:
        static = kaldi.mfcc(torch.from_numpy(waveform)[None], use_energy=False).T
        first = compute_deltas(static)
        frames = torch.cat([static, first, compute_deltas(first)]).T
        expected += frames[::50].flatten()[:200].tolist()
    assert outcome.check == pytest.approx(expected, abs=1e-2)
    assert outcome.audio_seconds == sum(signals.lengths(TINY["minutes"])) / 16_000


def test_a_side_without_its_program_is_reported_and_the_other_one_measured(tmp_path):
    """The peer's process runs where the peer is not installed: the runner says so, and goes on."""
    runner = Runner(tmp_path, "cpu", 1, Path(sys.executable), None)
    row = runner.measure(Case("mfcc", "MFCC", "mfcc", TINY), [], 1)
    assert row["sides"].keys() == {OURS}
    assert row["sides"][OURS]["peak_bytes"] >= row["sides"][OURS]["before_bytes"] > 50_000_000
    assert "minimal_hubert" in row["errors"][PEER]


@pytest.mark.skipif(not PEER_PYTHON.exists(), reason="the peer is not installed: python -m benchmarks.peer")
def test_ours_and_the_peers_mfccs_are_the_same(tmp_path):
    runner = Runner(tmp_path, "cpu", 1, PEER_PYTHON, None)
    row = runner.measure(Case("mfcc", "MFCC", "mfcc", TINY, tolerance=1e-2), [], 1)
    assert not row["errors"]
    assert row["agrees"], row["difference"]


def test_rates_are_taken_from_the_records_and_costs_follow_by_division(tmp_path):
    """A core that labels 100 s of audio per second takes 10 core-hours for 1,000 hours; linear in the hours."""
    units = {OURS: {"audio_seconds": 400.0, "cpu_seconds": 4.0, "wall_seconds": 2.0, "figures": {}}}
    path = tmp_path / "peers-cpu.json"
    path.write_text(json.dumps(recorded([{"name": "units-mfcc", "sides": units}])))
    rates = scale.read_rates([path], tmp_path / "none.json")
    assert rates.mfcc_units == 100.0
    assert rates.training_gpu is None
    costs = [scale.estimate(hours, 8, rates) for hours in (1_000, 2_000, 4_000)]
    assert [cost["core-hours: units of MFCC"] for cost in costs] == [10.0, 20.0, 40.0]
    assert costs[0]["hours on so many GPUs"] is None, "not measured: not invented"


def test_labelling_costs_what_it_does_in_the_arithmetic_of_the_recipe(tmp_path):
    from hubert.core.paths import find_recipe
    from hubert.settings.recipe import read_recipe

    assert read_recipe(find_recipe("librispeech-base")).iteration(2).features.dtype == scale.LABELLING
    assert f"layer-{scale.LABELLING}" in {case.name for case in build_cases("quick", "cuda")}
    rows = [
        {"name": f"layer-{dtype}", "sides": {OURS: {"audio_seconds": audio, "wall_seconds": 1.0, "figures": {}}}}
        for dtype, audio in (("bfloat16", 500.0), ("float32", 200.0))
    ]
    path = tmp_path / "peers-cuda.json"
    path.write_text(json.dumps(recorded(rows)))
    assert scale.read_rates([path], tmp_path / "none.json").layer_gpu == 200.0


def test_the_peer_is_no_dependency_and_is_named_in_the_benchmarks_only():
    for name in ("pyproject.toml", "requirements.lock"):
        lines = [line.split("#")[0] for line in (PROJECT / name).read_text().splitlines()]
        assert not [line for line in lines if re.search(r"\b(minimal[-_]hubert|spidr)\b", line)], name
    for folder in ("hubert", "tasks", "flows", "tools"):
        for path in (PROJECT / folder).rglob("*.py"):
            assert not re.search(r"^\s*(import|from) (minimal_hubert|spidr)", path.read_text(), re.MULTILINE), path
