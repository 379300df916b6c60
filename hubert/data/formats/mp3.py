"""The frames of an MPEG audio file (layers I to III), counted from their headers.

libmpg123, behind libsndfile, believes a Xing or Info header's number of frames. Without one it estimates the length
from the first frames' bit rate, and libsndfile stops reading there: right for a constant bit rate, a part of the file
for a variable one. Each frame's header gives its length in bytes and in samples, so counting them is exact.
"""

from typing import BinaryIO, NamedTuple

from hubert.data.formats.fault import Fault, truncated

WINDOW = 1 << 20  # bytes held at once
SYNC = 0xFFE0_0000
SAME = 0xFFFE_0C00  # bits that all frames of a file share: sync, version, layer, sample rate
MAX_SLACK = 1152 * 3  # samples: what a decoder's delay takes from the ends, beside what the header says

RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # by version: 1, 2, 2.5
KILOBITS = {  # by (version 1, layer)
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}

REMEDY = (
    "Rewrite it without loss, which adds the header (`ffmpeg -i old.mp3 -c copy new.mp3`), convert it to flac, or leave "
    "it out."
)


class Count(NamedTuple):
    """What the frames of a file add up to. A Xing, Info or VBRI header's own frame holds no audio and is not counted."""

    num_frames: int
    samples_per_frame: int
    header_frames: int | None  # what the Xing or Info header says; None: there is none
    delay: int  # samples that the header tells a decoder to drop at both ends
    is_variable: bool  # frames of different bit rates
    is_partial: bool  # the last frame is cut
    junk: int  # bytes between and after the frames that belong to no frame and no tag


def frame_size(header: int) -> tuple[int, int]:
    """Return the bytes and samples of the frame that a header (32 bits) opens: (0, 0) if it is none.

    Free format, whose headers do not tell the length, gives (-1, samples).
    """
    version, layer = header >> 19 & 3, 4 - (header >> 17 & 3)
    rate, bits = header >> 10 & 3, header >> 12 & 15
    if header & SYNC != SYNC or version == 1 or layer == 4 or rate == 3 or bits == 15:
        return 0, 0
    samples = 384 if layer == 1 else 1152 if layer == 2 or version == 3 else 576
    if bits == 0:
        return -1, samples
    bit_rate, padding = KILOBITS[version == 3, layer][bits] * 1000, header >> 9 & 1
    if layer == 1:
        return (12 * bit_rate // RATES[version][rate] + padding) * 4, samples
    return samples // 8 * bit_rate // RATES[version][rate] + padding, samples


# By the 12 bits that decide: of version, layer, protection, bit rate, sample rate and padding.
_SIZES = [frame_size(SYNC | bits << 9) for bits in range(1 << 12)]


def skip_id3(file: BinaryIO, position: int) -> int:
    """Return where the ID3v2 tags that begin at `position` end."""
    while True:
        file.seek(position)
        head = file.read(10)
        if len(head) < 10 or head[:3] != b"ID3" or any(byte > 127 for byte in head[6:]):
            return position
        length = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        position += 10 + length + (10 if head[5] & 0x10 else 0)


def count_frames(file: BinaryIO, size: int) -> Count | Fault | None:
    """Count the frames of a file of `size` bytes, all of which are read; None if it holds none.

    Returns a Fault for free format, in which no frame tells its length.
    """
    end = _end_of_audio(file, size)
    view = _View(file, size)
    position = skip_id3(file, 0)
    first = _find_first(view, position, end)
    if first is None:
        return None
    same, (_, samples) = view.word(first) & SAME, frame_size(view.word(first))
    if frame_size(view.word(first))[0] < 0:
        return Fault("free format: an mp3 whose frames do not tell their length", REMEDY)
    header_frames, delay, is_header = _read_xing(view, first)
    position, count, junk, bit_rates, partial = first, 0, 0, set(), False
    while position + 4 <= end:
        word = view.word(position)
        length = _SIZES[word >> 9 & 0xFFF][0] if word & SAME == same else 0
        if length > 0 and position + length > end:
            partial = True
            break
        if length > 0:
            position += length
            count += 1
            bit_rates.add(word >> 12 & 15)
            continue
        after = skip_id3(file, position) if word >> 8 == 0x494433 else position
        if after > position:
            position = after
            continue
        found = _resync(view, position + 1, end, same)
        junk += found - position
        position = found
    if not partial:
        junk += end - position
    count -= is_header
    return Count(count, samples, header_frames, delay, len(bit_rates) > 1 + is_header, partial, junk)


def check_count(found: Count, *, num_frames: int) -> Fault | None:
    """Compare what the frames add up to with `num_frames`, the samples per channel that libsndfile would read."""
    declared, counted = found.header_frames, found.num_frames
    if declared is not None and counted < declared and (found.is_partial or found.junk == 0):
        return truncated(f"its Xing header says {declared} MPEG frames, it has {counted}")
    if found.is_partial and (declared is None or counted < declared):
        return truncated(f"its last MPEG frame, number {counted + 1}, is cut")
    if declared is not None and declared != counted:
        return Fault(
            f"wrong length: its Xing header says {declared} MPEG frames, it has {counted} (files joined together?)",
            REMEDY,
        )
    held = counted * found.samples_per_frame
    slack = found.delay + MAX_SLACK if declared is not None else found.samples_per_frame
    if held - slack <= num_frames <= held:
        return None
    rate = "of a variable bit rate " if found.is_variable else ""
    return Fault(
        f"unknown length: an mp3 {rate}without a Xing or Info header; its {counted} MPEG frames hold {held} samples, "
        f"libsndfile estimates {num_frames}",
        REMEDY,
    )


class _View:
    """A file's bytes, a window at a time."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._start, self._held = file, size, 0, b""

    def bytes(self, position: int, count: int) -> bytes:
        """Return the bytes from `position` on; fewer at the end."""
        offset = position - self._start
        if offset < 0 or offset + count > len(self._held):
            self._file.seek(position)
            self._start, self._held, offset = position, self._file.read(max(WINDOW, count)), 0
        return self._held[offset : offset + count]

    def word(self, position: int) -> int:
        """Return the 32 bits at a position."""
        return int.from_bytes(self.bytes(position, 4), "big")


def _end_of_audio(file: BinaryIO, size: int) -> int:
    """Return where the tags at the end begin: ID3v1, APE and Lyrics3."""
    end = size
    file.seek(max(0, end - 128))
    if size >= 128 and file.read(3) == b"TAG":
        end -= 128
    while end >= 32:
        file.seek(end - 32)
        tail = file.read(32)
        if tail[:8] == b"APETAGEX":
            length = int.from_bytes(tail[12:16], "little") + (32 if tail[23] & 0x80 else 0)
        elif tail[-9:] == b"LYRICS200" and tail[-15:-9].isdigit():
            length = int(tail[-15:-9]) + 15
        else:
            break
        if not 0 < length <= end:
            break
        end -= length
    return end


def _find_first(view: _View, position: int, end: int) -> int | None:
    """Find the first frame: a header that another one of its kind, or the end, follows."""
    stop = min(end, position + WINDOW)
    while position + 4 <= stop:
        position = _next_sync(view, position, stop)
        word = view.word(position) if position + 4 <= stop else 0
        length, _ = frame_size(word)
        follows = position + length
        if length < 0 or (length > 0 and (follows + 4 > end or view.word(follows) & SAME == word & SAME)):
            return position
        position += 1
    return None


def _resync(view: _View, position: int, end: int, same: int) -> int:
    """Find the next frame after bytes that are none: a header of this file's kind that another one, or the end, follows."""
    while position + 4 <= end:
        position = _next_sync(view, position, end)
        word = view.word(position) if position + 4 <= end else 0
        length = frame_size(word)[0] if word & SAME == same else 0
        if length > 0 and (position + length == end or view.word(position + length) & SAME == same):
            return position
        position += 1
    return end


def _next_sync(view: _View, position: int, end: int) -> int:
    """Return the next position, from this one on, of a byte of ones; `end` if there is none."""
    while position < end:
        held = view.bytes(position, min(4096, end - position))
        if not held:
            break
        found = held.find(0xFF)
        if found >= 0:
            return position + found
        position += len(held)
    return end


def _read_xing(view: _View, first: int) -> tuple[int | None, int, bool]:
    """Read the header in the first frame: (frames, samples to drop at both ends, whether the frame is a header).

    libmpg123 does not know VBRI, and decodes its frame as audio; so it counts as audio here.
    """
    word = view.word(first)
    is_first_version, is_mono = word >> 19 & 3 == 3, word >> 6 & 3 == 3
    side = (17 if is_mono else 32) if is_first_version else (9 if is_mono else 17)
    for start in (4 + side, 6 + side):  # with a checksum before it, or without
        body = view.bytes(first + start, 200)
        if body[:4] not in {b"Xing", b"Info"}:
            continue
        flags = int.from_bytes(body[4:8], "big")
        frames = int.from_bytes(body[8:12], "big") if flags & 1 else None
        lame = 8 + 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
        trims = int.from_bytes(body[lame + 21 : lame + 24], "big") if body[lame : lame + 4].strip(b"\0") else 0
        return frames, (trims >> 12) + (trims & 0xFFF), True
    return None, 0, False
