"""One audio file, from disk to the report: every stage's files are opened and the same file is found in each."""

import json

import numpy as np
import polars as pl
import pytest
import soundfile
import torch

from hubert.checkpoint import list_checkpoints
from hubert.data import labels_for_crop
from hubert.kmeans import Codebook
from hubert.mfcc import mfcc
from hubert.model import HuBERT
from hubert.outcome import read_outcome
from hubert.resolve import resolve
from hubert.table import Table
from tests.small import build_corpus, write_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two iterations, stage by stage, without any server."""
    folder = tmp_path_factory.mktemp("one-file")
    corpus = build_corpus(folder / "corpus")
    recipe = write_recipe(folder / "small.toml", kmeans={"backend": "torch"})
    iterations = []
    for number in (1, 2):
        resolved = resolve(str(folder / "run"), str(recipe), str(corpus), iteration=number)
        iteration = resolved.iteration
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


def test_the_next_iteration_starts_from_what_the_report_says_was_chosen(finished):
    _, (first, second) = finished
    rows = [row for row in first.abx.figures()["rows"] if row["layer"]]
    best = min(rows, key=lambda row: row["all"]["across"])
    assert second.source.layer == best["layer"]
    losses = {row["step"]: row["masked_loss"] for row in first.validate.figures()["rows"]}
    assert read_outcome(first.folder, 1).step == min(losses, key=losses.get)


def test_a_codebook_of_iteration_1_refuses_the_features_of_iteration_2(finished):
    from hubert.errors import DataError

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
        for stage in again.iteration.evaluated():
            assert stage.done() is not None, stage.label
