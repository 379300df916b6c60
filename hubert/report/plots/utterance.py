"""The picture of one utterance: spectrogram, and below it phones and units on the same time axis, in lines like a score.

Both rows take their colour from the class of the phone, a unit from its most likely one: where the colours agree, the
unit says what the phone is.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hubert.core.frames import SAMPLE_RATE
from hubert.report.facts.example import Example
from hubert.report.facts.phone_order import CLASSES, order_phones
from hubert.report.plots.style import GRID, INK, Plot, dress, finish

WIDTH = 9.6  # inches, as these
LEFT, RIGHT, TOP, BOTTOM, GAP = 0.62, 0.12, 0.06, 0.42, 0.04
FRAMES_PER_LINE = 150  # then the number of a single frame's unit is still legible
WINDOW, STEP = 400, 80  # samples: 25 ms, every 5 ms
# White is as loud as the quietest fifth (the noise of the recording), but between 30 and 70 dB below the loudest point.
QUIET, MIN_RANGE_DB, MAX_RANGE_DB = 0.2, 30.0, 70.0
NUM_LEVELS = 24  # few levels make a small picture
LETTER_INCHES, DIGIT_INCHES = (
    0.07,
    0.055,
)  # what a letter of a phone's name needs, and a unit's number, which stands upright
TINT = 0.38  # strength of a class's colour, so that text on it stays legible on a light and on a dark page

# One hue per class of phones, apart in lightness too.
COLOURS = dict(
    zip(CLASSES, ("#d9480f", "#f2b705", "#2b8a3e", "#1c7ed6", "#0b7285", "#7048e8", "#868e96", "#c2255c"), strict=True)
)
NO_CLASS = "#868e96"


def draw_example(example: Example, unit_phones: Mapping[int, str]) -> list[Plot]:
    """Draw an utterance, line by line.

    Args:
        example: the utterance.
        unit_phones: each unit's most likely phone, for its colour; empty without alignments.
    """
    classes = classes_of([*unit_phones.values(), *(name for _, _, name in example.phones or ())])
    levels = spectrogram(example.samples)
    num_lines = max(1, round(np.ceil(example.seconds * example.frame_rate / FRAMES_PER_LINE)))
    bounds = np.linspace(0, example.seconds, num_lines + 1)
    return [_draw_line(example, unit_phones, classes, levels, start, end) for start, end in pairwise(bounds.tolist())]


def classes_of(phones: Sequence[str]) -> dict[str, str]:
    """Return the class of each phone."""
    names = list(dict.fromkeys(phones))
    return {names[index]: label for label, members in order_phones(names) for index in members}


def legend(example: Example, unit_phones: Mapping[int, str]) -> list[tuple[str, str]]:
    """Return (class, colour as it looks in the picture) of the classes that occur in it."""
    shown = [unit_phones[unit] for _, _, unit in example.runs() if unit in unit_phones]
    found = classes_of([*unit_phones.values(), *(name for _, _, name in example.phones or ())])
    present = {found[name] for name in (*shown, *(name for _, _, name in example.phones or ()))}
    return [(label, COLOURS[label]) for label in CLASSES if label in present]


def spectrogram(samples: npt.NDArray[np.int16]) -> npt.NDArray[np.float64]:
    """Return the level of each frequency at each time, (201, T), in dB, from 0 (as noise, or less) to 1 (the loudest).

    Column t is the Hann window of 400 samples that is centred at sample 80 t.
    """
    padded = np.pad(samples / 32768, WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::STEP]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW), axis=1)) ** 2
    level = 10 * np.log10(np.maximum(power, 1e-12))
    top = float(level.max())
    floor = max(top - MAX_RANGE_DB, min(float(np.quantile(level, QUIET)), top - MIN_RANGE_DB))
    above = np.clip(level - floor, 0, None) / (top - floor)
    return np.asarray(np.rint(above * NUM_LEVELS) / NUM_LEVELS).T


def _draw_line(
    example: Example,
    unit_phones: Mapping[int, str],
    classes: Mapping[str, str],
    levels: npt.NDArray[np.float64],
    start: float,
    end: float,
) -> Plot:
    heights = {"spectrogram": 1.25} | ({} if example.phones is None else {"phones": 0.22}) | {"units": 0.34}
    height = TOP + sum(heights.values()) + GAP * (len(heights) - 1) + BOTTOM
    figure = Figure(figsize=(WIDTH, height))
    axes, upper = {}, height - TOP
    for name, inches in heights.items():  # placed by hand: matplotlib's layouts draw everything twice
        upper -= inches
        box = (LEFT / WIDTH, upper / height, 1 - (LEFT + RIGHT) / WIDTH, inches / height)
        axes[name] = figure.add_axes(box)
        upper -= GAP
    first, last = int(start * SAMPLE_RATE / STEP), int(np.ceil(end * SAMPLE_RATE / STEP)) + 1
    part = levels[:, first:last]
    step = STEP / SAMPLE_RATE
    extent = ((first - 0.5) * step, (first - 0.5 + part.shape[1]) * step, 0.0, SAMPLE_RATE / 2000)
    axes["spectrogram"].imshow(
        part, cmap="Greys", vmin=0, vmax=1, origin="lower", aspect="auto", interpolation="none", extent=extent
    )
    axes["spectrogram"].set_yticks([0, 2, 4, 6, 8])
    axes["spectrogram"].set_ylabel("frequency (kHz)")
    phones = [
        Box(begin, stop, name, COLOURS[classes[name]], LETTER_INCHES * len(name))
        for begin, stop, name in example.phones or ()
    ]
    if phones:
        _draw_boxes(axes["phones"], phones, start, end, size=8)
    colours = {unit: COLOURS[classes[phone]] for unit, phone in unit_phones.items()}
    units = [
        Box(begin, stop, str(unit), colours.get(unit, NO_CLASS), DIGIT_INCHES) for begin, stop, unit in example.runs()
    ]
    _draw_boxes(axes["units"], units, start, end, size=5.5, rotation=90)
    for name in list(heights)[1:]:
        axes[name].set_ylim(0, 1)
        axes[name].set_yticks([0.5], [name])
    for one in axes.values():
        dress(one, grid=False, frame=True, label_size=8)
        is_lowest = one is axes["units"]
        one.tick_params(axis="x", bottom=is_lowest, labelbottom=is_lowest, length=3)
        one.tick_params(axis="y", length=3 if one is axes["spectrogram"] else 0)
        one.set_xlim(start, end)
        one.yaxis.label.set_fontsize(8)
    axes["units"].set_xlabel("time (s)", fontsize=8, labelpad=2)
    return finish(figure, _alt(example, start, end))


@dataclass(frozen=True)
class Box:
    """What lasts from `start` to `end`, in seconds: its text, and how many inches that needs."""

    start: float
    end: float
    text: str
    colour: str
    inches: float


def _draw_boxes(
    axes: Axes, boxes: Sequence[Box], start: float, end: float, *, size: float, rotation: float = 0
) -> None:
    """Draw what of the boxes lies between `start` and `end`, each with its text if that fits."""
    inches_per_second = (WIDTH - LEFT - RIGHT) / (end - start)
    shown = [box for box in boxes if box.start < end and box.end > start]
    spans = [(max(box.start, start), min(box.end, end)) for box in shown]
    axes.broken_barh(
        [(first, last - first) for first, last in spans],
        (0, 1),
        facecolors=[box.colour for box in shown],
        edgecolors="none",
        alpha=TINT,
    )
    axes.vlines([box.start for box in shown if box.start > start], 0, 1, color=GRID, linewidth=0.8)
    for box, (first, last) in zip(shown, spans, strict=True):
        if (last - first) * inches_per_second >= box.inches:
            middle = (first + last) / 2
            axes.text(middle, 0.47, box.text, ha="center", va="center", fontsize=size, rotation=rotation, color=INK)


def _alt(example: Example, start: float, end: float) -> str:
    parts = [f"Spectrogram from {start:.2f} to {end:.2f} s."]
    if example.phones is not None:
        said = [name or "silence" for begin, stop, name in example.phones if begin < end and stop > start]
        parts.append(f"Phones: {' '.join(said)}.")
    parts.append(
        f"Units: {' '.join(str(unit) for begin, stop, unit in example.runs() if begin < end and stop > start)}."
    )
    return re.sub(r"\s+", " ", " ".join(parts))
