"""The utterance that a report shows: which one, and that its samples, units and phones are those of the files."""

import base64
import hashlib
import io
import re
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
import soundfile

from hubert.core.errors import DataError
from hubert.report.facts.example import Example, best_phones, build_example, find_example
from hubert.report.plots.utterance import FRAMES_PER_LINE, classes_of, draw_example, spectrogram
from hubert.units.labels import Table, write_table
from tests.support.corpus import write_corpus

SECONDS = [1.2, 3.0, 9.5, 4.25, 2.5, 30.0]  # the second, fourth and fifth may be shown


def write_phones(path, fileids, seconds=3.0):
    """Write phones of a quarter of a second each: SIL AA S SIL AA S ..."""
    rows = [
        (fileid, 0.25 * number, 0.25 * (number + 1), ("SIL", "AA", "S")[number % 3])
        for fileid in fileids
        for number in range(round(seconds / 0.25))
    ]
    pl.DataFrame(rows, schema=["fileid", "start", "end", "phone"], orient="row").write_csv(path)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return write_corpus(folder, SECONDS, frame_rate=100), folder


def hash_of(fileid):
    return int.from_bytes(hashlib.blake2b(fileid.encode(), digest_size=8).digest(), "little")


def row_of(table, fileid):
    return next(row for row in range(len(table)) if table.fileid(row) == fileid)


def test_the_first_by_its_names_hash_among_those_of_2_to_8_s_is_shown(corpus):
    table = Table(corpus[0])
    allowed = [table.fileid(row) for row in (1, 3, 4)]
    example, missing = build_example(corpus[0], None)
    assert example.fileid == min(allowed, key=hash_of)
    assert example.phones is None
    assert missing == "The recipe names no phone alignments, so there is no row of phones."


def test_an_utterance_with_phones_comes_before_one_without(corpus, tmp_path):
    table = Table(corpus[0])
    last = max((table.fileid(row) for row in (1, 3, 4)), key=hash_of)
    example, missing = build_example(corpus[0], write_phones(tmp_path / "phones.csv", [last]))
    assert (example.fileid, missing) == (last, "")
    end = example.seconds
    expected = [
        (0.25 * number, min(0.25 * (number + 1), end), ("SIL", "AA", "S")[number % 3])
        for number in range(12)
        if 0.25 * number < end
    ]
    assert example.phones == expected


def test_alignments_of_other_audio_leave_the_phones_out_and_say_so(corpus, tmp_path):
    example, missing = build_example(corpus[0], write_phones(tmp_path / "phones.csv", ["elsewhere/one"]))
    assert example.phones is None
    assert "phones.csv" in missing


def test_samples_and_units_are_those_of_the_files(corpus):
    example, _ = build_example(corpus[0], None)
    table = Table(corpus[0])
    row = row_of(table, example.fileid)
    samples, rate = soundfile.read(table.audio_ref(row).path, dtype="int16")
    assert rate == 16_000
    assert np.array_equal(example.samples, samples)
    assert example.units == table.units(row).tolist()
    assert not example.is_cut
    kind, encoded = example.address().split(",", 1)
    assert kind == "data:audio/flac;base64"
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(encoded)), dtype="int16")
    assert rate == 16_000
    assert np.array_equal(heard, samples)


def test_of_a_longer_file_the_first_8_s_are_shown(tmp_path):
    table = write_corpus(tmp_path, [9.5], frame_rate=50)
    example, _ = build_example(table, None)
    assert example.is_cut
    assert example.seconds == 8.0
    assert len(example.units) == (8 * 16_000 - 400) // 320 + 1
    assert example.units == Table(table).units(0)[: len(example.units)].tolist()


def test_a_segment_has_the_phones_of_its_recording_from_its_first_sample_on(tmp_path):
    audio = tmp_path / "talk.wav"
    soundfile.write(audio, np.random.default_rng(0).normal(0, 0.1, 16_000 * 9).astype(np.float32), 16_000)
    rows = {"fileid": ["talk#48000-96000"], "path": [str(audio)], "num_samples": [48_000], "offset": [48_000]}
    units = np.arange((48_000 - 400) // 320 + 1) % 7
    write_table(tmp_path / "table", [rows | {"units": [units]}], frame_rate=50, num_units=7, codebook="test")
    example, _ = build_example(tmp_path / "table", write_phones(tmp_path / "phones.csv", ["talk"], seconds=9.0))
    samples, _ = soundfile.read(audio, dtype="int16")
    assert np.array_equal(example.samples, samples[48_000:96_000])
    assert example.phones[0] == (0.0, 0.25, "SIL")  # the thirteenth phone of the talk
    assert example.phones[-1] == (2.75, 3.0, "S")
    assert len(example.phones) == 12


def test_each_frames_unit_stands_at_the_centre_of_its_window(corpus):
    example, _ = build_example(corpus[0], None)
    runs = list(example.runs())
    for number, unit in enumerate(example.units):
        centre = (200 + 160 * number) / 16_000
        assert [found for start, end, found in runs if start < centre < end] == [unit]
    assert all(first[2] != second[2] for first, second in pairwise(runs))


def test_a_copy_stands_in_for_audio_that_is_gone_if_its_units_are_the_same(tmp_path):
    table = write_corpus(tmp_path, [3.0, 4.0], frame_rate=50)
    phones = write_phones(tmp_path / "phones.csv", [Table(table).fileid(row) for row in (0, 1)])
    example, _ = build_example(table, phones)
    example.save(tmp_path / "kept")
    other = Example(example.fileid, example.samples, [0, *example.units[1:-1], 0], 50, None, is_cut=False)
    other.save(tmp_path / "other")
    for path in (tmp_path / "audio").iterdir():
        path.unlink()
    phones.unlink()
    found, missing = find_example(table, phones, [tmp_path / "other", tmp_path / "kept"])
    assert missing == ""
    assert found.content() == example.content()
    assert np.array_equal(found.samples, example.samples)
    nothing, missing = find_example(table, phones, [tmp_path / "other"])
    assert nothing is None
    assert Table(table).audio_ref(0).path in missing or Table(table).audio_ref(1).path in missing


def test_a_run_without_validation_units_says_what_it_lacks(tmp_path):
    nothing, missing = find_example(tmp_path / "none", None)
    assert nothing is None
    assert "hubert units" in missing
    write_table(tmp_path / "empty", [], frame_rate=50, num_units=3, codebook="test")
    with pytest.raises(DataError, match="has no file"):
        build_example(tmp_path / "empty", None)


def test_a_units_best_phone_is_the_one_of_most_of_its_frames():
    joint = {"phones": ["AA", "S"], "units": 4, "counts": [[5, 0, 1, 0], [1, 0, 3, 2]]}
    assert best_phones(joint) == {0: "AA", 2: "S", 3: "S"}


def test_a_tone_is_one_line_of_the_spectrogram():
    times = np.arange(16_000) / 16_000
    samples = np.rint(10_000 * np.sin(2 * np.pi * 1000 * times)).astype(np.int16)
    levels = spectrogram(samples)
    assert levels.shape == (201, 16_000 // 80 + 1)
    assert (levels[:, 10:-10].argmax(0) == 25).all()  # 40 Hz apart
    assert levels.max() == 1.0
    assert levels[100:, 10:-10].max() == 0.0  # above 4 kHz there is nothing


def test_the_picture_says_all_units_and_phones_in_words_and_cuts_long_audio_into_lines(corpus, tmp_path):
    table = Table(corpus[0])
    names = [table.fileid(row) for row in (1, 3, 4)]
    example, _ = build_example(corpus[0], write_phones(tmp_path / "phones.csv", names, seconds=5.0))
    lines = draw_example(example, dict.fromkeys(range(6), "AA"))
    assert len(lines) == -(-len(example.units) // FRAMES_PER_LINE)
    bounds = np.linspace(0, example.seconds, len(lines) + 1)
    for line, first, last in zip(lines, bounds[:-1], bounds[1:], strict=True):
        said = re.search(r"Units: ([\d ]+)\.", line.alt)[1].split()
        assert said == [str(unit) for start, end, unit in example.runs() if start < last and end > first]
        assert re.search(r"Phones: (SIL|AA|S)( (SIL|AA|S))*\.", line.alt)


def test_phones_have_the_colour_of_their_class():
    assert classes_of(["AA", "S", "SIL", "AA"]) == {"AA": "vowels", "S": "fricatives", "SIL": "silence"}
