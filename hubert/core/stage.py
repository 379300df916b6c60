"""What a stage is: a folder whose name is its key, a plan, a receipt per shard, and `done.json`, written last.

    <stage>-<8 hex of its key>/
        plan.json            the shards, fixed at the first start; a rerun obeys it
        receipts/00042.json  shard 42 is done: its outputs with their sizes and sha256, its figures, the plan's hash
        done.json            the stage is done: every output, the figures, where they came from; and what was pruned since
        slurm.json           the jobs of a training that ran on Slurm
        lock                 held while a process plans, works or finishes here (released by the system if it dies)

The key is a hash of the settings that affect the outputs, the keys of the inputs, and the stage's version. So a
changed setting leads to another folder, and everything that did not change is found again. The command line and the
Prefect tasks run the same `Stage` objects: the files are the truth, whoever wrote them.

What is read is what was written. Before a stage works it hashes the files of other stages that it reads (`reads`): one that
changed is named and removed, so that its own stage makes it again, and only it. A finished stage whose files were written to
since does the same when it is asked for.
"""

import os
import platform
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from hubert.core.errors import DataError, TransientError
from hubert.core.files import link, look_again, read_json, remove, rename, write_record
from hubert.core.hashing import digest
from hubert.core.locks import hold
from hubert.core.outputs import Change, Hashes, all_there, check_files, find_changes, hash_outputs, is_of, size, time_ns
from hubert.core.process import gpu_allocations, gpu_name

CPU = "cpu"
Say = Callable[[str], object]
Spec = dict[str, Any]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Receipt:
    """Proof that one shard is done: its outputs (relative path -> bytes, and -> sha256 of each file) and its figures."""

    index: int
    plan: str
    outputs: dict[str, int]
    figures: Figures
    seconds: float = 0.0
    adopted_from: str = ""
    jobs: tuple[str, ...] = ()  # the Slurm job that did it, if one did
    device: str = ""  # the GPU that it computed on, or "cpu"; empty in receipts of older versions
    hashes: Hashes = field(default_factory=dict)  # empty in receipts of older versions


@dataclass(frozen=True)
class Plan:
    """The shards of a stage. `hash` binds receipts to it."""

    specs: list[Spec]

    @cached_property
    def hash(self) -> str:
        """Return the hash that every receipt of this plan carries."""
        return digest(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


class Stage(ABC):
    """One stage of a run. Subclasses are small picklable dataclasses: Dask carries them to the workers.

    A subclass says what its outputs depend on (`settings`, `inputs`), how the work is cut (`make_plan`), how one
    shard is done (`work`), and what is put together at the end (`finish`).
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    parent: Path
    counted: ClassVar[str] = "shards"  # what the progress is counted in, for people
    joins_shards: ClassVar[bool] = False  # whether `finish` reads the shards' outputs
    accepts_pruned = True  # False: outputs that `hubert prune` removed are needed again, so without them it is not done

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what affects the outputs, beside the inputs."""

    @abstractmethod
    def inputs(self) -> dict[str, str]:
        """Return the keys (or content digests) of what the stage reads."""

    @abstractmethod
    def make_plan(self) -> list[Spec]:
        """Cut the work into shards. A spec may hold `digest`: shards of sister folders with the same one are adopted."""

    @abstractmethod
    def work(self, spec: Spec) -> tuple[list[Path], Figures]:
        """Do one shard: write its files (atomically) and return them with the shard's figures."""

    def finish(self, receipts: list[Receipt]) -> tuple[list[Path], Figures]:
        """Put the shards together: write the stage's own files and return them with the stage's figures."""
        return [], {}

    def tables(self) -> Mapping[str, Path]:
        """Return the parquet files whose rows the shards' `start` and `end` are of, by the shards' `part`, if they have those."""
        return {}

    def reads(self) -> list[Path]:
        """Return the files and folders of other stages that the work reads."""
        return []

    def planned_files(self) -> list[Path]:
        """Return the files that `make_plan` writes, beside `plan.json`."""
        return []

    def seconds_of(self, receipts: list[Receipt]) -> float:
        """Return the seconds that the shards took, one after the other."""
        return sum(receipt.seconds for receipt in receipts)

    @cached_property
    def key(self) -> str:
        """The stage's key, 64 hex digits."""
        return digest(
            {"stage": self.name, "version": self.version, "settings": self.settings(), "inputs": self.inputs()}
        )

    @property
    def folder(self) -> Path:
        """The stage's folder."""
        return self.parent / f"{self.name}-{self.key[:8]}"

    @property
    def label(self) -> str:
        """The stage's name for people, such as `it2/units`."""
        return f"{self.parent.name}/{self.name}" if re.fullmatch(r"it\d+", self.parent.name) else self.name

    # What is done -----------------------------------------------------------------------------------------------

    def done(self) -> Figures | None:
        """Return the content of `done.json` if the stage is finished and every output is there with its size.

        Outputs that were pruned since (`hubert.core.outputs`) may be gone, unless `accepts_pruned` is false.
        """
        content = read_json(self.folder / "done.json")
        if content is None or content.get("key") != self.key:
            return None
        wanted = content["outputs"] if self.accepts_pruned else {**content["outputs"], **content.get("pruned", {})}
        return {**content, "figures": rename(content["figures"])} if all_there(self.folder, wanted) else None

    def changes(self) -> list[Change]:
        """Return the outputs of the finished stage that were written to since, and have another content than it wrote."""
        record = self.folder / "done.json"
        content = read_json(record) or {}
        outputs = content.get("outputs", {})
        mine = {name: found for name, found in content.get("hashes", {}).items() if is_of(name, outputs)}
        return find_changes(self.folder, mine, since_ns=time_ns(record))

    def settled(self, say: Say = print) -> Figures | None:
        """Return the content of `done.json` if the stage is finished and its outputs are as it wrote them.

        An output that changed is named to `say` and removed; the stage is then not finished, and makes it again.
        """
        content = self.done()
        if content is not None and (changes := self.changes()):
            for change in changes:
                remove(change.path)
                say(f"{self.label}: {change.describe()}. It was removed and is made again")
            return None
        return content

    def figures(self) -> Figures:
        """Return the figures of the finished stage.

        Raises:
            DataError: the stage is not finished.
        """
        content = self.done()
        if content is None:
            raise DataError(
                f"{self.label} is not finished in {self.folder}; run `hubert {self.name}` or the flow first"
            )
        return dict(content["figures"])

    def plan(self) -> Plan:
        """Return the plan, made and written at the first call. Receipts of sister folders with equal shards are taken over."""
        path = self.folder / "plan.json"
        content = read_json(path)
        if content is None:
            content = {
                "stage": self.name,
                "key": self.key,
                "settings": self.settings(),
                "inputs": self.inputs(),
                "shards": self.make_plan(),
            }
            write_record(path, {**content, "hashes": hash_outputs(self.folder, self.planned_files())})
            content = read_json(path)
            if content is None:
                raise TransientError(f"{path} was written and cannot be read back; check the disk and run again")
            self._adopt(Plan(content["shards"]))
        return Plan(content["shards"])

    def receipt(self, index: int, plan: Plan) -> Receipt | None:
        """Return the receipt of a shard if it belongs to this plan and its outputs are there."""
        return read_receipt(self.folder, index, plan)

    def missing(self, plan: Plan) -> list[int]:
        """Return the indices of the shards that still have to be done."""
        look_again(self.folder / "receipts")
        return [index for index in range(len(plan)) if self.receipt(index, plan) is None]

    # What is read is what was written ---------------------------------------------------------------------------

    def check(self, say: Say = print) -> None:
        """Hash what the work reads; call it before `plan`, in one process.

        Own files that changed are removed and named to `say`; the work makes them again.

        Raises:
            DataError: a file of another stage is not what that stage wrote; it was removed, and that stage makes it again.
        """
        for folder in check_files(self.reads()):
            say(f"{self.label}: {folder.name} is of an older version that recorded no hashes: it is read as it is")
        content = read_json(self.folder / "plan.json")
        if content is None:
            return
        changes = find_changes(self.folder, content.get("hashes", {}))
        if changes or not all(path.exists() for path in self.planned_files()):
            remove(self.folder / "plan.json")  # it is made from the same inputs, so the receipts still fit
        plan = Plan(content["shards"])
        for index in range(len(plan)):
            receipt = self.receipt(index, plan)
            since = None if self.joins_shards else time_ns(self._receipt_path(index))
            changes += find_changes(self.folder, receipt.hashes if receipt else {}, since_ns=since)
        for change in changes:
            remove(change.path)
            say(f"{self.label}: {change.describe()}. It was removed and is made again")

    # Doing it ---------------------------------------------------------------------------------------------------

    def run_shard(self, index: int, plan: Plan) -> Receipt:
        """Do one shard unless its receipt is there, and return the receipt. Safe to call twice, or in two places."""
        found = self.receipt(index, plan)
        if found is not None:
            return found
        allocations, start = gpu_allocations(), time.perf_counter()
        outputs, figures = self.work(plan.specs[index])
        seconds = round(time.perf_counter() - start, 3)
        device = gpu_name() if gpu_allocations() > allocations else CPU
        sizes, hashes = self._sizes(outputs), self.hash_outputs(outputs)
        receipt = Receipt(index, plan.hash, sizes, figures, seconds, jobs=_own_job(), device=device, hashes=hashes)
        write_record(self._receipt_path(index), vars(receipt))
        return receipt

    def complete(self, plan: Plan) -> Figures:
        """Put all shards together and write `done.json`.

        Raises:
            TransientError: shards are missing (a worker was lost); running again does just those.
        """
        receipts = [self.receipt(index, plan) for index in range(len(plan))]
        lost = [index for index, receipt in enumerate(receipts) if receipt is None]
        if lost:
            raise TransientError(
                f"{self.label}: {len(lost)} of {len(plan)} shards are missing, first {lost[:5]}; run again"
            )
        whole = [receipt for receipt in receipts if receipt is not None]
        outputs, figures = self.finish(whole)
        jobs = sorted({*_own_job(), *(job for receipt in whole for job in receipt.jobs)}, key=_by_number)
        shards = {
            name: size for receipt in whole for name, size in receipt.outputs.items() if (self.folder / name).exists()
        }
        hashes = {name: found for receipt in whole for name, found in receipt.hashes.items() if is_of(name, shards)}
        hashed = all(receipt.hashes for receipt in whole if receipt.outputs)  # else an older version did some shards
        content = {
            "stage": self.name,
            "key": self.key,
            "settings": self.settings(),
            "inputs": self.inputs(),
            "outputs": shards | self._sizes(outputs),
            **({"hashes": hashes | self.hash_outputs(outputs)} if hashed else {}),
            "figures": figures,
            "num_shards": len(plan),
            "seconds": round(self.seconds_of(whole), 3),
            "host": platform.node(),
            "devices": sorted({receipt.device for receipt in whole if receipt.device}),
            "gpu_seconds": round(sum(one.seconds for one in whole if one.device not in {"", CPU}), 3),
            **({"jobs": jobs} if jobs else {}),
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_record(self.folder / "done.json", content)
        return content

    def run(self, *, wait_seconds: float = -1) -> Figures:
        """Do whatever is missing, in this process, with a progress bar in a terminal. Returns the figures."""
        if (done := self.settled()) is None:
            with self.lock(wait_seconds=wait_seconds):
                if (done := self.done()) is None:  # else another process finished it while this one waited
                    self.check()
                    plan = self.plan()
                    for index in tqdm(self.missing(plan), desc=self.label, unit="shard", disable=None):
                        self.run_shard(index, plan)
                    done = self.complete(plan)
        return dict(done["figures"])

    @contextmanager
    def lock(self, *, wait_seconds: float = -1, say: Say = print) -> Iterator[None]:
        """Hold the stage's folder: one process at a time plans and finishes here.

        The system releases the lock when its holder dies, however it dies. A negative `wait_seconds` waits for ever.

        Raises:
            TransientError: another process still holds it after `wait_seconds`; names that process.
        """
        with hold(self.folder, self.label, wait_seconds=wait_seconds, say=say):
            yield

    # Details ----------------------------------------------------------------------------------------------------

    def _sizes(self, outputs: Iterable[Path]) -> dict[str, int]:
        return {str(path.relative_to(self.folder)): size(path) for path in outputs}

    def hash_outputs(self, outputs: Iterable[Path]) -> Hashes:
        """Return the sha256 of each file of some outputs, just after they were written."""
        return hash_outputs(self.folder, outputs)

    def _receipt_path(self, index: int) -> Path:
        return self.folder / "receipts" / f"{index:05d}.json"

    def _adopt(self, plan: Plan) -> None:
        """Take over shards that a sister folder (same stage, other key) has already done: equal `digest`, equal files."""
        wanted = {spec["digest"]: index for index, spec in enumerate(plan.specs) if spec.get("digest")}
        for sister in sorted(self.parent.glob(f"{self.name}-*")) if wanted else []:
            content = read_json(sister / "plan.json")
            if sister == self.folder or content is None:
                continue
            theirs = Plan(content["shards"])
            for other, spec in enumerate(theirs.specs):
                index = wanted.get(spec.get("digest", ""))
                if index is None or self.receipt(index, plan) is not None:
                    continue
                receipt = read_receipt(sister, other, theirs)
                if receipt is None or find_changes(sister, receipt.hashes):
                    continue
                for name in receipt.outputs:
                    link(sister / name, self.folder / name)
                adopted = replace(receipt, index=index, plan=plan.hash, seconds=0.0, jobs=(), adopted_from=sister.name)
                write_record(self._receipt_path(index), vars(adopted))


# Folders of stages, whatever their key -----------------------------------------------------------------------------


def read_receipt(folder: Path, index: int, plan: Plan) -> Receipt | None:
    """Return the receipt of a shard if it belongs to this plan and its outputs are there."""
    content = read_json(folder / "receipts" / f"{index:05d}.json")
    if content is None or content.get("plan") != plan.hash or not all_there(folder, content["outputs"]):
        return None
    known = {one.name: content[one.name] for one in fields(Receipt) if one.name in content}
    return Receipt(**{**known, "figures": rename(content["figures"]), "jobs": tuple(content.get("jobs", ()))})


def read_jobs(folder: Path) -> list[str]:
    """Return the ids of the Slurm jobs that did a stage's work; none if it was done elsewhere, or is not finished."""
    done, training = read_json(folder / "done.json") or {}, read_json(folder / "slurm.json") or {}
    found = {*done.get("jobs", ()), *(job["job_id"] for job in training.get("jobs", ()))}
    return sorted(found, key=_by_number)


def _own_job() -> tuple[str, ...]:
    """Return the Slurm job that this process belongs to."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return (job,) if job else ()


def _by_number(job: str) -> tuple[int, str]:
    return len(job), job


def group(indices: Sequence[int], num_groups: int) -> list[list[int]]:
    """Deal shards into at most `num_groups` groups of nearly equal size, neighbours together."""
    count = min(num_groups, len(indices))
    edges = [len(indices) * number // count for number in range(count + 1)] if count else [0]
    return [list(indices[start:end]) for start, end in pairwise(edges)]
