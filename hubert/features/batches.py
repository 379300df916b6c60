"""Which files go through the teacher together: similar lengths, little padding, bounded memory."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hubert.core.frames import SAMPLE_RATE

MAX_PADDING = 0.1  # of a batch: the teacher computes padding as it computes speech
# On a CPU larger batches of the teacher are no faster and take three times the memory of these.
CPU_BATCH_SECONDS = 30.0


def batches_by_length(
    lengths: Sequence[int], seconds: float, is_long: Callable[[int], bool], *, max_padding: float = MAX_PADDING
) -> Iterator[list[int]]:
    """Yield the indices of files in batches of similar length, shortest first.

    A batch's padded audio stays within `seconds`, and its padding within the share `max_padding`. A file that is longer than
    `seconds`, or that `is_long` names, comes alone.
    """
    batch: list[int] = []
    audio = 0  # samples of the batch without padding
    for index in np.argsort(np.asarray(lengths, np.int64), kind="stable").tolist():
        length = lengths[index]  # the longest so far
        padded = length * (len(batch) + 1)
        wasteful = padded - (audio + length) > max_padding * padded
        if batch and (padded > seconds * SAMPLE_RATE or wasteful or is_long(length)):
            yield batch
            batch, audio = [], 0
        batch.append(index)
        audio += length
    if batch:
        yield batch


def pad(waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack waveforms (T_i,) to (B, T) with a mask (B, T) of the true samples; no mask where all are equally long."""
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    padded = torch.nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True)
    mask = torch.arange(padded.shape[1])[None] < lengths[:, None]
    return padded, None if bool(mask.all()) else mask
