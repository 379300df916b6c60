"""Reading audio: one crop at a time, from files, from members of archives, from segments of long files.

Everything that leaves this module is 16 kHz mono float32. Lengths and positions count samples at 16 kHz, also for
files of another rate, so that nothing downstream needs to know what a file was.

Seeking is exact in wav and flac. In Ogg files libsndfile at times lands a block beside the target (its issue 885), and
an MP3 decoder needs the frames before. So MP3 is decoded from 30 s before the crop, and Ogg (Vorbis, Opus) from the
start of the file: right, but slow for crops of files that last hours, which are better converted to flac. Codecs in
which libsndfile cannot seek at all (GSM 6.10 and other telephone codecs) are decoded from the start, too.
`read_spans` reads all of a long file, piece by piece, and decodes each sample once, whatever the format.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from hubert.core.frames import RECEPTIVE_FIELD, SAMPLE_RATE
from hubert.data.audio_file import AudioError, AudioRef, Sound, open_audio, open_bytes, unusable
from hubert.data.formats.fault import Fault
from hubert.data.formats.integrity import find_fault, find_loss
from hubert.data.formats.resampling import MAX_SAMPLE_RATE, MIN_SAMPLE_RATE, build_resampler

MIN_SAMPLES = RECEPTIVE_FIELD  # fewer give no frame, neither of the model nor of the MFCC, whose window is as long

# Decoded and dropped before a crop, by container. MP3's bit reservoir reaches back ten frames at most, but libmpg123
# complains on stderr about each seek: with 30 s most utterances are decoded from their start, in silence, in 11 ms.
WHOLE = 1_000_000  # from the start of the file
PREROLL_SECONDS = {"MP3": 30, "OGG": WHOLE}

BLOCK_SAMPLES = (
    1 << 18
)  # samples (of each channel) decoded or resampled at once: bounds the memory for files of any length
UNKNOWN_LENGTH = 1 << 48  # libsndfile reports a length that the header leaves open as 2^63 - 1

Waveform = np.ndarray[tuple[int], np.dtype[np.float32]]


class AudioInfo(NamedTuple):
    """What a file holds: its length at 16 kHz, and the rate and channels that it is stored with."""

    num_samples: int
    sample_rate: int
    channels: int


def converted_length(num_frames: int, sample_rate: int) -> int:
    """Return the number of samples at 16 kHz that `num_frames` at `sample_rate` are converted to (rounded up)."""
    return -(-num_frames * SAMPLE_RATE // sample_rate)


def read_waveform(
    ref: AudioRef, *, start: int = 0, num_samples: int | None = None, resample: bool = False
) -> torch.Tensor:
    """Decode samples [start, start + num_samples) of a file or segment, and nothing else of it.

    Args:
        ref: the file, member or segment.
        start: first sample, counted from the start of `ref`, at 16 kHz.
        num_samples: how many, at 16 kHz; None: up to the end.
        resample: accept other rates and several channels. The channels are averaged and the rate is converted with
            torchaudio's windowed sinc; the crop is decoded with a margin of the filter's width, so that it equals the
            slice of the whole converted file (up to float rounding).

    Returns:
        (num_samples,) float32.

    Raises:
        AudioError: the file is missing, damaged, of another format than the manifest was built for, holds NaN or
            infinite samples, or is longer or shorter than the manifest says.
        TransientError: the disk failed.
        ValueError: the crop lies outside of `ref`.
    """
    count = ref.num_samples - start if num_samples is None else num_samples
    if start < 0 or count < 1 or start + count > ref.num_samples:
        raise ValueError(
            f"crop [{start}, {start + count}) is not within the {ref.num_samples} samples of {ref.fileid!r}"
        )
    (waveform,) = read_spans(ref, [(start, count)], resample=resample)
    return waveform


def read_spans(ref: AudioRef, spans: Iterable[tuple[int, int]], *, resample: bool = False) -> Iterator[torch.Tensor]:
    """Decode spans (start, num_samples) of a file or segment in one pass; each equals what `read_waveform` gives.

    Neither start nor end of a span may lie before that of the span before it; spans may overlap. The file is opened
    once and decoded forwards, so all of an Ogg file of hours costs one decoding. Memory is one span.

    Raises:
        AudioError, TransientError: see `read_waveform`.
        ValueError: spans that go backwards or lie outside of `ref`.
    """
    with open_audio(ref) as sound:
        _check_format(ref, sound, resample=resample)
        _check_length(ref, converted_length(sound.frames, sound.samplerate))
        decoder = _Decoder(ref, sound) if sound.samplerate == SAMPLE_RATE else _ResamplingDecoder(ref, sound)
        held_start, held = 0, np.empty(0, dtype=np.float32)  # the newest span: the next one may overlap it
        for start, count in spans:
            end, held_end = start + count, held_start + len(held)
            if start < held_start or end < held_end or count < 1 or end > ref.num_samples:
                raise ValueError(
                    f"span [{start}, {end}) is not within the {ref.num_samples} samples of {ref.fileid!r}, "
                    f"or goes back behind [{held_start}, {held_end})"
                )
            first = max(start, held_end)
            parts = [held[start - held_start :]]
            if first < end:
                parts.append(decoder.read((ref.offset or 0) + first, end - first))
                if not np.isfinite(parts[1]).all():
                    raise _not_finite(ref)
            held_start, held = start, np.concatenate(parts)
            yield torch.from_numpy(held)


def inspect_audio(ref: AudioRef, *, decode: bool, resample: bool, min_samples: int = MIN_SAMPLES) -> AudioInfo:
    """Find out whether a whole file can be used, and how long it is. `ref.num_samples` and `ref.offset` are ignored.

    Args:
        ref: the file or member.
        decode: decode all of it (in blocks), check that the samples are finite and as many as the header says, and read
            a crop as training will; else only compare what its headers say with its bytes.
        resample: accept other rates and several channels.
        min_samples: the least length, in samples at 16 kHz.

    Raises:
        AudioError: it cannot be used; `reason` says why in a few words.
        TransientError: the disk failed.
    """
    with open_bytes(ref) as (file, size):
        _require(ref, find_fault(file, size))
        with open_audio(ref) as sound:
            if not 0 <= sound.frames < UNKNOWN_LENGTH:
                raise unusable(
                    ref, "unknown length: its header does not say how long it is", "Convert it again, to a file."
                )
            _check_format(ref, sound, resample=resample)
            _require(
                ref,
                find_loss(
                    file,
                    size,
                    container=sound.format,
                    subtype=sound.subtype,
                    channels=sound.channels,
                    num_frames=sound.frames,
                ),
            )
            num_samples = converted_length(sound.frames, sound.samplerate)
            if num_samples < min_samples:
                reason = f"too short: {num_samples} samples at 16 kHz, at least {min_samples} needed"
                raise unusable(ref, reason, "Leave it out.")
            if decode:
                _decode_all(ref, sound)
            info = AudioInfo(num_samples, sound.samplerate, sound.channels)
            first = 0 if _preroll(sound) == WHOLE else num_samples - min(num_samples, MIN_SAMPLES)
    if decode:
        # As a reader will: by a seek of its own, and converted. What it meets must be met here.
        crop = ref._replace(num_samples=num_samples, offset=None)
        try:
            read_waveform(crop, start=first, num_samples=min(num_samples - first, MIN_SAMPLES), resample=resample)
        except AudioError as error:
            reason = f"not seekable: all of it can be decoded, but no crop of it ({error.reason})"
            raise unusable(ref, reason, "Convert it to flac, or leave it out.") from error
    return info


# Checking ---------------------------------------------------------------------------------------------------------


def _not_finite(ref: AudioRef) -> AudioError:
    return unusable(
        ref, "not finite: it holds NaN or infinite samples", "Convert it again from its source, or leave it out."
    )


def _require(ref: AudioRef, fault: Fault | None) -> None:
    if fault is not None:
        raise unusable(ref, fault.reason, fault.advice)


def _check_format(ref: AudioRef, sound: Sound, *, resample: bool) -> None:
    if not MIN_SAMPLE_RATE <= sound.samplerate <= MAX_SAMPLE_RATE:
        reason = (
            f"wrong sample rate: {sound.samplerate} Hz, which no recorder has ({MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz "
            "are read)"
        )
        raise unusable(ref, reason, "Its header is damaged; convert it again from its source, or leave it out.")
    if resample:
        return
    advice = "Convert it, or set `resample = true` under [data] to have it converted on reading."
    if sound.samplerate != SAMPLE_RATE:
        raise unusable(ref, f"wrong sample rate: {sound.samplerate} Hz, expected {SAMPLE_RATE} Hz", advice)
    if sound.channels != 1:
        raise unusable(ref, f"wrong number of channels: {sound.channels}, expected 1", advice)


def _check_length(ref: AudioRef, length: int) -> None:
    """Compare a file's length at 16 kHz with the manifest's: equal for a whole file, enough for a segment."""
    if ref.offset is None and length != ref.num_samples:
        reason = f"changed: the manifest says {ref.num_samples} samples at 16 kHz, the file has {length}"
    elif ref.offset is not None and ref.offset + ref.num_samples > length:
        reason = f"changed: the manifest's segment ends at sample {ref.offset + ref.num_samples}, the file at {length}"
    else:
        return
    raise unusable(ref, reason, "It was replaced after the manifest was built; build the manifest again.")


# Decoding ---------------------------------------------------------------------------------------------------------


class _Decoder:
    """Reads a file of 16 kHz forwards, channels averaged."""

    def __init__(self, ref: AudioRef, sound: Sound) -> None:
        self._ref = ref
        self._sound = sound
        self._position = 0  # counted here, since `tell` seeks

    def read(self, first: int, count: int) -> Waveform:
        """Return samples [first, first + count): (count,). Calls must go forwards."""
        return self._frames(first, count)

    def _frames(self, first: int, count: int) -> Waveform:
        """Decode frames [first, first + count) at the file's own rate: (count,)."""
        sound = self._sound
        origin, position = max(0, first - _preroll(sound) * sound.samplerate), self._position
        if position < origin:
            position = sound.seek(origin)
        while position < first:
            skipped = len(sound.read(min(BLOCK_SAMPLES, first - position), dtype="float32", always_2d=True))
            if skipped == 0:
                break
            position += skipped
        frames = sound.read(count, dtype="float32", always_2d=True)
        self._position = position + len(frames)
        if position != first or len(frames) != count:
            reason = f"truncated or damaged: {len(frames)} of {count} frames could be decoded from frame {first} on"
            raise unusable(self._ref, reason, "It was cut, or replaced after the manifest was built.")
        waveform: Waveform = frames[:, 0] if sound.channels == 1 else frames.mean(axis=1)
        return waveform


class _ResamplingDecoder(_Decoder):
    """Reads a file of another rate forwards, at 16 kHz.

    With the rates reduced to their smallest ratio old:new, output samples [b new, (b + 1) new) come from the input
    around [b old, (b + 1) old), `width` more on each side. So a stretch of whole blocks with the margin, zeros beyond
    the file's ends, gives the very numbers that the whole file gives.
    """

    def __init__(self, ref: AudioRef, sound: Sound) -> None:
        super().__init__(ref, sound)
        self._old, self._new, width, self._convert = build_resampler(sound.samplerate)
        self._margin = -(-width // self._old)
        self._held = np.empty(0, dtype=np.float32)  # decoded already: the margins of neighbouring blocks overlap
        self._held_start = 0

    def read(self, first: int, count: int) -> Waveform:
        """Return samples [first, first + count) at 16 kHz. Calls must go forwards."""
        starts = range(first, first + count, BLOCK_SAMPLES)
        return np.concatenate([self._block(begin, min(begin + BLOCK_SAMPLES, first + count)) for begin in starts])

    def _block(self, begin: int, end: int) -> Waveform:
        old, new, margin = self._old, self._new, self._margin
        start, stop = (begin // new - margin) * old, (-(-end // new) + margin) * old
        inside_start, inside_stop = max(0, start), min(self._sound.frames, stop)
        held_end = self._held_start + len(self._held)
        if inside_start > held_end:
            self._held, held_end = self._held[:0], inside_start
        else:
            self._held = self._held[inside_start - self._held_start :]
        self._held_start = inside_start
        if inside_stop > held_end:
            self._held = np.concatenate([self._held, self._frames(held_end, inside_stop - held_end)])
        padded = torch.zeros(stop - start)
        padded[inside_start - start : inside_stop - start] = torch.from_numpy(self._held[: inside_stop - inside_start])
        shift = (begin // new - margin) * new
        converted: Waveform = self._convert(padded).numpy()[begin - shift : end - shift]
        return converted


def _preroll(sound: Sound) -> int:
    """Return the seconds that are decoded before a crop. DWVW, which only AIFF has, claims that it can be sought."""
    container = sound.format
    if not sound.can_seek or (container == "AIFF" and sound.subtype.startswith("DWVW")):
        return WHOLE
    return PREROLL_SECONDS.get(container, 0)


def _decode_all(ref: AudioRef, sound: Sound) -> None:
    decoded = 0
    while len(block := sound.read(BLOCK_SAMPLES, dtype="float32", always_2d=True)):
        decoded += len(block)
        if not np.isfinite(block).all():
            raise _not_finite(ref)
    if decoded != sound.frames:
        reason = f"truncated or damaged: its header says {sound.frames} frames, {decoded} could be decoded"
        raise unusable(ref, reason, "Copy or convert it again, or leave it out.")
