"""The length of a FLAC stream by its last frame, beside the one that its header declares.

libsndfile stops at the declared number of samples, so a header that says too few hides the rest of the file, and a cut
file shows only when it is decoded up to the cut. Every FLAC frame tells its position in its header.
"""

from functools import cache
from typing import BinaryIO

from hubert.data.formats.fault import COPY_AGAIN, Fault, truncated
from hubert.data.formats.mp3 import skip_id3

MAX_FRAME = 1 << 17  # bytes from the end in which the last frame's header is looked for
BLOCK_SIZES = {1: 192, 2: 576, 3: 1152, 4: 2304, 5: 4608} | {8 + code: 256 << code for code in range(8)}


def check_length(file: BinaryIO, size: int) -> Fault | None:
    """Compare the samples that the header of a native FLAC stream declares with where its last frame ends."""
    file.seek(first := skip_id3(file, 0))
    head = file.read(42)
    if head[:4] != b"fLaC" or len(head) < 42 or head[4] & 0x7F != 0:
        return None
    declared = int.from_bytes(head[21:26], "big") & ((1 << 36) - 1)
    fixed_size = int.from_bytes(head[8:10], "big")  # the least block, which is every block's size but the last one's
    start = max(first + 42, size - MAX_FRAME)
    file.seek(start)
    end = _end_of_last_frame(file.read(MAX_FRAME), fixed_size, declared)
    if declared == 0 or end is None or end == declared:
        return None
    if end < declared:
        return truncated(f"its header says {declared} samples, its last FLAC frame ends at {end}")
    return Fault(f"wrong length: its header says {declared} samples, its last FLAC frame ends at {end}", COPY_AGAIN)


def _end_of_last_frame(tail: bytes, fixed_size: int, declared: int) -> int | None:
    """Find the last frame and return the sample it ends before; None if there is no frame.

    What only looks like a header is told apart by where it ends (at the declared length) or by the checksum of the
    frame, which ends the file. If neither fits, the file was cut within its last frame, and the last header is taken.
    """
    tail = tail[:-128] if tail[-128:-125] == b"TAG" else tail
    last = None
    position = len(tail)
    while (position := tail.rfind(b"\xff", 0, position)) >= 0:
        found = _parse(tail[position : position + 16], fixed_size)
        if found is not None and (found == declared or _crc(tail[position:], bits=16, polynomial=0x8005) == 0):
            return found
        last = found if last is None else last
    return last


def _parse(raw: bytes, fixed_size: int) -> int | None:
    """Return the sample that a frame ends before, from its header; None if the bytes are no whole header."""
    if len(raw) < 6 or raw[1] & 0xFE != 0xF8 or raw[3] & 1:
        return None
    size_code, rate_code, channels = raw[2] >> 4, raw[2] & 15, raw[3] >> 4
    if size_code == 0 or rate_code == 15 or channels > 10:
        return None
    lead = raw[4]
    extra = 0 if lead < 0x80 else next((count for count in range(1, 7) if not lead << count & 0x40), 7)
    if lead >= 0x80 and (lead < 0xC0 or extra > 6):
        return None
    number = lead if extra == 0 else lead & (0x3F >> extra)
    for byte in raw[5 : 5 + extra]:
        if byte & 0xC0 != 0x80:
            return None
        number = number << 6 | byte & 0x3F
    position = 5 + extra
    if size_code in {6, 7}:
        width = size_code - 5
        block = int.from_bytes(raw[position : position + width], "big") + 1
        position += width
    else:
        block = BLOCK_SIZES[size_code]
    position += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if position >= len(raw) or _crc(raw[: position + 1], bits=8, polynomial=0x07) != 0:
        return None
    first = number if raw[1] & 1 else number * fixed_size
    return first + block


def _crc(data: bytes, *, bits: int, polynomial: int) -> int:
    """Return the checksum of some bytes, the most significant bit first; 0 if their own checksum ends them."""
    table, mask, value = _crc_table(bits, polynomial), (1 << bits) - 1, 0
    for byte in data:
        value = (value << 8 & mask) ^ table[value >> bits - 8 ^ byte]
    return value


@cache
def _crc_table(bits: int, polynomial: int) -> list[int]:
    table, top, mask = [], 1 << bits - 1, (1 << bits) - 1
    for byte in range(256):
        value = byte << bits - 8
        for _ in range(8):
            value = (value << 1 ^ polynomial) & mask if value & top else value << 1
        table.append(value)
    return table
