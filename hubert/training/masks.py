"""Which frames are hidden from the model: spans of 10 frames that start at random (paper, section III-B).

Two rules, each a function of its seed alone, on every machine and in every process:

    static    the number of masked frames depends on the number of frames only, so every step has fixed shapes and
              every crop of a length weighs the same. It is the rounded mean of what fairseq's rule masks.
    fairseq   fairseq's own draw (`compute_mask_indices` with `mask_type="static"`): the number of spans is fixed up
              to rounding, the number of frames that they cover is not; rows are then cut to the batch's smallest.

With the paper's values the spans cover 56.7 % of the frames on average. fairseq's rule hides fewer in effect, because
of the last cut: 53 % in a batch of six 15-second crops, 46 % in one of twenty-two 4-second crops.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hubert.core.errors import ConfigError, DataError
from hubert.core.frames import FRAME_RATE

MASK_PROB = 0.8
MASK_LENGTH = 10
MIN_MASKS = 2

MaskRule = Literal["static", "fairseq"]
Seed = int | Sequence[int]

_Draws = npt.NDArray[np.uint64]
_LAST = np.uint64(2**64 - 1)  # a draw that no window chooses


def span_mask(
    batch_size: int,
    num_frames: int,
    *,
    seed: Seed,
    mask_prob: float = MASK_PROB,
    mask_length: int = MASK_LENGTH,
    min_masks: int = MIN_MASKS,
    rule: MaskRule = "static",
) -> Tensor:
    """Draw which frames of each row are masked; every row has the same number.

    static: span starts are visited in random order and their spans masked until `num_masked_frames` frames are; the
    last span is cut to fit, and every frame can be reached. fairseq: see the module's docstring; it never masks the
    last frame, as no span may start closer than `mask_length + 1` to the end.

    Args:
        batch_size: number of rows B.
        num_frames: frames per row F, at least `mask_length`.
        seed: one non-negative integer or several, such as (seed, step, micro-batch).
        mask_prob: share of the frames that the spans would cover if they never overlapped.
        mask_length: frames per span.
        min_masks: at least this many spans per row.
        rule: how spans become a mask.

    Returns:
        (B, F) bool, on the CPU; True where masked.

    Raises:
        DataError: the rows are shorter than one span.
        ConfigError: impossible settings.
    """
    _check(num_frames, mask_prob, mask_length, min_masks)
    draws = np.random.Philox(np.random.SeedSequence(seed))
    if rule == "static":
        count = num_masked_frames(num_frames, mask_prob, mask_length, min_masks)
        starts = _draw(draws, batch_size, num_frames - mask_length + 1)
        # The span of the smallest draw is masked first, so a frame's turn comes with the smallest draw that covers it.
        turn = _smallest_in_span(starts, num_frames, mask_length)
        mask = _first(turn, count)
    elif rule == "fairseq":
        mask = _fairseq_mask(draws, batch_size, num_frames, mask_prob, mask_length, min_masks)
    else:
        raise ConfigError(f"mask_rule = {rule!r}: expected 'static' or 'fairseq'")
    return torch.from_numpy(mask)


@cache
def num_masked_frames(
    num_frames: int,
    mask_prob: float = MASK_PROB,
    mask_length: int = MASK_LENGTH,
    min_masks: int = MIN_MASKS,
) -> int:
    """Return how many of `num_frames` frames the static rule masks: fairseq's expected number, rounded.

    With m of S starts drawn without replacement, a frame that c starts cover stays unmasked with probability
    C(S - c, m) / C(S, m); m is p F / length, rounded up or down at random with that mean.

    Raises:
        DataError: fewer frames than one span.
        ConfigError: impossible settings.
    """
    return round(expected_masked_frames(num_frames, mask_prob, mask_length, min_masks))


def expected_masked_frames(num_frames: int, mask_prob: float, mask_length: int, min_masks: int) -> float:
    """Return the expected number of frames that fairseq's rule masks in one row, before rows are made equal."""
    _check(num_frames, mask_prob, mask_length, min_masks)
    mean = mask_prob * num_frames / mask_length
    share_up = mean - math.floor(mean)
    expected = 0.0
    for num_spans, share in ((math.floor(mean), 1 - share_up), (math.floor(mean) + 1, share_up)):
        num_spans = max(min_masks, num_spans)  # noqa: PLW2901  (both roundings may fall below the minimum)
        num_starts = _num_starts(num_frames, num_spans, mask_length)
        frames = np.arange(num_frames)
        covering = np.minimum(frames, num_starts - 1) - np.maximum(frames - mask_length + 1, 0) + 1
        unmasked = sum(
            count * (math.comb(num_starts - covered, num_spans) / math.comb(num_starts, num_spans))
            for covered, count in zip(*(part.tolist() for part in np.unique(covering, return_counts=True)), strict=True)
        )
        expected += share * (num_frames - unmasked)
    return expected


def _check(num_frames: int, mask_prob: float, mask_length: int, min_masks: int) -> None:
    if not (0 < mask_prob <= 1 and mask_length >= 1 and min_masks >= 1):
        raise ConfigError(
            f"mask_prob = {mask_prob}, mask_length = {mask_length}, min_masks = {min_masks}: "
            "expected 0 < mask_prob <= 1, and at least 1 for the other two"
        )
    if num_frames < mask_length:
        raise DataError(
            f"expected at least mask_length = {mask_length} frames to mask, found {num_frames} "
            f"({num_frames / FRAME_RATE:.2f} s of audio); leave such utterances out (train.min_seconds), or lower "
            "train.mask_length"
        )


def _num_starts(num_frames: int, num_spans: int, mask_length: int) -> int:
    """Return from how many places fairseq draws its starts: F - length, or just enough where that is too few."""
    places = num_frames - mask_length
    return places if places > num_spans else num_spans + 1


def _draw(draws: np.random.Philox, rows: int, columns: int) -> _Draws:
    """Draw (rows, columns) 64-bit numbers; the raw stream, because numpy promises that it never changes."""
    return draws.random_raw(rows * columns).reshape(rows, columns)


def _smallest_in_span(starts: _Draws, num_frames: int, mask_length: int) -> _Draws:
    """Return for each frame (B, F) the smallest draw among the starts (B, S) whose spans cover it."""
    num_starts = min(starts.shape[1], num_frames)
    smallest = np.full((starts.shape[0], num_frames), _LAST)
    for offset in range(mask_length):
        width = min(num_starts, num_frames - offset)
        if width > 0:
            window = smallest[:, offset : offset + width]
            np.minimum(window, starts[:, :width], out=window)
    return smallest


def _first(turn: _Draws, count: int) -> npt.NDArray[np.bool_]:
    """Return (B, F) with the `count` frames of each row whose turn comes first; frames of one span from the left."""
    mask = np.zeros(turn.shape, dtype=np.bool_)
    np.put_along_axis(mask, np.argsort(turn, axis=1, kind="stable")[:, :count], values=True, axis=1)
    return mask


def _fairseq_mask(
    draws: np.random.Philox, batch_size: int, num_frames: int, mask_prob: float, mask_length: int, min_masks: int
) -> npt.NDArray[np.bool_]:
    mean = mask_prob * num_frames / mask_length
    shares = (_draw(draws, batch_size, 1) >> np.uint64(11)).astype(np.float64) * 2.0**-53  # uniform in [0, 1)
    mask = np.zeros((batch_size, num_frames), dtype=np.bool_)
    num_spans = np.maximum(min_masks, np.floor(mean + shares[:, 0]).astype(np.int64))
    for count in np.unique(num_spans).tolist():  # one or two values
        rows = num_spans == count
        starts = _draw(draws, int(rows.sum()), _num_starts(num_frames, count, mask_length))
        last_drawn = np.partition(starts, count - 1, axis=1)[:, count - 1 : count]
        mask[rows] = _smallest_in_span(starts, num_frames, mask_length) <= last_drawn
    turn = np.where(mask, _draw(draws, batch_size, num_frames) >> np.uint64(1), _LAST)
    return _first(turn, int(mask.sum(1).min()))
