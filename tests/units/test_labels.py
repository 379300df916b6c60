"""The trainer's table: what goes in comes out, and what does not fit together is refused by name."""

import tracemalloc

import numpy as np
import polars as pl
import pytest

from hubert.core.errors import DataError
from hubert.core.frames import num_units_of
from hubert.core.hashing import hash_fileids
from hubert.data.audio_file import AudioRef
from hubert.units.labels import Table, write_table

FORMAT = {"frame_rate": 100, "num_units": 10, "codebook": "c0ffee"}


def chunk(first: int, count: int, *, frame_rate: int = 100) -> dict:
    """Rows `first` to `first + count`: plain files, members and segments in turn, names with umlauts and commas."""
    rows = range(first, first + count)
    num_samples = [16_000 + 37 * row for row in rows]
    numbers = num_units_of(np.array(num_samples), frame_rate)
    member = [row % 3 == 1 for row in rows]
    return {
        "fileid": [f"sprecher ä, {row}" for row in rows],
        "path": [
            f"m{row}.flac" if is_member else f"/audio/ä, {row}.wav" for row, is_member in zip(rows, member, strict=True)
        ],
        "num_samples": num_samples,
        "offset": [5 * row if row % 3 == 2 else None for row in rows],
        "archive": [
            f"/audio/{row % 2}.tar" if is_member else None for row, is_member in zip(rows, member, strict=True)
        ],
        "byte_offset": [512 * row if is_member else None for row, is_member in zip(rows, member, strict=True)],
        "byte_size": [100 + row if is_member else None for row, is_member in zip(rows, member, strict=True)],
        "size": [4_000_000_000 + row for row in rows],
        "mtime_ns": [1_700_000_000_000_000_000 + row if row % 4 else None for row in rows],
        "units": [(np.arange(number) + row) % 10 for row, number in zip(rows, numbers, strict=True)],
    }


def test_a_table_gives_back_every_row_of_every_chunk(tmp_path):
    chunks = [chunk(0, 5), chunk(5, 1), chunk(6, 0), chunk(6, 7)]
    write_table(tmp_path / "table", chunks, **FORMAT)
    table = Table(tmp_path / "table")
    assert (len(table), table.frame_rate, table.num_units, table.codebook, table.resample) == (
        13,
        100,
        10,
        "c0ffee",
        False,
    )
    whole = chunk(0, 13)
    for row in range(13):
        fields = {name: whole[name][row] for name in AudioRef._fields}
        assert table.audio_ref(row) == AudioRef(**fields)
        assert np.array_equal(table.units(row), whole["units"][row])
        assert table.fileid(row) == whole["fileid"][row]
    assert np.array_equal(table.fileid_hash, hash_fileids(whole["fileid"]))
    assert table.hours == pytest.approx(sum(whole["num_samples"]) / 16_000 / 3600)


def test_a_table_of_an_older_version_is_read_without_sizes_and_times(tmp_path):
    write_table(tmp_path / "table", [chunk(0, 5)], **FORMAT)
    for name in ("size", "mtime_ns"):
        (tmp_path / "table" / f"{name}.npy").unlink()
    ref = Table(tmp_path / "table").audio_ref(3)
    assert (ref.path, ref.size, ref.mtime_ns) == (chunk(3, 1)["path"][0], None, None)


@pytest.mark.parametrize("numbers", [(0,), (9,), (95, 5, 900)])
def test_the_columns_are_the_files_that_numpy_itself_would_write(tmp_path, numbers):
    """Byte for byte, however many digits their length has."""
    firsts = np.cumsum([0, *numbers])
    write_table(tmp_path / "table", [chunk(*part) for part in zip(firsts, numbers, strict=False)], **FORMAT)
    columns = sorted((tmp_path / "table").glob("*.npy"))
    assert len(columns) == 14
    for path in columns:
        np.save(tmp_path / "theirs.npy", np.load(path))
        assert path.read_bytes() == (tmp_path / "theirs.npy").read_bytes()


def test_a_table_of_an_earlier_version_is_read(tmp_path):
    """Its headers had no comma after the shape."""
    write_table(tmp_path / "table", [chunk(0, 5)], **FORMAT)
    before = {row: Table(tmp_path / "table").units(row).tolist() for row in range(5)}
    for path in (tmp_path / "table").glob("*.npy"):
        content = path.read_bytes()
        header = content[10:128].replace(b"), }", b")}  ")
        assert header != content[10:128]
        path.write_bytes(content[:10] + header + content[128:])
    table = Table(tmp_path / "table")
    assert {row: table.units(row).tolist() for row in range(5)} == before
    assert table.fileid(4) == "sprecher ä, 4"


def test_polars_columns_with_nulls_are_taken_as_they_come_from_the_units_stage(tmp_path):
    plain = chunk(0, 6)
    frame = pl.DataFrame(plain | {"units": pl.Series(plain["units"], dtype=pl.List(pl.UInt16))}, strict=False)
    write_table(tmp_path / "a", [frame.to_dict(as_series=True)], **FORMAT)
    write_table(tmp_path / "b", [plain], **FORMAT)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_hash_of_a_fileid_is_the_same_for_ever():
    """Crops and order are drawn from it: another value would be another training."""
    assert hash_fileids(["", "a/b"]).tolist() == [
        13020603013274838756,
        11569688667527244557,
    ]  # b2sum -l 64, little-endian


@pytest.mark.parametrize(("frame_rate", "change"), [(100, 1), (100, -1), (50, 1)])
def test_a_file_with_a_wrong_number_of_units_is_refused_by_name(tmp_path, frame_rate, change):
    rows = chunk(0, 4, frame_rate=frame_rate)
    expected = len(rows["units"][2])
    rows["units"][2] = np.zeros(expected + change, np.uint16)
    with pytest.raises(
        DataError, match=rf"ä, 2: 16074 samples give {expected} units at {frame_rate} Hz, found {expected + change}"
    ):
        write_table(tmp_path / "table", [rows], **FORMAT | {"frame_rate": frame_rate})
    assert not list(tmp_path.iterdir())


def test_a_file_without_units_is_refused_by_name(tmp_path):
    rows = chunk(0, 4)
    rows["units"][3] = None
    with pytest.raises(DataError, match=r"ä, 3: .* found 0"):
        write_table(tmp_path / "table", [rows], **FORMAT)


def test_a_unit_beyond_the_codebook_is_refused_by_name(tmp_path):
    rows = chunk(0, 4)
    rows["units"][1][-1] = 10
    with pytest.raises(DataError, match="ä, 1: found unit 10, expected 0 to 9"):
        write_table(tmp_path / "table", [rows], **FORMAT)


def test_an_older_table_is_replaced_as_a_whole(tmp_path):
    write_table(tmp_path / "table", [chunk(0, 3)], **FORMAT)
    old = Table(tmp_path / "table")
    write_table(tmp_path / "table", [chunk(3, 2)], **FORMAT)
    assert len(Table(tmp_path / "table")) == 2
    assert np.array_equal(old.units(2), chunk(0, 3)["units"][2])
    with pytest.raises(DataError):
        write_table(tmp_path / "table", [chunk(0, 1), chunk(1, 1) | {"units": [[]]}], **FORMAT)
    assert len(Table(tmp_path / "table")) == 2


def test_a_folder_that_is_no_table_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected a table"):
        Table(tmp_path)


def test_a_damaged_column_is_refused_by_name(tmp_path):
    write_table(tmp_path / "table", [chunk(0, 3)], **FORMAT)
    path = tmp_path / "table" / "num_samples.npy"
    np.save(path, np.arange(2))
    with pytest.raises(DataError, match=r"num_samples\.npy: expected 3 values"):
        Table(tmp_path / "table")
    path.write_bytes(b"x" * 200)
    with pytest.raises(DataError, match=r"num_samples\.npy: cannot be read"):
        Table(tmp_path / "table")


def test_an_empty_table_is_one(tmp_path):
    write_table(tmp_path / "table", [], **FORMAT)
    assert len(Table(tmp_path / "table")) == 0


def test_writing_holds_one_chunk_in_memory(tmp_path):
    """20 chunks of 1 MB each: what is held at once stays near that of one chunk."""
    rows = chunk(0, 2)
    length = 160 * 250_000 + 240
    big = rows | {"num_samples": [length, length], "units": [np.zeros(250_000, np.uint16)] * 2}
    tracemalloc.start()
    write_table(tmp_path / "table", (big for _ in range(20)), **FORMAT)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(Table(tmp_path / "table")) == 40
    assert peak < 10e6
