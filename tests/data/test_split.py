"""Choices by hash: stable when files are added, and equal everywhere."""

import hashlib

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert.core.errors import ConfigError, DataError
from hubert.core.frames import SAMPLE_RATE
from hubert.data.schema import SCHEMA, conform, cut_segments
from hubert.data.split import manifest_digest, plan_shards, select_sample, shard_digests, split_manifest, stable_hash

HOUR = 3600 * SAMPLE_RATE


def build_rows(num_rows: int, *, speakers: int = 0, seed: int = 0) -> pl.DataFrame:
    """Invent a manifest: utterances of 2 to 30 s, sorted by fileid, with ids that no other seed uses."""
    random = np.random.default_rng(seed)
    speaker = [f"spk{number:04}" if speakers else None for number in random.integers(0, max(speakers, 1), num_rows)]
    frame = pl.DataFrame(
        {
            "fileid": [f"{name or 'all'}/{seed}-{row:06}" for row, name in enumerate(speaker)],
            "num_samples": random.integers(2 * SAMPLE_RATE, 30 * SAMPLE_RATE, num_rows),
            "speaker": speaker,
            "size": random.integers(1_000, 1_000_000, num_rows),
            "mtime_ns": random.integers(0, 2**60, num_rows),
        },
        schema_overrides={"speaker": pl.String},
    ).with_columns(path="/data/" + pl.col("fileid") + ".flac")
    return conform(frame, where="test").collect().sort("fileid")


def fileids(rows: pl.DataFrame) -> set[str]:
    return set(rows["fileid"])


# The hash ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.integers(0, 2**63))
def test_the_hash_is_blake2b_of_seed_and_text(texts: list[str], seed: int) -> None:
    """Said once more in other words: whoever changes this definition discards finished work."""
    expected = [
        int.from_bytes(hashlib.blake2b(str(seed).encode() + b"\0" + text.encode(), digest_size=8).digest(), "little")
        for text in texts
    ]
    found = stable_hash(pl.Series(texts, dtype=pl.String), seed)
    assert found.dtype == np.uint64
    assert found.tolist() == expected


def test_the_hash_of_a_known_text_never_changes() -> None:
    """The first 8 bytes, little-endian, of `printf '0\\0a' | b2sum --length 64`."""
    assert stable_hash(pl.Series(["a"]), 0).tolist() == [15270482384145340437]


# Validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speakers", [0, 300])
def test_no_speaker_is_on_both_sides_and_no_row_is_lost(speakers: int) -> None:
    rows = build_rows(20_000, speakers=speakers)
    train, validation = split_manifest(rows, validation_fraction=0.05)
    assert train.height + validation.height == rows.height
    assert not fileids(train) & fileids(validation)
    assert validation["fileid"].is_sorted()
    assert train["fileid"].is_sorted()
    assert 0.03 < validation.height / rows.height < 0.07
    if speakers:
        assert not set(train["speaker"]) & set(validation["speaker"])


@settings(max_examples=30, deadline=None)
@given(
    old=st.integers(200, 1_500),
    new=st.integers(1, 3_000),
    speakers=st.sampled_from([0, 40]),
    fraction=st.sampled_from([0.01, 0.1]),
    seed=st.integers(0, 5),
)
def test_adding_files_moves_only_what_the_minimum_had_forced(
    old: int, new: int, speakers: int, fraction: float, seed: int
) -> None:
    rows, added = build_rows(old, speakers=speakers, seed=1), build_rows(new, speakers=speakers, seed=2)
    both = pl.concat([rows, added])
    train, validation = split_manifest(rows, validation_fraction=fraction, seed=seed)
    train_after, validation_after = split_manifest(both, validation_fraction=fraction, seed=seed)
    _, unforced = split_manifest(rows, validation_fraction=fraction, min_validation_files=0, seed=seed)
    assert fileids(train) <= fileids(train_after)
    assert fileids(unforced) <= fileids(validation)
    assert fileids(unforced) <= fileids(validation_after)


def test_the_minimum_holds_out_whole_speakers() -> None:
    rows = build_rows(1_000, speakers=50)
    _, validation = split_manifest(rows, validation_fraction=1e-9, min_validation_files=25)
    held = set(validation["speaker"])
    assert 25 <= validation.height < 25 + 40
    assert validation.height == rows.filter(pl.col("speaker").is_in(held)).height


def test_all_segments_of_a_file_are_on_one_side() -> None:
    rows = cut_segments(build_rows(500), 1.0).collect()
    train, validation = split_manifest(rows, validation_fraction=0.2)
    assert train.height > 1_000
    assert not set(train["path"]) & set(validation["path"])


def test_all_segments_of_a_file_are_on_one_side_whatever_a_manifest_calls_them() -> None:
    """As Kaldi's segments: ids of their own, several of one recording."""
    rows = cut_segments(build_rows(500), 1.0).collect()
    names = [f"utt{number:05}" for number in np.random.default_rng(0).permutation(rows.height)]
    train, validation = split_manifest(rows.with_columns(fileid=pl.Series(names)), validation_fraction=0.2)
    assert validation.height > 100
    assert not set(train["path"]) & set(validation["path"])


def test_another_seed_holds_out_other_files() -> None:
    rows = build_rows(5_000)
    sides = [fileids(split_manifest(rows, validation_fraction=0.1, seed=seed)[1]) for seed in (0, 1)]
    assert len(sides[0] & sides[1]) < 0.3 * len(sides[0])


@pytest.mark.parametrize(("num_rows", "speakers"), [(10, 0), (30, 0), (1_000, 1)])
def test_a_split_that_would_leave_too_little_is_refused(num_rows: int, speakers: int) -> None:
    with pytest.raises(DataError, match="min_validation_files"):
        split_manifest(build_rows(num_rows, speakers=speakers))


def test_a_lazy_manifest_is_split_and_sampled_like_one_in_memory() -> None:
    rows = build_rows(3_000, speakers=200)
    for eager, lazy in zip(split_manifest(rows), split_manifest(rows.lazy()), strict=True):
        assert isinstance(lazy, pl.LazyFrame)
        assert lazy.collect(engine="streaming").equals(eager)
        assert eager.schema == SCHEMA
    assert select_sample(rows.lazy()).collect().equals(select_sample(rows))


# The sample -------------------------------------------------------------------------------------------------------


def test_the_sample_is_the_fraction_and_independent_of_the_split() -> None:
    rows = build_rows(20_000)
    sample = select_sample(rows, fraction=0.1)
    assert 0.09 < sample.height / rows.height < 0.11
    assert sample["fileid"].is_sorted()
    _, validation = split_manifest(rows, validation_fraction=0.1)
    assert 0.05 < len(fileids(sample) & fileids(validation)) / validation.height < 0.15


def test_the_sample_stays_within_the_hours_and_takes_the_lowest_hashes() -> None:
    rows = build_rows(5_000)
    large, small = (select_sample(rows, fraction=1.0, max_hours=hours) for hours in (5.0, 2.0))
    assert 4.9 * HOUR < large["num_samples"].sum() <= 5 * HOUR
    assert 1.9 * HOUR < small["num_samples"].sum() <= 2 * HOUR
    assert fileids(small) <= fileids(large)


def test_the_sample_has_at_least_the_minimum_even_beyond_the_hours() -> None:
    rows = build_rows(500)
    assert select_sample(rows, fraction=0.001, min_files=50).height == 50
    assert select_sample(rows, fraction=0.5, max_hours=0.001, min_files=50).height == 50
    assert select_sample(rows, fraction=0.001, min_files=10_000).height == 500
    with pytest.raises(ConfigError, match="sample_fraction"):
        select_sample(rows, fraction=1e-12, min_files=0)


def test_adding_files_leaves_the_sampled_ones_in_the_sample() -> None:
    rows, added = build_rows(2_000, seed=1), build_rows(500, seed=2)
    sample = fileids(select_sample(rows))
    assert fileids(select_sample(pl.concat([rows, added]))) & fileids(rows) == sample


# Shards -----------------------------------------------------------------------------------------------------------


def contents(rows: pl.DataFrame, hours: float) -> list[str]:
    return shard_digests(rows, plan_shards(rows, hours_per_shard=hours))


@settings(max_examples=20, deadline=None)
@given(num_rows=st.integers(0, 3_000), hours=st.sampled_from([0.001, 0.05, 0.5, 100.0]), seed=st.integers(0, 50))
def test_shards_cover_all_rows_once_and_last_between_half_and_twice_the_target(
    num_rows: int, hours: float, seed: int
) -> None:
    rows = build_rows(num_rows, seed=seed)
    shards = plan_shards(rows, hours_per_shard=hours)
    assert [row for start, end in shards for row in range(start, end)] == list(range(num_rows))
    lengths = [rows["num_samples"][start:end].sum() for start, end in shards]
    assert all(length >= hours * HOUR / 2 for length in lengths[:-1])
    assert all(length <= 2 * hours * HOUR + 30 * SAMPLE_RATE for length in lengths)


def test_shards_last_the_target_on_average() -> None:
    rows = build_rows(40_000)
    assert 0.85 < rows["num_samples"].sum() / HOUR / len(plan_shards(rows, hours_per_shard=0.5)) / 0.5 < 1.15


def test_adding_or_removing_a_file_changes_its_shard_and_seldom_another() -> None:
    rows = build_rows(4_000)
    before = set(contents(rows, 0.25))
    assert len(before) > 50
    changed = []
    for seed in range(40):
        row = int(np.random.default_rng(seed).integers(0, rows.height))
        fewer = pl.concat([rows[:row], rows[row + 1 :]])
        more = pl.concat([rows[:row], build_rows(1, seed=100 + seed), rows[row:]])
        changed += [len(before - set(contents(version, 0.25))) for version in (fewer, more)]
    assert sorted(changed)[len(changed) // 2] == 1
    assert np.mean(changed) < 1.5
    assert max(changed) < 10


def test_shards_before_an_added_file_keep_their_rows() -> None:
    rows = build_rows(2_000)
    shards = plan_shards(rows, hours_per_shard=0.25)
    row = shards[20][1] - 1
    more = pl.concat([rows[:row], build_rows(1, seed=9), rows[row:]])
    assert plan_shards(more, hours_per_shard=0.25)[:20] == shards[:20]


def test_shards_are_planned_from_bytes_where_lengths_are_unknown() -> None:
    rows = build_rows(2_000).with_columns(size=pl.col("num_samples"), num_samples=pl.lit(None, dtype=pl.Int64))
    assert plan_shards(rows, hours_per_shard=0.5) == plan_shards(build_rows(2_000), hours_per_shard=0.5)
    missing = rows.with_columns(size=pl.lit(None, dtype=pl.Int64))
    assert plan_shards(missing, hours_per_shard=0.5) == [(0, 2_000)]


# Digests ----------------------------------------------------------------------------------------------------------


def test_the_digest_ignores_the_order_of_rows_and_the_place_of_the_data() -> None:
    rows = build_rows(500, speakers=5)
    digest = manifest_digest(rows)
    assert manifest_digest(rows.sample(fraction=1.0, shuffle=True, seed=0)) == digest
    assert manifest_digest(rows.lazy()) == digest
    moved = rows.with_columns(path="/elsewhere" + pl.col("path"), speaker=pl.lit(None, dtype=pl.String))
    assert manifest_digest(moved) == digest


@pytest.mark.parametrize("column", ["size", "mtime_ns", "num_samples", "offset", "byte_offset", "fileid"])
def test_the_digest_changes_with_any_fact_about_any_file(column: str) -> None:
    rows = build_rows(500)
    value = pl.lit("new") if column == "fileid" else pl.col(column).fill_null(0) + 1
    changed = rows.with_columns(pl.when(pl.int_range(pl.len()) == 250).then(value).otherwise(column).alias(column))
    assert manifest_digest(changed) != manifest_digest(rows)
    assert manifest_digest(rows[:-1]) != manifest_digest(rows)


def test_the_digest_of_a_known_manifest_never_changes() -> None:
    assert (
        manifest_digest(build_rows(3).with_columns(size=1, mtime_ns=2, num_samples=3))
        == "58e1e687e2f8dba81ddc85267ef1097f"
    )


def test_the_digest_of_each_shard_is_that_of_its_rows() -> None:
    rows = build_rows(1_000)
    shards = plan_shards(rows, hours_per_shard=0.25)
    assert shard_digests(rows, shards) == [manifest_digest(rows[start:end]) for start, end in shards]
