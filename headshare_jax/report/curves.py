"""Curves: perplexity by bytes, and the metrics of a training run by step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogFormatter, LogLocator, NullLocator

from headshare_jax.report.picture import Picture, drawn
from headshare_jax.report.style import BASELINES, INK, SERIES, STRIP

# Points of more than this ratio to the dense perplexity lie beyond the chart's edge, if others lie nearer.
_NEAR = 2
# Where none is near: above this ratio of the highest perplexity to the lowest, the scale is logarithmic.
_LOG_FROM = 4
# Of the curves' axes: left, bottom, width, height, in points; and room for a label, and for one in the strip above.
_WIDTH, _HEIGHT = 405, 290
_BOX = (54, 42, 345, 240)
_LABEL_WIDTH, _LABEL_HEIGHT = 96, 15
_STRIP_LABEL_WIDTH = 120


def method_styles(points: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Colour and symbol of every method of a sweep; random baselines are grey and come last."""
    names = dict.fromkeys(point["method"] for point in points[1:])
    coloured = [name for name in names if name not in BASELINES]
    styles = {name: SERIES[place % len(SERIES)] for place, name in enumerate(coloured)}
    return styles | {name: BASELINES[name] for name in names if name in BASELINES}


@drawn
def draw_perplexity(points: Sequence[Mapping[str, Any]], styles: Mapping[str, tuple[str, str]]) -> Picture:
    """Perplexity by bytes of attention weights, a curve for each method, from the dense model on.

    What is far above the rest, or not finite, stands with its figure in a strip at the upper edge.

    Args:
      points: of a sweep, as in `sweep.json`; the first is the dense model.
      styles: `method_styles` of all the sweep's points.
    """
    dense = points[0]
    known = [point for point in points if point.get("attention_bytes") is not None]
    measured = [point for point in known if point["perplexity"] is not None]
    near = [point for point in measured if point["perplexity"] <= _NEAR * dense["perplexity"]]
    within = near if len(near) > 1 else measured
    beyond = sorted((point for point in known if point not in within), key=_bytes, reverse=True)
    rows = _rows([_bytes(point) for point in beyond], _points_per_megabyte(known))
    strip = _LABEL_HEIGHT * (max(rows, default=-1) + 1)
    picture = Picture(_WIDTH / 72, (_HEIGHT + strip) / 72)
    size = np.array((_WIDTH, _HEIGHT + strip) * 2)
    axes = picture.figure.add_axes(tuple(_BOX / size))
    _scale(axes, [_bytes(point) for point in known], [point["perplexity"] for point in within])
    ends = []
    for name, (colour, symbol) in styles.items():
        curve = sorted((point for point in measured if point["method"] in ("dense", name)), key=_place, reverse=True)
        if len(curve) < 2:
            continue
        places = [_place(point) for point in curve]
        line = "dotted" if name in BASELINES else "solid"
        axes.plot(*np.transpose(places), color=colour, linewidth=1.6, linestyle=line, zorder=3)
        shown = [point for point in curve[1:] if point in within]
        if not shown:
            continue
        x, y = np.transpose([_place(point) for point in shown])
        picture.points(axes, x, y, [_told(point, dense) for point in shown], color=colour, zorder=4, **_symbol(symbol))
        ends.append((name, colour, _place(shown[-1])))
    x, y = _place(dense)
    picture.points(axes, [x], [y], [_told(dense, dense)], color=INK, marker="o", zorder=5)
    axes.axhline(y, color=INK, linewidth=0.8, linestyle="dashed")
    # On the side of the line where fewer curves are.
    side = -1 if np.median([point["perplexity"] for point in measured]) >= y else 1
    axes.annotate(
        f"dense: {y:.1f}", (1, y), (-4, 9 * side), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
        ha="right", va="center",
    )  # fmt: skip
    # The labels lie above the lines and below the symbols.
    places_pt = [tuple(axes.transData.transform(end) * 72 / picture.figure.dpi) for _, _, end in ends]
    for (name, colour, end), shift in zip(ends, _shifts(places_pt), strict=True):
        axes.annotate(
            name, end, (-8, shift), textcoords="offset points", ha="right", va="center", color=colour, weight="bold",
            zorder=3.5, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0},
        )  # fmt: skip
    if beyond:
        left, bottom, width, height = _BOX
        above = picture.figure.add_axes(tuple((0, bottom + height, left + width, strip) / size), facecolor=STRIP)
        x_limits = axes.get_xlim()[0] - left / _points_per_megabyte(known), axes.get_xlim()[1]
        above.set(xlim=x_limits, ylim=(max(rows) + 0.5, -0.5), xticks=[], yticks=[])
        above.spines[:].set_visible(False)
        for point, row in zip(beyond, rows, strict=True):
            colour, symbol = styles[point["method"]]
            picture.points(above, [_bytes(point)], [row], [_told(point, dense)], color=colour, **_symbol(symbol))
            above.annotate(
                f"{point['method']} {_times(point, dense)}", (_bytes(point), row), (-8, 0),
                textcoords="offset points", ha="right", va="center", color=colour, weight="bold",
            )  # fmt: skip
    return picture


def _scale(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """Scales and names the axes, with room for labels on the left."""
    axes.grid()
    axes.tick_params(length=0)
    log = max(y) > _LOG_FROM * min(y)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(y) < 1000 * min(y) else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    lowest, highest = np.log(min(y)) if log else min(y), np.log(max(y)) if log else max(y)
    room = 0.1 * ((highest - lowest) or abs(lowest))
    axes.set_ylim(*(np.exp if log else np.asarray)([lowest - room, highest + 1.6 * room]))
    axes.set_xlim(*_limits(x))
    # The room may reach below nothing.
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 0 else "")
    axes.set(xlabel="stored attention weights, MB", ylabel="perplexity" + " (log scale)" * log)
    axes.margins(y=0.1)


def _limits(x: Sequence[float]) -> tuple[float, float]:
    width = max(x) - min(x) or max(x)
    return min(x) - 0.4 * width, max(x) + 0.06 * width


def _points_per_megabyte(points: Sequence[Mapping[str, Any]]) -> float:
    left, right = _limits([_bytes(point) for point in points])
    return _BOX[2] / (right - left)


def _bytes(point: Mapping[str, Any]) -> float:
    return point["attention_bytes"] / 1e6


def _place(point: Mapping[str, Any]) -> tuple[float, float]:
    return _bytes(point), point["perplexity"]


def _symbol(symbol: str) -> dict[str, Any]:
    return {"linestyle": "none", "marker": symbol, "markersize": 9 if symbol == "*" else 6, "markeredgewidth": 0}


def _times(point: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """A perplexity against the dense model's, as briefly as it makes sense."""
    if point["perplexity"] is None:
        return "not finite"
    times = point["perplexity"] / dense["perplexity"]
    return f"{times:,.1f}\u00d7" if times < 100 else f"{times:,.0f}\u00d7"


def _told(point: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    perplexity = (
        "not finite" if point["perplexity"] is None else f"{point['perplexity']:.2f}, {_times(point, dense)} dense"
    )
    return (
        f"{point['method']}, {point['amount']}: perplexity {perplexity}; {point['attention_bytes'] / 1e6:.1f} of "
        f"{dense['attention_bytes'] / 1e6:.1f} MB of attention, {point['bytes'] / 1e6:.1f} MB in all"
    )


def _rows(places: Sequence[float], scale: float) -> list[int]:
    """The first row of a strip with room for a label, for each of these places from the right, in points by a scale."""
    rows: list[int] = []
    last: dict[int, float] = {}
    for place in places:
        row = next(row for row in range(len(places)) if (last.get(row, math.inf) - place) * scale >= _STRIP_LABEL_WIDTH)
        last[row] = place
        rows.append(row)
    return rows


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
