"""Odd sample rates: the same filter as torchaudio's, in bounded memory, and no rates that nothing records."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from hubert.data.audio import converted_length, inspect_audio, read_waveform
from hubert.data.audio_file import AudioError, AudioRef
from hubert.data.formats import resampling
from hubert.data.formats.resampling import MAX_SAMPLE_RATE, MIN_SAMPLE_RATE, build_resampler

USUAL = [8_000, 11_025, 12_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000, 176_400, 192_000]
ODD = [22_254, 11_127, 44_056, 47_952, 16_001, 15_999, 96_001, 37_801]


@pytest.mark.parametrize("rate", USUAL)
def test_usual_rates_are_converted_by_torchaudio_itself(rate: int) -> None:
    waveform = torch.randn(2 * rate, generator=torch.Generator().manual_seed(0))
    assert torch.equal(build_resampler(rate).convert(waveform), torchaudio.transforms.Resample(rate, 16_000)(waveform))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 18_900, 37_800])
def test_the_sparse_kernel_gives_what_torchaudios_gives(rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "MAX_DENSE", 0)
    monkeypatch.setattr(resampling, "MAX_PRODUCTS", 10_000)
    waveform = torch.randn(rate + 17, generator=torch.Generator().manual_seed(0))
    converted = build_resampler.__wrapped__(rate).convert(waveform)
    expected = torchaudio.functional.resample(waveform.double(), rate, 16_000).float()
    torch.testing.assert_close(converted, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rate", ODD)
def test_a_tone_of_an_odd_rate_is_the_same_tone_at_16_khz(rate: int, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    num_frames = 2 * rate
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 440 * np.arange(num_frames) / rate), rate, subtype="FLOAT")
    info = inspect_audio(AudioRef("a", str(path), 0), decode=True, resample=True)
    assert info.num_samples == converted_length(num_frames, rate)
    ref = AudioRef("a", str(path), info.num_samples)
    whole = read_waveform(ref, resample=True)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(info.num_samples) / 16_000)
    inside = slice(100, -100)  # at the ends the filter meets the silence around the file
    np.testing.assert_allclose(whole.numpy()[inside], expected[inside], atol=2e-3)
    crop = read_waveform(ref, start=12_345, num_samples=2_000, resample=True)
    torch.testing.assert_close(crop, whole[12_345:14_345], rtol=0, atol=1e-6)


def test_no_rate_that_is_accepted_takes_gigabytes(tmp_path: Path) -> None:
    """Near the least and the greatest, and between: rates that share no factor with 16,000."""
    code = (
        "import sys, resource, torch\n"
        "from hubert.data.formats.resampling import build_resampler\n"
        "build_resampler(44_100).convert(torch.zeros(44_100))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for rate in map(int, sys.argv[1:]):\n"
        "    build_resampler(rate).convert(torch.zeros(rate))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    rates = (MIN_SAMPLE_RATE + 1, 15_999, 96_001, MAX_SAMPLE_RATE - 1)
    command = [sys.executable, "-c", code, *map(str, rates)]
    taken = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert taken < 600e6


@pytest.mark.parametrize("rate", [7, 100, MIN_SAMPLE_RATE - 1, MAX_SAMPLE_RATE + 1, 2_000_000])
def test_a_rate_that_no_recorder_has_is_rejected(rate: int, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(20_000), rate)
    for resample in (False, True):
        with pytest.raises(AudioError, match=f"wrong sample rate: {rate} Hz"):
            inspect_audio(AudioRef("a", str(path), 0), decode=True, resample=resample)
