"""Chunked containers: cut ones, unfinished ones, and those that a pipe wrote, by their own size fields."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hubert.data.audio import inspect_audio
from hubert.data.audio_file import AudioError, AudioRef

LENGTH = 20_000
CONTAINERS = {  # libsndfile's name: (encoding, where the size of the audio is, its struct)
    "WAV": ("PCM_16", b"data", "<I"),
    "WAVEX": ("PCM_16", b"data", "<I"),
    "RF64": ("PCM_16", b"ds64", "<Q"),
    "W64": ("PCM_16", b"data", "<Q"),
    "AIFF": ("PCM_16", b"SSND", ">I"),
    "AU": ("PCM_16", b".snd", ">I"),
    "CAF": ("PCM_16", b"data", ">Q"),
}
DISTANCE = {"RF64": 16, "W64": 16, "AU": 8}  # from the name to the size; else 4
MORE = {"W64": 24, "AIFF": 8, "CAF": 4}  # bytes that the size counts beside the audio


def write(container: str, subtype: str = "PCM_16", length: int = LENGTH, channels: int = 1) -> bytes:
    samples = np.random.default_rng(0).standard_normal((length, channels)) * 0.1
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format=container, subtype=subtype)
    return buffer.getvalue()


def declare(content: bytes, container: str, size: int) -> bytes:
    """Replace what a header declares as the size of the audio."""
    _, name, kind = CONTAINERS[container]
    position = content.index(name) + DISTANCE.get(container, 4)
    changed = bytearray(content)
    struct.pack_into(kind, changed, position, size)
    return bytes(changed)


def check(folder: Path, content: bytes, *, decode: bool = False) -> int:
    path = folder / "a.bin"
    path.write_bytes(content)
    return inspect_audio(AudioRef("a", str(path), 0), decode=decode, resample=True).num_samples


@pytest.mark.parametrize("container", [*CONTAINERS, "NIST"])
@pytest.mark.parametrize("kept", [0.6, 0.99])
def test_a_cut_file_is_rejected_and_the_whole_one_is_not(tmp_path: Path, container: str, kept: float) -> None:
    content = write(container)
    assert check(tmp_path, content, decode=True) == LENGTH
    with pytest.raises(AudioError) as caught:
        check(tmp_path, content[: int(len(content) * kept)])
    assert caught.value.reason.startswith("truncated or damaged: its ")


@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        *[
            ("WAV", name)
            for name in ("PCM_U8", "PCM_24", "FLOAT", "ULAW", "IMA_ADPCM", "MS_ADPCM", "GSM610", "G721_32")
        ],
        *[("AIFF", name) for name in ("PCM_S8", "DOUBLE", "ALAW", "GSM610", "DWVW_16", "IMA_ADPCM")],
        *[("AU", name) for name in ("FLOAT", "G723_24")],
        *[("W64", name) for name in ("PCM_32", "MS_ADPCM")],
        ("CAF", "ALAC_16"),
        ("NIST", "ALAW"),
    ],
)
def test_a_cut_file_is_rejected_whatever_its_encoding(tmp_path: Path, container: str, subtype: str) -> None:
    content = write(container, subtype)
    assert check(tmp_path, content, decode=True) >= LENGTH
    with pytest.raises(AudioError, match="truncated or damaged"):
        check(tmp_path, content[: int(len(content) * 0.6)])


@pytest.mark.parametrize("container", [name for name in CONTAINERS if name != "RF64"])
def test_a_header_that_was_never_completed_does_not_hide_the_rest_of_the_file(tmp_path: Path, container: str) -> None:
    for declared in (2_000, 0):
        content = declare(write(container), container, declared + MORE.get(container, 0))
        with pytest.raises(AudioError) as caught:
            check(tmp_path, content)
        # libsndfile refuses a CAF that does not add up; the others would have been read up to the declared size
        assert caught.value.reason.startswith(
            ("wrong length: ", "not audio: " if container == "CAF" else "wrong length")
        )


def test_an_rf64_that_declares_too_little_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="wrong length"):
        check(tmp_path, declare(write("RF64"), "RF64", 2_000))


@pytest.mark.parametrize("size", [0x7FFF_0000, 0x7FFF_FFF0, 0x8000_0000, 3_000_000_000, 0xFFFF_FF00])
def test_a_cut_wav_of_two_gigabytes_or_more_is_rejected(tmp_path: Path, size: int) -> None:
    with pytest.raises(AudioError, match=f"truncated or damaged: its WAV header says {size} bytes"):
        check(tmp_path, declare(write("WAV"), "WAV", size))


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
@pytest.mark.parametrize("limit", [0xFFFF_FFFF, 0x7FFF_FFFF, 0x7FFF_F000, 0x7FFF_FF00])
def test_a_wav_that_a_pipe_wrote_is_read_to_its_end(tmp_path: Path, limit: int, subtype: str, channels: int) -> None:
    """As ffmpeg writes it, as sox does (whole frames), and less the header."""
    content = write("WAV", subtype, channels=channels)
    frame = channels * (2 if subtype == "PCM_16" else 3)
    for size in {limit, limit - limit % frame, limit - 36}:
        assert check(tmp_path, declare(content, "WAV", size), decode=True) == LENGTH


def test_other_containers_that_a_pipe_wrote_are_read_to_their_end(tmp_path: Path) -> None:
    """As ffmpeg writes Wave64, RF64 and AU, and sox AIFF."""
    for size in (2**63 - 1, 2**64 - 1):
        assert check(tmp_path, declare(write("W64"), "W64", size), decode=True) == LENGTH
    assert check(tmp_path, declare(write("AU"), "AU", 0xFFFF_FFFF), decode=True) == LENGTH
    content = bytearray(declare(write("AIFF"), "AIFF", 0x7F00_0000 + 8))
    struct.pack_into(">I", content, content.index(b"COMM") + 10, 0x7F00_0000 // 2)
    assert check(tmp_path, bytes(content), decode=True) == LENGTH


def test_chunks_tags_and_padding_after_the_audio_are_no_fault(tmp_path: Path) -> None:
    content = write("WAV")
    note = b"LIST" + struct.pack("<I", 3_000) + b"INFO" + bytes(2_996)
    odd = write("WAV", "PCM_U8", length=LENGTH + 1)
    for whole in (
        content + note,
        content + note + note,
        content + bytes(4_096),
        content + b"TAG" + bytes(125),
        odd + note,  # as libsndfile pads it
        odd.removesuffix(b"\0") + note,  # the byte that pads an odd chunk is left out at times
    ):
        assert check(tmp_path, whole, decode=True) in {LENGTH, LENGTH + 1}
    with pytest.raises(AudioError, match="wrong length"):
        check(tmp_path, content + content[44:])


@pytest.mark.parametrize(
    "coding", ["pcm,embedded-shorten-v2.00", "ulaw,embedded-shorten-v2.00", "pcm,embedded-wavpack"]
)
def test_a_compressed_sphere_file_is_rejected_by_the_name_of_its_codec(tmp_path: Path, coding: str) -> None:
    content = write("NIST")
    header = content[:1024].replace(b"sample_coding -s3 pcm", f"sample_coding -s{len(coding)} {coding}".encode())
    with pytest.raises(AudioError) as caught:
        check(tmp_path, header[:1024].ljust(1024) + content[1024:])
    assert caught.value.reason.startswith(f"compressed: NIST SPHERE of {coding}")
