"""The report of a run whose stages' files are made up here: what the pages say, and what they must not do."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import html5lib
import numpy as np
import polars as pl
import pytest
import soundfile
import torch

from hubert.core.errors import DataError
from hubert.core.files import write_json
from hubert.core.paths import RunFolder
from hubert.core.text import duration, size
from hubert.evaluation.checkpoints import Checkpoint
from hubert.evaluation.choice import Outcome
from hubert.report import conclusions
from hubert.report.facts.collect import stage_row
from hubert.report.facts.phone_order import order_phones
from hubert.report.plots import style as plots
from hubert.report.report_data import ComparisonRow, Training, find_report
from hubert.report.stage import ReportStage, summarise_run
from hubert.runs.resolved import Resolved
from hubert.runs.status import read_folder
from hubert.settings.recipe import build_recipe
from hubert.units.labels import Table
from tests.support.corpus import write_corpus
from tests.support.toy import hubert

PHONES = ["AA", "B", "IY", "M", "S", "SIL", "T", "V"]
NUM_UNITS = 100
SECONDS = [9.0, 3.5, 2.25]  # of the validation's utterances
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


# A run that never was ----------------------------------------------------------------------------------------------


def key_of(name: str, parent: Path) -> str:
    return f"0123abcd{name}{parent.name}".ljust(64, "0")


def finish(parent: Path, name: str, figures: dict[str, Any], *, seconds: float = 12.5) -> Path:
    """Write a stage's folder with its done.json."""
    folder = parent / f"{name}-0123abcd"
    content = {"stage": name, "key": key_of(name, parent), "settings": {}, "inputs": {"x": "y" * 64}}
    content |= {"outputs": {}, "figures": figures, "num_shards": 3, "seconds": seconds, "host": "node1"}
    write_json(folder / "done.json", content | {"finished_at": "2026-11-22T10:00:00+0000"})
    return folder


def rates(within: float, across: float, items: str = "all items") -> dict[str, Any]:
    return {"within": within, "across": across, "items": items, "num_items": 3200, "num_cells": 640}


def abx_row(step: int | None, layer: int, within: float, across: float) -> dict[str, Any]:
    row = {"step": step, "layer": layer, "representation": f"layer {layer}" if layer else "MFCC"}
    return row | {part: rates(within, across) for part in ("all", "selection", "reported")}


def make_train(home: Path, number: int, steps: int) -> Path:
    rng = np.random.default_rng(number)
    gpus = {"device": "NVIDIA H200", "world_size": 4, "gpu_seconds": 4 * 190.0, "slurm_jobs": ["1017", "1021"]}
    machine = gpus if number == 2 else {"device": "cpu", "world_size": 1, "gpu_seconds": 0.0}
    folder = finish(
        home, "train", {"steps": steps, "seconds": 190.0, "audio_hours": 32 * steps / 3600, **machine}, seconds=190.0
    )
    lines = [
        {
            "step": step,
            "loss": 4.1 + 0.6 * float(np.exp(-step / 100)) + float(rng.normal(0, 0.01)),
            "accuracy": 0.05 + 0.08 * (1 - float(np.exp(-step / 100))),
            "grad_norm": 1.0,
        }
        for step in range(20, steps + 1, 20)
    ]
    lines[1] |= {"loss": None, "accuracy": None}  # no finite step in that window
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 10')  # the last line is being written
    return folder


def make_iteration(
    run: Path,
    number: int,
    *,
    steps: int = 400,
    across: float = 28.4,
    with_abx: bool = True,
    with_phones: bool = True,
    spoken: bool = False,
) -> ReportStage:
    """Write the stages' files of an iteration and its outcome, and return its report's stage."""
    home = run / f"it{number}"
    rng = np.random.default_rng(number)
    parts = {"train": {"num_files": 380, "hours": 0.61}, "validation": {"num_files": 40, "hours": 0.07}}
    manifest = finish(run, "manifest", {"num_files": 420, "hours": 0.68, "num_rejected": 2, **parts})
    pl.DataFrame(
        {"path": ["/data/<odd> & file.wav"], "fileid": ["odd"], "reason": ["stereo: 2 channels"]}
    ).write_parquet(manifest / "rejected.parquet")
    (manifest / "train.parquet").touch()
    source = {"kind": "mfcc", "dimension": 39}
    features = finish(home, "features", {"num_files": 40, "num_frames": 24480, "hours": 0.068, "source": source})
    codebook = {"mean_squared_distance": 1496.25, "num_unused_units": 0, "usage_perplexity": 88.25}
    kmeans = finish(home, "kmeans", {**codebook, "num_units": NUM_UNITS, "sha256": "c" * 64})
    usage = {
        "num_files": 380,
        "num_frames": 219600,
        "usage_perplexity": 84.5,
        "unigram_entropy": 4.437,
        "num_unused_units": 1,
    }
    units = finish(home, "units", {"num_units": NUM_UNITS, "frame_rate": 100, "train": usage, "validation": usage})
    if spoken:
        table = write_corpus(run.parent / f"spoken{number}", SECONDS, frame_rate=100 if number == 1 else 50)
        shutil.copytree(table, units / "tables" / "validation")
    (units / "tables" / "train").mkdir(parents=True, exist_ok=True)
    np.save(units / "tables" / "train" / "units.npy", rng.zipf(1.5, 5000).clip(1, NUM_UNITS).astype(np.uint16) - 1)
    rows = [
        {
            "step": step,
            "path": f"{home}/train-0123abcd/step-{step:08d}",
            "sha256": f"{step:064d}",
            "num_layers": 4,
            "validation_loss": 4.437 + 0.25 - 0.775 * step / steps,
            "unmasked_loss": 4.437 + 0.2 - 0.8 * step / steps,
            "masked_accuracy": 0.142 * step / steps,
            "unmasked_accuracy": 0.15 * step / steps,
            "feature_penalty": 0.0123,
            "prediction_perplexity": 55.5,
            "num_masked_frames": 12000,
        }
        for step in range(100, steps + 1, 100)
    ]
    best = rows[-1]
    validation = {"best": best, "rows": rows, "unigram_entropy": 4.437, "majority_accuracy": 0.031}
    stages = {"manifest": manifest, "features": features, "kmeans": kmeans, "units": units}
    stages |= {"train": make_train(home, number, steps), "validate": finish(home, "validate", validation)}
    if with_abx:
        scores = [abx_row(None, 0, 8.31, 24.92)]
        scores += [abx_row(steps, layer, 15.7 + (layer - 3) ** 2, across + (layer - 3) ** 2) for layer in range(1, 5)]
        figures = {"rows": scores, "num_dropped_items": 7, "item": "phoneme-abx.item", "before_residual": False}
        stages["abx"] = finish(home, "abx", figures)
    if with_phones:
        joint = rng.gamma(0.3, 60, (len(PHONES), NUM_UNITS)).astype(int)
        agreement = {
            "phone_purity": 0.55,
            "cluster_purity": 0.21,
            "pnmi": 0.412,
            "num_aligned_frames": int(joint.sum()),
        }
        layers = [
            {
                "layer": layer,
                "pnmi": 0.412 + 0.01 * layer,
                "phone_purity": 0.5,
                "cluster_purity": 0.2,
                "num_units": NUM_UNITS,
            }
            for layer in range(5)
        ]
        stages["quality"] = finish(home, "quality", {"units": agreement, "layers": layers, "num_units": NUM_UNITS})
        write_json(stages["quality"] / "joint.json", {"phones": PHONES, "units": NUM_UNITS, "counts": joint.tolist()})
    outcome = {"iteration": number, "checkpoint": best["path"], "sha256": best["sha256"], "step": steps, "layer": 3}
    outcome |= {"rule": "abx", "why": f"lowest ABX across speakers of 4 layers on all items: {across:.2f} %"}
    write_json(RunFolder(run).outcome(number), outcome)
    recipe = build_recipe(
        {
            "description": "a <tiny> model & more",
            "train": {"size": "tiny", "steps": steps},
            "iterations": [{}, {"kmeans": {"num_units": 100}}],
        }
    )
    teacher = {"checkpoint": f"{run}/it1/train-0123abcd/step-00000400", "sha256": "a" * 64, "layer": 3}
    resolved = {
        "run": str(run),
        "number": number,
        "data": "/corpus",
        "recipe": recipe.model_dump(mode="json"),
        "recipe_name": "demo",
        "source": (teacher if number > 1 else {"checkpoint": "", "sha256": "", "layer": 0}),
        "chosen": "iteration 1 starts from MFCC" if number == 1 else outcome["why"],
    }
    settled = Resolved.model_validate(resolved)
    settled.remember()
    resolved = settled.model_dump(mode="json")
    outcome = Outcome(**outcome)
    return ReportStage(parent=home, run_folder=run, number=number, resolved=resolved, stages=stages, outcome=outcome)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two iterations with their reports; the second falls below MFCC."""
    root = tmp_path_factory.mktemp("runs") / "demo"
    make_iteration(root, 1, spoken=True).run()
    make_iteration(root, 2, across=22.125, spoken=True).run()
    return RunFolder(root)


def page_of(folder: RunFolder, number: int) -> str:
    found = find_report(folder, number)
    assert found is not None
    return found[0].read_text()


# What a page must and must not do ----------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Reads a page as a browser without mercy: every tag is closed in order, every id is unique."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.note(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> closes itself outside of a picture"
        self.note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data.replace("\N{NO-BREAK SPACE}", " "))

    def note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"src", "srcset", "poster", "data"} or (name in {"href", "xlink:href"} and tag != "a"):
                self.loads.append(value or "")
            if name == "href" and tag == "a":
                self.links.append(value or "")
        assert tag not in {"script", "iframe", "object", "embed", "link"}


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.mark.parametrize("which", [1, 2, "run"])
def test_a_page_is_well_formed_needs_no_network_and_stays_small(run, which):
    page = summarise_run(run)[0].read_text() if which == "run" else page_of(run, which)
    reader = read(page)
    assert len(reader.ids) == len(set(reader.ids))
    embedded = ("#", "data:image/svg+xml;base64,", "data:audio/flac;base64,")
    assert all(load.startswith(embedded) for load in reader.loads)
    assert all(load[1:] in reader.ids for load in reader.loads if load.startswith("#"))
    assert all(used in reader.ids for used in re.findall(r"url\(#([^)]+)\)", page))
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "http" not in page  # not even a name of an XML language
    assert len(page.encode()) < 5_000_000


@pytest.mark.parametrize("which", [1, 2, "run"])
def test_a_page_is_html_without_a_fault_by_the_standards_parser(run, which):
    page = summarise_run(run)[0].read_text() if which == "run" else page_of(run, which)
    html5lib.HTMLParser(strict=True).parse(page)  # raises at the first fault
    with pytest.raises(html5lib.html5parser.ParseError):
        html5lib.HTMLParser(strict=True).parse(page.replace("</table>", "", 1))


@pytest.mark.parametrize("which", [1, 2, "run"])
def test_a_page_can_be_read_with_a_screen_reader_and_on_a_phone(run, which):
    page = summarise_run(run)[0].read_text() if which == "run" else page_of(run, which)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert '<html lang="en">' in page
    pictures = re.findall(r'<img class="plot" alt="([^"]*)"', page)
    assert pictures
    assert all(pictures)
    tables = [match.start() for match in re.finditer("<table", page)]
    assert tables
    assert all(page[:start].rstrip().endswith('tabindex="0">') for start in tables)  # a box that scrolls
    assert not re.search(r"<th(?! scope=| rowspan=| colspan=)[ >]", page)


@pytest.mark.parametrize(
    "text",
    [
        "4.437",  # unigram entropy
        "3.912",  # validation loss
        "14.2",  # masked accuracy, %
        "3.1",  # most frequent unit, %
        "28.40",
        "24.92",
        "8.31",
        "15.70",
        "0.442",  # PNMI of layer 3
        "3,200",  # items
        "640",  # cells
        "0.61",  # hours
        "1,496",  # mean squared distance
        "84.5",  # perplexity
        "3 min 10 s",
        "node1",
        "2026-11-22T10:00:00+0000",
        "lowest ABX across speakers of 4 layers on all items: 28.40 %",
        "a <tiny> model & more",
        "/data/<odd> & file.wav",
        "stereo: 2 channels",
        'size = "tiny"',
        "learning_rate = 0.0005",  # a default: among all settings
        f"{400:064d}",
        key_of("manifest", Path("demo")),
        "unigram entropy",
        "most frequent unit",
        "vowels",
    ],
)
def test_the_page_shows(run, text):
    assert text in "".join(read(page_of(run, 1)).words)


def test_the_pictures_of_an_iteration_are_there_as_files_of_their_own_that_are_dark_on_white(run):
    page = page_of(run, 1)
    files = re.findall(r'<img class="plot" alt="[^"]+" src="data:image/svg\+xml;base64,([^"]+)">', page)
    assert len(files) == 6 + 3  # and three lines of the utterance
    for encoded in files:
        picture = ET.fromstring(base64.b64decode(encoded))  # noqa: S314  (our own)
        assert picture.tag == "{http://www.w3.org/2000/svg}svg"
        background = picture.find(".//{*}g[@id='patch_1']/{*}path")
        assert "fill: #ffffff" in background.attrib["style"]
        assert any("#1f2328" in text.attrib["style"] for text in picture.iter("{http://www.w3.org/2000/svg}text"))


def test_the_second_iteration_is_compared_with_mfcc_and_the_first(run):
    words = "".join(read(page_of(run, 2)).words)
    assert "it1, layer 3" in words
    assert "28.40" in words
    assert "The previous iteration came to 28.40 %." in words
    assert "the layer tells phones apart better than MFCC." in words
    assert "layer 3 of step-00000400" in words
    assert "NVIDIA H200" in words
    assert "1017, 1021" in words  # Slurm jobs of the training
    assert "0.21" in words  # GPU-hours: 4 x 190 s


def test_the_report_for_programs_holds_the_row_and_all_layers(run):
    page, _ = find_report(run, 1)
    content = json.loads(page.with_name("report.json").read_text())
    expected = {"name": "it1", "layer": 3, "step": 400, "abx_within": 15.7, "abx_across": 28.4, "num_items": 3200}
    expected |= {"unigram_entropy": 4.437, "masked_accuracy": 0.142, "majority_accuracy": 0.031}
    assert {name: content["row"][name] for name in expected} == expected
    assert content["row"]["pnmi"] == pytest.approx(0.442)
    assert content["row"]["validation_loss"] == pytest.approx(3.912)
    assert [row["name"] for row in content["layers"]] == ["MFCC", "layer 1", "layer 2", "layer 3", "layer 4"]
    assert [row["step"] for row in content["checkpoints"]] == [100, 200, 300, 400]
    assert {stage["name"] for stage in content["stages"]} >= {"manifest", "train", "abx"}
    assert content["environment"]["torch"]


def test_a_run_without_items_and_alignments_has_a_report_that_says_so(tmp_path):
    stage = make_iteration(tmp_path / "bare", 1, with_abx=False, with_phones=False)
    stage.run()
    words = "".join(read((stage.folder / "report.html").read_text()).words)
    assert "ABX was not measured" in words
    assert "The layers were not compared" in words
    assert (stage.folder / "report.html").read_text().count('<img class="plot"') == 3
    _, text = summarise_run(RunFolder(tmp_path / "bare"))
    assert re.search(r"\nMFCC( +-){7}\n", text)


def test_the_slurm_jobs_of_each_stage_are_listed_if_there_are_any(tmp_path):
    stage = make_iteration(tmp_path / "site", 1)
    units = json.loads((stage.stages["units"] / "done.json").read_text())
    write_json(stage.stages["units"] / "done.json", units | {"jobs": ["17", "18"]})
    write_json(
        stage.stages["train"] / "slurm.json", {"jobs": [{"job_id": "19", "attempt": "a19", "ended": "COMPLETED"}]}
    )
    stage.run()
    words = read((stage.folder / "report.html").read_text()).words
    assert {"Slurm jobs", "17, 18", "19"} <= set(words)
    assert [*read_folder(stage.stages["units"]).jobs, *read_folder(stage.stages["train"]).jobs] == ["17", "18", "19"]
    elsewhere = make_iteration(tmp_path / "here", 1)
    elsewhere.run()
    assert "Slurm jobs" not in read((elsewhere.folder / "report.html").read_text()).words


def test_figures_that_a_stage_did_not_write_are_dashes(tmp_path):
    stage = make_iteration(tmp_path / "old", 1)
    for name in ("manifest", "features", "kmeans", "units", "train"):
        done = json.loads((stage.stages[name] / "done.json").read_text())
        write_json(stage.stages[name] / "done.json", done | {"figures": {}})
    stage.run()
    read((stage.folder / "report.html").read_text())


def test_the_report_is_written_again_only_if_what_it_shows_changed(run, tmp_path):
    first = make_iteration(tmp_path / "demo", 1)
    first.run()
    assert make_iteration(tmp_path / "demo", 1).done() is not None
    other = make_iteration(tmp_path / "demo", 1, with_phones=False)
    assert other.done() is None
    assert other.key != first.key
    before = make_iteration(tmp_path / "demo", 2).key
    changed = make_iteration(tmp_path / "demo", 1, across=30.0)
    changed.run()
    assert make_iteration(tmp_path / "demo", 2).key != before  # it shows iteration 1's row


def test_the_report_that_counts_is_the_one_of_the_outcome(tmp_path):
    """Two reports of one iteration lie side by side after a setting of ABX was changed and changed back."""
    root = tmp_path / "demo"
    make_iteration(root, 1, across=30.0).run()
    make_iteration(root, 1, across=29.0).run()
    make_iteration(root, 1, across=30.0)  # writes the outcome again, and finds its report
    _, content = find_report(RunFolder(root), 1) or (None, {})
    assert content.row.abx_across == 30.0


def test_a_run_without_a_finished_iteration_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="run `hubert-iteration`"):
        summarise_run(RunFolder(tmp_path))


# One utterance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2])
def test_the_sound_and_the_units_of_the_page_are_those_of_the_files(run, number):
    page = page_of(run, number)
    table = Table(run.iteration(number) / "units-0123abcd" / "tables" / "validation")
    (fileid,) = re.findall(r"<h2 id=\"example\">One utterance</h2>\s*<p><code>(.*?)</code>", page)
    row = next(row for row in range(len(table)) if table.fileid(row) == fileid)
    (encoded,) = re.findall(r'<audio [^>]*src="data:audio/flac;base64,([^"]+)"', page)
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(encoded)), dtype="int16")
    assert rate == 16_000
    assert np.array_equal(heard, soundfile.read(table.audio_ref(row).path, dtype="int16")[0])
    (numbers,) = re.findall(r"<summary>All units in numbers</summary>\s*<p[^>]*><code>([\d ]+)</code>", page)
    assert [int(unit) for unit in numbers.split()] == table.units(row).tolist()
    assert "so there is no row of phones" in page


def test_the_page_of_a_large_run_weighs_less_than_5_mb(tmp_path):
    """The paper's sizes: 500 units, 12 layers, 16 checkpoints, 2,000 lines of the log; 8 s of noise do not compress."""
    stage = make_iteration(tmp_path / "large", 1)
    shutil.move(
        write_corpus(tmp_path / "long", [20.0], frame_rate=100), stage.stages["units"] / "tables" / "validation"
    )
    line = json.loads((stage.stages["train"] / "metrics.jsonl").read_text().splitlines()[0])
    lines = [json.dumps(line | {"step": 200 * number, "loss": 4 + number % 7 / 10}) for number in range(1, 2001)]
    (stage.stages["train"] / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    rng = np.random.default_rng(0)
    phones = [f"P{number}" for number in range(70)]
    counts = rng.integers(0, 1000, (70, 500)).tolist()
    write_json(stage.stages["quality"] / "joint.json", {"phones": phones, "units": 500, "counts": counts})
    stage.run()
    page = (stage.folder / "report.html").read_text()
    html5lib.HTMLParser(strict=True).parse(page)
    assert page.count('<img class="plot"') == 6 + 6
    assert len(page.encode()) < 5_000_000


# What it cost, on what, of which data ------------------------------------------------------------------------------


def test_the_page_names_the_hashes_of_data_codebook_and_checkpoint(run):
    words = "".join(read(page_of(run, 2)).words)
    for expected in (key_of("manifest", Path("demo")), "c" * 64, f"{400:064d}", "a" * 64, key_of("units", Path("it2"))):
        assert expected in words


def test_gpu_hours_are_those_of_the_processes_that_had_a_gpu(tmp_path):
    stage = make_iteration(tmp_path / "fast", 2)
    for name, devices, seconds in (("units", ["NVIDIA H200"], 1800.0), ("abx", ["cpu"], 0.0)):
        done = json.loads((stage.stages[name] / "done.json").read_text())
        write_json(stage.stages[name] / "done.json", done | {"devices": devices, "gpu_seconds": seconds})
    stage.run()
    _, content = find_report(RunFolder(tmp_path / "fast"), 2)
    hours = {row.name: row.gpu_seconds and row.gpu_seconds / 3600 for row in content.stages}
    assert hours["units"] == 0.5
    assert hours["abx"] == 0.0
    assert hours["train"] == pytest.approx(4 * 190 / 3600)
    assert hours["manifest"] is None  # of an older version, which did not write it down
    words = read((stage.folder / "report.html").read_text()).words
    assert {"0.50", "0.71", "CPU", "NVIDIA H200"} <= set(words)  # 0.71: all


def test_gpu_hours_of_a_training_are_those_of_all_its_starts_and_unknown_if_an_older_version_did_some(tmp_path):
    stage = make_iteration(tmp_path / "moved", 2)
    path = stage.stages["train"] / "done.json"
    done = json.loads(path.read_text())
    for counted in (90.0 * 8 + 100.0 * 4, None):  # first on 8 GPUs; the last start had 4
        write_json(path, {**done, "figures": done["figures"] | {"gpu_seconds": counted}})
        assert stage_row("train", stage.stages["train"], json.loads(path.read_text())).gpu_seconds == counted


def test_the_report_names_the_gpus_that_stages_used_and_asks_cuda_nothing(tmp_path, monkeypatch):
    def initialise(*_):
        raise AssertionError("CUDA was initialised")

    monkeypatch.setattr(torch.cuda, "_lazy_init", initialise)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    stage = make_iteration(tmp_path / "quiet", 2)
    stage.run()
    _, content = find_report(RunFolder(tmp_path / "quiet"), 2)
    assert content.environment["GPUs that stages used"] == "NVIDIA H200"


def test_what_differs_from_the_paper_is_listed_and_nothing_else(run):
    page = page_of(run, 1)
    table = re.search(
        r"(\d+) settings differ from the paper's</summary>(.*?)</table>", page.replace("&#39;", "'"), re.DOTALL
    )
    rows = re.findall(r"<code>(.*?)</code></th><td>(.*?)</td><td>(.*?)</td>", table[2])
    assert rows == [("train.size", "tiny", "base"), ("train.steps", "400", "250,000")]
    assert int(table[1]) == 2


# Written again from files ------------------------------------------------------------------------------------------


def test_the_pages_are_written_again_from_the_files_alone(tmp_path):
    """The corpus that the settings name does not exist, and no server runs."""
    root = tmp_path / "demo"
    stages = [make_iteration(root, 1, spoken=True), make_iteration(root, 2, across=22.125)]
    for stage in stages:
        stage.run()
    path, text = summarise_run(RunFolder(root))
    pages = [path, *(stage.folder / "report.html" for stage in stages)]
    before = [page.read_text() for page in pages]
    for page in pages:
        page.unlink()
    code, said, errors = hubert("report", f"{root}/")
    assert (code, errors) == (0, "")
    assert [page.read_text() for page in pages] == before
    assert text in said
    assert all(str(page) in said for page in pages)
    assert all(stage.done() is not None for stage in stages)  # the receipts are those of the new files


def test_a_run_that_is_not_finished_has_pages_that_say_what_is_missing(tmp_path):
    root = tmp_path / "demo"
    make_iteration(root, 1).run()
    second = make_iteration(root, 2)
    RunFolder(root).outcome(2).unlink()
    for name in ("validate", "abx", "quality"):
        shutil.rmtree(second.stages[name])
    (second.stages["train"] / "done.json").unlink()
    code, said, _ = hubert("report", f"{root}/")
    assert code == 0
    assert "it2/report:\n  not finished; missing: train (no plan yet), validate (missing), report (missing)" in said
    page = RunFolder(root).unfinished(2).read_text()
    html5lib.HTMLParser(strict=True).parse(page)
    words = "".join(read(page).words)
    assert "Not finished." in words
    assert "The layers were not compared yet." in words
    assert "24.92" in words  # MFCC, as iteration 1 measured it
    assert page.count('<img class="plot"') == 2 + 1  # loss, accuracy; usage
    whole = RunFolder(root).report.read_text()
    html5lib.HTMLParser(strict=True).parse(whole)
    assert "1 finished iteration, 1 not finished" in "".join(read(whole).words)
    assert "it2/unfinished.html" in read(whole).links
    make_iteration(root, 2).run()
    assert not RunFolder(root).unfinished(2).exists()


def test_a_run_of_which_nothing_is_finished_has_pages_too(tmp_path):
    root = tmp_path / "new"
    make_iteration(root, 1)
    for path in [RunFolder(root).outcome(1), *root.glob("*/*-*"), *root.glob("manifest-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, said, _ = hubert("report", f"{root}/")
    assert code == 0
    assert "missing: manifest (missing), features (missing)" in said
    for page in (RunFolder(root).unfinished(1), RunFolder(root).report):
        html5lib.HTMLParser(strict=True).parse(page.read_text())
        read(page.read_text())


def test_a_report_of_an_older_version_keeps_its_place_in_the_runs_page(tmp_path):
    stage = make_iteration(tmp_path / "old", 1)
    stage.run()
    content = json.loads((stage.folder / "report.json").read_text())
    for name in ("resolved", "hashes", "hosts", "example"):
        del content[name]
    for row in content["stages"]:
        del row["elapsed_seconds"]
    write_json(stage.folder / "report.json", content)
    path, _ = summarise_run(RunFolder(tmp_path / "old"))
    assert f"{400:064d}" in "".join(read(path.read_text()).words)


def test_a_folder_without_a_run_is_an_error_that_says_how_to_start(tmp_path):
    code, _, errors = hubert("report", f"{tmp_path}/")
    assert code == 3
    assert "hubert manifest RUN" in errors


# The run -----------------------------------------------------------------------------------------------------------


GOLDEN = """\
Run demo: MFCC and the chosen layer of each iteration

              ABX error (%)     PNMI   validation loss (nats)      masked accuracy (%)
              within  across           model  unigram entropy   model  most frequent unit
MFCC            8.31   24.92   0.412       -                -       -                   -
it1 layer 3    15.70   28.40   0.442   3.912            4.437    14.2                 3.1
it2 layer 3    15.70   22.12   0.442   3.912            4.437    14.2                 3.1

ABX error rates on all items: 3,200 items in 640 cells; chance is about 50 %, on few items not
exactly. PNMI of 100 clusters of each representation.

it1: The validation loss is 3.912 nats, the units' unigram entropy 4.437 nats: clearly below, so
     the model predicts masked units from their context.
"""


def test_the_terminal_gets_the_table_and_plain_sentences(run):
    path, text = summarise_run(run)
    assert path == run.root / "report.html"
    assert text.startswith(GOLDEN)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "it is what a longer run is for" in text.replace("\n     ", " ")


def test_the_runs_page_links_to_the_iterations_pages(run):
    path, _ = summarise_run(run)
    links = [link for link in read(path.read_text()).links if not link.startswith("#")]
    assert len(set(links)) == 2
    assert all((path.parent / link).is_file() for link in links)


def test_what_the_iterations_share_is_paid_once(run):
    words = read(summarise_run(run)[0].read_text()).words
    stages = [word for word in words if word.endswith(("manifest", "train"))]
    assert stages == ["manifest", "it1 train", "it2 train"]


# Sentences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "kind", "words"),
    [
        (3.9, "good", "clearly below"),
        (4.42, "plain", "only just below"),
        (4.437, "bad", "not below"),
        (4.6, "bad", "not below"),
    ],
)
def test_the_loss_is_judged_by_the_unigram_entropy(loss, kind, words):
    judged = conclusions.explain_loss(ComparisonRow(name="it1", validation_loss=loss, unigram_entropy=4.437))
    assert judged is not None
    assert judged[0] == kind
    assert words in judged[1]


def test_a_long_run_above_mfcc_is_not_called_expected():
    row, mfcc = (
        ComparisonRow(name="it1", abx_across=30.0, layer=6, iteration=1),
        ComparisonRow(name="MFCC", abx_across=24.92),
    )
    short = conclusions.explain_abx(row, mfcc, None, Training(audio_hours=32 / 9))
    long = conclusions.explain_abx(row, mfcc, None, Training(audio_hours=190_000.0))
    assert short is not None
    assert long is not None
    assert "3.56 hours of audio; the paper's takes 194,444 hours" in short[1]
    assert "this is expected" in short[1]
    assert "this is not expected" in long[1]


def test_a_loss_that_rose_again_is_not_called_falling():
    rows = [
        Checkpoint(step=step, checkpoint="", sha256="", num_layers=2, validation_loss=loss)
        for step, loss in ((100, 4.2), (200, 4.0), (300, 4.1))
    ]
    judged = conclusions.explain_checkpoints(rows)
    assert judged is not None
    assert "lowest at step 200" in judged[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10 s"),
        (59, "59 s"),
        (59.7, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (27_600_000, "27.6 MB")]
)
def test_sizes(num_bytes, text):
    assert size(num_bytes) == text


# Pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phones", "order"),
    [
        (["SIL", "S", "T", "CH", "M", "L", "IY", "AAR", "XX"], "IY AAR L M T CH S SIL XX"),
        (["AH0", "IY1", "V", "SPN"], "IY1 AH0 V SPN"),
        (["h#", "tcl", "ih", "sh", "q", "axr"], "ih axr tcl q sh h#"),
        (["_:", "V", "tS", "D", "'i:", "@L", "d", "?", "A:"], "'i: A: V @L d ? tS D _:"),
        (["t\N{COMBINING DOUBLE INVERTED BREVE}ʃ", "aɪ", "ŋ", "ɹ", "θ", "tʰ", "spn"], "aɪ ɹ ŋ tʰ t͡ʃ θ spn"),  # noqa: RUF001
    ],
)
def test_phones_are_ordered_by_class(phones, order):
    assert [phones[index] for _, members in order_phones(phones) for index in members] == order.split()


def test_every_phone_of_the_demo_has_a_class():
    from hubert.data.demo import speech as demo_speech

    phones = sorted(set(demo_speech.PHONES.values()))
    groups = dict(order_phones(phones))
    assert "other" not in groups
    mnemonics = sorted(demo_speech.PHONES)
    assert "other" not in dict(order_phones(mnemonics))


def test_units_are_ordered_by_their_most_likely_phone():
    joint = np.array([[0, 9, 0, 5, 0], [8, 1, 0, 5, 1], [0, 0, 0, 0, 9]])
    assert plots.order_units(joint).tolist() == [1, 3, 0, 4]  # unit 2 has no frame


def test_long_curves_are_averaged_down():
    x, y = plots.thin(range(10_000), range(10_000), limit=100)
    assert len(x) == 100
    assert x[0] == y[0] == pytest.approx(49.5)
    assert np.mean(y) == pytest.approx(4999.5)
