"""Plans, receipts, done.json and locks: what a stage leaves behind, and what a second start makes of it."""

import json
import multiprocessing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hubert.core.errors import DataError, TransientError
from hubert.core.files import atomic_write, write_json
from hubert.core.hashing import digest
from hubert.core.stage import Plan, Receipt, Spec, Stage, group, read_jobs


@dataclass
class SquaresStage(Stage):
    """Writes the square of each number into a file, and their sum at the end."""

    name: ClassVar[str] = "squares"
    parent: Path
    numbers: tuple[int, ...]
    exponent: int = 2
    worked: list[int] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        return {} if self.exponent == 2 else {"exponent": self.exponent}

    def inputs(self) -> dict[str, str]:
        return {"numbers": digest(self.numbers)}

    def make_plan(self) -> list[Spec]:
        return [{"number": number, "digest": digest([number, self.settings()])} for number in self.numbers]

    def work(self, spec: Spec) -> tuple[list[Path], dict[str, Any]]:
        self.worked.append(spec["number"])
        output = self.folder / "shards" / f"{spec['digest'][:16]}.txt"
        with atomic_write(output) as temporary:
            temporary.write_text(str(spec["number"] ** self.exponent))
        return [output], {"value": spec["number"] ** self.exponent}

    def finish(self, receipts: list[Receipt]) -> tuple[list[Path], dict[str, Any]]:
        return [], {"sum": sum(receipt.figures["value"] for receipt in receipts)}


def test_a_finished_stage_does_no_work_when_it_is_run_again(tmp_path):
    assert SquaresStage(tmp_path, (1, 2, 3)).run() == {"sum": 14}
    again = SquaresStage(tmp_path, (1, 2, 3))
    assert again.run() == {"sum": 14}
    assert again.worked == []


def test_a_stage_that_was_cut_off_does_only_what_is_missing(tmp_path):
    stage = SquaresStage(tmp_path, (1, 2, 3, 4))
    plan = stage.plan()
    stage.run_shard(1, plan)
    stage.run_shard(3, plan)
    again = SquaresStage(tmp_path, (1, 2, 3, 4))
    assert again.run() == {"sum": 30}
    assert again.worked == [1, 3]


def test_a_lost_output_is_made_again_although_its_receipt_is_there(tmp_path):
    stage = SquaresStage(tmp_path, (5, 6))
    stage.run()
    lost = next((stage.folder / "shards").glob("*"))
    lost.unlink()
    again = SquaresStage(tmp_path, (5, 6))
    assert again.done() is None
    assert again.run() == {"sum": 61}
    assert len(again.worked) == 1
    assert lost.exists()


def test_a_changed_setting_or_input_leads_to_another_folder_and_back(tmp_path):
    first, other = SquaresStage(tmp_path, (1, 2)), SquaresStage(tmp_path, (1, 2), exponent=3)
    assert len({first.folder, other.folder, SquaresStage(tmp_path, (1, 2, 3)).folder}) == 3
    assert SquaresStage(tmp_path, (1, 2)).folder == first.folder


def test_equal_shards_of_a_sister_folder_are_taken_over(tmp_path):
    SquaresStage(tmp_path, (1, 2, 3)).run()
    grown = SquaresStage(tmp_path, (1, 2, 3, 4))
    assert grown.run() == {"sum": 30}
    assert grown.worked == [4]


def test_receipts_of_another_plan_do_not_count(tmp_path):
    stage = SquaresStage(tmp_path, (1, 2))
    plan = stage.plan()
    stage.run_shard(0, plan)
    assert stage.missing(plan) == [1]
    assert stage.missing(Plan([*plan.specs, {"number": 9}])) == [0, 1, 2]


def test_a_half_written_receipt_or_done_marker_counts_as_missing(tmp_path):
    stage = SquaresStage(tmp_path, (1, 2))
    stage.run()
    (stage.folder / "done.json").write_text('{"key": "')
    (stage.folder / "receipts" / "00001.json").write_text("")
    again = SquaresStage(tmp_path, (1, 2))
    assert again.run() == {"sum": 5}
    assert again.worked == [2]


def test_finishing_without_all_shards_names_the_missing_ones(tmp_path):
    stage = SquaresStage(tmp_path, (1, 2))
    plan = stage.plan()
    stage.run_shard(0, plan)
    with pytest.raises(TransientError, match=r"1 of 2 shards are missing, first \[1\]"):
        stage.complete(plan)


def test_figures_of_an_unfinished_stage_are_an_error_that_says_what_to_run(tmp_path):
    with pytest.raises(DataError, match="hubert squares"):
        SquaresStage(tmp_path, (1,)).figures()


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:  # noqa: PT012  (the block is the test)
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def _hold(folder: Path, ready: Any, release: Any) -> None:
    with SquaresStage(folder, (1,)).lock():
        ready.set()
        release.wait(60)


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready, release))
    holder.start()
    assert ready.wait(60)
    said: list[str] = []
    with (
        pytest.raises(TransientError, match=str(holder.pid)),
        SquaresStage(tmp_path, (1,)).lock(wait_seconds=0.1, say=said.append),
    ):
        pass
    assert str(holder.pid) in said[0]
    release.set()
    holder.join()


def test_a_killed_holder_releases_its_lock(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready, release))
    holder.start()
    assert ready.wait(60)
    holder.kill()
    holder.join()
    assert SquaresStage(tmp_path, (1,)).run() == {"sum": 1}


@pytest.mark.parametrize(("count", "num_groups"), [(0, 4), (1, 4), (7, 3), (200, 200), (1000, 7)])
def test_groups_hold_every_shard_once_and_differ_by_at_most_one(count, num_groups):
    groups = group(range(count), num_groups)
    assert [index for part in groups for index in part] == list(range(count))
    sizes = [len(part) for part in groups]
    assert len(groups) == min(count, num_groups)
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_the_key_does_not_depend_on_the_order_of_settings():
    assert digest({"a": 1, "b": [1, 2]}) == digest(json.loads('{"b": [1, 2], "a": 1}'))


def test_the_records_name_the_slurm_jobs_that_did_the_work(tmp_path, monkeypatch):
    stage = SquaresStage(tmp_path, (1, 2, 3))
    plan = stage.plan()
    for index, job in enumerate(("100", "20", "100")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        stage.run_shard(index, plan)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert stage.complete(plan)["jobs"] == ["20", "100"]
    assert read_jobs(stage.folder) == ["20", "100"]

    write_json(stage.folder / "slurm.json", {"jobs": [{"job_id": "7", "state": "TIMEOUT"}, {"job_id": "100"}]})
    assert read_jobs(stage.folder) == ["7", "20", "100"]

    elsewhere = SquaresStage(tmp_path, (4,))
    elsewhere.run()
    assert "jobs" not in elsewhere.done()
    assert read_jobs(elsewhere.folder) == []


def test_the_receipts_say_on_what_a_shard_ran_and_the_stage_how_long_gpus_were_held(tmp_path, monkeypatch):
    import torch

    stage = SquaresStage(tmp_path, (1, 2))
    plan = stage.plan()
    stage.run_shard(0, plan)
    counts = iter((5, 8))  # allocations before the second shard's work, and after it
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"allocation.all.allocated": next(counts)})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    second = stage.run_shard(1, plan)
    write_json(stage.folder / "receipts" / "00001.json", {**vars(second), "seconds": 7.5})
    done = stage.complete(plan)
    assert done["devices"] == ["NVIDIA H100", "cpu"]
    assert done["gpu_seconds"] == 7.5


def test_a_shard_that_leaves_the_gpu_alone_is_not_counted_though_its_process_has_cuda_initialised(
    tmp_path, monkeypatch
):
    import torch

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"allocation.all.allocated": 5})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    stage = SquaresStage(tmp_path, (1,))
    stage.run()
    assert stage.done()["devices"] == ["cpu"]
    assert stage.done()["gpu_seconds"] == 0.0


def test_a_receipt_of_an_older_version_has_no_device_and_its_stage_claims_none(tmp_path):
    stage = SquaresStage(tmp_path, (1,))
    plan = stage.plan()
    old = {name: value for name, value in vars(stage.run_shard(0, plan)).items() if name != "device"}
    write_json(stage.folder / "receipts" / "00000.json", old)
    done = stage.complete(plan)
    assert (done["devices"], done["gpu_seconds"]) == ([], 0.0)
