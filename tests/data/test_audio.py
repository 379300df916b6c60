"""Reading audio: a crop is the slice of the whole, wherever it lies, and a bad file is named with its reason."""

import copy
import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert.core.errors import DataError, TransientError
from hubert.core.frames import SAMPLE_RATE
from hubert.data.audio import MIN_SAMPLES, converted_length, inspect_audio, read_spans, read_waveform
from hubert.data.audio_file import AudioError, AudioRef, FileSlice, Sound

CROPS = [(0, 400), (1, 8_000), (7_919, 16_000), (23_040, 12_345), (39_600, 400)]
LENGTH = 40_000


def make_speech(num_samples: int, seed: int = 0) -> np.ndarray:
    """A tone that glides, in noise: no two stretches are alike, and no codec finds it easy."""
    noise = np.random.default_rng(seed).standard_normal(num_samples)
    phase = np.cumsum(0.05 + 0.04 * np.sin(np.arange(num_samples) / 3_000))
    return (0.3 * np.sin(phase) + 0.05 * noise).astype(np.float32)


def write_audio(path: Path, samples: np.ndarray, rate: int = SAMPLE_RATE, **options: str) -> AudioRef:
    soundfile.write(path, samples, rate, **options)
    return AudioRef(path.stem, str(path), converted_length(len(samples), rate))


def read_whole(path: Path) -> torch.Tensor:
    samples, _ = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(samples.mean(axis=1))


def write_tar(archive: Path, files: list[Path]) -> dict[str, tuple[int, int]]:
    with tarfile.open(archive, "w") as tar:
        for file in files:
            tar.add(file, file.name)
    with tarfile.open(archive) as tar:
        return {member.name: (member.offset_data, member.size) for member in tar}


def write_zip(archive: Path, files: list[Path]) -> dict[str, tuple[int, int]]:
    """Find the members' places by their bytes, not by the zip's fields."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
        for file in files:
            packed.write(file, file.name)
    content = archive.read_bytes()
    return {file.name: (content.index(file.read_bytes()), file.stat().st_size) for file in files}


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_a_crop_equals_the_slice_of_the_whole_file(tmp_path: Path, suffix: str) -> None:
    """Vorbis is the test: libsndfile's own seek misses the crops after the 32,000th sample of this file by 192."""
    path = tmp_path / f"a.{suffix}"
    ref = write_audio(path, make_speech(LENGTH))
    whole = read_whole(path)
    assert torch.equal(read_waveform(ref), whole)
    for start, count in CROPS:
        crop = read_waveform(ref, start=start, num_samples=count)
        assert crop.dtype == torch.float32
        assert torch.equal(crop, whole[start : start + count])


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_a_crop_of_an_mp3_equals_the_slice_although_its_decoder_has_a_memory(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "a.mp3"
    num_samples = 45 * rate  # longer than the preroll, so that the crop really starts by seeking
    soundfile.write(path, make_speech(num_samples), rate, bitrate_mode="VARIABLE", compression_level=0.5)
    ref = AudioRef("a", str(path), converted_length(num_samples, rate))
    whole = read_waveform(ref, resample=True)
    for start in (1_000, 40 * SAMPLE_RATE + 77):
        crop = read_waveform(ref, start=start, num_samples=SAMPLE_RATE, resample=True)
        torch.testing.assert_close(crop, whole[start : start + SAMPLE_RATE], rtol=0, atol=1e-6)


@pytest.mark.skipif("OPUS" not in soundfile.available_subtypes("OGG"), reason="this libsndfile reads no Opus")
def test_a_crop_of_opus_equals_the_slice(tmp_path: Path) -> None:
    path = tmp_path / "a.opus"
    ref = write_audio(path, make_speech(15 * SAMPLE_RATE), format="OGG", subtype="OPUS")
    start = 14 * SAMPLE_RATE
    crop = read_waveform(ref, start=start)
    torch.testing.assert_close(crop, read_whole(path)[start:], rtol=0, atol=1e-3)


@pytest.mark.parametrize("write_archive", [write_tar, write_zip])
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_a_crop_of_an_archives_member_equals_the_slice_of_the_file(
    tmp_path: Path, suffix: str, write_archive: Callable[[Path, list[Path]], dict[str, tuple[int, int]]]
) -> None:
    files = [tmp_path / f"{name}.{suffix}" for name in "abc"]
    for seed, file in enumerate(files):
        write_audio(file, make_speech(LENGTH, seed))
    archive = tmp_path / "packed"
    places = write_archive(archive, files)
    for file in files:
        start_byte, size = places[file.name]
        ref = AudioRef(file.stem, file.name, LENGTH, None, str(archive), start_byte, size)
        for start, count in CROPS:
            crop = read_waveform(ref, start=start, num_samples=count)
            assert torch.equal(crop, read_whole(file)[start : start + count])


def test_reading_a_crop_of_a_member_reads_only_a_part_of_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    write_audio(path, make_speech(60 * SAMPLE_RATE))
    size = path.stat().st_size
    touched = 0

    class Counting(FileSlice):
        def readinto(self, buffer: object) -> int:
            nonlocal touched
            count = super().readinto(buffer)
            touched += count
            return count

    with Counting(str(path), 0, size) as part, soundfile.SoundFile(part) as sound:
        sound.seek(30 * SAMPLE_RATE)
        sound.read(2 * SAMPLE_RATE)
    assert touched < size // 10


def test_a_segments_crop_is_counted_from_the_segments_start(tmp_path: Path) -> None:
    ref = write_audio(tmp_path / "a.flac", make_speech(LENGTH))
    segment = ref._replace(offset=10_000, num_samples=20_000)
    whole = read_whole(tmp_path / "a.flac")
    assert torch.equal(read_waveform(segment), whole[10_000:30_000])
    assert torch.equal(read_waveform(segment, start=500, num_samples=1_000), whole[10_500:11_500])


@settings(max_examples=25, deadline=None)
@given(
    rate=st.sampled_from([8_000, 11_025, 22_050, 32_000, 44_100, 48_000]),
    channels=st.integers(1, 3),
    start=st.integers(0, 30_000),
    count=st.integers(1, 10_000),
)
def test_a_converted_crop_equals_the_slice_of_the_converted_file(
    tmp_path_factory: pytest.TempPathFactory, rate: int, channels: int, start: int, count: int
) -> None:
    """Against torchaudio on the whole file, and against the whole file read here."""
    path = tmp_path_factory.getbasetemp() / f"{rate}-{channels}.wav"
    num_frames = int(2.6 * rate) + 7
    if not path.exists():
        stack = np.stack([make_speech(num_frames, seed) for seed in range(channels)], axis=1)
        soundfile.write(path, stack, rate, subtype="FLOAT")
    ref = AudioRef("a", str(path), converted_length(num_frames, rate))
    expected = torchaudio.functional.resample(read_whole(path), rate, SAMPLE_RATE)
    whole = read_waveform(ref, resample=True)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-4)
    crop = read_waveform(ref, start=start, num_samples=count, resample=True)
    torch.testing.assert_close(crop, whole[start : start + count], rtol=0, atol=1e-6)


def test_a_long_file_is_converted_in_pieces_without_seams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = write_audio(tmp_path / "a.wav", make_speech(44_100), 44_100)
    whole = read_waveform(ref, resample=True)
    monkeypatch.setattr("hubert.data.audio.BLOCK_SAMPLES", 1_000)
    torch.testing.assert_close(read_waveform(ref, resample=True), whole, rtol=0, atol=1e-6)


def test_a_converted_segment_counts_its_offset_in_16_khz_samples(tmp_path: Path) -> None:
    ref = write_audio(tmp_path / "a.wav", make_speech(24_000), 8_000)
    segment = ref._replace(offset=16_000, num_samples=8_000)
    whole = read_waveform(ref, resample=True)
    torch.testing.assert_close(read_waveform(segment, resample=True), whole[16_000:24_000], rtol=0, atol=1e-6)


def make_bad_file(folder: Path, kind: str) -> Path:
    """Write one of the unusable files that a real folder holds."""
    samples = make_speech(LENGTH)
    path = folder / f"{kind.replace(' ', '-')}.{'flac' if kind == 'truncated flac' else 'wav'}"
    match kind:
        case "truncated flac":
            soundfile.write(path, samples, SAMPLE_RATE)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "truncated wav":
            soundfile.write(path, samples, SAMPLE_RATE)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "empty":
            path.touch()
        case "8 kHz":
            soundfile.write(path, samples, 8_000)
        case "stereo":
            soundfile.write(path, np.stack([samples, samples], axis=1), SAMPLE_RATE)
        case "NaN":
            samples[20_000:20_010] = np.nan
            soundfile.write(path, samples, SAMPLE_RATE, subtype="FLOAT")
        case "text":
            path.write_text("These are not the samples that you are looking for.\n" * 50)
        case "short":
            soundfile.write(path, samples[: MIN_SAMPLES - 1], SAMPLE_RATE)
        case "no samples":
            soundfile.write(path, samples[:0], SAMPLE_RATE)
    return path


BAD_FILES = {
    "truncated flac": "truncated or damaged:",
    "truncated wav": "truncated or damaged:",
    "empty": "empty: 0 bytes",
    "8 kHz": "wrong sample rate: 8000 Hz",
    "stereo": "wrong number of channels: 2",
    "NaN": "not finite:",
    "text": "not audio:",
    "short": "too short: 399 samples",
    "no samples": "too short: 0 samples",
    "missing": "missing:",
}


@pytest.mark.parametrize(("kind", "reason"), BAD_FILES.items())
def test_a_bad_file_is_rejected_with_its_reason(tmp_path: Path, kind: str, reason: str) -> None:
    path = make_bad_file(tmp_path, kind)
    with pytest.raises(AudioError) as caught:
        inspect_audio(AudioRef("the/file", str(path), 0), decode=True, resample=False)
    assert caught.value.reason.startswith(reason)
    assert str(path) in str(caught.value)
    assert "'the/file'" in str(caught.value)


@pytest.mark.parametrize("kind", ["8 kHz", "stereo"])
def test_another_rate_and_several_channels_are_accepted_if_asked_for(tmp_path: Path, kind: str) -> None:
    ref = AudioRef("a", str(make_bad_file(tmp_path, kind)), 0)
    info = inspect_audio(ref, decode=True, resample=True)
    assert info.num_samples == (2 * LENGTH if kind == "8 kHz" else LENGTH)
    waveform = read_waveform(ref._replace(num_samples=info.num_samples), resample=True)
    assert waveform.shape == (info.num_samples,)
    with pytest.raises(AudioError, match="resample = true"):
        read_waveform(ref._replace(num_samples=info.num_samples))


def test_inspecting_a_good_file_gives_its_length_rate_and_channels(tmp_path: Path) -> None:
    ref = write_audio(tmp_path / "a.flac", make_speech(LENGTH))
    for decode in (True, False):
        assert inspect_audio(ref, decode=decode, resample=False) == (LENGTH, SAMPLE_RATE, 1)


def test_the_headers_alone_do_not_find_bad_samples(tmp_path: Path) -> None:
    """Why `verify` decodes by default."""
    path = make_bad_file(tmp_path, "NaN")
    assert inspect_audio(AudioRef("a", str(path), 0), decode=False, resample=False).num_samples == LENGTH


# Those that libsndfile cannot seek in, or only claims to; the others stand for what it can.
CODECS = [
    ("WAV", "GSM610"),
    ("WAV", "G721_32"),
    ("WAV", "NMS_ADPCM_32"),
    ("W64", "GSM610"),
    ("AIFF", "GSM610"),
    ("AIFF", "DWVW_16"),
    ("AU", "G721_32"),
    ("AU", "G723_24"),
    ("AU", "G723_40"),
    ("WAV", "MS_ADPCM"),
    ("WAV", "IMA_ADPCM"),
    ("CAF", "ALAC_16"),
    ("NIST", "ULAW"),
]


@pytest.mark.parametrize(("container", "codec"), CODECS)
def test_whatever_the_check_accepts_is_read_crop_by_crop_too(tmp_path: Path, container: str, codec: str) -> None:
    path = tmp_path / "a.bin"
    soundfile.write(path, make_speech(LENGTH), SAMPLE_RATE, format=container, subtype=codec)
    with Sound(path) as sound:  # soundfile's own would seek
        whole = torch.from_numpy(sound.read(sound.frames, dtype="float32"))
    info = inspect_audio(AudioRef("a", str(path), 0), decode=True, resample=False)
    assert info.num_samples == len(whole) >= LENGTH
    ref = AudioRef("a", str(path), info.num_samples)
    for start, count in CROPS:
        assert torch.equal(read_waveform(ref, start=start, num_samples=count), whole[start : start + count])
    spans = [(start, 9_000) for start in range(0, LENGTH - 9_000, 7_000)]
    for (start, count), crop in zip(spans, read_spans(ref, spans), strict=True):
        assert torch.equal(crop, whole[start : start + count])


def test_the_check_reads_as_training_does_and_reports_what_training_would_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A codec that decodes forwards and cannot seek, if libsndfile said that it can."""
    path = tmp_path / "a.wav"
    soundfile.write(path, make_speech(LENGTH), SAMPLE_RATE, subtype="GSM610")
    monkeypatch.setattr(Sound, "can_seek", True)
    with pytest.raises(AudioError, match=r"not seekable: .*Seek attempted"):
        inspect_audio(AudioRef("a", str(path), 0), decode=True, resample=False)


@pytest.mark.parametrize("change", ["other bytes", "another size", "gone"])
@pytest.mark.parametrize("archived", [False, True])
def test_a_file_that_was_replaced_since_the_manifest_is_not_read_although_its_length_fits(
    tmp_path: Path, change: str, archived: bool
) -> None:
    path, place = tmp_path / "a.wav", tmp_path / "a.wav"
    ref = write_audio(path, make_speech(LENGTH))
    if archived:
        place = tmp_path / "x.tar"
        start, size = write_tar(place, [path])["a.wav"]
        ref = AudioRef("a", "a.wav", LENGTH, None, str(place), start, size)
    before = place.stat()
    ref = ref._replace(size=before.st_size, mtime_ns=before.st_mtime_ns)
    assert len(read_waveform(ref)) == LENGTH
    content = place.read_bytes()
    match change:
        case "other bytes":
            place.write_bytes(content)
            os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
        case "another size":
            place.write_bytes(content + bytes(2))
            os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
        case "gone":
            place.unlink()
    with pytest.raises(AudioError, match="missing" if change == "gone" else r"changed: .*build the manifest again"):
        read_waveform(ref, num_samples=500)


def test_a_wav_that_a_pipe_wrote_with_an_open_length_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    write_audio(path, make_speech(LENGTH))
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert inspect_audio(AudioRef("a", str(path), 0), decode=True, resample=False).num_samples == LENGTH


def test_a_file_that_changed_since_the_manifest_is_an_error_not_a_shorter_crop(tmp_path: Path) -> None:
    ref = write_audio(tmp_path / "a.wav", make_speech(LENGTH))
    for changed in (ref._replace(num_samples=LENGTH + 1), ref._replace(num_samples=LENGTH - 1)):
        with pytest.raises(AudioError, match=r"changed.*build the manifest again"):
            read_waveform(changed, num_samples=500)
    with pytest.raises(AudioError, match="changed"):
        read_waveform(ref._replace(offset=30_000, num_samples=20_000), num_samples=500)


def test_a_truncated_flac_is_found_when_the_crop_reaches_the_cut(tmp_path: Path) -> None:
    ref = AudioRef("a", str(make_bad_file(tmp_path, "truncated flac")), LENGTH)
    assert len(read_waveform(ref, num_samples=4_000)) == 4_000
    with pytest.raises(AudioError, match="truncated"):
        read_waveform(ref, start=LENGTH - 4_000)


def test_nan_in_a_crop_is_an_error(tmp_path: Path) -> None:
    ref = AudioRef("a", str(make_bad_file(tmp_path, "NaN")), LENGTH)
    assert len(read_waveform(ref, num_samples=20_000)) == 20_000
    with pytest.raises(AudioError, match="NaN"):
        read_waveform(ref, start=19_000, num_samples=2_000)


def test_a_cut_archive_is_an_error_that_names_archive_and_member(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    write_audio(path, make_speech(LENGTH))
    archive = tmp_path / "packed.tar"
    start, size = write_tar(archive, [path])["a.wav"]
    with archive.open("rb+") as file:
        file.truncate(start + size - 10)
    with pytest.raises(AudioError, match=r"packed\.tar \(member a\.wav\).*10 bytes"):
        read_waveform(AudioRef("a", "a.wav", LENGTH, None, str(archive), start, size))


def test_a_failing_disk_is_transient_and_not_a_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error happens inside libsndfile's callback, where an exception would be printed and lost."""
    path = tmp_path / "a.wav"
    write_audio(path, make_speech(LENGTH))
    ref = AudioRef("a", "a.wav", LENGTH, None, str(path), 0, path.stat().st_size)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(TransientError, match="Input/output error"):
        read_waveform(ref)
    for either in (ref, AudioRef("a", str(path), 0)):
        with pytest.raises(TransientError, match="Input/output error"):
            inspect_audio(either, decode=True, resample=False)


@pytest.mark.parametrize(("start", "count"), [(-1, 10), (0, 0), (LENGTH, 1), (LENGTH - 10, 11)])
def test_a_crop_outside_of_the_file_is_refused(tmp_path: Path, start: int, count: int) -> None:
    ref = write_audio(tmp_path / "a.wav", make_speech(LENGTH))
    with pytest.raises(ValueError, match="is not within the 40000 samples"):
        read_waveform(ref, start=start, num_samples=count)


def test_a_file_slice_behaves_like_the_bytes_it_covers(tmp_path: Path) -> None:
    content = bytes(range(256)) * 8
    (tmp_path / "x").write_bytes(content)
    oracle = io.BytesIO(content[100:1_100])
    random = np.random.default_rng(0)
    with FileSlice(str(tmp_path / "x"), 100, 1_000) as part:
        for _ in range(200):
            if random.random() < 0.5:
                whence = int(random.integers(0, 3))
                offset = int(random.integers(0, 1_200)) if whence == os.SEEK_SET else int(random.integers(0, 50))
                assert part.seek(offset, whence) == oracle.seek(offset, whence)
            size = int(random.integers(0, 400))
            assert part.read(size) == oracle.read(size)
            assert part.tell() == oracle.tell()


def test_an_audio_error_survives_the_way_between_processes() -> None:
    """A copy takes the same way as a pickle that Dask sends."""
    error = copy.copy(AudioError("a.wav is unusable: empty: 0 bytes.", "empty: 0 bytes"))
    assert isinstance(error, DataError)
    assert (str(error), error.reason) == ("a.wav is unusable: empty: 0 bytes.", "empty: 0 bytes")
