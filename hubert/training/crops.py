"""Which crops make up a training step, and reading them.

Everything random is a function of (seed, epoch, file) or (seed, step, micro-batch), never of a generator's state:

    lengths      a few fixed crop lengths; each file is cut to the longest one that it fills, so shapes are static
    epoch        all files, sorted by length and then by a hash of (seed, epoch, file), cut into micro-batches of one length;
                 the micro-batches in the order of a hash of (seed, epoch, micro-batch). Their number never changes
    step         M consecutive micro-batches of the endless list epoch 0, epoch 1, ..., whatever the number of processes;
                 process r of R reads those with index % R == r
    crop         starts at a hash of (seed, epoch, file)

So any step can be asked for at once: a resumed training needs the step's number and nothing else, and neither the
number of processes nor of reading threads changes a single sample.
"""

import collections
import itertools
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hubert.core.errors import DataError
from hubert.core.frames import HOP, RECEPTIVE_FIELD, SAMPLE_RATE, IntArray, num_frames, num_units_of
from hubert.core.hashing import HashArray, mix, splitmix64
from hubert.data.audio import read_waveform
from hubert.data.read_ahead import read_ahead
from hubert.settings.sections import TrainSettings
from hubert.training.masks import num_masked_frames, span_mask
from hubert.units.labels import Table

ORDER, SHUFFLE, CROP, MASK, NOISE = range(1, 6)  # what a random draw is for: keeps the draws independent


def crop_frames(settings: TrainSettings) -> IntArray:
    """Return the crop lengths (L,) in frames, ascending, evenly spaced between `min_seconds` and `max_seconds`.

    F frames are 320 F + 80 samples, so no crop holds a sample that no frame sees. An utterance loses at most one
    spacing per epoch (0.9 s with the defaults), at another place in each epoch.
    """
    shortest, longest = (
        num_frames(round(seconds * SAMPLE_RATE)) for seconds in (settings.min_seconds, settings.max_seconds)
    )
    return np.unique(np.rint(np.linspace(shortest, longest, settings.num_crop_lengths)).astype(np.int64))


def samples_of[Count: (int, IntArray)](frames: Count) -> Count:
    """Return the number of samples under `frames` frames, at least one."""
    return HOP * (frames - 1) + RECEPTIVE_FIELD


def last_start(num_samples: IntArray, frames: int, frame_rate: int) -> IntArray:
    """Return the last sample at which a crop of `frames` frames may start in files of `num_samples` samples.

    The crop must end within the file, and the last frame's nearest unit must exist: a file's samples after its last
    full window have no unit, so up to half a hop at the end is never the start of a crop.
    """
    hop = SAMPLE_RATE // frame_rate
    last_unit = num_units_of(num_samples, frame_rate) - 1
    return np.minimum(num_samples - samples_of(frames), hop * last_unit + hop // 2 - HOP * (frames - 1))


def labels_for_crop(units: npt.NDArray[np.uint16], start: int, frames: int, frame_rate: int) -> npt.NDArray[np.int64]:
    """Return the label of each output frame of a crop: the unit whose 400-sample window has the nearest centre.

    Frame j of a crop at sample `start` is centred on `start + 320 j + 200`, unit u on `hop u + 200` with hop 320
    (50 Hz) or 160 (100 Hz, MFCC): the distance is at most half a hop, and its mean over starts is 0. Of two units at
    the same distance the earlier one counts. Rounding the start to frames instead, as is common, lags by 15 ms.

    Args:
        units: (U,) units of the whole file.
        start: first sample of the crop, at 16 kHz, within the file.
        frames: number of output frames of the crop.
        frame_rate: of the units, in Hz.

    Returns:
        (frames,) int64.

    Raises:
        DataError: the file has no unit for the first or last frame.
    """
    hop = SAMPLE_RATE // frame_rate
    nearest = (start + HOP * np.arange(frames) + (hop - 1) // 2) // hop
    if start < 0 or (frames and nearest[-1] >= len(units)):
        raise DataError(
            f"a crop of {frames} frames at sample {start} needs unit {nearest[-1] if frames else 0} at {frame_rate} Hz, and the "
            f"file has {len(units)}; the table and the audio do not belong together: run `hubert units` again"
        )
    return units[nearest].astype(np.int64)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads: crops of one length. `rows` (B,) in the table, `starts` (B,) in samples."""

    step: int
    index: int
    epoch: int
    rows: IntArray
    starts: IntArray
    num_frames: int

    @property
    def num_samples(self) -> int:
        """Samples of each crop."""
        return samples_of(self.num_frames)


class CropPlan:
    """All steps of a training, by arithmetic. Holds 14 bytes per file and, for two epochs, 4 more each.

    Args:
        num_samples: (n,) length of each file at 16 kHz.
        fileid_hash: (n,) hash of each fileid.
        frame_rate: of the units, in Hz.
        settings: crop lengths, batch sizes, seed.

    Raises:
        DataError: no file is as long as `min_seconds`.
    """

    def __init__(self, num_samples: IntArray, fileid_hash: HashArray, frame_rate: int, settings: TrainSettings) -> None:
        self.frames = crop_frames(settings)
        self.seed = settings.seed
        self._settings = settings
        self.frame_rate = frame_rate
        self.num_samples = num_samples
        self.fileid_hash = fileid_hash
        lengths = samples_of(self.frames)
        self._length_index = (np.searchsorted(lengths, num_samples, side="right") - 1).astype(np.int16)
        self._rows = np.flatnonzero(self._length_index >= 0).astype(np.int32)
        self.num_files = len(self._rows)
        self.num_left_out = len(num_samples) - self.num_files
        if not self.num_files:
            longest = num_samples.max(initial=0) / SAMPLE_RATE
            raise DataError(
                f"none of {len(num_samples)} files is as long as min_seconds ({settings.min_seconds} s); the longest has "
                f"{longest:.2f} s. Fix: lower train.min_seconds"
            )
        self._cut_epoch(np.bincount(self._length_index[self._rows], minlength=len(lengths)), lengths, settings)
        self.micro_batches_per_step = max(1, round(settings.batch_seconds / settings.micro_batch_seconds))
        self._epochs: collections.OrderedDict[int, tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]] = (
            collections.OrderedDict()
        )

    def _cut_epoch(self, counts: IntArray, lengths: IntArray, settings: TrainSettings) -> None:
        """Cut the list of files, longest first, into micro-batches of one length.

        Files that do not fill a micro-batch of their length come first among the next shorter ones, so at most the
        last micro-batch is not full.
        """
        shortest = int(np.flatnonzero(counts)[0])
        size = round(settings.micro_batch_seconds * SAMPLE_RATE)
        starts, kinds = [], []
        position = end = 0
        for kind in reversed(range(shortest, len(lengths))):
            end += int(counts[kind])
            capacity = max(1, size // int(lengths[kind]))
            full = (end - position) // capacity
            starts.append(position + capacity * np.arange(full))
            kinds.append(np.full(full, kind))
            position += capacity * full
        if position < end:
            starts.append(np.array([position]))
            kinds.append(np.array([shortest]))
        self._bounds = np.append(np.concatenate(starts), end)
        self._kinds = np.concatenate(kinds).astype(np.int16)
        self.micro_batches_per_epoch = len(self._kinds)

    def epoch(self, epoch: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return the files (rows of the table) in the order of the epoch's cuts, and the order of its micro-batches."""
        found = self._epochs.get(epoch)
        if found is None:
            keys = splitmix64(self.fileid_hash[self._rows] ^ np.uint64(mix(self.seed, epoch, ORDER)))
            keys >>= np.uint64(16)  # the length above 48 random bits: one sort does both
            keys |= (len(self.frames) - 1 - self._length_index[self._rows]).astype(np.uint64) << np.uint64(48)
            files = self._rows[np.argsort(keys, kind="stable")]
            numbers = np.arange(self.micro_batches_per_epoch, dtype=np.uint64)
            order = np.argsort(splitmix64(numbers ^ np.uint64(mix(self.seed, epoch, SHUFFLE))), kind="stable")
            found = self._epochs[epoch] = (files, order)
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return found

    def micro_batch(self, step: int, index: int) -> MicroBatch:
        """Return micro-batch `index` of a step (both from 0)."""
        epoch, place = divmod(step * self.micro_batches_per_step + index, self.micro_batches_per_epoch)
        files, order = self.epoch(epoch)
        cut = order[place]
        rows = files[self._bounds[cut] : self._bounds[cut + 1]].astype(np.int64)
        frames = int(self.frames[self._kinds[cut]])
        draws = splitmix64(self.fileid_hash[rows] ^ np.uint64(mix(self.seed, epoch, CROP)))
        shares = (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53  # uniform in [0, 1)
        starts = (shares * (last_start(self.num_samples[rows], frames, self.frame_rate) + 1)).astype(np.int64)
        return MicroBatch(step, index, epoch, rows, starts, frames)

    def step_frames(self, step: int) -> list[tuple[int, int]]:
        """Return (number of crops, frames per crop) of each micro-batch of a step."""
        shapes = []
        for number in range(step * self.micro_batches_per_step, (step + 1) * self.micro_batches_per_step):
            epoch, place = divmod(number, self.micro_batches_per_epoch)
            cut = self.epoch(epoch)[1][place]
            shapes.append((int(self._bounds[cut + 1] - self._bounds[cut]), int(self.frames[self._kinds[cut]])))
        return shapes

    def num_masked(self, step: int) -> int:
        """Return the step's number of masked frames over all processes: from the shapes alone, or by drawing all masks."""
        if self._settings.mask_rule == "static":
            rule = (self._settings.mask_prob, self._settings.mask_length, self._settings.min_masks)
            return sum(crops * num_masked_frames(frames, *rule) for crops, frames in self.step_frames(step))
        masks = (
            draw_mask(self._settings, step, index, crops, frames)
            for index, (crops, frames) in enumerate(self.step_frames(step))
        )
        return sum(int(mask.sum()) for mask in masks)

    def epochs_done(self, step: int) -> float:
        """Return how many epochs the first `step` steps are."""
        return step * self.micro_batches_per_step / self.micro_batches_per_epoch


def draw_mask(settings: TrainSettings, step: int, index: int, num_crops: int, frames: int) -> Tensor:
    """Draw the mask (num_crops, frames) bool of a micro-batch; each row has the same number of masked frames."""
    return span_mask(
        num_crops,
        frames,
        seed=(settings.seed, MASK, step, index),
        mask_prob=settings.mask_prob,
        mask_length=settings.mask_length,
        min_masks=settings.min_masks,
        rule=settings.mask_rule,
    )


@dataclass(frozen=True)
class Batch:
    """What one forward pass gets, on the CPU: waveforms (B, T) float32, labels (B, F) int64, mask (B, F) bool."""

    plan: MicroBatch
    waveforms: Tensor
    labels: Tensor
    mask: Tensor

    def pin(self) -> "Batch":
        """Copy to page-locked memory."""
        return Batch(self.plan, self.waveforms.pin_memory(), self.labels.pin_memory(), self.mask.pin_memory())


def read_crops(table: Table, plan: MicroBatch) -> tuple[Tensor, Tensor]:
    """Read the crops of a micro-batch: waveforms (B, T) float32 and labels (B, F) int64.

    Raises:
        DataError: a file is missing, damaged or changed since the manifest was built; names fileid and path.
        TransientError: the disk failed.
    """
    # Filled by numpy: a copy by torch would start a team of threads of its own beside the computation.
    waveforms = np.empty((len(plan.rows), plan.num_samples), np.float32)
    labels = np.empty((len(plan.rows), plan.num_frames), np.int64)
    for number, (row, start) in enumerate(zip(plan.rows.tolist(), plan.starts.tolist(), strict=True)):
        ref = table.audio_ref(row)
        waveform = read_waveform(ref, start=start, num_samples=plan.num_samples, resample=table.resample)
        waveforms[number] = waveform.numpy()
        labels[number] = labels_for_crop(table.units(row), start, plan.num_frames, table.frame_rate)
    return torch.from_numpy(waveforms), torch.from_numpy(labels)


def load_batches(
    table: Table, plan: CropPlan, settings: TrainSettings, *, first_step: int, rank: int, size: int, pin: bool
) -> Generator[Batch]:
    """Yield the micro-batches of one process, for ever, read ahead of the training; close it to end the threads.

    Args:
        table: the labelled files.
        plan: which crops.
        settings: the mask's, the seed, and `num_workers`.
        first_step: where to begin, from 0.
        rank: this process; it reads micro-batches `index % size == rank`.
        size: number of processes.
        pin: put the batches into page-locked memory, for a GPU.

    Raises:
        DataError: a file is missing, damaged or changed since the manifest was built; names fileid and path.
        TransientError: the disk failed.
    """

    def read(item: MicroBatch) -> Batch:
        waveforms, labels = read_crops(table, item)
        mask = draw_mask(settings, item.step, item.index, len(item.rows), item.num_frames)
        batch = Batch(item, waveforms, labels, mask)
        return batch.pin() if pin else batch

    own = range(rank, plan.micro_batches_per_step, size)
    items = (plan.micro_batch(step, index) for step in itertools.count(first_step) for index in own)
    yield from read_ahead(items, read, num_workers=settings.num_workers)
