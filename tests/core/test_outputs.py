"""What is read is what was written: hashes in receipts and `done.json`, and what a change of a file leads to."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hubert.core.errors import DataError
from hubert.core.files import atomic_write, read_json, write_json, write_record
from hubert.core.hashing import digest, file_digest
from hubert.core.outputs import check_files
from hubert.core.stage import Receipt, Spec, Stage
from tests.support.damage import DAMAGES, SILENT, damage


@dataclass
class NumbersStage(Stage):
    """Writes numbers, one file each, and a folder with all of them."""

    name: ClassVar[str] = "numbers"
    joins_shards: ClassVar[bool] = True
    parent: Path
    numbers: tuple[int, ...] = (1, 2, 3)
    worked: list[int] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        return {"numbers": self.numbers}

    def inputs(self) -> dict[str, str]:
        return {}

    def planned_files(self) -> list[Path]:
        return [self.folder / "listing.txt"]

    def make_plan(self) -> list[Spec]:
        with atomic_write(self.folder / "listing.txt") as temporary:
            temporary.write_text(" ".join(map(str, self.numbers)))
        return [{"row": row, "digest": digest([row, number])} for row, number in enumerate(self.numbers)]

    def work(self, spec: Spec) -> tuple[list[Path], dict[str, Any]]:
        number = int((self.folder / "listing.txt").read_text().split()[spec["row"]])
        self.worked.append(number)
        output = self.folder / "shards" / f"{spec['row']}.txt"
        with atomic_write(output) as temporary:
            temporary.write_text(f"the number {number}")
        return [output], {"number": number}

    def finish(self, receipts: list[Receipt]) -> tuple[list[Path], dict[str, Any]]:
        texts = [(self.folder / next(iter(receipt.outputs))).read_text() for receipt in receipts]
        (self.table / "part").mkdir(parents=True, exist_ok=True)
        (self.table / "part" / "all.txt").write_text("\n".join(texts))
        return [self.table], {"total": sum(receipt.figures["number"] for receipt in receipts)}

    @property
    def table(self) -> Path:
        return self.folder / "table"


@dataclass
class SumStage(Stage):
    """Adds up the numbers of a table."""

    name: ClassVar[str] = "sum"
    parent: Path
    table: Path

    def settings(self) -> dict[str, Any]:
        return {}

    def inputs(self) -> dict[str, str]:
        return {"table": self.table.parent.name}

    def reads(self) -> list[Path]:
        return [self.table]

    def make_plan(self) -> list[Spec]:
        return [{}]

    def work(self, spec: Spec) -> tuple[list[Path], dict[str, Any]]:  # noqa: ARG002  (there is one shard)
        lines = (self.table / "part" / "all.txt").read_text().splitlines()
        return [], {"sum": sum(int(line.split()[-1]) for line in lines)}

    def finish(self, receipts: list[Receipt]) -> tuple[list[Path], dict[str, Any]]:
        return [], receipts[0].figures


FILES = ("listing.txt", "plan.json", "receipts/00001.json", "shards/1.txt", "table/part/all.txt", "done.json")


@pytest.fixture
def numbers(tmp_path):
    stage = NumbersStage(tmp_path)
    stage.run()
    return stage


def content_of(stage: NumbersStage) -> str:
    return (stage.table / "part" / "all.txt").read_text()


def test_receipts_and_done_json_hold_the_sha256_of_every_file(numbers):
    hashes = read_json(numbers.folder / "done.json")["hashes"]
    assert hashes == {
        name: file_digest(numbers.folder / name)
        for name in ("shards/0.txt", "shards/1.txt", "shards/2.txt", "table/part/all.txt")
    }
    assert numbers.receipt(1, numbers.plan()).hashes == {"shards/1.txt": hashes["shards/1.txt"]}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("finished", [True, False])
def test_a_stage_with_a_damaged_file_makes_it_again_and_ends_with_the_same_outputs(numbers, name, how, finished):
    if not finished:
        (numbers.folder / "done.json").unlink()
        (numbers.folder / "receipts" / "00002.json").unlink()
        if name == "done.json":
            pytest.skip("it is what is missing")
    damage(numbers.folder / name, how)
    again = NumbersStage(numbers.parent)
    assert again.run() == {"total": 6}
    assert content_of(again) == "the number 1\nthe number 2\nthe number 3"
    redone = {"shards/1.txt": {2}, "receipts/00001.json": {2} if not finished else set()}.get(name, set())
    assert set(again.worked) == redone | (set() if finished else {3})


@pytest.mark.parametrize("how", SILENT)
def test_what_a_stage_reads_is_hashed_though_size_and_times_are_those_of_old(numbers, how, tmp_path):
    path = numbers.table / "part" / "all.txt"
    damage(path, how, keep_times=True)
    with pytest.raises(DataError, match=rf"{path} is not what was written.*`hubert numbers RUN`"):
        SumStage(tmp_path, numbers.table).run()
    assert not path.exists()
    again = NumbersStage(tmp_path)
    assert again.run() == {"total": 6}
    assert again.worked == []  # the shards are as they were
    assert SumStage(tmp_path, numbers.table).run() == {"sum": 6}


def test_a_sister_does_not_take_over_a_damaged_shard(numbers):
    damage(numbers.folder / "shards" / "1.txt", "one flipped bit", keep_times=True)
    grown = NumbersStage(numbers.parent, (1, 2, 3, 4))
    assert grown.run() == {"total": 10}
    assert grown.worked == [2, 4]
    assert content_of(grown).splitlines()[1] == "the number 2"


def test_outputs_of_an_older_version_are_read_as_they_are_and_that_is_said_once(numbers, tmp_path, capsys):
    for path in (numbers.folder / "done.json", *(numbers.folder / "receipts").iterdir()):
        content = read_json(path)
        del content["hashes"]
        write_json(path, content)
    assert NumbersStage(tmp_path).run() == {"total": 6}
    assert SumStage(tmp_path, numbers.table).run() == {"sum": 6}
    assert capsys.readouterr().out.count("recorded no hashes") == 1


def test_files_of_no_stage_are_not_checked(tmp_path):
    (tmp_path / "file").write_text("of a person")
    assert check_files([tmp_path / "file"]) == []


def test_a_file_that_was_only_touched_is_no_change(numbers):
    os.utime(numbers.table / "part" / "all.txt")
    again = NumbersStage(numbers.parent)
    assert again.settled() is not None
    assert again.changes() == []


def test_a_record_whose_figures_changed_is_no_record(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, {"value": 1.5, "path": tmp_path, "names": ("ä", "b")})
    assert read_json(path) == {"value": 1.5, "path": str(tmp_path), "names": ["ä", "b"]}
    text = path.read_text()
    path.write_text(text.replace("1.5", "1.4"))
    assert read_json(path) is None
    path.write_text(json.dumps({"value": 1.4}))  # of an older version, or by hand
    assert read_json(path) == {"value": 1.4}
