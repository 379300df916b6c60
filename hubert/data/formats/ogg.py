"""The pages of an Ogg file (Vorbis, Opus, FLAC, Speex).

Every page says which stream it belongs to, its number, the position in time that it reaches, and whether its stream
begins or ends with it. libsndfile takes the last page that it finds for the end, and reads only the first of streams
that follow each other.
"""

import struct
from typing import BinaryIO

from hubert.data.formats.fault import COPY_AGAIN, Fault, truncated

BEGINS, ENDS = 2, 4
HEADER = struct.Struct("<4sBBqIIIB")
AUDIO_HEADS = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"fLaC", b"Speex   ")


def check_pages(file: BinaryIO, size: int) -> Fault | None:
    """Follow the pages of an Ogg file from the first to the last, without reading what is in them."""
    position = 0
    open_streams: dict[int, int] = {}  # stream: number of its last page
    num_chained = 0
    while position + HEADER.size <= size:
        file.seek(position)
        magic, _, flags, _, stream, number, _, num_segments = HEADER.unpack(file.read(HEADER.size))
        if magic != b"OggS":
            return _check_rest(file, size, position, open_streams)
        table = file.read(num_segments)
        end = position + HEADER.size + num_segments + sum(table)
        if len(table) < num_segments or end > size:
            return truncated(f"its last Ogg page is cut ({end - size} bytes are missing)")
        if flags & BEGINS:
            if file.read(8).startswith(AUDIO_HEADS):
                num_chained += 1
                open_streams[stream] = number
        elif stream in open_streams:
            if number > open_streams[stream] + 1:
                return Fault(
                    f"truncated or damaged: Ogg pages {open_streams[stream] + 1} to {number - 1} are missing",
                    COPY_AGAIN,
                )
            open_streams[stream] = number
        if flags & ENDS:
            open_streams.pop(stream, None)
        position = end
    if position < size and open_streams:
        return truncated("it ends within the header of an Ogg page")
    if open_streams:
        return _unclosed()
    if num_chained > 1:
        return Fault(
            f"chained: {num_chained} Ogg streams follow each other, and only the first would be read",
            "Decode it to flac with `ffmpeg` or `oggdec`, or cut it with `oggz-chop`.",
        )
    return None


def _check_rest(file: BinaryIO, size: int, position: int, open_streams: dict[int, int]) -> Fault | None:
    """Judge bytes that begin no page: between pages something is lost, after the last one it may be a tag."""
    file.seek(position)
    while block := file.read(1 << 20):
        if b"OggS" in block:
            return Fault(f"truncated or damaged: bytes at {position} are no Ogg page, and pages follow", COPY_AGAIN)
        file.seek(file.tell() - min(3, len(block) - 1) if file.tell() < size else size)
    return _unclosed() if open_streams else None


def _unclosed() -> Fault:
    return Fault(
        "truncated or damaged: its last Ogg page is not marked as the end of the stream",
        "It was cut, or its recording was interrupted. Copy it again; if this is all there is, decode it to flac "
        "(`ffmpeg` or `oggdec`), or leave it out.",
    )
