"""Quality of units: how they are used, and how well they agree with phones (paper, section IV-D).

Without alignments: usage counts, perplexity, dead units, run length, and the unigram entropy and majority class beside
which a training's loss and accuracy have to be read. With alignments: the definitions of fairseq's
`measure_teacher_quality.py`, on frames, with p the joint distribution of phone and unit:

    phone purity    sum over units of max over phones of p        accuracy if every unit names its best phone
    cluster purity  sum over phones of max over units of p        the same with the roles exchanged
    PNMI            I(phone; unit) / H(phone)                     share of the phones' uncertainty that units remove
    unit NMI        I(phone; unit) / H(unit)                      share of the units' information that is about phones
    H(phone | unit) = H(phone) - I, H(unit | phone) = H(unit) - I: what one leaves open of the other, in nats
    mean lengths    frames per run of one phone, and of one unit, in the aligned files; a run ends at a gap

fairseq adds 1e-8 inside its logarithms; here they are exact. As there, the digits of ARPAbet's stress (`AH0`) are
dropped, and silence counts as a phone: by default all its spellings as one (`silence="merge"`). Unlike there, phones
are looked up at the centre of each frame's window instead of paired by index.

`UnitStatistics` and `PhoneStatistics` take one file at a time and merge, so shards are counted where they lie, and
memory does not grow with the number of files.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from hubert.core.errors import DataError
from hubert.evaluation.quality.alignments import Alignments
from hubert.units.statistics import Counts, UnitStatistics, check_units, entropy, mean_run, num_runs_of

Silence = Literal["merge", "keep", "exclude"]

SILENCE = "SIL"
_SILENCES = {"", "sil", "sp", "<eps>", "<sil>", "[sil]", "h#", "pau", "_", "#"}  # compared in lower case
_NOISES = {"spn", "<spn>", "nsn", "<unk>"}  # not silence, but no phone either: left out with `exclude`
_STRESSED = re.compile(r"([A-Z]{2})[012]")
_UNALIGNED, _EXCLUDED = -1, -2


class PhoneInventory:
    """The phones that an alignment's labels stand for: stress dropped, silence merged, kept or excluded."""

    def __init__(self, labels: Iterable[str], silence: Silence = "merge") -> None:
        """Number the phones of the labels.

        Args:
            labels: of the alignment, such as `Alignments.phones`.
            silence: "merge" counts silence, however it is spelled ("", sil, sp, ...), as the one phone `SIL`; "keep"
                counts every spelling as a phone; "exclude" leaves the frames of silence and of noise (spn) out.
        """
        names = [_name(label, silence) for label in labels]
        self.phones = tuple(sorted({name for name in names if name is not None}))
        index = {phone: number for number, phone in enumerate(self.phones)}
        self._table = np.array([_EXCLUDED if name is None else index[name] for name in names] + [_UNALIGNED], np.int32)

    def __call__(self, indices: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Turn indices of labels (-1: none) into indices of `phones` (-1: none, -2: excluded)."""
        return self._table[indices]  # -1 takes the last entry


def _name(label: str, silence: Silence) -> str | None:
    is_silence = label.strip().lower() in _SILENCES
    if silence == "merge" and is_silence:
        return SILENCE
    if silence == "exclude" and (is_silence or label.strip().lower() in _NOISES):
        return None
    stressed = _STRESSED.fullmatch(label)
    return stressed[1] if stressed else label


@dataclass
class PhoneStatistics:
    """Joint counts of phones and units: `joint[p, k]` is the number of frames of phone p and unit k."""

    phones: tuple[str, ...]
    num_units: int
    joint: Counts = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    num_files: int = 0
    num_files_without_alignment: int = 0
    num_overrun_files: int = 0
    num_unaligned_frames: int = 0
    num_excluded_frames: int = 0
    num_phone_runs: int = 0
    num_unit_runs: int = 0

    def __post_init__(self) -> None:
        """Start from nothing, or from counts that were stored."""
        shape = (len(self.phones), self.num_units)
        self.phones = tuple(self.phones)
        self.joint = (
            np.asarray(self.joint, np.int64).reshape(shape) if np.size(self.joint) else np.zeros(shape, np.int64)
        )

    def update(self, phones: npt.NDArray[np.int32], units: npt.ArrayLike, *, fileid: str = "") -> None:
        """Count one file: phone (-1: none, -2: excluded) and unit of each frame, both of shape (F,)."""
        values = check_units(units, self.num_units, fileid)
        used = phones >= 0
        np.add.at(self.joint, (phones[used], values[used]), 1)
        self.num_files += 1
        self.num_unaligned_frames += int((phones == _UNALIGNED).sum())
        self.num_excluded_frames += int((phones == _EXCLUDED).sum())
        begins = np.append(True, phones[1:] != phones[:-1])[: len(phones)]
        self.num_phone_runs += int(np.count_nonzero(begins & used))
        self.num_unit_runs += num_runs_of(values)

    def merge(self, other: Self) -> None:
        """Add what was counted elsewhere, with the same alignments and codebook."""
        if (other.phones, other.num_units) != (self.phones, self.num_units):
            raise DataError(
                f"cannot merge statistics of {len(self.phones)} phones x {self.num_units} units and of "
                f"{len(other.phones)} x {other.num_units}: expected the same alignments and codebook"
            )
        for name in self.__dataclass_fields__.keys() - {"phones", "num_units"}:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def figures(self) -> dict[str, Any]:
        """Return the agreement of units and phones, as JSON-like scalars. Entropies and information in nats.

        Raises:
            DataError: no frame has a phone, or all have the same one: then nothing is defined.
        """
        total = int(self.joint.sum())
        phone_entropy, unit_entropy = entropy(self.joint.sum(1)), entropy(self.joint.sum(0))
        if not total or not phone_entropy:
            raise DataError(
                f"{total} frames of {self.num_files} files have one of {np.count_nonzero(self.joint.sum(1))} phones; "
                f"{self.num_files_without_alignment} more files have no alignment. Expected at least two phones. "
                "Likely cause: alignments of other files, or another column than the phones"
            )
        if self.num_overrun_files * 2 > self.num_files:
            raise DataError(
                f"the alignments of {self.num_overrun_files} of {self.num_files} files go on more than 0.1 s after the "
                "last unit. Likely cause: another frame rate than that of the units, or alignments of other audio"
            )
        both = entropy(self.joint)
        information = max(phone_entropy + unit_entropy - both, 0.0)
        num_frames = total + self.num_unaligned_frames + self.num_excluded_frames
        return {
            "phone_purity": int(self.joint.max(0).sum()) / total,
            "cluster_purity": int(self.joint.max(1).sum()) / total,
            "pnmi": information / phone_entropy,
            "mutual_information": information,
            "unit_nmi": information / unit_entropy if unit_entropy else 0.0,
            "phone_entropy": phone_entropy,
            "unit_entropy": unit_entropy,
            "phone_entropy_given_unit": max(both - unit_entropy, 0.0),
            "unit_entropy_given_phone": max(both - phone_entropy, 0.0),
            "num_phones": int((self.joint.sum(1) > 0).sum()),
            "num_aligned_frames": total,
            "num_unaligned_frames": self.num_unaligned_frames,
            "num_excluded_frames": self.num_excluded_frames,
            "num_aligned_files": self.num_files,
            "num_files_without_alignment": self.num_files_without_alignment,
            "num_overrun_files": self.num_overrun_files,
            "mean_phone_length": mean_run(total, self.num_phone_runs),
            "mean_unit_length": mean_run(num_frames, self.num_unit_runs),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the counts, JSON-like; `PhoneStatistics(**counts)` is the way back."""
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**content, "phones": list(self.phones), "joint": self.joint.tolist()}


class PhoneCounter:
    """Looks up the phones of each file's frames and counts them: alignments + units -> `statistics`."""

    def __init__(
        self, alignments: Alignments, *, num_units: int, frame_rate: float, silence: Silence = "merge"
    ) -> None:
        self._alignments = alignments
        self._inventory = PhoneInventory(alignments.phones, silence)
        self._frame_rate = frame_rate
        self.statistics = PhoneStatistics(self._inventory.phones, num_units)

    def update(self, fileid: str, units: npt.ArrayLike, *, offset: int | None = None) -> None:
        """Count the units of a file, shape (F,). For a segment: its file's name, and its first sample."""
        if fileid not in self._alignments:
            self.statistics.num_files_without_alignment += 1
            return
        values = np.asarray(units)
        labels = self._alignments.phones_at_frames(fileid, len(values), self._frame_rate, offset=offset or 0)
        self.statistics.update(self._inventory(labels), values, fileid=fileid)
        if offset is None:
            # The last window ends up to one hop before the file does; aligners round; more is another frame rate.
            seconds = (len(values) + 1) / self._frame_rate + 0.1
            self.statistics.num_overrun_files += self._alignments.end_seconds(fileid) > seconds


@dataclass(frozen=True)
class UnitQuality:
    """Quality of the units of some files: `usage` always, `phones` where alignments were given."""

    frame_rate: float
    usage: UnitStatistics
    phones: PhoneStatistics | None = None

    def figures(self) -> dict[str, Any]:
        """Return all figures as one flat JSON-like dict, with lengths of runs in seconds too."""
        figures = self.usage.figures() | {"frame_rate": self.frame_rate}
        figures["mean_run_seconds"] = figures["mean_run_length"] / self.frame_rate
        if self.phones is not None:
            figures |= self.phones.figures()
            figures["mean_phone_seconds"] = figures["mean_phone_length"] / self.frame_rate
        return figures


def unit_quality(
    units: Mapping[str, npt.ArrayLike] | Iterable[tuple[str, npt.ArrayLike]],
    alignments: Alignments | None = None,
    *,
    num_units: int,
    frame_rate: float,
    silence: Silence = "merge",
) -> UnitQuality:
    """Measure units, given as fileid -> (F,) or as a stream of such pairs, one file at a time.

    Args:
        units: of each file, integers from 0 to num_units - 1.
        alignments: the phones; None: usage alone.
        num_units: size of the codebook.
        frame_rate: of the units, in Hz.
        silence: "merge" (default), "keep" or "exclude"; see `PhoneInventory`.

    Raises:
        DataError: a unit out of range; from `figures`, also alignments that fit no frame.
    """
    usage = UnitStatistics(num_units)
    counter = (
        None
        if alignments is None
        else PhoneCounter(alignments, num_units=num_units, frame_rate=frame_rate, silence=silence)
    )
    for fileid, values in units.items() if isinstance(units, Mapping) else units:
        usage.update(values, fileid=fileid)
        if counter is not None:
            counter.update(fileid, values)
    return UnitQuality(frame_rate, usage, None if counter is None else counter.statistics)


def heat_map_order(joint: Counts) -> tuple[Counts, Counts]:
    """Return the order of phones (most frequent first) and of units (by their commonest phone, purest first).

    So `joint[phones][:, units]` has its mass along a diagonal. Units that are never used come last.
    """
    phones = np.argsort(-joint.sum(1), kind="stable")
    rank = np.argsort(phones, kind="stable")
    total = joint.sum(0)
    purity = joint.max(0) / np.maximum(total, 1)
    units = np.lexsort((-purity, rank[joint.argmax(0)], total == 0))
    return phones.astype(np.int64), units.astype(np.int64)
