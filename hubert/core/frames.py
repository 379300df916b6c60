"""The arithmetic of frames: sample rate, hop, receptive field, and how many frames some samples give."""

from typing import Any, overload

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


SAMPLE_RATE = 16_000  # Hz

FRAME_RATE = 50  # Hz, of the model

MFCC_FRAME_RATE = 100  # Hz

MFCC_DIMENSION = 39  # 13 cepstra, their first and second differences

HOP = 320  # samples between two frames

RECEPTIVE_FIELD = 400  # samples under one frame


@overload
def num_frames(num_samples: int) -> int: ...


@overload
def num_frames(num_samples: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]: ...


def num_frames(num_samples: int | npt.NDArray[np.integer[Any]]) -> int | npt.NDArray[np.int64]:
    """Return the number of frames that `num_samples` samples give: (n - 400) // 320 + 1, and 0 below 400 samples.

    Only whole windows count: up to 319 samples at the end are seen by no frame.
    """
    if isinstance(num_samples, np.ndarray):
        counts: npt.NDArray[np.int64] = np.maximum((num_samples.astype(np.int64) - RECEPTIVE_FIELD) // HOP + 1, 0)
        return counts
    return max((num_samples - RECEPTIVE_FIELD) // HOP + 1, 0)


def max_samples(frames: int) -> int:
    """Return the largest number of samples that gives `frames` frames; the inverse of `num_frames`."""
    return HOP * frames + RECEPTIVE_FIELD - 1


def num_units_of(num_samples: IntArray, frame_rate: int) -> IntArray:
    """Return how many units files of `num_samples` samples have at `frame_rate` Hz: full 400-sample windows only, at any rate."""
    return np.maximum((num_samples - RECEPTIVE_FIELD) // (SAMPLE_RATE // frame_rate) + 1, 0)
