"""MFCC: the values of torchaudio's Kaldi MFCC, whatever the audio, and the same bits in any batch."""

import math
from contextlib import nullcontext

import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hubert.features.mfcc as mfcc_module
from hubert.core.paths import PROJECT
from hubert.features.extract import FeatureExtractor
from hubert.features.mfcc import BLOCK_FRAMES, batch_mfcc, mfcc
from hubert.features.source import FeatureSource
from tests.support.reference import torchaudio_mfcc

pytestmark = pytest.mark.usefixtures("one_thread")

REAL = PROJECT.parent / "shared" / "data" / "librispeech-mini" / "val"


def make_noise(num_samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


def make_tone(num_samples: int = 32_000, hertz: float = 440) -> Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(num_samples) / 16_000)


SIGNALS = {
    "noise": make_noise(48_000),
    "silence": torch.zeros(16_000),
    "silence after noise": torch.cat([make_noise(8_000), torch.zeros(8_000)]),
    "a constant": torch.full((16_000,), 0.7),
    "quiet noise on a constant": 0.5 + 1e-4 * make_noise(16_000),
    "a tone": make_tone(),
    "a tone of 16 bits": (make_tone(hertz=1_000) * 32_767).round() / 32_768,
    "clipped": (30 * make_noise(32_000)).clamp(-1, 1),
    "a square wave": make_tone(hertz=200).sign(),
    "one click": torch.nn.functional.one_hot(torch.tensor(7_777), 16_000).float(),
    "the samples' integers": 32_768 * make_noise(32_000),
    "the least significant bit": make_noise(16_000).sign() / 32_768,
    "denormal numbers": 1e-40 * make_noise(16_000).sign(),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_the_values_are_torchaudios(name: str) -> None:
    """Within 1e-4, among values of up to 150."""
    found = mfcc(SIGNALS[name])
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torch.testing.assert_close(found, torchaudio_mfcc(SIGNALS[name]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "length", [400, 401, 559, 560, 561, 719, 720, 1_040, 160 * BLOCK_FRAMES + 239, 160 * BLOCK_FRAMES + 240]
)
def test_the_shortest_files_have_the_frames_and_values_of_torchaudio(length: int) -> None:
    waveform = make_noise(length)
    found = mfcc(waveform)
    assert found.shape == ((length - 400) // 160 + 1, 39)
    torch.testing.assert_close(found, torchaudio_mfcc(waveform), rtol=0, atol=1e-4)


def test_fewer_samples_than_a_window_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 400 samples .* found 399"):
        batch_mfcc([make_noise(500), make_noise(399)])
    assert batch_mfcc([]) == []


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(400, 30_000), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_a_file_has_the_same_bits_in_every_batch(lengths: list[int], order: object) -> None:
    waveforms = [make_noise(length, seed) for seed, length in enumerate(lengths)]
    alone = [mfcc(waveform) for waveform in waveforms]
    numbers = list(range(len(lengths)))
    order.shuffle(numbers)
    for number, found in zip(numbers, batch_mfcc([waveforms[number] for number in numbers]), strict=True):
        assert torch.equal(found, alone[number])


@pytest.mark.parametrize(("threads", "step"), [(1, 1), (2, 17)])
def test_a_frame_has_the_same_bits_at_every_place_of_a_block(threads: int, step: int) -> None:
    """A file of one frame behind others of all lengths: products and transforms treat some rows differently."""
    torch.set_num_threads(threads)
    probe = make_noise(400)
    (expected,) = batch_mfcc([probe])
    for place in range(3, BLOCK_FRAMES + 3, step):
        assert torch.equal(batch_mfcc([make_noise(160 * place), probe])[1], expected)


def test_a_broken_file_does_not_touch_its_neighbours() -> None:
    waveforms = [make_noise(5_000), torch.full((4_321,), torch.nan), make_noise(3_000)]
    first, broken, last = batch_mfcc(waveforms)
    assert broken.isnan().all()
    assert torch.equal(first, mfcc(waveforms[0]))
    assert torch.equal(last, mfcc(waveforms[2]))


def test_waveforms_are_not_written_to_and_results_share_nothing() -> None:
    waveforms = [make_noise(5_000), make_noise(7_000)]
    copies = [waveform.clone() for waveform in waveforms]
    first, second = batch_mfcc(waveforms)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert second.untyped_storage().nbytes() == second.nbytes
    assert all(map(torch.equal, waveforms, copies))


def test_results_are_plain_tensors_that_a_caller_may_change_and_train_on() -> None:
    """Also when the tables were first made in inference mode, as in a stage."""
    with torch.inference_mode():
        mfcc(make_noise(5_000))
    features = mfcc(make_noise(5_000).requires_grad_())
    assert not features.requires_grad
    features.mul_(2)
    weights = torch.ones(39, requires_grad=True)
    (features @ weights).sum().backward()
    torch.testing.assert_close(weights.grad, features.sum(0))


def test_the_extractor_gives_the_values_of_each_file() -> None:
    waveforms = [make_noise(9_999), make_noise(400), make_noise(40_000)]
    for found, waveform in zip(FeatureExtractor(FeatureSource())(waveforms), waveforms, strict=True):
        torch.testing.assert_close(found, torchaudio_mfcc(waveform), rtol=0, atol=1e-4)


def test_real_speech_has_the_values_of_torchaudio() -> None:
    if not REAL.is_dir():
        pytest.skip("needs ../shared/data/librispeech-mini")
    for path in sorted(REAL.rglob("*.flac"))[:3]:
        waveform = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        torch.testing.assert_close(mfcc(waveform), torchaudio_mfcc(waveform), rtol=0, atol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_blocks_are_computed_on_one_thread_and_torch_has_its_threads_again(monkeypatch, fails):
    compute, found = mfcc_module._cepstra, []

    def watched(frames):
        found.append(torch.get_num_threads())
        if fails:
            raise MemoryError
        return compute(frames)

    monkeypatch.setattr(mfcc_module, "_cepstra", watched)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with pytest.raises(MemoryError) if fails else nullcontext():
            batch_mfcc([torch.randn(16_000)])
        assert found == [1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
