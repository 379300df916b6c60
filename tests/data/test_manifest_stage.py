"""The manifest stage through changes of what it was made from: nothing old is taken for new."""

import os
from pathlib import Path

import polars as pl
import pytest

from hubert.core.errors import ConfigError
from hubert.data.stage import ManifestStage
from hubert.settings.sections import DataSettings
from tests.support.toy import write_noise

NAMES = [f"spk{number}" for number in range(12)]


@pytest.fixture
def audio(tmp_path) -> Path:
    for number, name in enumerate(NAMES):
        write_noise(tmp_path / "audio" / name, 2, 0.5, seed=number)
    return tmp_path / "audio"


def run(parent: Path, source: Path, **data) -> pl.DataFrame:
    stage = ManifestStage(parent=parent, audio=[source], data=DataSettings(min_validation_files=2, **data))
    stage.run()
    return pl.read_parquet(stage.everything)


def test_another_rule_for_speakers_takes_over_no_shard_with_the_old_ones(audio, tmp_path):
    assert set(run(tmp_path / "run", audio, speaker="auto")["speaker"]) == set(NAMES)
    assert set(run(tmp_path / "run", audio, speaker="none")["speaker"]) == {None}
    assert set(run(tmp_path / "run", audio, speaker="first")["speaker"]) == set(NAMES)


def write_manifest(path: Path, audio: Path, speakers: list[str]) -> Path:
    files = sorted(audio.rglob("*.wav"))
    rows = {"fileid": [f"u{number}" for number in range(len(files))], "path": [str(file) for file in files]}
    pl.DataFrame({**rows, "num_samples": 8000, "speaker": speakers}).write_csv(path)
    return path


def test_corrected_speakers_in_a_manifest_are_noticed(audio, tmp_path):
    source = write_manifest(tmp_path / "m.csv", audio, ["a"] * 24)
    with pytest.raises(Exception, match="speakers too large"):
        run(tmp_path / "run", source)
    corrected = [f"s{number // 2}" for number in range(24)]
    assert run(tmp_path / "run", write_manifest(source, audio, corrected))["speaker"].to_list() == corrected


def test_audio_that_moved_under_a_manifest_is_said_and_not_looked_for_at_the_old_place(audio, tmp_path):
    speakers = [f"s{number // 2}" for number in range(24)]
    source = write_manifest(tmp_path / "m.csv", audio, speakers)
    run(tmp_path / "run", source)
    moved = audio.rename(tmp_path / "moved")
    write_manifest(source, moved, speakers)
    with pytest.raises(ConfigError, match="with other paths"):
        run(tmp_path / "run", source)
    assert run(tmp_path / "another run", source)["path"].str.starts_with(str(moved)).all()


def test_what_was_not_taken_is_counted_in_the_figures_and_said_on_one_line(audio, tmp_path, caplog):
    for number in range(5):
        (audio / NAMES[0] / f"{number}.m4a").write_bytes(b"ftypM4A")
    for number in range(3):
        (audio / f"._{number}.wav").write_bytes(bytes.fromhex("00051607"))
    stage = ManifestStage(parent=tmp_path / "run", audio=[audio], data=DataSettings(min_validation_files=2))
    figures = stage.run()
    kinds = ("num_rejected", "num_skipped_suffixes", "num_skipped_macos", "num_skipped_copies", "skipped_suffixes")
    assert [figures[name] for name in kinds] == [0, 5, 3, 0, {".m4a": 5}]
    assert [record.getMessage() for record in caplog.records if record.name == "hubert.data.stage"] == [
        "manifest: not taken: 5 .m4a, 3 files of macOS"
    ]


def test_the_key_of_a_folder_of_audio_is_the_one_that_older_versions_gave_it(tmp_path):
    """A finished run must be found again: the key hashes the audio and nothing of what was left out."""
    write_noise(tmp_path / "audio", 1, 0.5, seed=0)
    os.utime(tmp_path / "audio" / "audio 0.wav", ns=(0, 1_700_000_000_000_000_000))
    for name in ("notes.txt", ".DS_Store", "notes.m4a"):
        (tmp_path / "audio" / name).write_text("x")
    stage = ManifestStage(parent=tmp_path / "run", audio=[tmp_path / "audio"], data=DataSettings())
    assert stage.key == "638fe90a5cb27e714d034c32210dac5b1d421e3f9f4d7a9657418f31865074cd"  # by commit 3d365d5
