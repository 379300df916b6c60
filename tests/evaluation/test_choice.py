"""Which layer an iteration ends with, by each rule."""

import pytest

from hubert.evaluation.choice import choose_layer

BEST = {"step": 400, "num_layers": 4, "path": "p", "sha256": "s"}


def abx_row(layer: int, across: float, step: int | None = 400) -> dict:
    return {"step": step if layer else None, "layer": layer, "selection": {"across": across, "items": "all items"}}


def test_abx_chooses_the_lowest_error_of_the_best_checkpoints_layers():
    rows = [abx_row(0, 5.0), abx_row(1, 9.0), abx_row(2, 8.0), abx_row(3, 8.0), abx_row(4, 1.0, step=300)]
    layer, rule, why = choose_layer(1, BEST, {"rows": rows}, {"layers": [{"layer": 1, "pnmi": 0.9}]})
    assert (layer, rule) == (2, "abx")  # neither MFCC nor another checkpoint's layer; of equals the lower
    assert "8.00 %" in why


def test_pnmi_never_chooses_mfcc_which_has_no_layer_to_go_on_from():
    rows = [{"layer": 0, "pnmi": 0.41}, {"layer": 1, "pnmi": 0.30}, {"layer": 2, "pnmi": 0.33}]
    layer, rule, why = choose_layer(1, BEST, None, {"layers": rows})
    assert (layer, rule) == (2, "pnmi")
    assert "of 2 layers: 0.330" in why


@pytest.mark.parametrize(("number", "layer"), [(1, 6), (2, 9), (3, 9)])
def test_without_measurements_it_is_the_papers_layer(number, layer):
    assert choose_layer(number, {**BEST, "num_layers": 12}, None, None)[:2] == (layer, "paper")
