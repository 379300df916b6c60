"""Kaldi's MFCCs of many waveforms at once: the values of torchaudio's, per core several times as fast.

`torchaudio.compliance.kaldi.mfcc` builds window, mel banks and DCT again for each file and moves every frame through
memory a dozen times. Here they are built once, and all files of a batch lie one behind the other:

    samples   |-- file 0 --|0|-- file 1 --------|0|-- file 2 ---|0 0|     each starts at a multiple of the hop
    frames    |0 1 2 . . x x |. . . . . . . . x x |. . . . . x x    |     x looks at two files, or at the end: unused
    blocks    |-------- 256 frames --------|-------- 256 frames ----|     one product or transform each, in the cache

A block always has 256 frames, so a frame goes through the same instructions in whatever batch or chunk it stands, and
its values do not depend on it.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from hubert.core.frames import MFCC_FRAME_RATE, RECEPTIVE_FIELD, SAMPLE_RATE
from hubert.core.machine import one_thread

MFCC_CONTEXT = 4  # frames on each side that the second difference looks at

WINDOW = RECEPTIVE_FIELD  # 25 ms
SHIFT = SAMPLE_RATE // MFCC_FRAME_RATE
FFT_SIZE = 512
PREEMPHASIS = 0.97
NUM_MEL_BINS = 23
NUM_CEPSTRA = 13
LIFTER = 22.0
LOWEST_FREQUENCY = 20.0
FLOOR = torch.finfo(torch.float32).eps  # of a mel bin's energy, before the logarithm

BLOCK_FRAMES = 256  # frames: their windows and spectra are 1.5 MB, near a core's cache; a multiple of 32 (vectors)
LANES = 16  # mel bins and cepstra are computed in groups of this, filled up with zeros: the width of a vector
NUM_BANKS = 2


def mfcc(waveform: Tensor) -> Tensor:
    """Compute 13 Kaldi MFCCs with their first and second differences (paper, section IV-B).

    Window 25 ms, hop 10 ms, 23 mel bins, no energy, no dither: `torchaudio.compliance.kaldi.mfcc` on samples in
    [-1, 1], as fairseq's `dump_mfcc_feature.py` calls it.

    Args:
        waveform: (T,) samples at 16 kHz, T >= 400.

    Returns:
        (F, 39) float32 with F = (T - 400) // 160 + 1.
    """
    return batch_mfcc([waveform])[0]


@torch.no_grad()
def batch_mfcc(waveforms: Sequence[Tensor]) -> list[Tensor]:
    """Return `mfcc` of each waveform: the same bits, in a fraction of the time."""
    if not waveforms:
        return []
    lengths = [len(waveform) for waveform in waveforms]
    counts = [(length - WINDOW) // SHIFT + 1 for length in lengths]
    if min(counts) < 1:
        raise ValueError(f"expected at least {WINDOW} samples for one MFCC frame, found {min(lengths)}")
    starts = [0, *accumulate(-(-length // SHIFT) for length in lengths)]  # in frames; the last is where all end
    num_blocks = -(-starts[-1] // BLOCK_FRAMES)
    samples = torch.empty(num_blocks * BLOCK_FRAMES * SHIFT + WINDOW - SHIFT, device=waveforms[0].device)
    for start, waveform, following in zip(starts, waveforms, starts[1:], strict=False):
        samples[start * SHIFT : start * SHIFT + len(waveform)] = waveform
        samples[start * SHIFT + len(waveform) : following * SHIFT] = 0
    samples[starts[-1] * SHIFT :] = 0
    # Inference mode is faster; what is returned is made outside it, so that callers may change it in place. A block is too
    # small to share: two threads take three times as long as one.
    with torch.inference_mode(), one_thread():
        static = _cepstra(samples.unfold(0, WINDOW, SHIFT))
    return [_with_differences(static[start : start + count]) for start, count in zip(starts, counts, strict=False)]


class _Bank(NamedTuple):
    """Some neighbouring mel bins and the stretch of the spectrum that they look at."""

    rows: slice  # of the spectrum's real and imaginary parts, which alternate
    columns: slice  # of the block's mel energies
    weights: Tensor  # (len(rows), len(columns))


class _Tables(NamedTuple):
    """What does not depend on the audio."""

    window: Tensor  # (400,)
    banks: list[_Bank]
    cosines: Tensor  # (32, 16): the DCT with the lifter


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> _Tables:
    from torchaudio.compliance import kaldi  # a second of import time that labelling by layers is spared
    from torchaudio.functional import create_dct

    window = torch.hann_window(WINDOW, periodic=False).pow(0.85)  # Povey's
    mel, _ = kaldi.get_mel_banks(NUM_MEL_BINS, FFT_SIZE, SAMPLE_RATE, LOWEST_FREQUENCY, 0.0, 100.0, -500.0, 1.0)
    filled = torch.zeros(NUM_BANKS * LANES, mel.shape[1])
    filled[:NUM_MEL_BINS] = mel
    banks = []
    for number, part in enumerate(filled.split(LANES)):
        used = part.sum(0).nonzero()
        start, end = int(used[0]), int(used[-1]) + 1
        weights = part[:, start:end].T.repeat_interleave(2, 0).contiguous().to(device)
        banks.append(_Bank(slice(2 * start, 2 * end), slice(number * LANES, (number + 1) * LANES), weights))
    dct = create_dct(NUM_MEL_BINS, NUM_MEL_BINS, "ortho")
    dct[:, 0] = NUM_MEL_BINS**-0.5
    lifter = 1 + LIFTER / 2 * torch.sin(torch.pi * torch.arange(NUM_CEPSTRA) / LIFTER)
    cosines = torch.zeros(NUM_BANKS * LANES, LANES)
    cosines[:NUM_MEL_BINS, :NUM_CEPSTRA] = dct[:, :NUM_CEPSTRA] * lifter
    return _Tables(window.to(device), banks, cosines.to(device))


def _cepstra(frames: Tensor) -> Tensor:
    """Return the cepstra (F, 13) of frames (F, 400), F a multiple of the block."""
    window, banks, cosines = _tables(frames.device)
    # Views are made once, and frames start at multiples of 64 bytes: what is not arithmetic is half of the time here.
    shifted, padded = frames.new_empty(BLOCK_FRAMES, LANES + WINDOW), frames.new_empty(BLOCK_FRAMES, FFT_SIZE)
    shifted[:, :LANES], padded[:, WINDOW:] = 0, 0
    centred, before = shifted[:, LANES:], shifted[:, LANES - 1 : -1]  # a frame's first sample counts 0 in the window
    emphasised = padded[:, :WINDOW]
    energies, cepstra = frames.new_empty(BLOCK_FRAMES, NUM_BANKS * LANES), frames.new_empty(len(frames), LANES)
    energies_of_banks = [energies[:, bank.columns] for bank in banks]
    for block, out in zip(frames.split(BLOCK_FRAMES), cepstra.split(BLOCK_FRAMES), strict=True):
        torch.sub(block, block.sum(1, keepdim=True).div_(WINDOW), out=centred)
        torch.mul(before, PREEMPHASIS, out=emphasised)
        torch.sub(centred, emphasised, out=emphasised).mul_(window)
        power = torch.view_as_real(torch.fft.rfft(padded)).flatten(1).square_()
        for bank, part in zip(banks, energies_of_banks, strict=True):
            torch.mm(power[:, bank.rows], bank.weights, out=part)
        torch.mm(energies.clamp_(min=FLOOR).log_(), cosines, out=out)
    return cepstra[:, :NUM_CEPSTRA]


def _with_differences(static: Tensor) -> Tensor:
    """Put first and second differences beside the cepstra of a file: (F, 13) -> (F, 39)."""
    first = _slope(static)
    return torch.cat([static, first, _slope(first)], 1)


def _slope(frames: Tensor) -> Tensor:
    """Fit a line through each frame and two on both sides: (F, D) -> (F, D). The first and last frame go on for ever."""
    start, end = frames[:1], frames[-1:]
    wide = torch.cat([start, start, frames, end, end])
    return torch.sub(wide[4:], wide[:-4]).mul_(2).add_(wide[3:-1]).sub_(wide[1:-3]).div_(10)
