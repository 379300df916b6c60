"""Which crops make up a step: alignment with the units, coverage, and independence of workers, processes and restarts."""

import itertools
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert.core.errors import DataError
from hubert.core.frames import num_frames, num_units_of
from hubert.core.hashing import mix, splitmix64
from hubert.data.read_ahead import read_ahead
from hubert.settings.sections import TrainSettings
from hubert.training.crops import (
    CropPlan,
    crop_frames,
    draw_mask,
    labels_for_crop,
    last_start,
    load_batches,
    samples_of,
)
from hubert.units.labels import Table
from tests.support.corpus import write_corpus

SETTINGS = TrainSettings(
    min_seconds=1.0, max_seconds=4.0, num_crop_lengths=5, micro_batch_seconds=8.0, batch_seconds=32.0, num_workers=0
)


def plan_of(seconds: list[float], settings: TrainSettings = SETTINGS, frame_rate: int = 50, seed: int = 0) -> CropPlan:
    num_samples = np.array([round(value * 16_000) for value in seconds], dtype=np.int64)
    hashes = np.random.default_rng(seed).integers(0, 2**63, len(seconds)).astype(np.uint64)
    return CropPlan(num_samples, hashes, frame_rate, settings)


def random_seconds(count: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).uniform(0.3, 6.0, count).tolist()


# Crops and labels -------------------------------------------------------------------------------------------------


@given(num_samples=st.integers(400, 30_000), frame_rate=st.sampled_from([50, 100]), data=st.data())
def test_a_label_is_the_unit_with_the_nearest_window_centre(num_samples, frame_rate, data):
    """Against a search through all units; at most half a hop away wherever a crop may start."""
    frames = data.draw(st.integers(1, num_frames(num_samples)))
    (latest,) = last_start(np.array([num_samples]), frames, frame_rate)
    start = data.draw(st.integers(0, int(latest)))
    (count,) = num_units_of(np.array([num_samples]), frame_rate)
    units = np.arange(count, dtype=np.uint16)  # each unit is its own position
    labels = labels_for_crop(units, start, frames, frame_rate)
    hop = 16_000 // frame_rate
    for frame, label in enumerate(labels.tolist()):
        centre = start + 320 * frame + 200
        distances = [abs(hop * unit + 200 - centre) for unit in range(count)]
        assert label == distances.index(min(distances))  # of two equals the earlier one
        assert distances[label] <= hop // 2
    assert start + samples_of(frames) <= num_samples


@pytest.mark.parametrize("frame_rate", [50, 100])
def test_labels_neither_lag_nor_lead(frame_rate):
    """Over all starts within a frame the mean distance is 0 (but for the tie, which goes to the earlier unit)."""
    units = np.arange(1000, dtype=np.uint16)
    hop = 16_000 // frame_rate
    lags = [start + 200 - (hop * labels_for_crop(units, start, 1, frame_rate)[0] + 200) for start in range(3200)]
    assert np.mean(lags) == 0.5
    assert (min(lags), max(lags)) == (1 - hop // 2, hop // 2)


def test_a_crop_without_units_is_refused():
    with pytest.raises(DataError, match="needs unit 10 at 50 Hz, and the file has 10"):
        labels_for_crop(np.zeros(10, np.uint16), 320, 10, 50)


def test_crop_lengths_are_whole_frames_between_the_bounds():
    frames = crop_frames(TrainSettings())
    assert len(frames) == 16
    assert (frames[0], frames[-1]) == (99, 781)
    assert (samples_of(frames) <= 250_000).all()
    assert (np.diff(frames) >= 45).all()
    assert len(crop_frames(SETTINGS.model_copy(update={"max_seconds": 1.0}))) == 1


# Epochs and steps -------------------------------------------------------------------------------------------------


def epoch_of(plan: CropPlan, epoch: int) -> list:
    """All micro-batches of an epoch, asked for through the steps that they belong to."""
    per_epoch, per_step = plan.micro_batches_per_epoch, plan.micro_batches_per_step
    return [plan.micro_batch(*divmod(number, per_step)) for number in range(epoch * per_epoch, (epoch + 1) * per_epoch)]


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 200), seed=st.integers(0, 5), frame_rate=st.sampled_from([50, 100]), epoch=st.integers(0, 3)
)
def test_an_epoch_holds_every_file_once_in_micro_batches_of_one_length(count, seed, frame_rate, epoch):
    seconds = [*random_seconds(count, seed), 1.5]
    plan = plan_of(seconds, frame_rate=frame_rate, seed=seed)
    batches = epoch_of(plan, epoch)
    assert Counter(np.concatenate([batch.rows for batch in batches]).tolist()) == Counter(
        row for row, value in enumerate(seconds) if round(value * 16_000) >= samples_of(num_frames(16_000))
    )
    capacities = [int(8.0 * 16_000) // batch.num_samples for batch in batches]
    assert all(len(batch.rows) <= capacity for batch, capacity in zip(batches, capacities, strict=True))
    assert sum(len(batch.rows) < capacity for batch, capacity in zip(batches, capacities, strict=True)) <= 1
    for batch in batches:
        assert batch.epoch == epoch
        assert (batch.starts >= 0).all()
        assert (batch.starts + batch.num_samples <= plan.num_samples[batch.rows]).all()


def test_most_files_are_cut_to_the_longest_length_that_they_fill():
    plan = plan_of(random_seconds(2000))
    own = np.searchsorted(samples_of(plan.frames), plan.num_samples, side="right") - 1
    cut = {row: batch.num_frames for batch in epoch_of(plan, 0) for row in batch.rows.tolist()}
    assert all(frames <= plan.frames[own[row]] for row, frames in cut.items())
    assert np.mean([frames == plan.frames[own[row]] for row, frames in cut.items()]) > 0.98


def test_files_that_are_too_short_are_counted():
    plan = plan_of([0.5, 0.9, 1.0, 3.0])
    assert (plan.num_files, plan.num_left_out) == (2, 2)


def test_a_corpus_of_short_files_names_the_setting():
    with pytest.raises(DataError, match=r"none of 2 files is as long as min_seconds \(1.0 s\); the longest has 0.70 s"):
        plan_of([0.5, 0.7])


def test_epochs_differ_in_order_and_in_crops():
    plan = plan_of([3.9] * 64)
    first, second = epoch_of(plan, 0), epoch_of(plan, 1)
    order = [np.concatenate([batch.rows for batch in batches]).tolist() for batches in (first, second)]
    assert order[0] != order[1]
    starts = [
        {row: s for batch in batches for row, s in zip(batch.rows, batch.starts, strict=True)}
        for batches in (first, second)
    ]
    assert sum(starts[0][row] == starts[1][row] for row in range(64)) < 4


def test_crop_starts_are_spread_over_the_file():
    """Mean and deviation of a uniform distribution, within four standard errors."""
    plan = plan_of([5.0] * 4000)
    starts = np.concatenate([batch.starts for batch in epoch_of(plan, 0)])
    latest = 80_000 - plan.frames[-1] * 320 - 80
    assert abs(starts.mean() - latest / 2) < 4 * latest / 12**0.5 / 4000**0.5
    assert starts.min() < latest * 0.01
    assert starts.max() > latest * 0.99


def test_what_a_file_contributes_does_not_depend_on_its_row():
    """Crops and order are drawn by fileid: sorting a manifest otherwise changes nothing."""
    seconds = random_seconds(300)
    plan = plan_of(seconds)
    order = np.random.default_rng(1).permutation(len(seconds))
    moved = CropPlan(plan.num_samples[order], plan.fileid_hash[order], 50, SETTINGS)
    for batch, other in zip(epoch_of(plan, 2), epoch_of(moved, 2), strict=True):
        assert np.array_equal(batch.rows, order[other.rows])
        assert np.array_equal(batch.starts, other.starts)


def test_any_step_can_be_asked_for_at_once():
    plan, other = plan_of(random_seconds(100)), plan_of(random_seconds(100))
    for number in range(60):
        plan.micro_batch(number, 0)
    for step in (59, 3, 31):
        for index in range(plan.micro_batches_per_step):
            a, b = plan.micro_batch(step, index), other.micro_batch(step, index)
            assert np.array_equal(a.rows, b.rows)
            assert np.array_equal(a.starts, b.starts)


def test_a_step_of_a_tiny_corpus_lies_across_epochs():
    plan = plan_of([1.5, 2.0, 1.2])
    assert plan.micro_batches_per_epoch < plan.micro_batches_per_step
    rows = np.concatenate([plan.micro_batch(0, index).rows for index in range(plan.micro_batches_per_step)])
    assert set(rows.tolist()) == {0, 1, 2}
    assert plan.epochs_done(3) == 3 * plan.micro_batches_per_step / plan.micro_batches_per_epoch


@pytest.mark.parametrize("count", [1, 40, 2000])
def test_a_training_meets_one_shape_per_crop_length_and_at_most_one_more(count):
    """Crops, frames and masked frames of a micro-batch: what a compiler or a CUDA graph is made for once."""
    plan = plan_of([*random_seconds(count), 1.5])
    seen = []
    for epoch in range(3):
        shapes = set()
        for batch in epoch_of(plan, epoch):
            mask = draw_mask(SETTINGS, batch.step, batch.index, len(batch.rows), batch.num_frames)
            shapes.add((len(batch.rows), batch.num_frames, int(mask.sum())))
        seen.append(shapes)
    assert seen[0] == seen[1] == seen[2], "later epochs bring no new shape"
    full = {(int(8.0 * 16_000) // samples_of(frames), frames) for frames in plan.frames.tolist()}
    assert len([shape for shape in seen[0] if shape[:2] not in full]) <= 1, "only an epoch's last crops are fewer"
    assert len(seen[0]) <= len(plan.frames) + 1


@pytest.mark.parametrize("rule", ["static", "fairseq"])
def test_the_number_of_masked_frames_is_known_before_the_step(rule):
    chosen = SETTINGS.model_copy(update={"mask_rule": rule})
    plan = plan_of(random_seconds(200), chosen)
    for step in range(3):
        batches = [plan.micro_batch(step, index) for index in range(plan.micro_batches_per_step)]
        assert plan.step_frames(step) == [(len(batch.rows), batch.num_frames) for batch in batches]
        masks = [draw_mask(chosen, step, batch.index, len(batch.rows), batch.num_frames) for batch in batches]
        assert plan.num_masked(step) == sum(int(mask.sum()) for mask in masks)


def test_hashes_are_the_published_ones_and_seeds_depend_on_every_number():
    """splitmix64 of 0 and of the golden ratio: the first two outputs of the generator seeded with 0."""
    assert splitmix64(np.array([0, 0x9E3779B97F4A7C15], np.uint64)).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    seeds = {mix(*numbers) for length in (1, 2, 3) for numbers in itertools.product(range(6), repeat=length)}
    assert len(seeds) == 6 + 36 + 216
    assert all(0 <= seed < 2**63 for seed in seeds)


# Reading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), random_seconds(40), frame_rate=100)


def read(table: Table, count: int, *, num_workers: int = 0, first_step: int = 0, rank: int = 0, size: int = 1) -> list:
    chosen = SETTINGS.model_copy(update={"num_workers": num_workers})
    plan = CropPlan(table.num_samples, table.fileid_hash, table.frame_rate, chosen)
    with closing(load_batches(table, plan, chosen, first_step=first_step, rank=rank, size=size, pin=False)) as batches:
        return list(itertools.islice(batches, count))


def assert_same(batches: list, others: list) -> None:
    for batch, other in zip(batches, others, strict=True):
        assert (batch.plan.step, batch.plan.index) == (other.plan.step, other.plan.index)
        for name in ("waveforms", "labels", "mask"):
            assert torch.equal(getattr(batch, name), getattr(other, name))


def test_a_batch_holds_the_samples_and_units_of_its_crops(corpus):
    table = Table(corpus)
    for batch in read(table, 6):
        for number, (row, start) in enumerate(zip(batch.plan.rows.tolist(), batch.plan.starts.tolist(), strict=True)):
            whole, _ = soundfile.read(table.audio_ref(row).path, dtype="float32")
            assert np.array_equal(batch.waveforms[number], whole[start : start + batch.plan.num_samples])
            units = labels_for_crop(table.units(row), start, batch.plan.num_frames, 100)
            assert np.array_equal(batch.labels[number], units)


def test_the_number_of_reading_threads_changes_nothing(corpus):
    table = Table(corpus)
    alone = read(table, 30)
    for num_workers in (1, 2, 5):
        assert_same(alone, read(table, 30, num_workers=num_workers))


def test_processes_share_the_micro_batches_of_one_list(corpus):
    table = Table(corpus)
    alone = read(table, 4 * 6)
    for size in (2, 3):
        shared = []
        for rank in range(size):
            count = 6 * len(range(rank, 4, size))
            shared += read(table, count, rank=rank, size=size)
        assert_same(alone, sorted(shared, key=lambda batch: (batch.plan.step, batch.plan.index)))


def test_a_loader_that_starts_later_reads_what_one_from_the_start_reads(corpus):
    table = Table(corpus)
    assert_same(read(table, 4 * 5)[4 * 3 :], read(table, 4 * 2, first_step=3, num_workers=2))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_reading_ahead_keeps_the_order_ends_with_the_items_and_stays_ahead_by_a_few(num_workers):
    started = []
    results = read_ahead(range(50), lambda item: started.append(item) or -item, num_workers=num_workers)
    assert next(results) == 0
    assert len(started) <= 1 + 2 * num_workers
    assert list(results) == [-item for item in range(1, 50)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_vanished_is_an_error_with_its_fileid_and_path(tmp_path, num_workers):
    table = Table(write_corpus(tmp_path, [2.0, 2.5, 1.2]))
    Path(table.audio_ref(1).path).unlink()
    with pytest.raises(DataError, match=r"speaker1/file 1.*audio/file 1\.wav"):
        read(table, 8, num_workers=num_workers)


def test_a_file_that_was_replaced_is_an_error(tmp_path):
    table = Table(write_corpus(tmp_path, [2.0, 2.5, 1.2]))
    soundfile.write(table.audio_ref(2).path, np.zeros(40_000), 16_000)
    with pytest.raises(DataError, match="speaker2/file 2"):
        read(table, 8)
