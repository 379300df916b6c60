"""A corpus of noise with random units, for the tests of the trainer and of validation."""

from pathlib import Path

import numpy as np
import soundfile

from hubert.core.frames import num_units_of
from hubert.units.labels import write_table

NUM_UNITS = 12


def write_corpus(folder: Path, seconds: list[float], *, frame_rate: int = 50, seed: int = 0) -> Path:
    """Write one wav file per entry of `seconds`, and their table; return the table's folder.

    The units of a file follow the loudness of its frames, so there is something to learn.
    """
    generator = np.random.default_rng(seed)
    audio = folder / "audio"
    audio.mkdir(parents=True)
    rows: dict[str, list] = {"fileid": [], "path": [], "num_samples": [], "units": []}
    for number, length in enumerate(seconds):
        num_samples = round(length * 16_000)
        loudness = np.repeat(generator.integers(0, NUM_UNITS, num_samples // 1600 + 1), 1600)[:num_samples]
        waveform = generator.standard_normal(num_samples) * 0.02 * (1 + loudness)
        path = audio / f"file {number}.wav"
        soundfile.write(path, waveform.astype(np.float32), 16_000, subtype="PCM_16")
        (count,) = num_units_of(np.array([num_samples]), frame_rate)
        centres = 16_000 // frame_rate * np.arange(count) + 200
        values = (f"speaker{number % 3}/file {number}", str(path), num_samples, loudness[centres])
        for name, value in zip(rows, values, strict=True):
            rows[name].append(value)
    write_table(folder / "table", [rows], frame_rate=frame_rate, num_units=NUM_UNITS, codebook="test")
    return folder / "table"
