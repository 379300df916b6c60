"""Match the file names of item files and alignments to the fileids of a manifest."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hubert.core.errors import DataError

NANOSECONDS = 10**9


@dataclass(frozen=True)
class Match:
    """Names found among fileids: `found` maps name to fileid; `ambiguous` maps name to the fileids that fit."""

    found: dict[str, str]
    missing: list[str]
    ambiguous: dict[str, list[str]]


def match_fileids(names: Iterable[str], fileids: Iterable[str]) -> Match:
    """Match the file names of an item or alignment file to the fileids of a manifest.

    A name belongs to the fileid that equals it. Failing that, it belongs to the only fileid of which it is the tail,
    in whole path components, or which is its tail: `utt1` and `dev/spk/utt1` both fit `spk/utt1`, but `other/utt1`
    does not. Memory grows with `names`, not with `fileids`, so a manifest of millions of rows can be passed.
    """
    wanted = set(names)
    by_last: defaultdict[str, list[str]] = defaultdict(list)
    for name in wanted:
        by_last[_parts(name)[-1]].append(name)
    exact: set[str] = set()
    candidates: defaultdict[str, set[str]] = defaultdict(set)
    for fileid in fileids:
        if fileid in wanted:
            exact.add(fileid)
        parts = _parts(fileid)
        for name in by_last.get(parts[-1], ()):
            if _is_tail(parts, _parts(name)):
                candidates[name].add(fileid)
    found: dict[str, str] = {}
    missing: list[str] = []
    ambiguous: dict[str, list[str]] = {}
    for name in sorted(wanted):
        fits = sorted(candidates[name])
        if name in exact:
            found[name] = name
        elif len(fits) == 1:
            found[name] = fits[0]
        elif fits:
            ambiguous[name] = fits
        else:
            missing.append(name)
    return Match(found, missing, ambiguous)


def require_unambiguous(match: Match, source: Path) -> None:
    """Raise a DataError that counts the names that fit several fileids and shows the first ones."""
    if match.ambiguous:
        shown = "; ".join(
            f"{name!r} fits {' and '.join(map(repr, fits[:2]))}" for name, fits in _first(match.ambiguous.items())
        )
        raise DataError(
            f"{source}: {len(match.ambiguous)} file names fit more than one fileid of the manifest: {shown}. "
            "Likely cause: equal file names in several folders. Fix: write the whole fileid in the file column"
        )


def _parts(name: str) -> list[str]:
    return name.split("/")


def _is_tail(one: list[str], other: list[str]) -> bool:
    length = min(len(one), len(other))
    return one[-length:] == other[-length:]


def _first[T](values: Iterable[T], count: int = 3) -> list[T]:
    return [value for value, _ in zip(values, range(count), strict=False)]
