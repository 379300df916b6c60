"""How units are used: counts, entropy, run lengths."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hubert.core.errors import DataError

Counts = npt.NDArray[np.int64]


def entropy(counts: Counts) -> float:
    """Return the entropy of the distribution that counts (of any shape) are proportional to, in nats."""
    shares = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(-(shares * np.log(shares)).sum()) + 0.0  # no -0.0


def mean_run(num_frames: int, num_runs: int) -> float:
    """Return the mean length of runs in frames; 0 without runs."""
    return num_frames / num_runs if num_runs else 0.0


def num_runs_of(values: npt.NDArray[np.integer[Any]]) -> int:
    """Count the runs of equal values in a sequence."""
    return int(np.count_nonzero(values[1:] != values[:-1])) + 1 if len(values) else 0


@dataclass
class UnitStatistics:
    """Usage of `num_units` units, counted file by file. `usage[k]` is the number of frames of unit k."""

    num_units: int
    num_files: int = 0
    num_runs: int = 0
    usage: Counts = field(init=False)

    def __post_init__(self) -> None:
        self.usage = np.zeros(self.num_units, np.int64)

    def update(self, units: npt.ArrayLike, *, fileid: str = "") -> None:
        """Count the units of one file, shape (F,). A run ends where the file ends.

        Raises:
            DataError: a unit is not in 0 ... num_units - 1, or the units are not integers of shape (F,).
        """
        values = check_units(units, self.num_units, fileid)
        np.add.at(self.usage, values, 1)
        self.num_files += 1
        self.num_runs += num_runs_of(values)

    @property
    def num_frames(self) -> int:
        """The number of units counted."""
        return int(self.usage.sum())

    def figures(self) -> dict[str, Any]:
        """Return what describes the usage, as JSON-like scalars. Entropy in nats, run length in frames."""
        unigram_entropy = entropy(self.usage)
        most = int(self.usage.argmax())
        return {
            "num_files": self.num_files,
            "num_frames": self.num_frames,
            "num_units": self.num_units,
            "num_unused_units": int((self.usage == 0).sum()),
            "unigram_entropy": unigram_entropy,
            "usage_perplexity": float(np.exp(unigram_entropy)),
            "majority_unit": most,
            "majority_share": int(self.usage[most]) / max(self.num_frames, 1),
            "mean_run_length": mean_run(self.num_frames, self.num_runs),
        }


def check_units(units: npt.ArrayLike, num_units: int, fileid: str = "") -> Counts:
    """Return units as int64 of shape (F,), or raise a DataError that names the file and the first wrong unit."""
    values = np.asarray(units)
    if values.ndim != 1 or (values.size and not np.issubdtype(values.dtype, np.integer)):
        raise DataError(
            f"units of {fileid!r}: expected integers of shape (frames,), found {values.dtype} of shape {values.shape}"
        )
    values = values.astype(np.int64)
    wrong = np.flatnonzero((values < 0) | (values >= num_units))
    if len(wrong):
        frame = int(wrong[0])
        raise DataError(
            f"units of {fileid!r}: expected 0 to {num_units - 1}, found {values[frame]} at frame {frame} "
            f"({len(wrong)} of {len(values)} frames are out of range). Likely cause: units of another codebook"
        )
    return values
