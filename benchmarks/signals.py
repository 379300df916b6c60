"""What the stages hear: signals that resemble speech in level, spectrum and length, the same at every call. numpy only.

Each file is a row of voiced stretches (harmonics of a gliding pitch under formants), noise and pauses, in 16 bit as flac
and wav hold it. Lengths are spread as LibriSpeech's: 2 to 17 s, mostly above 10.
"""

import numpy as np
import numpy.typing as npt

SAMPLE_RATE = 16_000
SEED = 0

FloatArray = npt.NDArray[np.float32]


def lengths(minutes: float) -> list[int]:
    """Return the samples of each file; together at least `minutes`."""
    rng = np.random.default_rng(SEED)
    found: list[int] = []
    while sum(found) < minutes * 60 * SAMPLE_RATE:
        found.append(int(rng.triangular(2.0, 14.5, 17.0) * SAMPLE_RATE))
    return found


def waveform(number: int, num_samples: int) -> FloatArray:
    """Return file `number` (num_samples,), float32 in steps of 2^-15."""
    rng = np.random.default_rng([SEED, number])
    edges = np.cumsum(rng.integers(800, 4800, num_samples // 800 + 1))
    segment = np.searchsorted(edges, np.arange(num_samples), side="right")
    count = int(segment[-1]) + 1
    kind = rng.choice(3, count, p=[0.6, 0.25, 0.15])  # voiced, noise, pause
    level = rng.uniform(0.03, 0.2, count)
    targets = rng.uniform(90, 230, count)
    pitch = np.interp(np.arange(num_samples), edges[:count], targets)
    phase = np.cumsum(pitch) * (2 * np.pi / SAMPLE_RATE)
    voiced = np.zeros(num_samples)
    formants = rng.uniform([300, 900, 2200], [800, 2000, 3200], (count, 3))
    for harmonic in range(1, 16):
        distance = (harmonic * targets[:, None] - formants) / 250
        amplitude = np.exp(-(distance**2)).sum(1) / harmonic**0.5
        voiced += amplitude[segment] * np.sin(harmonic * phase)
    noise = rng.standard_normal(num_samples)
    signal = level[segment] * np.choose(kind[segment], [voiced, 0.5 * noise, 0.01 * noise]) + 0.002 * noise
    return (np.clip(np.rint(signal * 32_768), -32_768, 32_767) / 32_768).astype(np.float32)


def waveforms(minutes: float) -> list[FloatArray]:
    """Return all files."""
    return [waveform(number, num_samples) for number, num_samples in enumerate(lengths(minutes))]


def crops(num_crops: int, num_samples: int) -> FloatArray:
    """Return crops of one length (num_crops, num_samples)."""
    return np.stack([waveform(number, num_samples) for number in range(num_crops)])


def num_frames(num_samples: int) -> int:
    """Return the frames of HuBERT at 50 Hz."""
    return (num_samples - 400) // 320 + 1


def labels(num_crops: int, frames: int, num_units: int) -> npt.NDArray[np.int64]:
    """Return random units (num_crops, frames)."""
    return np.random.default_rng([SEED, 1]).integers(0, num_units, (num_crops, frames))


def mask(num_crops: int, frames: int) -> npt.NDArray[np.bool_]:
    """Return spans of 10 frames that start at 8 % of the frames (num_crops, frames): the paper's, about 57 % masked."""
    starts = np.random.default_rng([SEED, 2]).random((num_crops, frames)) < 0.08
    masked = np.zeros_like(starts)
    for shift in range(10):
        masked[:, shift:] |= starts[:, : frames - shift]
    masked[:, :10] = True
    return masked
