"""What the model is given: waveforms of true or padded length, checked and, where it wants that, normalised."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hubert.core.errors import DataError
from hubert.core.frames import RECEPTIVE_FIELD, SAMPLE_RATE, num_frames

_EPS = 1e-5


def frame_mask(lengths: list[int], frames: int) -> Tensor:
    """Return (B, F) bool on the CPU: True for the frames of utterances of `lengths` samples, False for padding."""
    counts = torch.tensor([num_frames(length) for length in lengths])
    return torch.arange(frames) < counts[:, None]


def check_lengths(waveforms: Tensor, attention_mask: Tensor | None) -> list[int] | None:
    """Return the true number of samples of each utterance, None if nothing is padded, after checking the shapes."""
    if waveforms.ndim != 2 or not waveforms.is_floating_point():
        raise DataError(
            f"expected waveforms as (B, T) floats, found {tuple(waveforms.shape)} {waveforms.dtype}; "
            "a single waveform needs a batch dimension: waveform[None]"
        )
    batch, samples = waveforms.shape
    lengths = [samples] * batch
    if attention_mask is not None:
        if attention_mask.shape != waveforms.shape:
            raise DataError(
                f"expected an attention_mask of the waveforms' shape {(batch, samples)}, found "
                f"{tuple(attention_mask.shape)}; it marks samples, not frames"
            )
        present = attention_mask.bool()
        ends = present.sum(1)
        at_end_only = present == (torch.arange(samples, device=present.device) < ends[:, None])
        *lengths, is_valid = torch.cat([ends, at_end_only.all()[None]]).tolist()  # one wait for the device, not two
        if not is_valid:
            raise DataError(
                "attention_mask has padding before or among samples; expected it at the end of each row only"
            )
    shortest = min(lengths, default=0)
    if shortest < RECEPTIVE_FIELD:
        row = f"utterance {lengths.index(shortest)} of the batch" if lengths else "an empty batch"
        raise DataError(
            f"expected at least {RECEPTIVE_FIELD} samples ({1000 * RECEPTIVE_FIELD / SAMPLE_RATE:.0f} ms at 16 kHz) "
            f"for one frame, found {shortest} in {row}; leave such audio out, or pad it with silence"
        )
    return None if shortest == samples else lengths


def clear_padding(waveforms: Tensor, lengths: list[int]) -> Tensor:
    """Set what stands behind each utterance's true length to 0, whatever it was."""
    counts = torch.tensor(lengths)[:, None].to(waveforms.device, non_blocking=True)
    return torch.where(torch.arange(waveforms.shape[1], device=waveforms.device) < counts, waveforms, 0)


def normalize(waveforms: Tensor, lengths: list[int] | None) -> Tensor:
    """Scale each utterance to mean 0 and variance 1 over its true length (fairseq's `task.normalize`); padding is 0."""
    waveforms = waveforms.float()
    if lengths is None:
        return F.layer_norm(waveforms, waveforms.shape[1:], eps=_EPS)
    counts = torch.tensor(lengths, dtype=torch.float32)[:, None].to(waveforms.device, non_blocking=True)
    mean = clear_padding(waveforms, lengths).sum(1, keepdim=True) / counts
    centred = clear_padding(waveforms - mean, lengths)
    return centred * torch.rsqrt(centred.square().sum(1, keepdim=True) / counts + _EPS)
