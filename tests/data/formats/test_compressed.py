"""MP3, Ogg and FLAC: the length is counted in the frames and pages themselves."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hubert.data.audio import inspect_audio
from hubert.data.audio_file import AudioError, AudioRef
from hubert.data.formats.mp3 import Count, count_frames, frame_size

SECONDS = 8


def make_speech(rate: int, quiet: str) -> np.ndarray:
    """Half of it silence, which a variable bit rate makes small."""
    half = SECONDS * rate // 2
    noise = np.random.default_rng(0).standard_normal(half)
    loud = 0.3 * np.sin(np.cumsum(0.05 + 0.04 * np.sin(np.arange(half) / 3_000))) + 0.05 * noise
    return np.concatenate([np.zeros(half), loud] if quiet == "first" else [loud, np.zeros(half)])


def write_mp3(rate: int = 16_000, *, mode: str = "VARIABLE", quiet: str = "first", channels: int = 1) -> bytes:
    buffer = io.BytesIO()
    samples = np.repeat(make_speech(rate, quiet)[:, None], channels, axis=1)
    soundfile.write(buffer, samples, rate, format="MP3", bitrate_mode=mode, compression_level=0.5)
    return buffer.getvalue()


def without_header(content: bytes) -> bytes:
    """Drop the first frame, which holds the Xing or Info header."""
    return content[frame_size(int.from_bytes(content[:4], "big"))[0] :]


def check(folder: Path, content: bytes, *, decode: bool = True) -> int:
    path = folder / "a.bin"
    path.write_bytes(content)
    return inspect_audio(AudioRef("a", str(path), 0), decode=decode, resample=True).num_samples


def reason(folder: Path, content: bytes, *, decode: bool = True) -> str:
    with pytest.raises(AudioError) as caught:
        check(folder, content, decode=decode)
    return caught.value.reason


# MP3 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_the_frames_that_are_counted_are_those_that_are_decoded(rate: int, channels: int) -> None:
    """libmpg123 is the oracle: without a header it gives all samples of all frames, if asked for more than there are."""
    content = without_header(write_mp3(rate, channels=channels))
    count = count_frames(io.BytesIO(content), len(content))
    assert isinstance(count, Count)
    with soundfile.SoundFile(io.BytesIO(content)) as sound:
        decoded = len(sound.read(sound.frames, dtype="float32"))
    assert decoded == count.num_frames * count.samples_per_frame
    assert (count.is_partial, count.junk, count.header_frames) == (False, 0, None)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("quiet", ["first", "last"])
def test_an_mp3_with_a_header_has_the_length_that_was_written(tmp_path: Path, mode: str, quiet: str) -> None:
    content = write_mp3(mode=mode, quiet=quiet)
    tagged = b"ID3\x04\0\0\0\0\x07\x68" + bytes(1_000) + content + b"TAG" + bytes(125)
    for whole in (content, tagged):
        assert check(tmp_path, whole) == SECONDS * 16_000


@pytest.mark.parametrize("quiet", ["first", "last"])
@pytest.mark.parametrize("decode", [True, False])
def test_a_variable_bit_rate_without_a_header_is_rejected_for_its_length_and_never_called_truncated(
    tmp_path: Path, quiet: str, decode: bool
) -> None:
    found = reason(tmp_path, without_header(write_mp3(quiet=quiet)), decode=decode)
    assert found.startswith("unknown length: an mp3 of a variable bit rate without a Xing or Info header")


def test_a_constant_bit_rate_without_a_header_has_all_its_frames(tmp_path: Path) -> None:
    content = without_header(write_mp3(mode="CONSTANT"))
    count = count_frames(io.BytesIO(content), len(content))
    assert isinstance(count, Count)
    assert check(tmp_path, content) == count.num_frames * count.samples_per_frame


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("decode", [True, False])
def test_a_cut_mp3_is_truncated(tmp_path: Path, mode: str, header: bool, decode: bool) -> None:
    content = write_mp3(mode=mode)
    content = content if header else without_header(content)
    assert reason(tmp_path, content[: int(len(content) * 0.6) + 5], decode=decode).startswith("truncated or damaged")


def test_mp3_files_joined_together_are_not_read_as_the_first_one(tmp_path: Path) -> None:
    content = write_mp3()
    assert reason(tmp_path, content + content).startswith("wrong length: its Xing header says")


def test_free_format_is_rejected_by_name(tmp_path: Path) -> None:
    content = bytearray(without_header(write_mp3(mode="CONSTANT")))
    size = frame_size(int.from_bytes(content[:4], "big"))[0]
    for start in range(0, len(content), size):
        content[start + 2] &= 0x0F  # bit rate 0
    assert isinstance(found := count_frames(io.BytesIO(content), len(content)), tuple)
    assert found[0].startswith("free format")


def test_the_sizes_of_frames_are_those_of_the_standard() -> None:
    """ISO 11172-3 and 13818-3 by hand: 144 x bit rate / sample rate, half of it in version 2 for layer III."""
    assert frame_size(0xFFFB_9000) == (144 * 128_000 // 44_100, 1152)
    assert frame_size(0xFFFB_9200) == (144 * 128_000 // 44_100 + 1, 1152)
    assert frame_size(0xFFF3_4800) == (72 * 32_000 // 16_000, 576)
    assert frame_size(0xFFE3_1800) == (72 * 8_000 // 8_000, 576)
    assert frame_size(0xFFFD_8400) == (144 * 128_000 // 48_000, 1152)
    assert frame_size(0xFFFF_4400) == (12 * 128_000 // 48_000 * 4, 384)
    for word in (0xFFFB_F000, 0xFFFB_9C00, 0xFFEB_9000, 0xFFF9_9000, 0x1234_5678):
        assert frame_size(word) == (0, 0)


# Ogg --------------------------------------------------------------------------------------------------------------


def write_ogg(subtype: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, make_speech(16_000, "first"), 16_000, format="OGG", subtype=subtype)
    return buffer.getvalue()


def pages(content: bytes) -> list[int]:
    """Where the pages begin, by their magic."""
    return [position for position in range(len(content)) if content.startswith(b"OggS\0", position)]


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("decode", [True, False])
def test_a_cut_ogg_is_truncated_wherever_it_was_cut(tmp_path: Path, subtype: str, decode: bool) -> None:
    content = write_ogg(subtype)
    assert check(tmp_path, content, decode=decode) == SECONDS * 16_000
    last = pages(content)[-1]
    for cut in (int(len(content) * 0.6), len(content) - 1, last, last + 10):
        assert reason(tmp_path, content[:cut], decode=decode).startswith("truncated or damaged")


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_that_lacks_pages_is_damaged(tmp_path: Path, subtype: str) -> None:
    content = write_ogg(subtype)
    starts = pages(content)
    found = reason(tmp_path, content[: starts[3]] + content[starts[4] :], decode=False)
    assert found == "truncated or damaged: Ogg pages 3 to 3 are missing"
    hole = content[: starts[3]] + bytes(starts[4] - starts[3]) + content[starts[4] :]
    assert "are no Ogg page" in reason(tmp_path, hole, decode=False)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(["VORBIS", "OPUS"], repeat=2)))
def test_chained_ogg_streams_are_not_read_as_the_first_one(tmp_path: Path, first: str, second: str) -> None:
    assert reason(tmp_path, write_ogg(first) + write_ogg(second)).startswith("chained: 2 Ogg streams")


def test_bytes_after_the_last_page_are_no_fault(tmp_path: Path) -> None:
    assert check(tmp_path, write_ogg("VORBIS") + b"TAG" + bytes(125)) == SECONDS * 16_000


# FLAC -------------------------------------------------------------------------------------------------------------


def write_flac(subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, make_speech(16_000, "first"), 16_000, format="FLAC", subtype=subtype)
    return buffer.getvalue()


def declare(content: bytes, total: int) -> bytes:
    """Replace the number of samples in the header, the last 36 bits of bytes 18 to 26."""
    fields = int.from_bytes(content[18:26], "big")
    return content[:18] + (fields >> 36 << 36 | total).to_bytes(8, "big") + content[26:]


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
@pytest.mark.parametrize("decode", [True, False])
def test_a_cut_flac_is_truncated_and_a_whole_one_is_not(tmp_path: Path, subtype: str, decode: bool) -> None:
    content = write_flac(subtype)
    tagged = b"ID3\x04\0\0\0\0\x07\x68" + bytes(1_000) + content
    assert check(tmp_path, content, decode=decode) == SECONDS * 16_000
    for whole in (tagged, content + b"TAG" + bytes(125)):  # which libsndfile opens, and at times cannot decode
        assert check(tmp_path, whole, decode=False) == SECONDS * 16_000
    for kept in (0.3, 0.6, 0.9):
        assert reason(tmp_path, content[: int(len(content) * kept)], decode=decode).startswith("truncated or damaged")


def test_a_flac_that_declares_fewer_samples_than_it_has_is_rejected(tmp_path: Path) -> None:
    content = write_flac()
    assert reason(tmp_path, declare(content, 20_000)).startswith("wrong length: its header says 20000 samples")
    assert reason(tmp_path, declare(content, 200_000)).startswith("truncated or damaged: its header says 200000")
    assert reason(tmp_path, declare(content, 0)).startswith("unknown length")
