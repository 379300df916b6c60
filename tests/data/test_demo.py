"""The demo corpus: the same bytes whoever makes it, whole or made again, and phone times that fit the audio."""

import csv
import hashlib
import json
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hubert.core.errors import ConfigError, DataError
from hubert.data.demo import corpus as demo
from hubert.data.demo import speech as demo_speech
from hubert.data.demo.corpus import TEST_SPEAKERS, TRAIN_SPEAKERS, build_demo_corpus

pytest.importorskip("espeakng_loader", reason="the demo's speech needs the extra 'demo'")

NUM_TRAIN, NUM_VALIDATION, NUM_ABX = 14, 8, 20
PARTS = {"train": NUM_TRAIN, "val": NUM_VALIDATION, "abx": NUM_ABX}
REQUEST = {
    "text": "The cat bit the hat.",
    "voice": "en-us+m3",
    "rate": 160,
    "pitch": 50,
    "pitch_range": 50,
    "volume": 60,
    "seed": 1,
}


def build(folder: Path, *, num_train: int = NUM_TRAIN, seed: int = 0, num_workers: int = 2) -> Path:
    return build_demo_corpus(
        folder, num_train=num_train, num_validation=NUM_VALIDATION, num_abx=NUM_ABX, seed=seed, num_workers=num_workers
    )


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_alignments(folder: Path) -> dict[str, list[tuple[float, float, str]]]:
    segments = defaultdict(list)
    with (folder / "alignments.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            segments[row["fileid"]].append((float(row["start"]), float(row["end"]), row["phone"]))
    return dict(segments)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("demo"))


def test_two_builds_give_the_same_bytes_whatever_the_number_of_workers(corpus: Path, tmp_path: Path) -> None:
    assert hashes(build(tmp_path, num_workers=1)) == hashes(corpus)


def test_another_seed_gives_other_speech(corpus: Path, tmp_path: Path) -> None:
    first, second = hashes(corpus), hashes(build(tmp_path, seed=1))
    audio = [name for name in first if name.endswith(".flac")]
    assert set(first) == set(second)
    assert not [name for name in audio if first[name] == second[name]]


def test_what_is_spoken_before_an_utterance_does_not_change_it() -> None:
    """The engine keeps state from call to call; each request must get a fresh one."""
    engine = demo._find_espeak()
    other = REQUEST | {"text": "Seven sheep saw the sea!", "voice": "en-us+f1", "seed": 2}
    (phones, alone), *_ = demo_speech.speak([REQUEST], *engine)
    _, (phones_after, after), (_, again) = demo_speech.speak([other, REQUEST, REQUEST], *engine)
    assert phones == phones_after
    np.testing.assert_array_equal(alone, after)
    np.testing.assert_array_equal(alone, again)


def test_no_sentence_is_spoken_twice_in_any_part() -> None:
    settings = demo._Settings(num_train=400, num_validation=60, num_abx=120, seed=3)
    texts = demo._texts(settings)
    assert len(set(texts)) == len(texts) == 580


def test_every_file_is_16_khz_mono_16_bit_flac_of_its_part_and_speaker(corpus: Path) -> None:
    for part, count in PARTS.items():
        files = sorted((corpus / part).rglob("*.flac"))
        assert len(files) == count
        speakers = TRAIN_SPEAKERS if part == "train" else TEST_SPEAKERS
        assert {path.parent.name for path in files} == {speaker.name for speaker in speakers}
        for path in files:
            info = soundfile.info(path)
            assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
            assert 1 < info.duration < 12
            samples, _ = soundfile.read(path, dtype="int16")
            assert 1000 < np.abs(samples.astype(int)).max() < 32_767


def test_training_hears_no_speaker_of_the_test_parts() -> None:
    assert not {speaker.name for speaker in TRAIN_SPEAKERS} & {speaker.name for speaker in TEST_SPEAKERS}
    assert len(TRAIN_SPEAKERS) >= 10
    assert len(TEST_SPEAKERS) >= 6


def test_ids_do_not_collide_between_parts(corpus: Path) -> None:
    ids = [
        str(path.relative_to(corpus / part).with_suffix(""))
        for part in PARTS
        for path in (corpus / part).rglob("*.flac")
    ]
    assert len(ids) == len(set(ids)) == sum(PARTS.values())


def test_alignments_cover_each_test_file_without_gap_or_overlap(corpus: Path) -> None:
    alignments = read_alignments(corpus)
    found = {
        part: {str(p.relative_to(corpus / part).with_suffix("")) for p in (corpus / part).rglob("*.flac")}
        for part in PARTS
    }
    assert set(alignments) == found["val"] | found["abx"]
    for fileid, segments in alignments.items():
        part = "val" if fileid in found["val"] else "abx"
        assert segments[0][0] == 0
        assert segments[-1][1] == soundfile.info(corpus / part / f"{fileid}.flac").duration
        assert all(start < end for start, end, _ in segments)
        assert all(first[1] == second[0] for first, second in pairwise(segments))
        assert segments[0][2] == segments[-1][2] == "SIL"
        assert not [True for first, second in pairwise(segments) if first[2] == second[2] == "SIL"]


def test_phone_times_fit_the_audio(corpus: Path) -> None:
    """Sibilants are where the high frequencies are, vowels where the low ones are, pauses where little is."""
    bands = defaultdict(list)
    for fileid, segments in read_alignments(corpus).items():
        part = "val" if "/val-" in fileid else "abx"
        samples, rate = soundfile.read(corpus / part / f"{fileid}.flac")
        for start, end, phone in segments:
            piece = samples[round(start * rate) : round(end * rate)]
            power = np.abs(np.fft.rfft(piece)) ** 2 / len(piece) / np.mean(samples**2)
            frequency = np.fft.rfftfreq(len(piece), 1 / rate)
            low, high = power[frequency < 1000].mean(), power[frequency > 4000].mean()
            bands[phone].append((np.log(high / low), np.log(power.mean())))
    tilt = {phone: np.median([value[0] for value in values]) for phone, values in bands.items()}
    loudness = {phone: np.median([value[1] for value in values]) for phone, values in bands.items()}
    assert min(tilt["S"], tilt["SH"], tilt["Z"]) > max(tilt["AA"], tilt["OW"], tilt["AE"], tilt["AO"], tilt["N"])
    assert loudness["SIL"] < min(loudness["AA"], loudness["OW"], loudness["AE"], loudness["AO"], loudness["IY"]) - 1


def test_silence_before_a_burst_belongs_to_the_stop() -> None:
    """The engine counts a closure with the phone before it; here vowels end where their sound ends."""
    (phones, pcm), *_ = demo_speech.speak([REQUEST], *demo._find_espeak())
    padded = np.concatenate([np.zeros(4410), pcm / 2**15, np.zeros(4410)])
    segments = demo_speech._align([(name, 4410 + sample) for name, sample in phones], padded)
    stops = [(before, stop) for before, stop in pairwise(segments) if stop[2] == "T" and before[2] != "SIL"]
    assert stops
    for before, stop in stops:
        start, middle = round(stop[0] * 22_050), round((stop[0] + 0.02) * 22_050)
        assert np.count_nonzero(padded[start + 2 : middle]) == 0
        assert np.count_nonzero(padded[round(before[0] * 22_050) : start]) > 0


def test_segments_without_length_and_glides_are_merged() -> None:
    speech = np.ones(44_100)
    speech[:2205] = 0
    phones = [("D", 2205), ("'I2", 4410), (";", 6615), ("l", 8820), ("l", 8820), ("_:", 22_050), ("_", 30_000)]
    assert demo_speech._align(phones, speech) == [
        (0.0, 0.1, "SIL"),
        (0.1, 0.2, "DH"),
        (0.2, 0.4, "IH"),
        (0.4, 1.0, "L"),
        (1.0, 2.0, "SIL"),
    ]


def test_every_item_is_a_phone_of_the_alignments_between_two_others(corpus: Path) -> None:
    alignments = read_alignments(corpus)
    header, *lines = (corpus / "phoneme-abx.item").read_text().splitlines()
    assert header == "#file onset offset #phone prev-phone next-phone speaker"
    triples = {
        (fileid, f"{start:.4f}", f"{end:.4f}", phone, before, after)
        for fileid, segments in alignments.items()
        for (_, _, before), (start, end, phone), (_, _, after) in zip(
            segments, segments[1:], segments[2:], strict=False
        )
    }
    speakers: Counter[str] = Counter()
    for line in lines:
        *item, speaker = line.split(" ")
        assert tuple(item) in triples
        assert "SIL" not in item
        assert float(item[2]) - float(item[1]) >= 0.0299
        assert item[0].split("/")[0] == speaker
        assert (corpus / "abx" / f"{item[0]}.flac").is_file()
        speakers[speaker] += 1
    assert set(speakers) == {speaker.name for speaker in TEST_SPEAKERS}
    assert min(speakers.values()) > 20


def test_a_finished_corpus_is_reused_without_espeak(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    assert build(corpus) == corpus
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


def test_a_build_that_was_killed_or_damaged_is_completed(corpus: Path, tmp_path: Path) -> None:
    """No mark of the end, files missing, one cut short, a temporary one left behind: the outcome is the same."""
    build(tmp_path)
    (tmp_path / "done.json").unlink()
    (tmp_path / "alignments.csv").unlink()
    first, second, *_ = sorted((tmp_path / "train").rglob("*.flac"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:1000])
    second.with_name(f".{second.name}.0123456789ab.tmp").write_bytes(b"half")
    assert hashes(build(tmp_path)) == hashes(corpus)
    second.write_bytes(second.read_bytes()[:1000])
    assert hashes(build(tmp_path)) == hashes(corpus)


def test_other_settings_replace_the_corpus_and_leave_the_files_of_others(corpus: Path, tmp_path: Path) -> None:
    build(tmp_path, num_train=NUM_TRAIN + 4)
    mine = tmp_path / "train" / "me" / "hello.flac"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    build(tmp_path)
    assert hashes(tmp_path) == hashes(corpus) | {"train/me/hello.flac": hashlib.sha256(b"mine").hexdigest()}


def test_two_builders_of_one_folder_do_not_disturb_each_other(corpus: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: build(tmp_path), range(2)))
    assert hashes(tmp_path) == hashes(corpus)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not empty"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError, match="is a file"):
        build(tmp_path / "thesis.txt")


def test_a_number_below_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_train = 0, expected at least 1"):
        build(tmp_path, num_train=0)
    with pytest.raises(ConfigError, match="seed = -1, expected at least 0"):
        build(tmp_path, seed=-1)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_wheel_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ConfigError, match=r"pip install hubert-flows\[demo\].*make demo"):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_engine_is_reported_with_its_reason() -> None:
    library, data = demo._find_espeak()
    with pytest.raises(DataError, match="no voice 'en-us"):
        demo_speech.speak([REQUEST, REQUEST | {"voice": "en-us+nobody"}], library, data)
    with pytest.raises(DataError, match="found no data"):
        demo_speech.speak([REQUEST], library, "nowhere")


def test_an_unknown_phone_is_an_error() -> None:
    with pytest.raises(DataError, match="'q!'"):
        demo_speech._align([("q!", 0)], np.ones(441))


def test_done_names_the_settings_and_the_engine(corpus: Path) -> None:
    done = json.loads((corpus / "done.json").read_text())
    assert done["settings"]["num_train"] == NUM_TRAIN
    assert done["espeakng_loader"]
