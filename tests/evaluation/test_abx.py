"""ABX scoring: items, the frames that they have, scores against fastabx's own entry point, and the process."""

import re
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from fastabx import zerospeech_abx
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert.core.errors import DataError, HubertError, TransientError
from hubert.core.paths import PROJECT
from hubert.data.match import match_fileids
from hubert.evaluation.abx.features import FeatureFolder, FeatureWriter
from hubert.evaluation.abx.items import SCHEMA, item_frames, read_items, split_items, write_item
from hubert.evaluation.abx.job import ABXJob, Representation, main, read_results, score_in_subprocess
from hubert.evaluation.abx.score import ABXResult, ScoreSettings, score_representations

PHONES = ("AA", "B", "K", "IY")
SPEECH = PROJECT.parent / "shared" / "data" / "librispeech-mini"


def make_items(
    *, num_files: int = 6, tokens: int = 12, num_speakers: int = 3, seed: int = 0, phones: tuple[str, ...] = PHONES
) -> pl.DataFrame:
    """Phones of 80 ms, one after the other, all in the same context."""
    rng = np.random.default_rng(seed)
    rows = [
        (
            f"s{file % num_speakers}/u{file}",
            token * 80_000_000,
            (token + 1) * 80_000_000,
            phone,
            "SIL",
            "SIL",
            f"s{file % num_speakers}",
        )
        for file in range(num_files)
        for token, phone in enumerate(rng.choice(phones, tokens).tolist())
    ]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def make_features(
    items: pl.DataFrame, *, frame_rate: int = 50, dim: int = 8, noise: float = 0.0, seed: int = 0
) -> dict[str, np.ndarray]:
    """Features in which each phone has a direction of its own, plus noise; noise alone if it is infinite."""
    rng = np.random.default_rng(seed)
    features = {}
    for (fileid,), rows in items.group_by("fileid", maintain_order=True):
        length = round(float(rows["offset_ns"].to_numpy().max()) * 1e-9 * frame_rate)
        array = rng.normal(size=(length, dim)) * min(noise, 1.0)
        start, end = item_frames(rows, frame_rate)
        for phone, first, last in zip(rows["phone"], start, end, strict=True):
            array[first:last, PHONES.index(phone)] += np.isfinite(noise)
        features[str(fileid)] = array.astype(np.float32)
    return features


def score(features: dict[str, np.ndarray], items: pl.DataFrame, *, frame_rate: float, **settings: object) -> ABXResult:
    """Score one representation in this process."""
    chosen = ScoreSettings.model_validate(settings)
    return next(score_representations({"features": (features, frame_rate)}, {"items": items}, chosen))


def write_features(folder: Path, features: dict[str, np.ndarray]) -> None:
    counts = {fileid: len(array) for fileid, array in features.items()}
    with FeatureWriter(folder, counts, torch.float32) as writer:
        for fileid, array in features.items():
            writer.write(fileid, torch.as_tensor(array))


def write_job(
    folder: Path, items: pl.DataFrame, features: dict[str, dict[str, np.ndarray]], rates: dict[str, float]
) -> ABXJob:
    write_item(folder / "all.item", items)
    for name, arrays in features.items():
        write_features(folder / name, arrays)
    one = [Representation(name=name, features=folder / name, frame_rate=rates[name]) for name in features]
    return ABXJob(
        items={"all": folder / "all.item"}, representations=tuple(one), output=folder / "abx.json", num_threads=1
    )


# Scores -------------------------------------------------------------------------------------------------------------


def test_features_that_tell_the_phones_apart_make_no_error() -> None:
    items = make_items()
    result = score(make_features(items), items, frame_rate=50)
    assert (result.within, result.across) == (0.0, 0.0)
    assert result.num_items == len(items) == 72
    assert result.num_dropped_items == 0
    assert min(result.num_cells_within, result.num_cells_across, result.num_triplets_within) > 0


def test_features_without_information_are_near_chance() -> None:
    """With 400 items a rate of independent noise stays within 0.05 of one half."""
    items = make_items(num_files=20, tokens=20, num_speakers=4)
    result = score(make_features(items, noise=np.inf), items, frame_rate=50)
    assert result.within == pytest.approx(0.5, abs=0.05)
    assert result.across == pytest.approx(0.5, abs=0.05)


def test_scores_equal_fastabx_own_entry_point(tmp_path: Path) -> None:
    """`zerospeech_abx` reads one file per utterance; without draws it does not depend on the order of cells.

    The features hold all-zero frames, which have no direction, and phones hold the '-' that fastabx joins keys with.
    """
    items = make_items(seed=3).with_columns(
        phone=pl.col("phone").replace("AA", "A-A"), next_phone=pl.col("onset_ns").mod(3).cast(pl.String) + "-"
    )
    features = make_features(items.with_columns(phone=pl.col("phone").replace("A-A", "AA")), noise=0.8)
    for fileid, array in features.items():
        array[::7] = 0
        (tmp_path / fileid).parent.mkdir(exist_ok=True)
        torch.save(torch.from_numpy(array), tmp_path / f"{fileid}.pt")
    write_item(tmp_path / "x.item", items)
    result = score(features, items, frame_rate=50, max_size_group=None, max_x_across=None)
    for speaker in ("within", "across"):
        truth: float = zerospeech_abx(
            tmp_path / "x.item",
            tmp_path,
            max_size_group=None,
            max_x_across=None,
            speaker=speaker,
            context="within",
            device="cpu",
            progress=False,
        )
        assert 0 < truth < 0.5
        assert getattr(result, speaker) == pytest.approx(truth, abs=1e-6)


def test_an_item_without_all_its_frames_is_left_out_of_every_representation_and_counted(tmp_path: Path) -> None:
    """HuBERT's last window does not fit into a file's last 25 ms: layers lack the last frame, MFCCs here do not."""
    items = make_items()
    mfcc, layer = make_features(items, frame_rate=100), make_features(items)
    layer = {fileid: array[:-1] for fileid, array in layer.items()}
    blip = pl.DataFrame([("s0/u0", 1_000_000, 4_000_000, "AA", "SIL", "SIL", "s0")], schema=SCHEMA, orient="row")
    job = write_job(tmp_path, pl.concat([items, blip]), {"mfcc": mfcc, "layer-1": layer}, {"mfcc": 100, "layer-1": 50})
    for result in score_in_subprocess(job):
        assert (result.num_beyond_end_items, result.num_too_short_items, result.num_dropped_items) == (6, 1, 7)
        assert result.num_items == len(items) - 6
        assert (result.within, result.across) == (0.0, 0.0)
    usable = items.filter(pl.col("offset_ns") < pl.col("offset_ns").max())
    alone = score(mfcc, usable, frame_rate=100)
    assert (alone.num_cells_within, alone.num_cells_across) == (result.num_cells_within, result.num_cells_across)


def test_a_wrong_frame_rate_is_an_error_and_not_a_small_score() -> None:
    items = make_items()
    with pytest.raises(DataError, match=r"needs frame .* found 48 frames at 100 Hz"):
        score(make_features(items, frame_rate=50), items, frame_rate=100)


def test_a_single_speaker_cannot_be_scored_across() -> None:
    items = make_items(num_speakers=1)
    assert score(make_features(items), items, frame_rate=50, speaker=["within"]).across is None
    with pytest.raises(DataError, match=r"across speaker on items.* 1 speakers"):
        score(make_features(items), items, frame_rate=50)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda array: array[:, 0], r"should be finite and of shape \(frames, dimensions\)"),
        (lambda array: np.where(array == array.max(), np.nan, array), "values not finite"),
        (lambda array: array[:, :3], "have 3 dimensions"),
    ],
)
def test_features_that_cannot_be_compared_are_named(spoil: Callable[[np.ndarray], np.ndarray], message: str) -> None:
    items = make_items()
    features = make_features(items)
    features["s1/u4"] = spoil(features["s1/u4"])
    with pytest.raises(DataError, match=message) as error:
        score(features, items, frame_rate=50)
    assert "s1/u4" in str(error.value)


# The process --------------------------------------------------------------------------------------------------------


def test_two_runs_of_a_job_give_identical_scores(tmp_path: Path) -> None:
    """Both limits draw, so this fails where the order of the cells is left to chance."""
    items = make_items(num_files=24, tokens=30, num_speakers=8)
    features = {name: make_features(items, noise=2.0, seed=seed) for seed, name in enumerate(["layer-1", "layer-2"])}
    job = write_job(tmp_path, items, features, {"layer-1": 50, "layer-2": 50})
    job = job.model_copy(update={"max_size_group": 4, "max_x_across": 2})
    first, second = score_in_subprocess(job), score_in_subprocess(job)
    assert [result.representation for result in first] == ["layer-1", "layer-2"]
    for one, other in zip(first, second, strict=True):
        assert (one.within, one.across, one.num_triplets_across) == (
            other.within,
            other.across,
            other.num_triplets_across,
        )
        assert 0 < (one.across or 0) < 0.5
    assert first[0].across != first[1].across
    assert read_results(job.output) == second


def test_a_job_scores_halves_of_the_items_separately(tmp_path: Path) -> None:
    items = make_items(num_files=12)
    choose, report = split_items(items)
    write_item(tmp_path / "choose.item", choose)
    job = write_job(tmp_path, report, {"layer-1": make_features(items)}, {"layer-1": 50})
    job = job.model_copy(update={"items": {"choose": tmp_path / "choose.item", "report": tmp_path / "all.item"}})
    results = score_in_subprocess(job)
    assert [result.items for result in results] == ["choose", "report"]
    assert sum(result.num_items for result in results) == len(items)


def test_an_error_of_the_process_is_raised_with_its_words(tmp_path: Path) -> None:
    items = make_items()
    features = make_features(items)
    features.pop("s1/u4")
    job = write_job(tmp_path, items, {"layer-1": features}, {"layer-1": 50})
    with pytest.raises(DataError, match=r"1 of 6 files of the item file are not in the manifest, first \['s1/u4'\]"):
        score_in_subprocess(job)
    assert not job.output.exists()
    with pytest.raises(DataError, match="no features"):
        score_in_subprocess(
            job.model_copy(
                update={"representations": (job.representations[0].model_copy(update={"features": tmp_path / "x"}),)}
            )
        )


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [("kill -9 $$", TransientError, "signal 9"), ("echo no room >&2; exit 1", HubertError, "no room")],
)
def test_a_process_that_dies_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, kind: type[Exception], message: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{line}\n")
    python.chmod(0o755)
    items = make_items()
    job = write_job(tmp_path, items, {"layer-1": make_features(items)}, {"layer-1": 50})
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(kind, match=message):
        score_in_subprocess(job)


def test_a_job_started_by_hand_scores_in_one_thread_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = make_items()
    job = write_job(tmp_path, items, {"layer-1": make_features(items)}, {"layer-1": 50})
    (tmp_path / "job.json").write_text(job.model_dump_json())
    subprocess.run(
        [sys.executable, "-m", "hubert.evaluation.abx.job", tmp_path / "job.json"],
        check=True,
        cwd=PROJECT,
    )
    (result,) = read_results(job.output)
    assert result.across == 0
    assert re.fullmatch(
        r"layer-1 on all: within 0.00 % \([\d,]+ cells\), across 0.00 % \([\d,]+ cells\); 72 items; chance 50 %",
        str(result),
    )
    assert main([]) == 78
    assert "expected one argument" in capsys.readouterr().err


def test_a_job_refuses_equal_names_and_limits_that_fastabx_does_not_take(tmp_path: Path) -> None:
    one = Representation(name="mfcc", features=tmp_path, frame_rate=100)
    with pytest.raises(ValueError, match="different names"):
        ABXJob(items={"all": tmp_path}, representations=(one, one), output=tmp_path)
    with pytest.raises(ValueError, match="max_x_across"):
        ABXJob(items={"all": tmp_path}, representations=(one,), output=tmp_path, max_x_across=1)


def test_features_on_disk_are_read_back_file_by_file(tmp_path: Path) -> None:
    """Names with spaces, quotes and letters of any alphabet; the pieces of a file come in any order."""
    arrays = {name: torch.randn(number + 3, 2) for number, name in enumerate(["a b/é,1", 'c#0-16000"', "d.e"])}
    counts = {name: len(array) for name, array in arrays.items()}
    with FeatureWriter(tmp_path, counts, torch.float16) as writer:
        for name, array in reversed(arrays.items()):
            writer.write(name, array[2:], start=2)
            writer.write(name, array[:2])
    folder = FeatureFolder(tmp_path)
    assert list(folder) == list(arrays)
    assert {name: folder.num_frames(name) for name in folder} == counts
    assert all(torch.equal(folder[name], array.half()) for name, array in arrays.items())


def test_features_that_were_not_written_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no features"):
        FeatureFolder(tmp_path)
    with (
        pytest.raises(DataError, match="expected 5 frames, 4 were written"),
        FeatureWriter(tmp_path, {"a": 5}, torch.float32) as writer,
    ):
        writer.write("a", torch.ones(4, 2))
    (tmp_path / "frames.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match=r"frames\.safetensors: expected a safetensors file"):
        FeatureFolder(tmp_path)
    (tmp_path / "frames.safetensors").unlink()
    with pytest.raises(DataError, match=r"frames\.safetensors"):
        FeatureFolder(tmp_path)


# Items --------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**7), st.integers(1, 10**6), st.sampled_from([50, 100, 12.5, 49.95]))
def test_the_frames_of_an_item_have_their_time_inside_it(onset_us: int, length_us: int, frame_rate: float) -> None:
    """An oracle in exact arithmetic: frame j is in the item if onset <= (j + 0.5) / rate <= offset."""
    row = ("u", onset_us * 1000, (onset_us + length_us) * 1000, "A", "B", "C", "s")
    start, end = item_frames(pl.DataFrame([row], schema=SCHEMA, orient="row"), frame_rate)
    onset, offset = Decimal(onset_us).scaleb(-6), Decimal(onset_us + length_us).scaleb(-6)
    rate = Decimal(str(frame_rate))
    first, last = int(onset * rate) - 2, int(offset * rate) + 2
    frames = [frame for frame in range(first, last + 1) if onset * rate <= frame + Decimal("0.5") <= offset * rate]
    assert list(range(int(start[0]), int(end[0]))) == frames


def test_a_time_between_two_frames_is_decided_exactly() -> None:
    """0.51 s at 50 Hz is the time of frame 25 to the digit; binary fractions would put it on either side."""
    items = pl.DataFrame([("u", 510_000_000, 570_000_000, "A", "B", "C", "s")], schema=SCHEMA, orient="row")
    start, end = item_frames(items, 50)
    assert (start[0], end[0]) == (25, 29)  # 28.5 / 50 = 0.57


TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1).filter(
    lambda text: text.strip(" ") == text
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(TEXT, st.integers(0, 10**12), st.integers(1, 10**10), TEXT, TEXT), min_size=1, max_size=5))
def test_an_item_file_is_read_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int, int, str, str]]
) -> None:
    """Names with spaces, commas, quotes and non-ASCII letters included; times to the nanosecond."""
    path = tmp_path_factory.mktemp("items") / "x.item"
    items = [
        (fileid, onset, onset + length, phone, "B", "C", speaker) for fileid, onset, length, phone, speaker in rows
    ]
    frame = pl.DataFrame(items, schema=SCHEMA, orient="row")
    write_item(path, frame)
    assert read_items(path).equals(frame)


def test_items_are_matched_to_fileids_by_name_or_by_unique_end() -> None:
    match = match_fileids(["a/1", "2", "x/b/3", "4", "5", "c/6"], ["a/1", "z/a/1", "b/2", "b/3", "b/4", "c/4", "d/6"])
    assert match.found == {"a/1": "a/1", "2": "b/2", "x/b/3": "b/3"}
    assert match.ambiguous == {"4": ["b/4", "c/4"]}
    assert match.missing == ["5", "c/6"]


def test_items_of_missing_or_ambiguous_files_are_counted_and_named(tmp_path: Path) -> None:
    write_item(tmp_path / "x.item", make_items())
    with pytest.raises(DataError, match=r"5 of 6 files .* first \['s0/u3', 's1/u1', 's1/u4'\]"):
        read_items(tmp_path / "x.item", ["s0/u0", "s3/u3"])
    write_item(tmp_path / "x.item", make_items().with_columns(pl.col("fileid").str.slice(3)))
    with pytest.raises(DataError, match=r"1 file names fit more than one fileid.*'u0' fits 'a/u0' and 's0/u0'"):
        read_items(tmp_path / "x.item", [*(f"s{i % 3}/u{i}" for i in range(6)), "a/u0"])
    items = read_items(tmp_path / "x.item", (f"s{i % 3}/u{i}" for i in range(6)))
    assert items.equals(make_items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "header"),
        ("file onset offset\na 0 1\n", "header"),
        ("#file onset offset #phone prev-phone next-phone speaker\n", "no items"),
        (
            "#file onset offset #phone prev-phone next-phone speaker\na b 0 1 A B C s\n",
            "line 2: expected 7 fields, found 8",
        ),
        ("#file onset offset #phone prev-phone next-phone speaker\na 0 1 A B C s\na 1 x A B C s\n", "line 3.*'1', 'x'"),
        ("#file onset offset #phone prev-phone next-phone speaker\na 1 1 A B C s\n", "0 <= onset < offset"),
        ("#file onset offset #phone prev-phone next-phone speaker\na nan 1 A B C s\n", "'nan'"),
        ('#file onset offset #phone prev-phone next-phone speaker\n"a 0 1 A B C s\n', "line 2"),
    ],
)
def test_a_broken_item_file_is_refused_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.item").write_text(content)
    with pytest.raises(DataError, match=message):
        read_items(tmp_path / "x.item")


def test_an_item_file_with_more_columns_tabs_or_several_spaces_is_read(tmp_path: Path) -> None:
    header = ["language", "#file", "onset", "offset", "#phone", "prev-phone", "next-phone", "speaker"]
    row = ["en", "a", "0.1", ".25", "AA0", "SIL", "B", "s1"]
    for separator in ("\t", "  "):
        (tmp_path / "x.item").write_text("\n".join(separator.join(fields) for fields in (header, row)) + "\n\n")
        assert read_items(tmp_path / "x.item").rows() == [("a", 100_000_000, 250_000_000, "AA0", "SIL", "B", "s1")]


def test_empty_phones_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="next_phone"):
        write_item(tmp_path / "x.item", make_items().with_columns(next_phone=pl.lit("")))
    assert not list(tmp_path.iterdir())


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(1, 4), st.integers(0, 5))
def test_halves_share_no_file_and_keep_all_speakers(num_files: int, num_speakers: int, seed: int) -> None:
    items = make_items(num_files=num_files, num_speakers=num_speakers, tokens=4)
    first, second = split_items(items, seed)
    assert set(first["fileid"]) | set(second["fileid"]) == set(items["fileid"])
    assert not set(first["fileid"]) & set(second["fileid"])
    assert len(first) + len(second) == len(items)
    assert abs(len(first) - len(second)) <= 4 * (1 + num_speakers)
    several = items.group_by("speaker").agg(pl.col("fileid").n_unique()).filter(pl.col("fileid") > 1)["speaker"]
    assert set(several) <= set(first["speaker"]) & set(second["speaker"])
    again, _ = split_items(items.reverse(), seed)
    assert set(again["fileid"]) == set(first["fileid"])


def test_items_of_one_file_cannot_be_split() -> None:
    with pytest.raises(DataError, match="1 file"):
        split_items(make_items(num_files=1))


# Real speech --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SPEECH.is_dir(), reason="needs ../shared/data/librispeech-mini")
@pytest.mark.parametrize(("kind", "within", "across"), [("triphone", 0.1175, 0.3564), ("phoneme", 0.0832, 0.2492)])
def test_mfcc_of_real_speech_score_as_measured_with_zerospeech_abx(
    tmp_path: Path, kind: str, within: float, across: float
) -> None:
    import soundfile  # only where the data is
    from torchaudio.compliance.kaldi import mfcc
    from torchaudio.functional import compute_deltas

    features = {}
    for path in sorted((SPEECH / "abx").rglob("*.flac")):
        waveform = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        static = mfcc(waveform[None], sample_frequency=16_000, use_energy=False).T
        first = compute_deltas(static)
        features[f"{path.parent.name}/{path.stem}"] = torch.cat([static, first, compute_deltas(first)]).T
    write_features(tmp_path / "mfcc", features)
    representation = Representation(name="mfcc", features=tmp_path / "mfcc", frame_rate=100)
    job = ABXJob(
        items={kind: SPEECH / f"{kind}-abx.item"}, representations=(representation,), output=tmp_path / "abx.json"
    )
    (result,) = score_in_subprocess(job)
    assert result.within == pytest.approx(within, abs=5e-5)
    assert result.across == pytest.approx(across, abs=5e-5)
    assert result.num_dropped_items == 0
