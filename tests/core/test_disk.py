"""Disks that are really full, files that are really too large, locks that the kernel really refuses."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from hubert.core.errors import DataError, DiskError
from hubert.core.files import atomic_write, link, write_json
from hubert.core.paths import PROJECT
from tests.support.disk import fill, small_disk

NOISE = np.random.default_rng(0).random(500_000)  # 4 MB


def save_folder(path: Path) -> None:
    path.mkdir()
    with atomic_write(path / "inner") as temporary:
        save_file({"a": torch.from_numpy(NOISE)}, temporary)


WRITERS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda path: path.write_bytes(NOISE.tobytes()),
    "numpy": NOISE.tofile,
    "torch": lambda path: torch.save({"a": torch.from_numpy(NOISE)}, path),
    "safetensors": lambda path: save_file({"a": torch.from_numpy(NOISE)}, path),
    "polars, parquet": lambda path: pl.DataFrame({"a": NOISE}).write_parquet(path),
    "polars, streamed": lambda path: pl.DataFrame({"a": NOISE}).lazy().sink_parquet(path),
    "polars, csv": lambda path: pl.DataFrame({"a": NOISE}).write_csv(path),
    "libsndfile": lambda path: soundfile.write(path, NOISE, 16_000, format="WAV", subtype="DOUBLE"),
    "a folder, and in it a file of its own": save_folder,
}


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "small", "2m") as folder:
        yield folder


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_a_disk_error_whichever_library_writes(writer, disk):
    with (
        pytest.raises(
            DiskError, match=r"No space left.*It needs 4 MB, and the disk of .* 2.1 MB free.*hubert prune RUN"
        ),
        atomic_write(disk / "file", size=4_000_000) as temporary,
    ):
        WRITERS[writer](temporary)
    assert not list(disk.iterdir())


def test_without_a_known_size_the_message_says_how_much_was_written(disk):
    with (
        pytest.raises(DiskError, match=r"It needs more than the 2\.1 MB that were written"),
        atomic_write(disk / "x") as path,
    ):
        WRITERS["bytes"](path)


def test_not_even_a_folder_fits_on_a_disk_without_room(disk):
    ballast = fill(disk)
    try:
        with pytest.raises(DiskError, match="No space left"):
            write_json(disk / "settings.json", {"a": "b" * 5000})
    finally:
        ballast.unlink()


def test_an_error_that_is_not_the_disks_passes_as_it_is(disk):
    for error in (ValueError("shape"), RuntimeError("iostream"), DataError("damaged"), PermissionError(13, "no")):
        with pytest.raises(type(error)) as raised, atomic_write(disk / "file") as path:  # noqa: PT012  (the block of the write)
            path.write_text("half")
            raise error
        assert raised.value is error
    assert not list(disk.iterdir())


def test_a_finished_file_that_a_new_folder_links_to_is_never_written_to(disk):
    """As when a checkpoint is written again over weights that are good; the disk is asked by writing to what is half written."""
    finished = disk / "weights"
    finished.write_bytes(b"finished")

    def write(folder: Path) -> None:
        folder.mkdir()
        link(finished, folder / "weights")
        WRITERS["torch"](folder / "state")

    with pytest.raises(DiskError), atomic_write(disk / "step") as temporary:
        write(temporary)
    assert finished.read_bytes() == b"finished"


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=PROJECT, timeout=120)


TOO_LARGE = """
import resource, sys
from pathlib import Path
from hubert.core.errors import DiskError
from hubert.core.files import atomic_write
from tests.core.test_disk import WRITERS
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
for name, writer in WRITERS.items():
    try:
        with atomic_write(Path(sys.argv[1]) / "file") as temporary:
            writer(temporary)
    except DiskError as error:
        assert error.number == 27, error
        assert "files of 1 MB at most (`ulimit -f`)" in str(error), error
        print(name)
assert not list(Path(sys.argv[1]).iterdir())
"""


def test_a_limit_on_the_size_of_files_is_a_disk_error_whichever_library_writes(tmp_path):
    """RLIMIT_FSIZE: the kernel says EFBIG."""
    ended = run_python(TOO_LARGE, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == list(WRITERS)


LOCKLESS = """
import sys, time, warnings
from pathlib import Path
from hubert.core.errors import TransientError
from hubert.core.locks import acquire, find_holder, hold
from hubert.training.folder import TrainingFolder
from tests.support.disk import refuse_locks
warnings.simplefilter("error")
folder = Path(sys.argv[1])
(folder / "lock.json").write_text('{"pid": 1, "host": "a dead one"}')
(folder / "lock").write_text("1\\na dead one\\n")
refuse_locks(int(sys.argv[2]))
for work in (
    lambda: hold(folder, "features").__enter__(),
    lambda: find_holder(folder),
    lambda: TrainingFolder(folder, "a").hold(take=False).__enter__(),
):
    try:
        work()
    except TransientError as error:
        assert "gives no locks" in str(error) and "HUBERT_RUNS" in str(error), error
        print("explained")
"""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_explained_and_nothing_waits_for_a_dead_holder(number, tmp_path):
    ended = run_python(LOCKLESS, tmp_path, number)
    assert ended.stdout.splitlines() == 3 * ["explained"], ended.stderr
