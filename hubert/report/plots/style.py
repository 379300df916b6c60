"""How the report's plots look: curves, usage, heat map; each one a whole SVG file, dark on white.

A plot is an image of its own in a page, on a light and on a dark screen alike, and the same file is shown by MLflow and
Prefect. Figures are made without pyplot, whose global state is not safe in the threads of a worker.
"""

import base64
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Counts = npt.NDArray[np.int64]

SMALL = (4.7, 3.1)  # inches: about 450 pixels, the width of a phone and of half a page
MAX_POINTS = 500  # per curve; a longer one is averaged down

INK, MUTED, GRID = "#1f2328", "#59636e", "#d1d9e0"
BLUE, ORANGE, GREEN, PURPLE, GREY = SERIES = ("#1c6fbf", "#c2510c", "#1a7f37", "#8250df", MUTED)
# The SVG backend asks matplotlib's global settings how to write text and identifiers, so one figure is written at a time.
_writing = threading.Lock()


@dataclass(frozen=True)
class Plot:
    """A plot as an SVG file, and what it shows, for readers who do not see it."""

    svg: str
    alt: str

    @property
    def address(self) -> str:
        """The file as an address that holds it: nothing is loaded for it."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode()).decode()}"


@dataclass(frozen=True)
class Curve:
    """A line of a plot. `marked` draws every point; `chosen` is the x of the point that is ringed."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = BLUE
    marked: bool = False
    faint: bool = False
    chosen: float | None = None


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line: what a curve is compared with."""

    label: str
    y: float
    colour: str = ORANGE


def thin(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """Average neighbouring points until at most `limit` are left."""
    if len(x) <= limit:
        return list(x), list(y)
    parts = [np.array_split(np.asarray(values, dtype=np.float64), limit) for values in (x, y)]
    means = [[float(part.mean()) for part in pieces] for pieces in parts]
    return means[0], means[1]


def line_plot(
    alt: str,
    curves: Sequence[Curve],
    levels: Sequence[Level] = (),
    *,
    x_label: str,
    y_label: str,
    percent: bool = False,
    integer_x: bool = False,
) -> Plot | None:
    """Draw curves and the levels that they are compared with; None if no curve has a point.

    Args:
        alt: what the plot shows, for readers who do not see it.
        curves: the lines; those without points are left out.
        levels: dashed horizontal lines.
        x_label: meaning and unit of the x axis.
        y_label: meaning and unit of the y axis.
        percent: the y values are shares, shown in per cent.
        integer_x: the x values are counted (layers): only whole numbers get a tick.
    """
    curves = [curve for curve in curves if curve.x]
    if not curves:
        return None
    figure = Figure(figsize=SMALL, layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        x, y = thin(curve.x, curve.y)
        marker = "o" if curve.marked or len(x) == 1 else ""
        axes.plot(
            x,
            y,
            color=curve.colour,
            label=curve.label,
            marker=marker,
            markersize=4,
            linewidth=1.2 if curve.faint else 1.8,
            alpha=0.55 if curve.faint else 1.0,
        )
        if curve.chosen is not None and curve.chosen in curve.x:
            place = list(curve.x).index(curve.chosen)
            axes.plot(
                [curve.chosen],
                [curve.y[place]],
                "o",
                markersize=10,
                markerfacecolor="none",
                markeredgecolor=curve.colour,
            )
    for level in levels:
        axes.axhline(level.y, color=level.colour, linestyle=(0, (5, 3)), linewidth=1.3, label=level.label)
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=13 if integer_x else 6, steps=[1, 2, 2.5, 5, 10], integer=integer_x))
    if not integer_x:
        axes.xaxis.set_major_formatter(FuncFormatter(short_number))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    dress(axes)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9, labelcolor=INK, handlelength=1.7)
    return finish(figure, alt)


def short_number(value: float, _position: int | None = None) -> str:
    """Write a tick such as 250000 as 250k."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def usage_plot(alt: str, usage: Counts) -> Plot:
    """Draw the share of frames of each unit, the most frequent first, beside equal use.

    Args:
        alt: what the plot shows.
        usage: (K,) number of frames of each unit.
    """
    share = np.sort(usage)[::-1] / max(int(usage.sum()), 1)
    figure = Figure(figsize=SMALL, layout="constrained")
    axes = figure.subplots()
    axes.stairs(share, np.arange(len(share) + 1) + 0.5, fill=True, color=BLUE, alpha=0.75, label="units")
    axes.axhline(
        1 / max(len(share), 1), color=ORANGE, linestyle=(0, (5, 3)), linewidth=1.3, label="all equally frequent"
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.set_xlim(0.5, len(share) + 0.5)
    axes.set_xlabel("units, most frequent first")
    axes.set_ylabel("share of frames (%)")
    dress(axes)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9, labelcolor=INK, handlelength=1.7)
    return finish(figure, alt)


def order_units(joint: Counts) -> npt.NDArray[np.intp]:
    """Order units by their most likely phone, then by how sure it is; units without frames are left out.

    Args:
        joint: (P, K) frames of each phone and unit, the phones in the order in which they are drawn.
    """
    totals = joint.sum(0)
    share = joint / np.maximum(totals, 1)
    best = share.argmax(0)
    order = np.lexsort((-share.max(0), best))
    return order[totals[order] > 0]


def heat_map(alt: str, joint: Counts, phones: Sequence[str], groups: Sequence[tuple[str, Sequence[int]]]) -> Plot:
    """Draw how likely each phone is, given the unit: one column per unit, one row per phone.

    Args:
        alt: what the plot shows.
        joint: (P, K) frames of each phone and unit.
        phones: names of the P phones.
        groups: class and row numbers of its phones, from `hubert.report.facts.phone_order.order_phones`.
    """
    rows = [index for _, members in groups for index in members]
    counts = joint[rows]
    counts = counts[:, order_units(counts)]
    share = counts / np.maximum(counts.sum(0), 1)
    top = max(0.1, float(np.ceil(10 * share.max(initial=0.0)) / 10))
    ramp = LinearSegmentedColormap.from_list("ramp", ["white", BLUE])
    figure = Figure(figsize=(9.6, 1.0 + 0.165 * len(rows)), layout="constrained")
    axes, scale = figure.subplots(1, 2, width_ratios=[60, 1])
    axes.imshow(share, cmap=ramp, vmin=0, vmax=top, aspect="auto", interpolation="none")
    axes.set_yticks(range(len(rows)), [phones[index] for index in rows])
    axes.set_xticks([])
    axes.set_xlabel(f"{counts.shape[1]} units, ordered by their most likely phone")
    axes.set_ylabel("phone")
    edge = 0
    for label, members in groups:
        middle = edge + (len(members) - 1) / 2
        axes.annotate(
            label,
            (1.006, middle),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
            color=MUTED,
            annotation_clip=False,
        )
        edge += len(members)
        if edge < len(rows):
            axes.axhline(edge - 0.5, color=GRID, linewidth=1)
    scale.imshow(
        np.linspace(1, 0, 64)[:, None], cmap=ramp, extent=(0, 1, 0, 100 * top), aspect="auto", interpolation="none"
    )
    scale.set_xticks([])
    scale.yaxis.tick_right()
    scale.yaxis.set_label_position("right")
    scale.set_ylabel("share of the unit's frames with the phone (%)")
    dress(axes, grid=False, frame=True, label_size=8)
    dress(scale, grid=False, frame=True)
    return finish(figure, alt)


def dress(axes: Axes, *, grid: bool = True, frame: bool = False, label_size: float = 9) -> None:
    """Set the colours of axes, and take away what is no data."""
    for side, spine in axes.spines.items():
        spine.set_visible(frame or side in {"left", "bottom"})
        spine.set_color(GRID)
    axes.tick_params(color=GRID, labelcolor=INK, labelsize=label_size)
    axes.xaxis.label.set(color=MUTED, fontsize=10)
    axes.yaxis.label.set(color=MUTED, fontsize=10)
    if grid:
        axes.grid(visible=True, axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)


def finish(figure: Figure, alt: str) -> Plot:
    """Write a figure as SVG. Equal figures give equal files; text stays text."""
    buffer = io.StringIO()
    with _writing, mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hubert"}):
        figure.savefig(buffer, format="svg", metadata={"Title": alt, "Date": None, "Creator": None})
    return Plot(buffer.getvalue(), alt)
