"""Whether a file's bytes are what libsndfile makes of them: nothing missing, nothing left over, whatever the container."""

from typing import BinaryIO

from hubert.data.formats import flac, mp3, ogg
from hubert.data.formats.chunks import Payload, check_num_frames, check_payload, find_payload
from hubert.data.formats.fault import Fault


def find_fault(file: BinaryIO, size: int) -> Fault | None:
    """Look for a fault in a file of `size` bytes by its own structure, before libsndfile opens it."""
    file.seek(mp3.skip_id3(file, 0))
    magic = file.read(4)
    if magic == b"OggS":
        return ogg.check_pages(file, size)
    if magic == b"fLaC":
        return flac.check_length(file, size)
    found = find_payload(file, size)
    return check_payload(file, size, found) if isinstance(found, Payload) else found


def find_loss(
    file: BinaryIO, size: int, *, container: str, subtype: str, channels: int, num_frames: int
) -> Fault | None:
    """Compare what libsndfile would read with what the bytes hold.

    Args:
        file: the file.
        size: its bytes.
        container: libsndfile's name of the container ("MP3").
        subtype: its name of the encoding ("PCM_16").
        channels: as it says.
        num_frames: samples per channel, as it says.
    """
    if container == "MP3":
        count = mp3.count_frames(file, size)
        return mp3.check_count(count, num_frames=num_frames) if isinstance(count, mp3.Count) else count
    found = find_payload(file, size)
    if not isinstance(found, Payload):
        return None
    return check_num_frames(found, size, num_frames=num_frames, channels=channels, subtype=subtype)
