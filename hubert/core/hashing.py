"""Hashes that stay the same: of content, of files, of fileids, and of integers in place of random numbers."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_WRAP = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
HashArray = npt.NDArray[np.uint64]


def digest(content: Any) -> str:
    """Hash a JSON-like value, independent of the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_fileids(fileids: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Return a stable 64-bit hash of each fileid (BLAKE2b): equal on every machine and in every version."""
    digests = b"".join(hashlib.blake2b(fileid.encode(), digest_size=8).digest() for fileid in fileids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def splitmix64(values: HashArray) -> HashArray:
    """Scramble 64-bit integers (Steele, Lea & Flood 2014): equal inputs, equal outputs; others look independent."""
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def mix(*numbers: int) -> int:
    """Hash non-negative integers, in order, to one of 63 bits: the seed of everything that they name."""
    state = 0
    for number in numbers:
        state = _scramble(state ^ _scramble(number & _WRAP))
    return state >> 1


def _scramble(value: int) -> int:
    """Do `splitmix64` on one integer, without the overhead of an array."""
    value = (value + _GOLDEN) & _WRAP
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WRAP
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WRAP
    return value ^ (value >> 31)
