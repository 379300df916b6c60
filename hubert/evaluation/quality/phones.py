"""Quality of units: how well they agree with phones (paper, section IV-D).

The definitions are those of fairseq's `measure_teacher_quality.py`, on frames, with p the joint distribution of phone
and unit:

    phone purity    sum over units of max over phones of p        accuracy if every unit names its best phone
    cluster purity  sum over phones of max over units of p        the same with the roles exchanged
    PNMI            I(phone; unit) / H(phone)                     share of the phones' uncertainty that units remove
    unit NMI        I(phone; unit) / H(unit)                      share of the units' information that is about phones
    H(phone | unit) = H(phone) - I, H(unit | phone) = H(unit) - I: what one leaves open of the other, in nats
    mean lengths    frames per run of one phone, and of one unit, in the aligned files; a run ends at a gap

fairseq adds 1e-8 inside its logarithms; here they are exact. As there, the digits of ARPAbet's stress (`AH0`) are
dropped, and silence counts as a phone, all its spellings as one. Unlike there, phones are looked up at the centre of
each frame's window instead of paired by index.

`PhoneStatistics` takes one file at a time, so memory does not grow with the number of files.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hubert.core.errors import DataError
from hubert.data.phones import SILENCE, is_silence
from hubert.evaluation.quality.alignments import Alignments
from hubert.units.statistics import Counts, check_units, entropy, mean_run, num_runs_of

_STRESSED = re.compile(r"([A-Z]{2})[012]")
_UNALIGNED = -1


class PhoneInventory:
    """The phones that an alignment's labels stand for: stress dropped, silence ("", sil, sp, ...) as one phone, `SIL`."""

    def __init__(self, labels: Iterable[str]) -> None:
        """Number the phones of the labels, such as `Alignments.phones`."""
        names = [_name(label) for label in labels]
        self.phones = tuple(sorted(set(names)))
        index = {phone: number for number, phone in enumerate(self.phones)}
        self._table = np.array([*(index[name] for name in names), _UNALIGNED], np.int32)

    def __call__(self, indices: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Turn indices of labels (-1: none) into indices of `phones` (-1: none)."""
        return self._table[indices]  # -1 takes the last entry


def _name(label: str) -> str:
    if is_silence(label):
        return SILENCE
    stressed = _STRESSED.fullmatch(label)
    return stressed[1] if stressed else label


@dataclass
class PhoneStatistics:
    """Joint counts of phones and units: `joint[p, k]` is the number of frames of phone p and unit k."""

    phones: tuple[str, ...]
    num_units: int
    joint: Counts = field(init=False)
    num_files: int = 0
    num_files_without_alignment: int = 0
    num_overrun_files: int = 0
    num_unaligned_frames: int = 0
    num_phone_runs: int = 0
    num_unit_runs: int = 0

    def __post_init__(self) -> None:
        self.joint = np.zeros((len(self.phones), self.num_units), np.int64)

    def update(self, phones: npt.NDArray[np.int32], units: npt.ArrayLike, *, fileid: str = "") -> None:
        """Count one file: phone (-1: none) and unit of each frame, both of shape (F,)."""
        values = check_units(units, self.num_units, fileid)
        used = phones >= 0
        np.add.at(self.joint, (phones[used], values[used]), 1)
        self.num_files += 1
        self.num_unaligned_frames += int((~used).sum())
        begins = np.append(True, phones[1:] != phones[:-1])[: len(phones)]
        self.num_phone_runs += int(np.count_nonzero(begins & used))
        self.num_unit_runs += num_runs_of(values)

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
        num_frames = total + self.num_unaligned_frames
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
            "num_aligned_files": self.num_files,
            "num_files_without_alignment": self.num_files_without_alignment,
            "num_overrun_files": self.num_overrun_files,
            "mean_phone_length": mean_run(total, self.num_phone_runs),
            "mean_unit_length": mean_run(num_frames, self.num_unit_runs),
        }


class PhoneCounter:
    """Looks up the phones of each file's frames and counts them: alignments + units -> `statistics`."""

    def __init__(self, alignments: Alignments, *, num_units: int, frame_rate: float) -> None:
        self._alignments = alignments
        self._inventory = PhoneInventory(alignments.phones)
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
