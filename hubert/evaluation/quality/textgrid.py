"""Reading Praat's TextGrid files: one interval tier of the long or the short text format.

Both formats hold the same values in the same order, and the long one puts a name before each. So a file is cut into
its values (numbers, quoted texts, `<exists>`), the names and the counters in brackets are passed over, and one grammar
reads both:

    "ooTextFile" "TextGrid" xmin xmax <exists> num_tiers
    then per tier: class name xmin xmax size, and per interval: xmin xmax text (per point: time text)
"""

import re
from collections.abc import Iterator
from pathlib import Path

from hubert.core.errors import DataError

Interval = tuple[float, float, str]
Value = str | float

# Quoted text (a quote inside is doubled), a flag, or a number that is no part of a word or counter (`item [1]:`).
_VALUE = re.compile(r'"((?:[^"]|"")*)"|(<\w+>)|(?<![\w.\[])([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)(?![\w.])')


def read_textgrid(path: Path, tier: str = "phones") -> list[Interval]:
    """Return the intervals (start, end, text; seconds) of the tier with this name.

    A tier `<speaker> - <tier>`, as the Montreal Forced Aligner names it, counts if it is the only such one. Silence is
    mostly an interval with an empty text, and is returned as such.

    Raises:
        DataError: the file is no text TextGrid, is cut short, or has no (or more than one) such interval tier.
    """
    try:
        tiers = _parse(_values(_decode(path.read_bytes())))
    except (UnicodeDecodeError, StopIteration, _UnexpectedValueError) as error:
        cause = "it ends too early" if isinstance(error, StopIteration) else str(error)
        raise DataError(f"{path}: expected a TextGrid in Praat's long or short text format, found: {cause}") from error
    chosen = [intervals for name, intervals in tiers if name == tier]
    chosen = chosen or [intervals for name, intervals in tiers if name.endswith(f" - {tier}")]
    if len(chosen) != 1:
        names = [name for name, _ in tiers]
        raise DataError(
            f"{path}: expected one interval tier {tier!r}, found {len(chosen)} among the interval tiers {names}"
        )
    return chosen[0]


class _UnexpectedValueError(ValueError):
    """A value is not of the kind that the grammar has at its place."""


def _decode(content: bytes) -> str:
    is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # what Praat writes when a text is not ASCII
    return content.decode("utf-16" if is_utf16 else "utf-8-sig")


def _values(text: str) -> Iterator[Value]:
    for match in _VALUE.finditer(text):
        quoted, flag, number = match.groups()
        yield quoted.replace('""', '"') if quoted is not None else flag or float(number)


def _parse(values: Iterator[Value]) -> list[tuple[str, list[Interval]]]:
    """Return the name and the intervals of each interval tier; point tiers are passed over."""
    if (kind := (next(values), next(values))) != ("ooTextFile", "TextGrid"):
        raise _UnexpectedValueError(f"its type and class are {kind}")
    _number(values), _number(values)
    if (flag := next(values)) != "<exists>":
        if flag == "<absent>":
            return []
        raise _UnexpectedValueError(f"{flag!r} where <exists> should stand")
    tiers = []
    for _ in range(int(_number(values))):
        kind_of_tier, name = _text(values), _text(values)
        _number(values), _number(values)
        size = int(_number(values))
        if kind_of_tier == "IntervalTier":
            tiers.append((name, [(_number(values), _number(values), _text(values)) for _ in range(size)]))
        elif kind_of_tier == "TextTier":
            for _ in range(size):
                _number(values), _text(values)
        else:
            raise _UnexpectedValueError(f"a tier of class {kind_of_tier!r}")
    return tiers


def _number(values: Iterator[Value]) -> float:
    if isinstance(value := next(values), float):
        return value
    raise _UnexpectedValueError(f"{value!r} where a number should stand")


def _text(values: Iterator[Value]) -> str:
    if isinstance(value := next(values), str):
        return value
    raise _UnexpectedValueError(f"{value!r} where a text should stand")
