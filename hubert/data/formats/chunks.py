"""Where the audio of a chunked container lies, by its own size fields: WAV, RF64, Wave64, AIFF, AU, CAF, NIST SPHERE.

libsndfile takes the smaller of what a header declares and what the file holds, without a word. So a file that was cut,
or whose header was never completed, reads as a shorter one. Here both are compared.
"""

import io
import struct
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from hubert.data.formats.fault import COPY_AGAIN, Fault, truncated

# Programs that write to a pipe cannot know the size, and put one of these there: ffmpeg and lame 2^32 - 1 or 2^31 - 1,
# sox, mplayer and espeak 0x7FFFF000, alsa 0x7FFFFF00; each less the header or rounded down to whole frames.
OPEN_SIZES = (0xFFFF_FFFF, 0x7FFF_FFFF, 0x7FFF_F000, 0x7FFF_FF00)
OPEN_AIFF_SIZES = (0xFFFF_FFFF, 0x7FFF_FFFF, 0x7F00_0000)  # the last one is sox's
OPEN_WIDE_SIZES = (0xFFFF_FFFF_FFFF_FFFF, 0x7FFF_FFFF_FFFF_FFFF)

W64_GUID = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # ends the name of every chunk but the first
PADDING = 1 << 16  # zeros after the last chunk, up to a whole sector or page of the recorder's disk
SPARE = 16  # bytes after the last chunk that are always let pass
MAX_CHUNKS = 10_000

BYTES_PER_SAMPLE = {
    "PCM_S8": 1,
    "PCM_U8": 1,
    "PCM_16": 2,
    "PCM_24": 3,
    "PCM_32": 4,
    "FLOAT": 4,
    "DOUBLE": 8,
    "ULAW": 1,
    "ALAW": 1,
}


class Payload(NamedTuple):
    """The audio in a container, in bytes: where it starts, its declared size, and where what is declared ends."""

    container: str
    start: int
    size: int | None  # None: left open by a program that wrote to a pipe, so it goes up to the end of the file
    end: int


def find_payload(file: BinaryIO, size: int) -> Payload | Fault | None:
    """Find the audio in a file of `size` bytes.

    Returns a Fault if its codec is known and cannot be read, None if it is no container of this module, or has no audio
    (libsndfile then says what it is).
    """
    file.seek(0)
    head = file.read(64)
    for magic, find in FINDERS.items():
        if head.startswith(magic):
            try:
                return find(file, size)
            except (struct.error, ValueError):
                return None  # the header itself is cut or nonsense, which libsndfile reports
    return None


def check_payload(file: BinaryIO, size: int, found: Payload) -> Fault | None:
    """Compare what a container declares with the bytes that it has, in both directions."""
    if found.size is None:
        return None
    held = size - found.start
    if found.size > held:
        return truncated(f"its {found.container} header says {found.size} bytes of audio, it has {max(0, held)}")
    rest = size - found.end
    if rest <= max(SPARE, min(4096, found.size // 100)):
        return None
    file.seek(found.end)
    tail = file.read(PADDING + 1)
    if tail[:3] in {b"TAG", b"ID3"} or tail[:8] == b"APETAGEX" or (len(tail) <= PADDING and not any(tail)):
        return None
    return Fault(
        f"wrong length: its {found.container} header says {found.size} bytes of audio, and {rest} bytes follow that "
        "nothing in it declares",
        "It was never completed (the recording was interrupted), or is damaged. Repair the header (`sox --ignore-length` "
        "reads all of a wav), or leave it out.",
    )


def check_num_frames(found: Payload, size: int, *, num_frames: int, channels: int, subtype: str) -> Fault | None:
    """Compare the frames that libsndfile would read of an uncompressed file with its bytes."""
    width = BYTES_PER_SAMPLE.get(subtype, 0) * channels
    held = size - found.start if found.size is None else found.size
    if width == 0 or held - num_frames * width < width + max(SPARE, min(4096, held // 100)):
        return None
    return Fault(
        f"wrong length: {num_frames} frames would be read of {held} bytes of audio, which hold {held // width}",
        COPY_AGAIN,
    )


def _is_open(size: int, limits: tuple[int, ...], start: int, frame: int) -> bool:
    """Return True if a declared size only stands for "unknown": a limit, less the header, or down to whole frames."""
    sizes = [limit - less for limit in limits for less in (0, start - 8, start)]
    return any(size in {one, one - one % max(1, frame)} for one in sizes)


def _walk(
    file: BinaryIO, size: int, position: int, read_header: Callable[[bytes], tuple[bytes, int]], *, width: int, pad: int
) -> list[tuple[bytes, int, int]]:
    """List the chunks (name, first byte, bytes) from `position` on, up to the first that does not fit into the file.

    Args:
        file: the container.
        size: its bytes.
        position: of the first chunk.
        read_header: gives name and size (of what follows the header) from a header's bytes.
        width: bytes of a header.
        pad: chunks start at multiples of this.
    """
    chunks: list[tuple[bytes, int, int]] = []
    while position + width <= size and len(chunks) < MAX_CHUNKS:
        file.seek(position)
        name, length = read_header(file.read(width))
        if not all(0x20 <= byte < 0x7F for byte in name[:4]) or length < 0:
            previous = sum(chunks[-1][1:]) if chunks else position
            if previous == position:
                break
            position = previous  # some programs leave out the byte that pads a chunk
            continue
        start = position + width
        chunks.append((name, start, length))
        if start + length > size:
            break
        position = start + length
        position += -position % pad
    return chunks


def _chunk(chunks: list[tuple[bytes, int, int]], name: bytes) -> tuple[int, int] | None:
    return next(((start, length) for found, start, length in chunks if found[:4] == name), None)


def _end(chunks: list[tuple[bytes, int, int]], size: int) -> int:
    """Return where the last chunk that fits into the file ends."""
    return max((start + length for _, start, length in chunks if start + length <= size), default=0)


def _riff(file: BinaryIO, size: int) -> Payload | None:
    file.seek(0)
    head = file.read(12)
    if head[8:] != b"WAVE":
        return None
    order = ">" if head[:4] == b"RIFX" else "<"
    chunks = _walk(file, size, 12, lambda raw: struct.unpack(f"{order}4sI", raw), width=8, pad=2)
    data, form = _chunk(chunks, b"data"), _chunk(chunks, b"fmt ")
    if data is None:
        return None
    start, length = data
    frame = 1
    if form is not None:
        file.seek(form[0] + 12)
        (frame,) = struct.unpack(f"{order}H", file.read(2))
    if head[:4] in {b"RF64", b"BW64"} and length == OPEN_SIZES[0] and (wide := _chunk(chunks, b"ds64")) is not None:
        file.seek(wide[0] + 8)
        (length,) = struct.unpack("<Q", file.read(8))
        is_open = length in OPEN_WIDE_SIZES
        after = start + length + length % 2
        if not is_open and after < size:
            rest = _walk(file, size, after, lambda raw: struct.unpack("<4sI", raw), width=8, pad=2)
            return Payload("RF64", start, length, max(start + length, _end(rest, size)))
        return Payload("RF64", start, None if is_open else length, size if is_open else start + length)
    if _is_open(length, OPEN_SIZES, start, frame):
        return Payload("WAV", start, None, size)
    return Payload("WAV", start, length, max(min(start + length, size), _end(chunks, size)))


def _wave64(file: BinaryIO, size: int) -> Payload | None:
    def header(raw: bytes) -> tuple[bytes, int]:
        name, length = struct.unpack("<16sQ", raw)
        return (name, length - 24) if name[4:] == W64_GUID else (b"\0\0\0\0", 0)

    data = _chunk(chunks := _walk(file, size, 40, header, width=24, pad=8), b"data")
    if data is None:
        return None
    start, length = data
    if length + 24 in OPEN_WIDE_SIZES or length in OPEN_WIDE_SIZES:
        return Payload("Wave64", start, None, size)
    return Payload("Wave64", start, length, max(min(start + length, size), _end(chunks, size)))


def _aiff(file: BinaryIO, size: int) -> Payload | None:
    file.seek(8)
    if file.read(4) not in {b"AIFF", b"AIFC"}:
        return None
    chunks = _walk(file, size, 12, lambda raw: struct.unpack(">4sI", raw), width=8, pad=2)
    sound, common = _chunk(chunks, b"SSND"), _chunk(chunks, b"COMM")
    if sound is None:
        return None
    start, length = sound
    file.seek(start)
    (offset,) = struct.unpack(">I", file.read(4))
    frame = 1
    if common is not None:
        file.seek(common[0])
        channels, _, bits = struct.unpack(">HIH", file.read(8))
        frame = channels * (-(-bits // 8))
    first = start + 8 + offset
    if _is_open(length - 8, OPEN_AIFF_SIZES, first, frame) or _is_open(length, OPEN_AIFF_SIZES, first, frame):
        return Payload("AIFF", first, None, size)
    return Payload("AIFF", first, length - 8 - offset, max(min(start + length, size), _end(chunks, size)))


def _au(file: BinaryIO, _size: int) -> Payload:
    file.seek(0)
    order = ">" if file.read(4) == b".snd" else "<"
    start, length = struct.unpack(f"{order}II", file.read(8))
    return Payload("AU", start, None if length == OPEN_SIZES[0] else length, start + length)


def _caf(file: BinaryIO, size: int) -> Payload | None:
    data = _chunk(chunks := _walk(file, size, 8, lambda raw: struct.unpack(">4sQ", raw), width=12, pad=1), b"data")
    if data is None:
        return None
    start, length = data
    if length in OPEN_WIDE_SIZES:
        return Payload("CAF", start + 4, None, size)
    return Payload("CAF", start + 4, length - 4, max(min(start + length, size), _end(chunks, size)))


def _sphere(file: BinaryIO, size: int) -> Payload | Fault | None:
    file.seek(8)
    start = int(file.read(8))
    file.seek(0)
    fields = {}
    for line in io.BytesIO(file.read(start)).read().decode("latin-1").splitlines()[2:]:
        name, kind, value = [*line.split(None, 2), "", "", ""][:3]
        if name == "end_head":
            break
        fields[name] = int(value) if kind == "-i" else value.strip()
    coding = str(fields.get("sample_coding", "pcm"))
    if "embedded-" in coding:
        return Fault(
            f"compressed: NIST SPHERE of {coding}, which libsndfile does not read",
            "Decompress it with `sph2pipe -f wav` or NIST's `w_decode`, or leave it out.",
        )
    numbers = [fields.get(name) for name in ("sample_count", "channel_count", "sample_n_bytes")]
    count, channels, width = (one if isinstance(one, int) else None for one in numbers)
    if count is None:
        return Payload("NIST SPHERE", start, None, size)
    length = count * (channels or 1) * (width or (1 if "law" in coding else 2))
    return Payload("NIST SPHERE", start, length, start + length)


FINDERS: dict[bytes, Callable[[BinaryIO, int], Payload | Fault | None]] = {
    b"RIFF": _riff,
    b"RIFX": _riff,
    b"RF64": _riff,
    b"BW64": _riff,
    b"riff\x2e\x91\xcf\x11": _wave64,
    b"FORM": _aiff,
    b".snd": _au,
    b"dns.": _au,
    b"caff": _caf,
    b"NIST_1A": _sphere,
}
