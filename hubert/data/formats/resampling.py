"""Conversion of a sample rate to 16 kHz with torchaudio's windowed sinc, within bounded memory.

torchaudio's kernel has a row for each output phase and a column for each input sample of a period: with the rates
reduced to old:new, new x (old + 2 width) numbers. At 44.1 kHz these are 76 thousand; at a rate that shares no factor
with 16,000 they are gigabytes, almost all of them zero. There only the numbers that are not zero are kept.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from hubert.core.frames import SAMPLE_RATE

# What recorders and their files have: from the first digital dictation machines to ultrasound recorders for bats.
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 4_000, 768_000

MAX_DENSE = 1 << 20  # numbers in torchaudio's kernel; all usual rates need less
MAX_PRODUCTS = 1 << 20  # products of samples and weights held at once
ZERO_CROSSINGS, ROLLOFF = 6, 0.99  # torchaudio's defaults: half the filter's length, and its edge


class Resampler(NamedTuple):
    """Converts stretches of a file. `convert` takes (T,) float32 and gives (ceil(T new / old),) at 16 kHz."""

    old: int  # the ratio of the rates is old:new, in smallest terms
    new: int
    width: int  # input samples on either side that an output sample depends on
    convert: Callable[[torch.Tensor], torch.Tensor]


@lru_cache(maxsize=32)
def build_resampler(sample_rate: int) -> Resampler:
    """Build the conversion of a sample rate, in Hz, to 16 kHz."""
    divisor = math.gcd(sample_rate, SAMPLE_RATE)
    old, new = sample_rate // divisor, SAMPLE_RATE // divisor
    width = math.ceil(ZERO_CROSSINGS * old / (min(old, new) * ROLLOFF))
    if new * (old + 2 * width) <= MAX_DENSE:
        from torchaudio.transforms import Resample  # training nodes without torchaudio never get here

        return Resampler(old, new, width, Resample(sample_rate, SAMPLE_RATE))
    return Resampler(old, new, width, _SparseConversion(old, new, width))


class _SparseConversion:
    """The same filter, holding for each output phase only the weights of the samples within its reach."""

    def __init__(self, old: int, new: int, width: int) -> None:
        self._old, self._new = old, new
        self._reach = np.arange(-width, width + 2)  # around the input sample at or before the output sample
        phase = np.arange(new)[:, None]
        distance = ((phase * old // new + self._reach) * new - phase * old) / (old * new)  # in periods
        t = np.clip(distance * min(old, new) * ROLLOFF, -ZERO_CROSSINGS, ZERO_CROSSINGS)
        window = np.cos(t * math.pi / ZERO_CROSSINGS / 2) ** 2
        self._weights = (np.sinc(t) * window * (min(old, new) * ROLLOFF / old)).astype(np.float32)

    def __call__(self, waveform: torch.Tensor) -> torch.Tensor:
        """Convert (T,) float32 to (ceil(T new / old),)."""
        margin = len(self._reach)
        padded = np.pad(waveform.numpy(), margin)
        length = -(-len(waveform) * self._new // self._old)
        converted = np.empty(length, np.float32)
        step = max(1, MAX_PRODUCTS // margin)
        for start in range(0, length, step):
            outputs = np.arange(start, min(start + step, length))
            inputs = (outputs * self._old // self._new)[:, None] + (self._reach + margin)
            weights = self._weights[outputs % self._new]
            converted[start : start + step] = np.einsum("ij,ij->i", padded[inputs], weights)
        return torch.from_numpy(converted)
