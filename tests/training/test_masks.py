"""Span masks: the number of masked frames, where they lie, and fairseq's rule against a slow oracle."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert.core.errors import ConfigError, DataError
from hubert.training.masks import expected_masked_frames, num_masked_frames, span_mask
from tests.support.reference import fairseq_mask, fairseq_masks

PAPER = {"mask_prob": 0.8, "mask_length": 10, "min_masks": 2}


def runs(row: np.ndarray) -> list[int]:
    """Return the lengths of the runs of masked frames."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
    return (edges[1::2] - edges[::2]).tolist()


@given(
    batch=st.integers(1, 6),
    mask_length=st.integers(1, 20),
    extra=st.integers(0, 300),
    mask_prob=st.floats(0.01, 1.0),
    min_masks=st.integers(1, 5),
    seed=st.integers(0, 2**63),
)
@settings(deadline=None, max_examples=150)
def test_every_row_of_a_static_mask_has_exactly_the_promised_number_of_frames(
    batch, mask_length, extra, mask_prob, min_masks, seed
):
    frames = mask_length + extra
    mask = span_mask(
        batch, frames, seed=seed, mask_prob=mask_prob, mask_length=mask_length, min_masks=min_masks
    ).numpy()
    count = num_masked_frames(frames, mask_prob, mask_length, min_masks)
    assert mask.shape == (batch, frames)
    assert mask.dtype == np.bool_
    assert (mask.sum(1) == count).all()
    for row in mask:
        assert sum(length < min(mask_length, count) for length in runs(row)) <= 1, "only the last span may be cut"


@pytest.mark.parametrize("frames", [10, 11, 12, 20, 24, 99, 199, 780])
def test_the_number_of_masked_frames_is_the_mean_of_fairseqs(frames):
    """The analytic mean lies within four standard errors of the oracle's, special cases of short rows included."""
    random = np.random.default_rng(frames)
    counts = [fairseq_mask(random, frames, **PAPER).sum() for _ in range(3000)]
    error = np.std(counts) / np.sqrt(len(counts))
    expected = expected_masked_frames(frames, **PAPER)
    assert expected == pytest.approx(np.mean(counts), abs=4 * error + 1e-9)
    assert num_masked_frames(frames) == round(expected)


def test_the_papers_values_mask_57_percent_of_crops_of_usual_length():
    shares = [num_masked_frames(frames) / frames for frames in range(99, 1500)]
    assert 0.564 < min(shares) <= max(shares) < 0.58


@pytest.mark.parametrize("frames", [11, 50, 199])
def test_fairseqs_rule_masks_each_frame_as_often_as_the_oracle(frames):
    """Single rows, which are not made equal: frame by frame, and the spread of the number of masked frames."""
    draws = 3000
    random = np.random.default_rng(1)
    oracle = np.stack([fairseq_mask(random, frames, **PAPER) for _ in range(draws)])
    ours = np.stack([span_mask(1, frames, seed=(7, i), rule="fairseq").numpy()[0] for i in range(draws)])
    error = np.sqrt(0.25 * 2 / draws)
    assert np.abs(oracle.mean(0) - ours.mean(0)).max() < 4.5 * error
    assert not ours[:, -1].any() or frames == 11, "no span starts late enough to reach the last frame"
    assert ours.sum(1).mean() == pytest.approx(oracle.sum(1).mean(), abs=5 * oracle.sum(1).std() / np.sqrt(draws))
    assert ours.sum(1).std() == pytest.approx(oracle.sum(1).std(), rel=0.1)


def test_fairseqs_rule_makes_the_rows_of_a_batch_equal():
    random = np.random.default_rng(2)
    oracle = [fairseq_masks(random, 6, 120, **PAPER) for _ in range(400)]
    ours = [span_mask(6, 120, seed=i, rule="fairseq").numpy() for i in range(400)]
    assert all(len(set(mask.sum(1))) == 1 for mask in ours)
    counts, expected = np.array([mask[0].sum() for mask in ours]), np.array([mask[0].sum() for mask in oracle])
    assert counts.mean() == pytest.approx(expected.mean(), abs=5 * expected.std() / np.sqrt(len(oracle)))
    frames, frames_expected = np.mean(ours, axis=(0, 1)), np.mean(oracle, axis=(0, 1))
    assert np.abs(frames - frames_expected).max() < 4.5 * np.sqrt(0.5 / (6 * 400))


def test_static_spans_start_everywhere_equally_often():
    """With one span per row, the mask is the span: its start is uniform over all F - length + 1 places."""
    frames, draws = 40, 400
    masks = np.concatenate([span_mask(50, frames, seed=i, mask_prob=0.01, min_masks=1).numpy() for i in range(draws)])
    assert set(masks.sum(1)) == {10}
    assert all(runs(row) == [10] for row in masks)
    counts = np.bincount(masks.argmax(1), minlength=31)
    assert len(counts) == 31
    expected = len(masks) / 31
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 30 + 5 * np.sqrt(60), "31 places: mean 30, standard deviation sqrt(60)"


@pytest.mark.parametrize("rule", ["static", "fairseq"])
def test_a_mask_is_a_function_of_its_seed(rule):
    again = [span_mask(4, 199, seed=(3, 14, 15), rule=rule) for _ in range(2)]
    assert again[0].equal(again[1])
    assert not again[0].equal(span_mask(4, 199, seed=(3, 14, 16), rule=rule))
    assert not again[0][0].equal(again[0][1]), "rows differ"


def test_masks_are_the_same_in_every_process_and_on_every_machine():
    """Pinned: a change of the draws would give a resumed training other masks.

    Made with `python -c` and the line below.
    """
    line = (
        "import numpy as np; from hubert.training.masks import span_mask;"
        "print(*(np.packbits(span_mask(2, 40, seed=(5, 6), rule=r).numpy()).tobytes().hex() for r in ('static', 'fairseq')))"
    )
    printed = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True).stdout.split()
    assert printed == GOLDEN


GOLDEN = ["1ff807ffc00007ffdff8", "7fe01ffc00000bffbfd0"]


@pytest.mark.parametrize("rule", ["static", "fairseq"])
def test_rows_shorter_than_a_span_are_refused(rule):
    assert span_mask(2, 10, seed=0, rule=rule).any()
    with pytest.raises(DataError, match=r"mask_length = 10 frames.*found 9"):
        span_mask(2, 9, seed=0, rule=rule)


@pytest.mark.parametrize(
    "wrong", [{"mask_prob": 0.0}, {"mask_prob": 1.1}, {"mask_length": 0}, {"min_masks": 0}, {"rule": "random"}]
)
def test_impossible_settings_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)).removeprefix("mask_")):
        span_mask(2, 50, seed=0, **wrong)
