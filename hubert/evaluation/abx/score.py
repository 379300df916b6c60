"""Scoring ABX in this process, through fastabx. `hubert.evaluation.abx.job` runs it in a process of its own: that is repeatable.

Features come as a mapping from fileid to (F, D), mostly a `FeatureFolder`, which reads one file at a time.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
import torch
from fastabx import Dataset, EmptyTaskError, InMemoryAccessor, Score, Subsampler, Task
from pydantic import BaseModel, ConfigDict, Field

from hubert.core.errors import DataError
from hubert.evaluation.abx.features import FeatureFolder
from hubert.evaluation.abx.items import ItemCheck, check_items, item_frames

Speaker = Literal["within", "across"]
Array = np.ndarray | torch.Tensor


class ScoreSettings(BaseModel):
    """How to score: phones in the same context, and the two limits of ZeroSpeech (None: all are compared)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    speaker: tuple[Speaker, ...] = ("within", "across")
    max_size_group: int | None = Field(default=10, ge=2)  # most occurrences of A, of B and of X in a cell
    max_x_across: int | None = Field(default=5, ge=2)  # most speakers of X for an A and B; fastabx refuses 1
    seed: int = Field(default=0, ge=0)  # of the draws that the limits make


@dataclass(frozen=True)
class ABXResult:
    """The ABX error rates of one representation on one set of items, as shares (0.25 is 25 %).

    A rate that was not asked for is None, and its cells and triplets are 0. The dropped items are those that are too
    short (no frame lies inside) or beyond the end (a frame of theirs does not exist) in any representation of the job.
    """

    representation: str
    items: str
    frame_rate: float
    within: float | None
    across: float | None
    num_items: int
    num_dropped_items: int
    num_too_short_items: int
    num_beyond_end_items: int
    num_cells_within: int
    num_cells_across: int
    num_triplets_within: int
    num_triplets_across: int
    seconds: float

    def __str__(self) -> str:
        """Return the rates beside what they rest on, for people."""
        rates = [
            f"{name} {100 * rate:.2f} % ({cells:,} cells)"
            for name, rate, cells in (
                ("within", self.within, self.num_cells_within),
                ("across", self.across, self.num_cells_across),
            )
            if rate is not None
        ]
        dropped = f", {self.num_dropped_items:,} dropped" if self.num_dropped_items else ""
        return (
            f"{self.representation} on {self.items}: {', '.join(rates)}; {self.num_items:,} items{dropped}; chance 50 %"
        )


def score_representations(
    representations: Mapping[str, tuple[Mapping[str, Array], float]],
    item_sets: Mapping[str, pl.DataFrame],
    settings: ScoreSettings,
) -> Iterator[ABXResult]:
    """Score representations, name -> (features, frame rate), on item sets, name -> items; representations outermost.

    Features are fileid -> (F, D) of any float dtype: a dict or a `FeatureFolder`. Equal calls give equal results only if
    polars runs one thread (POLARS_MAX_THREADS=1 before it is imported); `hubert.evaluation.abx.job.score_in_subprocess`
    sees to that.

    Memory: the frames of one representation, normalised, in float32: 4 x (D + 1) bytes a frame (3 GB for the 5.4 h of
    LibriSpeech's dev-clean at 50 Hz and D = 768), and the cells.

    Raises:
        DataError: no usable item, no cell (too few items, or a single speaker in "across"), features that are not
            (F, D), differ in D or are not finite, or times that do not fit them.
    """
    checks = {name: _common_check(name, items, representations) for name, items in item_sets.items()}
    files = pl.concat([items["fileid"] for items in item_sets.values()]).unique(maintain_order=True).to_list()
    for name, (features, frame_rate) in representations.items():
        first_frame, data = _load(name, features, files)
        for set_name, items in item_sets.items():
            start = time.perf_counter()
            check = checks[set_name]
            usable = items.filter(pl.Series(check.usable))
            accessor = _accessor(data, first_frame, usable, frame_rate)
            scores = {
                mode: _score(Dataset(_labels(usable), accessor), mode, settings, set_name) for mode in settings.speaker
            }
            within, across = scores.get("within", (None, 0, 0)), scores.get("across", (None, 0, 0))
            yield ABXResult(
                representation=name,
                items=set_name,
                frame_rate=frame_rate,
                within=within[0],
                across=across[0],
                num_items=len(usable),
                num_dropped_items=len(items) - len(usable),
                num_too_short_items=int(check.too_short.sum()),
                num_beyond_end_items=int(check.beyond_end.sum()),
                num_cells_within=within[1],
                num_cells_across=across[1],
                num_triplets_within=within[2],
                num_triplets_across=across[2],
                seconds=round(time.perf_counter() - start, 3),
            )


def _common_check(
    set_name: str, items: pl.DataFrame, representations: Mapping[str, tuple[Mapping[str, Array], float]]
) -> ItemCheck:
    """Find the items that are usable in every representation, so that all are scored on the same ones."""
    nothing = np.zeros(len(items), bool)
    checked = ItemCheck(nothing, nothing)
    for name, (features, frame_rate) in representations.items():
        lengths = {
            fileid: _num_frames(features, fileid) for fileid in items["fileid"].unique().to_list() if fileid in features
        }
        checked |= check_items(items, lengths, frame_rate, source=f"ABX of {name} on {set_name}")
    if not checked.usable.any():
        raise DataError(
            f"ABX on {set_name}: none of {len(items)} items can be scored: {checked.too_short.sum()} are shorter than "
            f"a frame, {checked.beyond_end.sum()} end beyond their file's last frame"
        )
    return checked


def _num_frames(features: Mapping[str, Array], fileid: str) -> int:
    return features.num_frames(fileid) if isinstance(features, FeatureFolder) else len(features[fileid])


def _load(name: str, features: Mapping[str, Array], files: list[str]) -> tuple[dict[str, int], torch.Tensor]:
    """Put the normalised frames of all files into one tensor; return each file's first row, and the tensor.

    Each file is normalised on its own (a row's norm is all that it depends on), so no second copy is ever made.
    """
    lengths = [_num_frames(features, fileid) for fileid in files]
    first_frame = dict(zip(files, np.cumsum([0, *lengths]).tolist(), strict=False))
    data = torch.empty(0)
    for fileid, length in zip(files, lengths, strict=True):
        if length == 0:
            continue
        array = torch.as_tensor(features[fileid]).detach().float()
        if array.ndim != 2 or not torch.isfinite(array).all():
            raise DataError(
                f"ABX of {name}: the features of {fileid!r} should be finite and of shape (frames, dimensions); "
                f"found shape {tuple(array.shape)}, {int((~torch.isfinite(array)).sum())} values not finite"
            )
        file = InMemoryAccessor({0: (0, length)}, array, torch.device("cpu"))
        file.normalize_()
        if not data.numel():
            data = torch.empty(sum(lengths), file.data.shape[1])
        if file.data.shape[1] != data.shape[1]:
            raise DataError(
                f"ABX of {name}: the features of {fileid!r} have {array.shape[1]} dimensions, those of {files[0]!r} "
                f"{data.shape[1] - 1}; expected one representation per folder"
            )
        data[first_frame[fileid] : first_frame[fileid] + length] = file.data
    return first_frame, data


def _accessor(
    data: torch.Tensor, first_frame: dict[str, int], items: pl.DataFrame, frame_rate: float
) -> InMemoryAccessor:
    """Give fastabx the frames of each item: ranges of rows of `data`, which may overlap, as triphones do."""
    start, end = item_frames(items, frame_rate)
    base = items["fileid"].replace_strict(first_frame, return_dtype=pl.Int64).to_numpy()
    ranges = dict(enumerate(zip((base + start).tolist(), (base + end).tolist(), strict=True)))
    accessor = InMemoryAccessor(ranges, data, torch.device("cpu"))
    accessor.is_normalized = True  # by `_load`
    return accessor


def _labels(items: pl.DataFrame) -> pl.DataFrame:
    """Number the labels: fastabx joins them to keys with '-', which would mix up phones that contain it."""
    return items.select(pl.col("phone", "prev_phone", "next_phone", "speaker").rank("dense").cast(pl.Int32))


def _score(dataset: Dataset, speaker: Speaker, settings: ScoreSettings, set_name: str) -> tuple[float, int, int]:
    """Return the error rate, the number of cells and the number of triplets of one condition."""
    context = ["prev_phone", "next_phone"]
    by, across = ([*context, "speaker"], []) if speaker == "within" else (context, ["speaker"])
    subsampler = Subsampler(settings.max_size_group, settings.max_x_across, settings.seed)
    try:
        task = Task(dataset, on="phone", by=by, across=across, subsampler=subsampler)
    except EmptyTaskError as error:
        counts = {name: dataset.labels[name].n_unique() for name in ("phone", "speaker")}
        raise DataError(
            f"ABX {speaker} speaker on {set_name}: {len(dataset.labels)} items of {counts['phone']} phones and "
            f"{counts['speaker']} speakers give nothing to compare. Expected two phones in the same context"
            + (" and X of another speaker" if across else ", one of them twice, of one speaker")
            + ". Fix: more items, or leave this condition out"
        ) from error
    score = Score(task, "angular", progress=False)
    rate = score.collapse(levels=[("next_phone", "prev_phone"), "speaker"])
    if not math.isfinite(rate):
        raise DataError(f"ABX {speaker} speaker on {set_name}: the error rate is {rate}; expected a share from 0 to 1")
    return rate, len(task), int(score.cells["size"].sum())
