"""Pictures of match scores and sharing maps."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headshare_jax.errors import HeadshareError
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.scores import MatchResult

FORMATS = (".png", ".svg", ".pdf")
_DONOR, _RECEIVER, _OWN, _DROPPED = "#1b6ca8", "#d1495b", "#d9d9d9", "#444444"


def check_name(path: Path) -> None:
    """Raises HeadshareError unless the file's ending is one of `FORMATS`."""
    if path.suffix.lower() not in FORMATS:
        raise HeadshareError(f"A picture's name must end in {', '.join(FORMATS)}, unlike {path.name}.")


def draw_scores(result: MatchResult, path: Path) -> None:
    """Draws the score of every (receiver, donor) pair as a heatmap, with each receiver's best donor marked.

    Raises:
      HeadshareError: the result holds best donors only, or the file's ending is none of `FORMATS`.
    """
    if result.scores is None:
        raise HeadshareError("This match result holds only the best donors; match again to draw all pairs.")
    layers, units = result.value.shape
    scores = np.where(np.isfinite(result.scores), result.scores, np.nan)
    limit = float(np.nanmax(np.abs(scores)))
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(scores, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    receivers = np.arange(units, layers * units)
    axes.plot(result.donor.ravel()[units:], receivers, ".", color="black", markersize=2, label="best donor")
    axes.set_title(f"Match scores of sharing units ({result.match})")
    axes.set_xlabel("donor's layer")
    axes.set_ylabel("receiver's layer")
    shown = np.arange(0, layers, max(1, layers // 16))
    for set_ticks in (axes.set_xticks, axes.set_yticks):
        set_ticks(shown * units + (units - 1) / 2, [str(layer) for layer in shown])
    axes.legend(loc="upper right")
    figure.colorbar(image, ax=axes, label="score", shrink=0.8)
    _save(figure, path)


def draw_map(sharing: SharingMap, path: Path) -> None:
    """Draws every unit, layers from left to right: a dot, or a cross if dropped; and arcs from donors to receivers.

    Raises:
      HeadshareError: the file's ending is none of `FORMATS`.
    """
    _save(_map_figure(sharing), path)


def _map_figure(sharing: SharingMap) -> Figure:
    layers, units = sharing.donor.shape
    figure = Figure(figsize=(max(6, layers * 0.36), max(2.6, units * 0.3 + 1.6)), layout="constrained")
    axes = figure.add_subplot()
    layer, unit = np.divmod(np.arange(layers * units), units)
    receives, dropped = sharing.receives.ravel(), sharing.dropped.ravel()
    gives = np.isin(np.arange(layers * units), sharing.donor.ravel()[receives])
    for flat in np.flatnonzero(receives):
        donor = sharing.donor.flat[flat]
        _arc(axes, (layer[donor], unit[donor]), (layer[flat], unit[flat]))
    kinds = [
        (~receives & ~gives & ~dropped, "o", _OWN, "own weights"),
        (gives, "o", _DONOR, "donor"),
        (receives, "o", _RECEIVER, "receiver"),
    ]
    if dropped.any():
        kinds.append((dropped, "x", _DROPPED, "dropped"))
    for chosen, marker, colour, label in kinds:
        axes.scatter(layer[chosen], unit[chosen], s=48, marker=marker, color=colour, label=label, zorder=3)
    axes.set_title(sharing.summary())
    axes.set_xlabel("layer")
    axes.set_ylabel("unit")
    axes.set_yticks(np.arange(0, units, max(1, units // 8)))
    axes.set_xticks(np.arange(0, layers, max(1, layers // 16)))
    axes.set_ylim(units - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(kinds), frameon=False)
    return figure


def map_svg(sharing: SharingMap) -> str:
    """The picture of `draw_map` as an SVG element."""
    with io.StringIO() as text:
        _map_figure(sharing).savefig(text, format="svg")
        return text.getvalue()[text.getvalue().index("<svg") :]


def draw_training(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws a PostShare run's losses, similarity of the pairs and held-out perplexity by step.

    Raises:
      HeadshareError: the file's ending is none of `FORMATS`.
    """
    panels = {
        "loss per token": ("lm_loss",),
        "similarity penalty": ("sim_loss",),
        "mean cosine of the pairs": ("pair_cosine",),
        "held-out perplexity": ("shared_perplexity", "dense_perplexity"),
    }
    panels = {title: names for title, names in panels.items() if any(name in line for line in lines for name in names)}
    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, colour in zip(names, (_DONOR, _RECEIVER), strict=False):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=name.replace("_", " "))
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axes.set_yscale("log")
            axes.legend(frameon=False)
    _save(figure, path)


def _arc(axes: Axes, donor: tuple[int, int], receiver: tuple[int, int]) -> None:
    style = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=-0.2", "color": _DONOR, "alpha": 0.35, "linewidth": 0.9}
    axes.annotate("", xy=receiver, xytext=donor, arrowprops=style, zorder=2)


def _save(figure: Figure, path: Path) -> None:
    check_name(path)
    figure.savefig(path, dpi=150)
