"""One audio file, from disk to the report: every stage's files are opened and the same file is found in each."""

import base64
import io
import json
import re
import shutil

import numpy as np
import polars as pl
import pytest
import soundfile
import torch

from hubert.evaluation.choice import read_outcome
from hubert.features.mfcc import mfcc
from hubert.model.hubert import HuBERT
from hubert.runs.options import RunOptions
from hubert.runs.pipeline import Iteration
from hubert.runs.rebuild import rebuild
from hubert.runs.resolve import resolve
from hubert.training.checkpoint import list_checkpoints
from hubert.training.crops import labels_for_crop
from hubert.units.codebook import Codebook
from hubert.units.labels import Table
from tests.support.small import write_recipe


@pytest.fixture(scope="module")
def finished(small_corpus, tmp_path_factory):
    """Two iterations, stage by stage, without any server; on a corpus of its own, as a test takes it away."""
    folder = tmp_path_factory.mktemp("one-file")
    corpus = shutil.copytree(small_corpus, folder / "corpus")
    recipe = write_recipe(folder / "small.toml", kmeans={"backend": "torch"})
    iterations = []
    for number in (1, 2):
        resolved = resolve(RunOptions(str(folder / "run"), number, str(recipe), str(corpus)))
        iteration = Iteration(resolved)
        for stage in (
            "manifest",
            "features",
            "kmeans",
            "units",
            "train",
            "validate",
            "abx_manifest",
            "abx",
            "quality_manifest",
            "quality",
        ):
            getattr(iteration, stage).run()
        iteration.outcome().save(iteration.folder)
        iteration.report.run()
        iterations.append(iteration)
    return corpus, iterations


def test_one_file_is_followed_from_disk_to_the_report(finished):
    corpus, (first, second) = finished
    path = sorted((corpus / "train").rglob("*.flac"))[5]
    waveform, sample_rate = soundfile.read(path, dtype="float32")
    fileid = str(path.relative_to(corpus / "train").with_suffix(""))

    row = pl.read_parquet(first.manifest.train).filter(pl.col("fileid") == fileid).row(0, named=True)
    assert (row["path"], row["num_samples"], sample_rate) == (str(path), len(waveform), 16_000)

    features = mfcc(torch.from_numpy(waveform))
    codebook = Codebook.load(first.kmeans.path)
    expected = torch.cdist(features.double(), codebook.centroids.double()).argmin(1)
    shards = pl.concat([pl.read_parquet(shard) for shard in (first.units.folder / "shards").glob("*.parquet")])
    units = shards.filter(pl.col("fileid") == fileid)["units"][0].to_numpy()
    assert len(units) == (len(waveform) - 400) // 160 + 1
    assert (units == expected.numpy()).mean() > 0.999  # ties in float32 aside

    table = Table(first.units.table("train"))
    index = next(number for number in range(len(table)) if table.fileid(number) == fileid)
    assert np.array_equal(table.units(index), units)
    labels = labels_for_crop(table.units(index), 1000, 40, table.frame_rate)
    assert labels[3] == units[round((1000 + 320 * 3) / 160)]

    checkpoint = list_checkpoints(first.train.folder)[-1]
    assert checkpoint.step == 12
    outcome = read_outcome(first.folder, 1)
    assert second.source.checkpoint == outcome.checkpoint
    teacher = HuBERT.from_pretrained(outcome.checkpoint).eval()
    with torch.inference_mode():
        layer = teacher.get_intermediate_outputs(torch.from_numpy(waveform)[None], before_residual=False)[
            outcome.layer - 1
        ][0]
    codebook = Codebook.load(second.kmeans.path)
    expected = torch.cdist(layer.double(), codebook.centroids.double()).argmin(1)
    units = Table(second.units.table("train")).units(index)
    assert len(units) == (len(waveform) - 400) // 320 + 1
    assert (units == expected.numpy()).mean() > 0.99  # batches are padded: equal up to rounding

    report = json.loads((second.report.folder / "report.json").read_text())
    assert report
    html = (second.report.folder / "report.html").read_text()
    assert f"step {outcome.step}" in html or f"{outcome.step:,}" in html


def test_the_reports_figures_sound_units_and_phones_are_those_of_the_files(finished):
    corpus, (_, second) = finished
    html = (second.report.folder / "report.html").read_text()
    losses = {row["step"]: row["validation_loss"] for row in second.validate.figures()["rows"]}
    shown = re.findall(r'<tr[^>]*>\s*<th scope="row">(\d+)</th>\s*<td>([\d.]+)</td>', html)
    assert {int(step): loss for step, loss in shown} == {step: f"{loss:.3f}" for step, loss in losses.items()}

    (fileid,) = re.findall(r'<h2 id="example">One utterance</h2>\s*<p><code>(.*?)</code>', html)
    samples, rate = soundfile.read(corpus / "val" / f"{fileid}.flac", dtype="int16")
    (encoded,) = re.findall(r'<audio [^>]*src="data:audio/flac;base64,([^"]+)"', html)
    heard = soundfile.read(io.BytesIO(base64.b64decode(encoded)), dtype="int16")
    assert (rate, heard[1]) == (16_000, 16_000)
    assert np.array_equal(heard[0], samples)

    shards = pl.concat([pl.read_parquet(shard) for shard in (second.units.folder / "shards").glob("*.parquet")])
    units = shards.filter(pl.col("fileid") == fileid)["units"][0].to_list()
    (numbers,) = re.findall(r"<summary>All units in numbers</summary>\s*<p[^>]*><code>([\d ]+)</code>", html)
    assert [int(unit) for unit in numbers.split()] == units

    names = pl.read_csv(corpus / "alignments.csv").filter(pl.col("fileid").str.ends_with(fileid)).sort("start")["phone"]
    said = [line.split() for line in re.findall(r'alt="Spectrogram from .*? s\. Phones: (.*?)\.', html)]
    joined = said[0] + [name for line in said[1:] for name in line[1:]]  # a phone at the end of a line begins the next
    assert joined == names.to_list()


def test_the_reports_of_a_run_are_written_again_when_the_corpus_is_gone(finished):
    corpus, (first, second) = finished
    pages = [first.report.folder / "report.html", second.report.folder / "report.html"]
    before = [page.read_text() for page in pages]
    away = corpus.rename(corpus.with_name("away"))
    try:
        for page in pages:
            page.unlink()
        rebuilt = rebuild(first.folder)
        assert list(rebuilt.pages.values()) == pages
        assert [page.read_text() for page in pages] == before
    finally:
        away.rename(corpus)
    assert second.report.done() is not None
    assert rebuilt.missing == {}


def test_the_next_iteration_starts_from_what_the_report_says_was_chosen(finished):
    _, (first, second) = finished
    rows = [row for row in first.abx.figures()["rows"] if row["layer"]]
    best = min(rows, key=lambda row: row["all"]["across"])
    assert second.source.layer == best["layer"]
    losses = {row["step"]: row["validation_loss"] for row in first.validate.figures()["rows"]}
    assert read_outcome(first.folder, 1).step == min(losses, key=losses.get)


def test_a_codebook_of_iteration_1_refuses_the_features_of_iteration_2(finished):
    from hubert.core.errors import DataError

    _, (first, second) = finished
    with pytest.raises(DataError, match="units of another source are noise"):
        Codebook.load(first.kmeans.path).check_source(second.source)


def test_every_stage_of_a_finished_run_is_found_done(finished):
    _, iterations = finished
    for iteration in iterations:
        again = (
            type(iteration.resolved).load(iteration.home / "resolved.toml")
            if (iteration.home / "resolved.toml").exists()
            else iteration.resolved
        )
        for stage in Iteration(again).evaluated():
            assert stage.done() is not None, stage.label
