"""Which files go through the teacher together."""

import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hubert.core.frames import SAMPLE_RATE
from hubert.features.batches import MAX_PADDING, batches_by_length, pad

LENGTHS = st.lists(st.integers(400, 20 * SAMPLE_RATE), max_size=60)


@given(LENGTHS, st.floats(0.1, 60.0), st.integers(400, 30 * SAMPLE_RATE))
def test_every_file_is_in_one_batch_that_is_within_its_limits(lengths, seconds, longest):
    batches = list(batches_by_length(lengths, seconds, lambda length: length > longest))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        audio = [lengths[index] for index in batch]
        padded = max(audio) * len(audio)
        assert len(batch) == 1 or (padded <= seconds * SAMPLE_RATE and max(audio) <= longest)
        assert padded - sum(audio) <= MAX_PADDING * padded


@given(st.integers(1, 200), st.integers(400, SAMPLE_RATE))
def test_files_of_one_length_fill_their_batches(number, length):
    capacity = 30 * SAMPLE_RATE // length
    batches = list(batches_by_length([length] * number, 30.0, lambda _: False))
    assert [len(batch) for batch in batches[:-1]] == [capacity] * (len(batches) - 1)
    assert len(batches) == -(-number // capacity)


def test_padding_is_marked_and_where_there_is_none_nothing_is():
    padded, mask = pad([torch.ones(3), torch.ones(2)])
    assert padded.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert mask is not None
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    assert pad([torch.ones(3), torch.ones(3)])[1] is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back when it is asked")
def test_memory_goes_back_to_the_system_although_small_pieces_lie_between():
    code = """
import ctypes, os
import torch
from hubert.core.machine import Heap
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6
pieces = [libc.malloc(100_000) for _ in range(4000)]  # too small to be mappings of their own
for piece in pieces:
    ctypes.memset(piece, 1, 100_000)
for piece in pieces[::2]:  # the others stay, and pin the heap
    libc.free(ctypes.c_void_p(piece))
full = rss()
Heap(torch.device('cpu'), 3600.0).give_back()  # too early
Heap(torch.device('cuda'), 0.0).give_back()  # not there
assert rss() > full - 100, (full, rss())
Heap(torch.device('cpu'), 0.0).give_back()
assert rss() < full - 150, (full, rss())
"""
    subprocess.run([sys.executable, "-c", code], check=True)
