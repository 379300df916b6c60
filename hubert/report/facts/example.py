"""One utterance of the validation audio, to look at and to listen to: its samples, its units, its phones.

The choice is settled by the files' names alone, so nobody picks a nice one: of the utterances that last 2 to 8 s, the
first in the order of the names' hashes, among those with a phone alignment if there are any. Where all are longer, the
first 8 s of one are shown.

The report keeps a copy beside its page, because the corpus may be gone when the page is written again:

    example.flac   the samples, 16 kHz, 16 bits
    example.json   name, units with their frame rate, phones with their times
"""

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import soundfile

from hubert.core.errors import DataError, HubertError
from hubert.core.files import atomic_write, read_json, write_json
from hubert.core.frames import RECEPTIVE_FIELD, SAMPLE_RATE, num_units_of
from hubert.core.hashing import hash_fileids
from hubert.data.audio import read_waveform
from hubert.data.audio_file import AudioRef
from hubert.data.schema import SEGMENT
from hubert.evaluation.quality.alignments import Alignments, read_alignments
from hubert.units.labels import Table

MIN_SECONDS, MAX_SECONDS = 2.0, 8.0
MAX_CANDIDATES = 10_000  # utterances whose names are looked for in the alignments
AUDIO, CONTENT = "example.flac", "example.json"

NO_PHONES = "No phone alignment covers it."

Samples = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Example:
    """An utterance, or its first seconds.

    `samples` are those of the file at 16 kHz; `units` has one number per frame; `phones` are (start, end, name) in
    seconds from the first sample, None without an alignment.
    """

    fileid: str
    samples: Samples
    units: list[int]
    frame_rate: int
    phones: list[tuple[float, float, str]] | None
    is_cut: bool

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.samples) / SAMPLE_RATE

    def runs(self) -> Iterator[tuple[float, float, int]]:
        """Yield start and end in seconds, and the unit, of each run of equal units.

        A frame is drawn around the centre of its window of 400 samples, as wide as the frames are apart.
        """
        hop = 1 / self.frame_rate
        first = RECEPTIVE_FIELD / 2 / SAMPLE_RATE - hop / 2
        values = np.asarray(self.units)
        edges = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
        for begin, end in pairwise(edges):
            yield first + begin * hop, first + end * hop, int(values[begin])

    def flac(self) -> bytes:
        """Return the samples as a FLAC file: lossless, and browsers play it."""
        buffer = io.BytesIO()
        soundfile.write(buffer, self.samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        return buffer.getvalue()

    def content(self) -> dict[str, Any]:
        """Return everything but the samples, as JSON-like values."""
        described = asdict(self)
        del described["samples"]
        return described

    def address(self) -> str:
        """Return the audio as an address that holds the sound itself: nothing is loaded for it."""
        return f"data:audio/flac;base64,{base64.b64encode(self.flac()).decode()}"

    def save(self, folder: Path) -> list[Path]:
        """Write the copy that stays with the report; return its files."""
        audio, content = folder / AUDIO, folder / CONTENT
        with atomic_write(audio) as temporary:
            temporary.write_bytes(self.flac())
        write_json(content, self.content())
        return [audio, content]

    @classmethod
    def load(cls, folder: Path) -> "Example | None":
        """Return the copy that was kept with a report; None if there is none."""
        content = read_json(folder / CONTENT)
        if content is None or not (folder / AUDIO).exists():
            return None
        samples, _ = soundfile.read(folder / AUDIO, dtype="int16")
        phones = content.pop("phones")
        return cls(**content, samples=samples, phones=None if phones is None else [tuple(one) for one in phones])


def find_example(table_folder: Path, alignments: Path | None, kept: Sequence[Path] = ()) -> tuple[Example | None, str]:
    """Return an utterance of the validation table; if its audio or its phones are gone, a copy that a report kept.

    Args:
        table_folder: the validation's units with their audio.
        alignments: the phones; None if there are none.
        kept: folders of reports of this iteration; a copy counts if its units are those of the table.

    Returns:
        The example, and a sentence about what is missing of it (empty if nothing is).
    """
    try:
        example, missing = build_example(table_folder, alignments)
    except (HubertError, OSError) as error:
        example, missing = None, f"No utterance can be shown: {error}"
    if example is None or (example.phones is None and alignments is not None and not alignments.exists()):
        copies = (Example.load(folder) for folder in kept)
        copy = next((copy for copy in copies if copy is not None and _is_of(copy, table_folder)), None)
        if copy is not None:
            return copy, "" if copy.phones is not None else NO_PHONES
    return example, missing


def _is_of(example: Example, table_folder: Path) -> bool:
    """Return True if a copy has the units of the table."""
    try:
        table = Table(table_folder)
    except DataError:
        return False
    rows = np.flatnonzero(table.fileid_hash == hash_fileids([example.fileid])[0])
    return any(table.units(int(row))[: len(example.units)].tolist() == example.units for row in rows)


def build_example(table_folder: Path, alignments: Path | None) -> tuple[Example, str]:
    """Choose an utterance and read its audio, units and phones.

    Raises:
        DataError: there is no table of validation units, or the audio cannot be read.
    """
    table = Table(table_folder)
    rows = list_candidates(table)
    refs = [table.audio_ref(row) for row in rows]
    aligned, missing = _read_alignments(alignments, refs)
    chosen = next((place for place, ref in enumerate(refs) if aligned is not None and _name_in(aligned, ref)), 0)
    ref = refs[chosen]
    num_samples = min(ref.num_samples, round(MAX_SECONDS * SAMPLE_RATE))
    waveform = read_waveform(ref, num_samples=num_samples, resample=table.resample).numpy()
    samples = np.clip(np.rint(waveform * 32768), -32768, 32767).astype(np.int16)
    (num_units,) = num_units_of(np.array([num_samples]), table.frame_rate)
    phones = None if aligned is None else _phones_of(aligned, ref, num_samples)
    if phones is None and not missing:
        missing = NO_PHONES
    units = table.units(rows[chosen])[:num_units].tolist()
    example = Example(ref.fileid, samples, units, table.frame_rate, phones, is_cut=num_samples < ref.num_samples)
    return example, "" if phones is not None else missing


def list_candidates(table: Table) -> list[int]:
    """Return rows that may be shown, by the hash of their names: those of 2 to 8 s, else longer ones, else the longest.

    Raises:
        DataError: the table is empty.
    """
    if len(table) == 0:
        raise DataError(f"{table.folder} has no file: expected validation audio; `data.validation` names it")
    seconds = np.asarray(table.num_samples) / SAMPLE_RATE
    usable = np.flatnonzero((seconds >= MIN_SECONDS) & (seconds <= MAX_SECONDS))
    if not len(usable):
        usable = np.flatnonzero(seconds >= min(MIN_SECONDS, float(seconds.max())))
    order = np.argsort(table.fileid_hash[usable], kind="stable")
    return [int(row) for row in usable[order][:MAX_CANDIDATES]]


def _names(ref: AudioRef) -> list[str]:
    """Return what an alignment may call an utterance: its own name, and that of the recording that it is a segment of."""
    return [ref.fileid] if ref.offset is None else [ref.fileid, re.sub(SEGMENT, "", ref.fileid)]


def _read_alignments(path: Path | None, refs: Sequence[AudioRef]) -> tuple[Alignments | None, str]:
    if path is None:
        return None, "The recipe names no phone alignments, so there is no row of phones."
    try:
        return read_alignments(path, {name for ref in refs for name in _names(ref)}), ""
    except (
        DataError
    ):  # of other audio than the validation's, mostly; the stage `quality` has complained of anything else
        return (
            None,
            f"No phones of it are known: {path.name} is not there, or is about other audio than the validation's.",
        )


def _name_in(alignments: Alignments, ref: AudioRef) -> str | None:
    """Return the name under which the alignments know an utterance; None if they do not."""
    return next((name for name in _names(ref) if name in alignments), None)


def _phones_of(alignments: Alignments, ref: AudioRef, num_samples: int) -> list[tuple[float, float, str]] | None:
    name = _name_in(alignments, ref)
    if name is None:
        return None
    origin = 0.0 if name == ref.fileid else (ref.offset or 0) / SAMPLE_RATE
    length = num_samples / SAMPLE_RATE
    rows = alignments.frame.filter(pl.col("fileid") == name).select("start", "end", "phone").iter_rows()
    moved = ((start - origin, end - origin, phone) for start, end, phone in rows)
    return [(max(start, 0.0), min(end, length), phone) for start, end, phone in moved if end > 0 and start < length]


def best_phones(joint: Mapping[str, Any]) -> dict[int, str]:
    """Return each unit's most likely phone, from `joint.json` of the stage `quality`; without units that have no frame."""
    counts = np.asarray(joint["counts"], dtype=np.int64).reshape(len(joint["phones"]), joint["units"])
    return {int(unit): joint["phones"][int(counts[:, unit].argmax())] for unit in np.flatnonzero(counts.sum(0))}
