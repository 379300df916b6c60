"""How long audio is cut for extraction: memory stays bounded, and no frame is lost or moved.

A file of n samples has (n - 400) // hop + 1 frames, and frame j looks at samples [hop j, hop j + 400), whether it is cut
or not. So a chunk starts at a multiple of the hop, reads some frames of context on both sides, and those are computed
and thrown away:

    frames of the file   |-------------- kept: 0 … a --------------|------------ kept: a … b ------------|-- …
    chunk 0              |=========================================|+++++|
    chunk 1                                                  |+++++|=====================================|+++++|

fairseq (`dump_hubert_feature.py`, `max_chunk`) cuts at 1,600,000 samples without overlap: each cut loses a frame and
moves all later ones by 80 samples. 1,600,000 samples, 100 s, are the default here too.

A layer's frame depends on the whole chunk (attention, and for base the statistics of the first convolution), so the
rule is part of what long files' units are: it is in the keys of stages with such files, and in the codebook. MFCC looks
at a few frames only, and its chunks give the very values that the whole file gives.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import polars as pl
from torch import Tensor

from hubert.core.frames import FRAME_RATE, HOP, RECEPTIVE_FIELD, SAMPLE_RATE
from hubert.data.audio import BLOCK_SAMPLES, read_spans
from hubert.data.audio_file import AudioRef
from hubert.data.schema import AnyRows
from hubert.model.encoder import EPS
from hubert.settings.sections import FeatureSettings


class Chunk(NamedTuple):
    """What is read (`num_samples` from sample `start`), and which of its frames are kept (`num_frames` after `skip`)."""

    start: int
    num_samples: int
    skip: int
    first_frame: int  # the file's number of the first kept frame
    num_frames: int


def cut(num_samples: int, *, hop: int, max_samples: int, context: int) -> list[Chunk]:
    """Cut a file into chunks that keep each of its frames once, in order; one chunk if it has at most `max_samples`.

    All chunks keep the same number of frames, but for one, so none is much shorter than the others.

    Args:
        num_samples: of the file, at least 400.
        hop: samples between two frames.
        max_samples: the longest chunk, context included.
        context: frames on each side that are read and thrown away, where the file has them.

    Raises:
        ValueError: `max_samples` leaves no frame beside the context.
    """
    frames = (num_samples - RECEPTIVE_FIELD) // hop + 1
    if num_samples <= max_samples:
        return [Chunk(0, num_samples, 0, 0, frames)]
    kept = (max_samples - RECEPTIVE_FIELD) // hop + 1 - 2 * context
    if kept < 1:
        raise ValueError(f"chunks of {max_samples} samples have no frames beside a context of 2 x {context}")
    number = -(-frames // kept)
    chunks = []
    for index in range(number):
        first, end = frames * index // number, frames * (index + 1) // number
        read_from, read_to = max(first - context, 0), min(end + context, frames)
        size = hop * (read_to - read_from - 1) + RECEPTIVE_FIELD
        chunks.append(Chunk(hop * read_from, size, first - read_from, first, end - first))
    return chunks


@dataclass(frozen=True)
class ChunkRule:
    """From which length a file is cut for the teacher, and how much context each chunk has on both sides."""

    max_seconds: float
    context_seconds: float

    @classmethod
    def of(cls, settings: FeatureSettings) -> "ChunkRule":
        """Return the rule that the settings name."""
        return cls(settings.max_chunk_seconds, settings.chunk_context_seconds)

    @property
    def max_samples(self) -> int:
        """The longest file, and the longest chunk, that the teacher is given."""
        return round(self.max_seconds * SAMPLE_RATE)

    def chunks(self, num_samples: int) -> list[Chunk]:
        """Cut a file for the teacher."""
        context = round(self.context_seconds * FRAME_RATE)
        return cut(num_samples, hop=HOP, max_samples=self.max_samples, context=context)

    def to_dict(self) -> dict[str, Any]:
        """Return the rule, JSON-like, as keys and codebooks hold it."""
        return asdict(self)


DEFAULT_RULE = ChunkRule.of(FeatureSettings())


def chunking(rows: AnyRows, settings: FeatureSettings) -> dict[str, Any]:
    """Return what a key has to hold about long files: the rule if a teacher gets one of them in chunks, else nothing.

    So the rule does not enter the keys of a corpus of short files.
    """
    rule = ChunkRule.of(settings)
    longest = rows.lazy().select(pl.col("num_samples").max()).collect(engine="streaming").item() or 0
    return {"chunks": rule.to_dict()} if longest > rule.max_samples else {}


def read_chunks(ref: AudioRef, chunks: list[Chunk], *, resample: bool) -> Iterator[tuple[Chunk, Tensor]]:
    """Yield each chunk with its samples (num_samples,); the file is decoded once. Do not write into them: chunks overlap."""
    spans = [(chunk.start, chunk.num_samples) for chunk in chunks]
    return zip(chunks, read_spans(ref, spans, resample=resample), strict=True)


def level(ref: AudioRef, *, resample: bool) -> tuple[float, float]:
    """Return what to subtract from a file's samples and then to multiply them by, for mean 0 and variance 1."""
    spans = [(start, min(BLOCK_SAMPLES, ref.num_samples - start)) for start in range(0, ref.num_samples, BLOCK_SAMPLES)]
    total, squares = 0.0, 0.0
    for waveform in read_spans(ref, spans, resample=resample):
        exact = waveform.double()
        total, squares = total + float(exact.sum()), squares + float(exact.square().sum())
    mean = total / ref.num_samples
    return mean, (squares / ref.num_samples - mean**2 + EPS) ** -0.5
