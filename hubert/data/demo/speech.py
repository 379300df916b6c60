"""One utterance of the demo corpus: spoken by espeak-ng, recorded in a noisy room, its phones timed.

Accuracy of the times: the engine's own boundaries, exact to the sample at 22.05 kHz, written to 0.1 ms. The engine
counts the silence before a burst with the phone before it; here it belongs to the stop, as phoneticians segment it.
"""

import json
import subprocess
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hubert.core.errors import DataError
from hubert.data.demo import espeak
from hubert.data.phones import SILENCE

SAMPLE_RATE = 16_000

Segments = list[tuple[float, float, str]]  # start and end in seconds, phone
Speech = tuple[list[tuple[str, int]], NDArray[np.int16]]  # mnemonic and first sample of each phone; 22.05 kHz samples

# 20 ms are a whole number of samples at both rates.
_BLOCK_IN, _BLOCK_OUT = 441, 320

# How the recordings vary, evenly between these bounds.
_MARGIN_BLOCKS = (5, 12)  # of silence before and after, 20 ms each
_TILT_DB = (-2.5, 2.5)  # an octave
_ECHO_SECONDS = (0.004, 0.03)
_ECHO_GAIN = (0.0, 0.35)
_SNR_DB = (9.0, 13.0)
_LEVEL_DB = (-30.0, -22.0)  # root mean square of the speech, relative to full scale

# The engine's mnemonic, without stress marks, = the label here: ARPAbet's 39 and AX (reduced vowel), DX (flap),
# EL (syllabic l), and the five vowels with an r (AAR, AOR, EHR, IHR, UHR), which the engine speaks as one phone.
_MNEMONICS = """
    b=B d=D f=F g=G k=K l=L m=M n=N p=P r=R s=S t=T v=V w=W z=Z D=DH N=NG S=SH T=TH Z=ZH dZ=JH h=HH j=Y tS=CH
    n-=N r-=R t2=T ?=T t#=DX @L=EL 0=AA A:=AA a=AE aa=AE V=AH @=AX @2=AX a#=AX O:=AO O2=AO aU=AW aI=AY aI@=AY aI3=AY
    E=EH 3:=ER 3=ER eI=EY I=IH I2=IH I#=IH i:=IY i=IY oU=OW OI=OY U=UH u:=UW A@=AAR O@=AOR o@=AOR e@=EHR i@=IHR
    i@3=IHR U@=UHR _=SIL _:=SIL _|=SIL
"""
PHONES = dict(pair.split("=") for pair in _MNEMONICS.split())
_STRESS = "',%="
_GLIDE = ";"  # the passage from a front vowel to the next vowel: part of the first one


def speak(requests: list[dict[str, Any]], library: str, data: str) -> list[Speech]:
    """Let one engine process speak all requests, each independent of the others.

    Args:
        requests: the keyword arguments of `espeak.speak` for each utterance.
        library: path of libespeak-ng.
        data: path of the folder `espeak-ng-data`.

    Raises:
        DataError: the engine stopped; names the utterance and the reason.
    """
    command = [sys.executable, "-I", "-S", espeak.__file__, library, data]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    answer = subprocess.run(command, input=lines.encode(), capture_output=True, check=False)
    if answer.returncode != 0:
        reason = answer.stderr.decode(errors="replace").strip().replace("\n", "; ")
        raise DataError(f"the speech engine ended with status {answer.returncode}: {reason}; reinstall espeakng-loader")
    speeches: list[Speech] = []
    output = memoryview(answer.stdout)
    while output:
        header, pcm = espeak.FRAME.unpack_from(output)
        middle, end = espeak.FRAME.size + header, espeak.FRAME.size + header + pcm
        phones = [(name, sample) for name, sample in json.loads(bytes(output[espeak.FRAME.size : middle]))]
        speeches.append((phones, np.frombuffer(output[middle:end], np.int16)))
        output = output[end:]
    return speeches


def record(speech: Speech, rng: np.random.Generator) -> tuple[NDArray[np.int16], Segments]:
    """Return the 16 kHz recording of an utterance and its segments, which cover it without gap or overlap.

    Raises:
        DataError: the engine gave a phone that is not known here.
    """
    phones, pcm = speech
    lead, tail = (int(blocks) * _BLOCK_IN for blocks in rng.integers(*_MARGIN_BLOCKS, size=2, endpoint=True))
    num_blocks = -(-(lead + len(pcm) + tail) // _BLOCK_IN)
    samples = np.zeros(num_blocks * _BLOCK_IN)
    samples[lead : lead + len(pcm)] = pcm / 2**15
    return _add_room(samples, rng), _align([(name, lead + sample) for name, sample in phones], samples)


def _add_room(speech: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int16]:
    """Record speech as a cheap microphone in a room would: 22.05 kHz in, as many 20 ms blocks at 16 kHz out.

    One pass through the frequency domain tilts the spectrum, adds one echo and resamples; then come noise (white mixed
    with pink) and gain. Nothing moves the speech in time.
    """
    num_samples = len(speech) // _BLOCK_IN * _BLOCK_OUT
    frequencies = np.fft.rfftfreq(num_samples, 1 / SAMPLE_RATE)
    tilt = rng.uniform(*_TILT_DB) * np.log2(np.maximum(frequencies, 100) / 1000)
    echo = rng.uniform(*_ECHO_GAIN) * np.exp(-2j * np.pi * frequencies * rng.uniform(*_ECHO_SECONDS))
    low_pass = np.clip((SAMPLE_RATE / 2 - frequencies) / 400, 0, 1)
    spectrum = np.fft.rfft(speech)[: len(frequencies)] * 10 ** (tilt / 20) * (1 + echo) * low_pass
    clean = np.fft.irfft(spectrum, num_samples) * (_BLOCK_OUT / _BLOCK_IN)
    level = np.sqrt(np.sum(clean**2) / (np.count_nonzero(speech) * _BLOCK_OUT / _BLOCK_IN))

    pink = 1 / np.maximum(frequencies, 50)
    mix = rng.uniform()
    amplitude = np.sqrt(mix * pink / pink.mean() + 1 - mix)
    gaussian = rng.standard_normal(len(frequencies)) + 1j * rng.standard_normal(len(frequencies))
    noise = np.fft.irfft(amplitude * gaussian, num_samples)
    noise *= level / np.sqrt(np.mean(noise**2)) / 10 ** (rng.uniform(*_SNR_DB) / 20)

    recording = (clean + noise) / level * 10 ** (rng.uniform(*_LEVEL_DB) / 20)
    pcm: NDArray[np.int16] = np.round(np.clip(recording * 2**15, -(2**15), 2**15 - 1)).astype(np.int16)
    return pcm


def _align(phones: list[tuple[str, int]], speech: NDArray[np.float64]) -> Segments:
    """Turn the engine's phones (mnemonic, first sample) into segments."""
    segments: list[tuple[int, str]] = [(0, SILENCE)]  # first sample, label
    for mnemonic, first in phones:
        name = mnemonic.strip(_STRESS)
        if name == _GLIDE:
            continue
        if name not in PHONES:
            raise DataError(
                f"espeak-ng gave the phone {mnemonic!r}, which hubert/data/demo/speech.py does not know; "
                "the version of espeakng-loader may be too new: install 0.2.4"
            )
        start, label, (previous, previous_label) = first, PHONES[name], segments[-1]
        if previous_label != SILENCE:  # zeros at the end of a phone are the closure of the next one, or a short gap
            start = previous + _last_sounding(speech[previous:first])
        if start == previous:
            segments.pop()
        if not segments or segments[-1][1] != SILENCE or label != SILENCE:
            segments.append((start, label))
    if segments[-1][1] != SILENCE:
        segments.append((_last_sounding(speech), SILENCE))
    edges = [*(start / espeak.SAMPLE_RATE for start, _ in segments), len(speech) / espeak.SAMPLE_RATE]
    return [
        (round(start, 4), round(end, 4), label)
        for start, end, (_, label) in zip(edges, edges[1:], segments, strict=False)
    ]


def _last_sounding(samples: NDArray[np.float64]) -> int:
    """Return the number of samples up to the last one that is not zero."""
    sounding = np.flatnonzero(samples)
    return int(sounding[-1]) + 1 if len(sounding) else 0
