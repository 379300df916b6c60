"""The losses of every checkpoint on the same crops and the same masks.

Each utterance counts with its first `max_seconds`, uncut if it is shorter, and with a mask drawn from (seed, fileid): so
neither the batch in which it is scored nor the checkpoint that is scored changes what is asked. The model is in
evaluation mode: no dropout, no layer is skipped. Losses are in nats, weighted by frames.

A masked cross-entropy means something beside the unigram entropy of the same labels: what a model reaches that has
learnt how frequent each unit is, and nothing else.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from hubert.core.errors import DataError
from hubert.core.files import write_json
from hubert.core.frames import SAMPLE_RATE, IntArray, num_frames
from hubert.core.hashing import digest, mix, splitmix64
from hubert.core.machine import Heap
from hubert.core.stage import Figures, Receipt, Spec, Stage
from hubert.data.read_ahead import read_ahead
from hubert.model.hubert import HuBERTPretrain
from hubert.settings.sections import TrainSettings, ValidateSettings
from hubert.training.crops import MASK, ORDER, MicroBatch, read_crops, samples_of
from hubert.training.masks import span_mask
from hubert.units.assign import UnitsStage
from hubert.units.labels import Table
from hubert.units.statistics import entropy

MASK_SETTINGS = ("mask_rule", "mask_prob", "mask_length", "min_masks")


@dataclass(frozen=True)
class Selection:
    """Which utterances are scored: rows of the table (n,) and frames of each (n,), in order of their frames."""

    rows: IntArray
    frames: IntArray
    num_too_short: int
    num_over_limit: int


def select(table: Table, validation: ValidateSettings, train: TrainSettings) -> Selection:
    """Choose the utterances: all that can hold a mask, or as many as fill `max_hours`, drawn by a hash of the fileid.

    Raises:
        DataError: not one can be scored.
    """
    longest = num_frames(round(train.max_seconds * SAMPLE_RATE))
    frames = np.minimum(num_frames(np.asarray(table.num_samples)), longest)
    usable = np.flatnonzero(frames >= train.mask_length)
    if not len(usable):
        raise DataError(
            f"{table.folder}: none of the {len(table)} validation files has {train.mask_length} frames, which a mask needs; "
            "validate on longer ones"
        )
    draws = splitmix64(table.fileid_hash[usable] ^ np.uint64(mix(validation.seed, ORDER)))
    drawn = usable[np.argsort(draws, kind="stable")]
    hours = np.cumsum(samples_of(frames[drawn])) / SAMPLE_RATE / 3600
    taken = drawn[: max(1, int(np.searchsorted(hours, validation.max_hours, side="right")))]
    rows = taken[np.argsort(frames[taken], kind="stable")]
    return Selection(rows, frames[rows], len(table) - len(usable), len(usable) - len(taken))


def micro_batches(selection: Selection, seconds: float) -> Iterator[MicroBatch]:
    """Yield the utterances in batches of one length, at most `seconds` of audio each; nothing is padded."""
    for frames in np.unique(selection.frames).tolist():
        rows = selection.rows[selection.frames == frames]
        capacity = max(1, int(seconds * SAMPLE_RATE) // samples_of(frames))
        for start in range(0, len(rows), capacity):
            part = rows[start : start + capacity]
            yield MicroBatch(0, 0, 0, part, np.zeros(len(part), np.int64), frames)


def draw_masks(table: Table, plan: MicroBatch, validation: ValidateSettings, train: TrainSettings) -> Tensor:
    """Draw the mask (B, F) bool of a batch: each row by (seed, fileid)."""
    return torch.cat(
        [
            span_mask(
                1,
                plan.num_frames,
                seed=(validation.seed, MASK, int(table.fileid_hash[row])),
                mask_prob=train.mask_prob,
                mask_length=train.mask_length,
                min_masks=train.min_masks,
                rule=train.mask_rule,
            )
            for row in plan.rows.tolist()
        ]
    )


@dataclass
class Scores:
    """Sums over all frames of one checkpoint, and what a constant prediction would reach on the same masked frames."""

    num_units: int
    num_files: int = 0
    num_samples: int = 0
    num_frames: int = 0
    num_masked_frames: int = 0
    masked_loss: float = 0.0
    masked_correct: int = 0
    unmasked_loss: float = 0.0
    unmasked_correct: int = 0
    penalty: float = 0.0
    labels: npt.NDArray[np.int64] = field(init=False)
    predictions: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.labels = np.zeros(self.num_units, np.int64)
        self.predictions = np.zeros(self.num_units, np.int64)

    def add(self, losses: Tensor, outputs: Mapping[str, Any], labels: Tensor, mask: Tensor) -> None:
        """Add a batch: the model's losses (N,) and outputs, the labels (B, F) and the mask (B, F)."""
        self.num_files += len(labels)
        self.num_samples += len(labels) * samples_of(labels.shape[1])
        self.num_frames += labels.numel()
        self.num_masked_frames += len(losses)
        self.masked_loss += float(losses.double().sum())
        self.masked_correct += int(outputs["num_correct"])
        self.unmasked_loss += float(outputs["unmasked_losses"].double().sum())
        self.unmasked_correct += int(outputs["unmasked_num_correct"])
        self.penalty += float(outputs["feature_penalty"]) * labels.numel()
        self.labels += np.bincount(labels[mask].numpy(), minlength=self.num_units)
        self.predictions += np.bincount(outputs["predictions"].cpu().numpy(), minlength=self.num_units)

    def row(self) -> dict[str, float | int]:
        """Return the scores. Losses and entropies in nats, accuracies as shares."""
        masked, unmasked = self.num_masked_frames, max(1, self.num_frames - self.num_masked_frames)
        return {
            "validation_loss": self.masked_loss / masked,
            "masked_accuracy": self.masked_correct / masked,
            "unmasked_loss": self.unmasked_loss / unmasked,
            "unmasked_accuracy": self.unmasked_correct / unmasked,
            "feature_penalty": self.penalty / self.num_frames,
            "prediction_perplexity": math.exp(entropy(self.predictions)),
            "unigram_entropy": entropy(self.labels),
            "majority_accuracy": int(self.labels.max()) / masked,
            "num_files": self.num_files,
            "num_frames": self.num_frames,
            "num_masked_frames": masked,
            "hours": self.num_samples / SAMPLE_RATE / 3600,
        }


@torch.inference_mode()
def score(model: HuBERTPretrain, table: Table, validation: ValidateSettings, train: TrainSettings) -> Scores:
    """Score a model on the utterances, crops and masks that the settings say, in float32 and evaluation mode.

    Raises:
        DataError: no utterance can be scored; a file is missing, damaged or changed; the model has other units.
    """
    if model.num_classes != table.num_units:
        raise DataError(
            f"the model predicts {model.num_classes} units, and the table {table.folder} was labelled with {table.num_units}; "
            "validate on the units of the same codebook"
        )
    model = model.eval()
    device = model.mask_embedding.device
    selection = select(table, validation, train)
    scores, heap = Scores(table.num_units), Heap(device)

    def read(plan: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        return *read_crops(table, plan), draw_masks(table, plan, validation, train)

    batches = read_ahead(micro_batches(selection, train.micro_batch_seconds), read, num_workers=train.num_workers)
    with closing(batches), tqdm(total=len(selection.rows), unit="file", disable=None, leave=False) as bar:
        for waveforms, labels, mask in batches:
            losses, outputs = model(waveforms.to(device), labels, mask=mask, unmasked=True)
            scores.add(losses, outputs, labels, mask)
            heap.give_back()
            bar.update(len(labels))
    return scores


@dataclass(kw_only=True)
class ValidateStage(Stage):
    """Score every checkpoint of a training; one shard per checkpoint.

    `checkpoints` are rows with `step, path, sha256, num_layers`, as `TrainStage.checkpoints` returns them. A checkpoint
    that another folder of this stage has scored on the same data is not scored again.
    """

    name: ClassVar[str] = "validate"
    counted: ClassVar[str] = "checkpoints"
    parent: Path
    labels: UnitsStage
    checkpoints: Sequence[Mapping[str, Any]]
    train: TrainSettings
    validation: ValidateSettings

    @property
    def _table(self) -> Path:
        return self.labels.table("validation")

    @cached_property
    def _shared(self) -> dict[str, Any]:
        """What is asked of every checkpoint."""
        train = {name: getattr(self.train, name) for name in (*MASK_SETTINGS, "max_seconds")}
        return {"table": self.labels.key, "validation": self.validation.key_settings(), **train}

    @property
    def _paths(self) -> dict[str, str]:
        """Where the checkpoints lie now, by the hash of their weights: a plan keeps the places of the day when it was made."""
        return {checkpoint["sha256"]: checkpoint["path"] for checkpoint in self.checkpoints}

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in self._shared.items() if name != "table"}

    def inputs(self) -> dict[str, str]:
        weights = digest([[checkpoint["step"], checkpoint["sha256"]] for checkpoint in self.checkpoints])
        return {"table": self.labels.key, "checkpoints": weights}

    def make_plan(self) -> list[Spec]:
        return [
            {**checkpoint, "digest": digest([checkpoint["sha256"], self._shared])} for checkpoint in self.checkpoints
        ]

    def reads(self) -> list[Path]:
        return [self._table, *(Path(checkpoint["path"]) for checkpoint in self.checkpoints)]

    def work(self, spec: Spec) -> tuple[list[Path], Figures]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = HuBERTPretrain.from_pretrained(self._paths[spec["sha256"]]).to(device)
        return [], dict(score(model, Table(self._table), self.validation, self.train).row())

    def finish(self, receipts: list[Receipt]) -> tuple[list[Path], Figures]:
        plan = self.plan()
        checkpoint_fields = ("step", "path", "sha256", "num_layers")
        rows = [
            {name: plan.specs[receipt.index][name] for name in checkpoint_fields} | receipt.figures
            for receipt in receipts
        ]
        rows = [{**row, "path": self._paths[row["sha256"]]} for row in rows]
        rows.sort(key=lambda row: row["step"])
        selection = select(Table(self._table), self.validation, self.train)
        shared = ("unigram_entropy", "majority_accuracy", "num_files", "num_frames", "num_masked_frames", "hours")
        figures: Figures = {
            **{name: rows[0][name] for name in shared},
            "num_too_short": selection.num_too_short,
            "num_over_limit": selection.num_over_limit,
            "best": min(rows, key=lambda row: (row["validation_loss"], row["step"])),
            "rows": rows,
        }
        path = self.folder / "validation.json"
        write_json(path, figures)
        return [path], figures
