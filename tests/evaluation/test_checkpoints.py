"""Naming a teacher by what a run left on disk, without any server."""

from types import SimpleNamespace

import polars as pl
import pytest

from hubert.core.errors import ConfigError
from hubert.evaluation.checkpoints import (
    ANSWER,
    FORM,
    SERVICE,
    LayerScores,
    Pick,
    find_run_checkpoint,
    pick_of,
    read_checkpoints,
)
from hubert.evaluation.choice import Outcome, choose_layer
from hubert.evaluation.columns import CHECKPOINT, LAYER_SCORES, describe, write_csv
from hubert.report.facts.collect import iteration_row, layer_table
from hubert.report.stage_summary import summarise_stage
from hubert.runs.options import RunOptions
from hubert.runs.pipeline import Iteration
from hubert.runs.resolve import choose_source
from hubert.settings.recipe import IterationSettings
from hubert.settings.sections import FeatureSettings
from tasks.choice import checkpoint_row
from tasks.teacher import checkpoint_table
from tasks.tracking.mirror import entry_metrics
from tasks.tracking.registry import scores_of, version_tags
from tests.support.offered import write_offered

SETTINGS = IterationSettings(features=FeatureSettings())


@pytest.fixture
def offered(tmp_path, monkeypatch):
    monkeypatch.setenv("HUBERT_RUNS", str(tmp_path / "runs"))
    return write_offered(tmp_path / "runs" / "mine")


def choose(offered, **wishes):
    pick = wishes.pop("pick", None)
    return choose_source(offered.folder, 2, SETTINGS, RunOptions(str(offered.folder.root), **wishes), pick)


def test_a_runs_iteration_stands_for_what_it_chose_and_a_step_for_that_checkpoint(offered):
    best, first = offered.checkpoints[-1], offered.checkpoints[0]
    for name, wanted in (("mine/it1", best), ("mine/it1/step-00000004", first), ("mine/it1/step-4", first)):
        source, why, by = choose(offered, teacher=name)
        assert (source.checkpoint, source.sha256, source.layer) == (wanted.checkpoint, wanted.sha256, 2)
        assert f"step {wanted.step} of iteration 1" in why
        assert by == FORM
    assert choose(offered, teacher=f"{offered.folder.root}/it1/")[0] == choose(offered, teacher="mine/it1")[0]


def test_the_layer_of_the_form_wins_and_the_choice_says_so(offered):
    for teacher in ("mine/it1/step-00000004", ""):
        source, why, by = choose(offered, teacher=teacher, layer=1)
        assert (source.layer, by) == (1, FORM)
        assert why.endswith("layer 1: as was given")
    source, why, by = choose(offered)
    assert (source.layer, by) == (2, SERVICE)
    assert why.endswith("layer 2: lowest ABX")


def test_what_somebody_picked_wins_over_the_outcome(offered):
    pick = pick_of(offered.checkpoints[0], 1, ANSWER, "a person answered: step 4")
    source, why, by = choose(offered, pick=pick)
    assert (source.checkpoint, by) == (offered.checkpoints[0].checkpoint, ANSWER)
    assert why == "a person answered: step 4; layer 2: its layers were not scored"
    assert choose(offered, pick=pick, layer=1)[2] == FORM


@pytest.mark.parametrize(
    ("teacher", "layer", "message"),
    [
        ("mine/it1/step-00000005", None, r"step-00000004, step-00000008, step-00000012"),
        ("mine/it3", None, r"has no iteration 3; it has it1"),
        ("yours/it1/step-00000004", None, r"there is no run .*yours; runs in .*: mine"),
        ("mine/it1", 3, r"layer 3: .* has layers 1 to 2"),
        ("models:/mine-it1@teacher", None, r"is an entry of MLflow, which only the flows ask"),
        ("/no/such/folder", None, r"was given without `layer`"),
        ("/no/such/folder", 2, r"does not exist"),
    ],
)
def test_a_teacher_that_is_not_there_is_refused_with_what_there_is(offered, teacher, layer, message):
    with pytest.raises(ConfigError, match=message):
        choose(offered, teacher=teacher, layer=layer)


def test_an_iteration_that_is_not_finished_offers_nothing_and_says_what_to_do(offered):
    offered.folder.checkpoints(1).unlink()
    with pytest.raises(ConfigError, match=r"not finished\. Fix: run iteration 1"):
        find_run_checkpoint("mine/it1/step-00000004")
    offered.folder.outcome(1).unlink()
    for teacher in ("mine/it1", ""):
        with pytest.raises(ConfigError, match="not finished"):
            choose(offered, teacher=teacher)


def test_checkpoints_are_read_as_they_were_written(offered):
    assert read_checkpoints(offered.folder, 1) == offered.checkpoints
    assert offered.checkpoints[-1].best_layer == LayerScores(layer=2, abx_within=10.0, abx_across=20.0, pnmi=0.2)
    assert offered.checkpoints[0].best_layer is None


def test_names_of_other_kinds_are_left_to_others(offered):
    for name in ("facebook/hubert-base-ls960", "https://host/it1.pt", "nobody/it1", str(offered.stage.folder)):
        assert find_run_checkpoint(name) is None


def test_a_pick_is_one_sentence(offered):
    pick = Pick("path", "sha", 3, "step 4", FORM)
    assert pick.why == "step 4; layer 3"
    assert pick.with_layer(None) is pick
    assert pick.with_layer(2).why == "step 4; layer 2: as was given"


def abx_row(layer: int, *, selection: float, reported: float) -> dict:
    """Return a line of the ABX table with `abx.selection = "half"`: three rates, each on items of its own."""
    rates = {"first half of items": selection, "second half of items": reported, "all items": 60.0}
    selection, reported, every = (
        {"within": rate - 1, "across": rate, "items": items, "num_items": 50, "num_cells": 9}
        for items, rate in rates.items()
    )
    row = {"step": 400 if layer else None, "layer": layer, "representation": f"layer {layer}" if layer else "MFCC"}
    return {**row, "selection": selection, "reported": reported, "all": every}


def test_where_half_of_the_items_choose_every_place_shows_the_abx_of_the_other_half_that_the_report_shows(tmp_path):
    rows = [
        abx_row(0, selection=40.0, reported=41.0),
        abx_row(1, selection=30.0, reported=20.0),
        abx_row(2, selection=25.0, reported=27.25),  # lowest on the items that choose, not on those that are reported
    ]
    best = {
        "step": 400,
        "path": "p/step-400",
        "sha256": "a",
        "num_layers": 2,
        "validation_loss": 3.5,
        "masked_accuracy": 0.25,
    }
    validation = {"rows": [best], "best": best, "unigram_entropy": 4.0, "majority_accuracy": 0.1}
    abx = {"rows": rows, "num_dropped_items": 0}
    outcome = Outcome(1, best["path"], best["sha256"], 400, *choose_layer(1, best, abx, None))
    iteration = SimpleNamespace(
        abx=SimpleNamespace(name="abx", figures=lambda: abx),
        quality=None,
        validate=SimpleNamespace(figures=lambda: validation),
        outcome=lambda: outcome,
        _here=dict,  # the run was not moved
    )
    (checkpoint,) = Iteration.checkpoints(iteration)
    assert checkpoint.layer == 2

    layers = layer_table(abx, {}, outcome)
    assert iteration_row(1, layers, validation, outcome).abx_across == 27.25  # the report
    assert checkpoint.abx_across == 27.25
    assert "ABX across 27.25 %" in describe(LAYER_SCORES, checkpoint.best_layer)  # the form
    assert "27.25" in checkpoint_table([checkpoint])
    assert checkpoint_row(checkpoint, outcome)["ABX across (%)"] == "27.25"  # the page in Prefect
    assert summarise_stage(iteration.abx, abx).headline.startswith("lowest ABX error across speakers: 27.25 %, layer 2")
    table = pl.read_csv(write_csv(tmp_path / "checkpoints.csv", CHECKPOINT, [checkpoint]))
    assert (table["ABX across (%)"][0], table["ABX within (%)"][0]) == (27.25, 26.25)
    assert scores_of(iteration)["abx_across_mfcc"] == 41.0  # MLflow
    assert entry_metrics(checkpoint)["abx_across"] == 27.25
    assert version_tags(checkpoint)["abx_across"] == "27.25 %"
