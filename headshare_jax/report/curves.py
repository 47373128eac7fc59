"""Curves: perplexity by bytes, and the metrics of a training run by step."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogFormatter, LogLocator, NullLocator

from headshare_jax.report.picture import Picture, drawn
from headshare_jax.report.style import BASELINE, INK, SERIES

# Above this ratio of the highest perplexity to the lowest, the scale is logarithmic.
LOG_FROM = 4
# Of the curves' axes: left, bottom, width, height, in points; and room for a label.
_WIDTH, _HEIGHT = 405, 290
_BOX = (54, 42, 345, 240)
_LABEL_WIDTH, _LABEL_HEIGHT = 96, 15


def method_styles(points: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Colour and symbol of every method of a sweep; the random baseline's is grey and comes last."""
    names = dict.fromkeys(point["method"] for point in points[1:])
    coloured = [name for name in names if name != "random"]
    styles = {name: SERIES[place % len(SERIES)] for place, name in enumerate(coloured)}
    return styles | {name: BASELINE for name in names if name == "random"}


@drawn
def draw_perplexity(points: Sequence[Mapping[str, Any]], styles: Mapping[str, tuple[str, str]]) -> Picture:
    """Perplexity by bytes of attention weights, a curve for each method, from the dense model on.

    Args:
      points: of a sweep, as in `sweep.json`; the first is the dense model.
      styles: `method_styles` of all the sweep's points.
    """
    dense = points[0]
    measured = [point for point in points if point["perplexity"] is not None]
    picture = Picture(_WIDTH / 72, _HEIGHT / 72)
    axes = picture.figure.add_axes(tuple(np.divide(_BOX, (_WIDTH, _HEIGHT) * 2)))
    _scale(axes, *zip(*map(_place, measured), strict=True))
    ends = []
    for name, (colour, symbol) in styles.items():
        curve = sorted((point for point in measured if point["method"] in ("dense", name)), key=_place, reverse=True)
        if len(curve) < 2:
            continue
        places = [_place(point) for point in curve]
        curve_x, curve_y = np.transpose(places)
        line = "dotted" if name == "random" else "solid"
        axes.plot(curve_x, curve_y, color=colour, linewidth=1.6, linestyle=line, zorder=3)
        picture.points(
            axes, curve_x[1:], curve_y[1:], [_told(point, dense) for point in curve[1:]], color=colour, zorder=4,
            linestyle="none", marker=symbol, markersize=9 if symbol == "*" else 6, markeredgewidth=0,
        )  # fmt: skip
        ends.append((name, colour, places[-1]))
    x, y = _place(dense)
    picture.points(axes, [x], [y], [_told(dense, dense)], color=INK, marker="o", zorder=5)
    axes.axhline(y, color=INK, linewidth=0.8, linestyle="dashed")
    # On the side of the line where fewer curves are.
    side = -1 if np.median([point["perplexity"] for point in measured]) >= y else 1
    axes.annotate(
        f"dense: {y:.1f}", (1, y), (-4, 9 * side), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
        ha="right", va="center",
    )  # fmt: skip
    # The labels lie above the lines and below the symbols; their places need the limits.
    axes.autoscale_view()
    places_pt = [tuple(axes.transData.transform(end) * 72 / picture.figure.dpi) for _, _, end in ends]
    for (name, colour, end), shift in zip(ends, _shifts(places_pt), strict=True):
        axes.annotate(
            name, end, (-8, shift), textcoords="offset points", ha="right", va="center", color=colour, weight="bold",
            zorder=3.5, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0},
        )  # fmt: skip
    return picture


def _scale(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """Scales and names the axes, with room for labels on the left."""
    axes.grid()
    axes.tick_params(length=0)
    log = max(y) > LOG_FROM * min(y)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(y) < 1000 * min(y) else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    width = max(x) - min(x) or max(x)
    axes.set_xlim(min(x) - 0.4 * width, max(x) + 0.06 * width)
    # The room may reach below nothing.
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 0 else "")
    axes.set(xlabel="stored attention weights, MB", ylabel="perplexity" + " (log scale)" * log)
    axes.margins(y=0.1)


def _place(point: Mapping[str, Any]) -> tuple[float, float]:
    return point["attention_bytes"] / 1e6, point["perplexity"]


def _told(point: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    return (
        f"{point['method']}, {point['amount']}: perplexity {point['perplexity']:.2f}, "
        f"{point['perplexity'] / dense['perplexity']:.2f}x dense; {point['attention_bytes'] / 1e6:.1f} of "
        f"{dense['attention_bytes'] / 1e6:.1f} MB of attention, {point['bytes'] / 1e6:.1f} MB in all"
    )


def _shifts(places: Sequence[tuple[float, float]]) -> list[float]:
    """How far labels at these places, in points, move up so as not to lie over one another."""
    heights: dict[int, float] = {}
    for label in sorted(range(len(places)), key=lambda label: places[label][1]):
        x, y = places[label]
        near = [height for other, height in heights.items() if abs(places[other][0] - x) < _LABEL_WIDTH]
        heights[label] = max([y, *(height + _LABEL_HEIGHT for height in near)])
    return [heights[label] - y for label, (_, y) in enumerate(places)]


@drawn
def draw_training(lines: Sequence[Mapping[str, Any]]) -> Picture:
    """A run's losses, similarity of the pairs and held-out perplexity by step, from the lines of its metrics."""
    panels = {
        "loss per token": ("lm_loss",),
        "similarity penalty": ("sim_loss",),
        "mean cosine of the pairs": ("pair_cosine",),
        "held-out perplexity": ("shared_perplexity", "dense_perplexity"),
    }
    panels = {title: names for title, names in panels.items() if any(name in line for line in lines for name in names)}
    picture = Picture(4.5 * len(panels), 3.4, layout="constrained")
    all_axes = picture.figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, names) in zip(all_axes, panels.items(), strict=True):
        for name, (colour, _) in zip(names, SERIES, strict=False):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=name.replace("_", " "))
        axes.set(title=title, xlabel="step")
        if len(names) > 1:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.4)))
            axes.legend()
    return picture
