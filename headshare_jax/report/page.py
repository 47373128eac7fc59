"""The page of a sweep: one HTML file that needs no network."""

import importlib.util
import json
import math
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from headshare_jax.errors import HeadshareError
from headshare_jax.sharing.ledger import megabytes
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.scores import MatchResult

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

TEMPLATE = "page.html.jinja"
_INK, _FAINT, _GRID = "#222222", "#c9c9c9", "#e9e9e9"
# Colours that readers with any kind of colour vision can tell apart, dark enough to write in; each with its own symbol.
_STYLES = (
    ("#0072b2", "circle"),
    ("#c24e00", "square"),
    ("#00795a", "diamond"),
    ("#a3487f", "triangle-up"),
    ("#5b4fa0", "star"),
    ("#7a6200", "cross"),
)
_BASELINE = ("#6b6b6b", "x")
_DONOR, _RECEIVER = _STYLES[0], _STYLES[1]
# In pixels.
_HEIGHT, _TOP, _BOTTOM, _LABEL = 400, 16, 52, 17
# Above this ratio of the highest perplexity to the lowest, curves are drawn on a logarithmic scale.
_LOG_FROM = 4
# Up to this ratio to the dense perplexity, points are drawn a second time if others are far above.
_NEAR = 2
# Points of the line that joins a donor and a receiver.
_ARC = np.linspace(0, 1, 9)


def check_installed() -> None:
    """Raises HeadshareError if plotly is missing."""
    if importlib.util.find_spec("plotly") is None:
        raise HeadshareError("The report needs plotly; install it: pip install 'headshare-jax[report]'.")


def page(record: dict[str, Any], scores: Sequence[MatchResult]) -> str:
    """The page as HTML, with its scripts inside.

    Args:
      record: a sweep's plain data, as in `sweep.json`; its first point is the dense model.
      scores: match results to draw; those drawn at random, or without all pairs, are left out.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    shown = {result.match: result for result in scores if result.scores is not None and result.match != "random"}
    maps = [point for point in record["points"] if point.get("map") is not None]
    best, near = _best(record["points"]), _near(record["points"])
    figures = {
        "curves": _curves(record["points"], _styles(record["points"])),
        "near": _curves(near, _styles(record["points"])) if near else None,
        "maps": [_map(SharingMap.from_json(json.dumps(point["map"]))) for point in maps],
        "scores": [_heatmap(result) for result in shown.values()],
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"megabytes": megabytes, "brief": _brief}
    template = environment.from_string(resources.files("headshare_jax.report").joinpath(TEMPLATE).read_text())
    return template.render(
        record=record,
        dense=record["points"][0],
        best=best,
        maps=maps,
        near=_NEAR if near else None,
        # The best point of the middle amount.
        shown=best[(len(best) - 1) // 2] if best else None,
        scores=[_score_name(name) for name in shown],
        figures=_plain(figures),
        plotly=get_plotlyjs(),
    )


def _plain(value: Any) -> Any:
    """Figures as plain data, small."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if value is None else json.loads(value.to_json())


def _brief(value: float) -> str:
    """Two decimals, or none of a large number."""
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _best(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The point with the lowest perplexity of every amount."""
    measured = [point for point in points[1:] if point["perplexity"] is not None]
    return [
        min((point for point in measured if point["amount"] == amount), key=lambda point: point["perplexity"])
        for amount in dict.fromkeys(point["amount"] for point in measured)
    ]


def _near(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points that lie near the dense model, if there are some and others hide them; none otherwise."""
    far = [point for point in points if point["perplexity"] is not None and point["relative"] > _LOG_FROM]
    near = [point for point in points if point["perplexity"] is not None and point["relative"] <= _NEAR]
    return near if far and len(near) > 1 else []


def _curves(points: list[dict[str, Any]], styles: dict[str, tuple[str, str]]) -> "Figure":
    """Perplexity by bytes of attention weights, a curve for each method, from the dense model on."""
    import plotly.graph_objects as go

    dense = points[0]
    measured = [point for point in points if point["perplexity"] is not None]
    highest, lowest = (choose(point["perplexity"] for point in measured) for choose in (max, min))
    log = highest > _LOG_FROM * lowest
    scale = math.log10 if log else float
    low, high = scale(lowest), scale(highest)
    margin = 0.08 * (high - low or 1.0)
    low, high = low - margin, high + margin
    most, least = (choose(point["attention_bytes"] for point in measured) / 1e6 for choose in (max, min))
    width = most - least or most
    figure = go.Figure()
    labels = []
    for name, (colour, symbol) in styles.items():
        curve = sorted(
            (point for point in measured if point["method"] in ("dense", name)), key=lambda p: -p["attention_bytes"]
        )
        if len(curve) < 2:
            continue
        figure.add_scatter(
            name=name,
            x=[point["attention_bytes"] / 1e6 for point in curve],
            y=[point["perplexity"] for point in curve],
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": "dot" if name == "random" else "solid"},
            marker={"symbol": symbol, "size": [0] + [9] * (len(curve) - 1), "opacity": 1},
            customdata=[[point["amount"], point["relative"], point["bytes"] / 1e6] for point in curve],
            hovertemplate="%{customdata[0]}: perplexity %{y:.2f}, %{customdata[1]:.2f}x dense<br>"
            f"%{{x:.1f}} of {most:.1f} MB of attention, %{{customdata[2]:.1f}} MB in all",
        )
        end = curve[-1]
        labels.append((end["attention_bytes"] / 1e6, scale(end["perplexity"]), name, colour))
    figure.add_scatter(
        x=[dense["attention_bytes"] / 1e6],
        y=[dense["perplexity"]],
        mode="markers",
        marker={"symbol": "circle", "size": 11, "color": _INK},
        hovertemplate="dense: perplexity %{y:.2f}, %{x:.1f} MB of attention<extra></extra>",
    )
    figure.add_hline(dense["perplexity"], line={"color": _INK, "width": 1, "dash": "dash"})
    figure.add_annotation(
        x=most + 0.04 * width, y=scale(dense["perplexity"]), text=f"dense: {dense['perplexity']:.1f}",
        showarrow=False, xanchor="right", yanchor="top", font={"color": _INK},
    )  # fmt: skip
    per_pixel = (high - low) / (_HEIGHT - _TOP - _BOTTOM)
    for (x, y, name, colour), place in zip(labels, _spread([y / per_pixel for _, y, _, _ in labels]), strict=True):
        figure.add_annotation(
            x=x, y=y, text=f"<b>{name}</b>", xshift=-9, yshift=place - y / per_pixel, showarrow=False,
            xanchor="right", font={"color": colour},
        )  # fmt: skip
    figure.update_layout(**_layout(_HEIGHT), showlegend=False)
    figure.update_xaxes(
        title_text="stored attention weights, MB", range=[least - 0.36 * width, most + 0.06 * width], **_axis()
    )
    figure.update_yaxes(
        title_text="perplexity" + " (log scale)" * log, type="log" if log else "linear", range=[low, high], **_axis()
    )
    if log:
        figure.update_yaxes(tickvals=_round_values(10**low, 10**high), tickformat="~s")
    return figure


def _styles(points: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Colour and symbol of every method; random pairs are in grey."""
    names = dict.fromkeys(point["method"] for point in points[1:])
    coloured = [name for name in names if name != "random"]
    styles = {name: _STYLES[place % len(_STYLES)] for place, name in enumerate(coloured)}
    return styles | {name: _BASELINE for name in names if name == "random"}


def _spread(places: list[float]) -> list[float]:
    """Heights of labels, in pixels, moved up where they would lie over one another."""
    moved = list(places)
    lowest = -math.inf
    for label in np.argsort(places):
        moved[label] = max(places[label], lowest)
        lowest = moved[label] + _LABEL
    return moved


def _round_values(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [factor * 10.0**power for power in powers for factor in (1, 2, 5) if low <= factor * 10.0**power <= high]


def _map(sharing: SharingMap) -> "Figure":
    """Every unit as a dot, layers from left to right, and a line from each donor to each of its receivers."""
    import plotly.graph_objects as go

    layers, units = sharing.donor.shape
    layer, unit = np.divmod(np.arange(layers * units), units)
    donor, receives, dropped = (each.ravel() for each in (sharing.donor, sharing.receives, sharing.dropped))
    assert sharing.unit_tie is not None
    uses = np.bincount(donor[receives], minlength=layers * units)
    kinds = (
        ("own", ~receives & ~dropped & (uses == 0), _FAINT, "circle", 5),
        ("dropped", dropped, *_BASELINE, 7),
        ("donor", uses > 0, *_DONOR, 9),
        ("receiver", receives, *_RECEIVER, 8),
    )
    told = [f"layer {layer[flat]}, unit {unit[flat]}: its own weights" for flat in range(layers * units)]
    for flat in np.flatnonzero(uses):
        told[flat] = f"layer {layer[flat]}, unit {unit[flat]}: donor of {uses[flat]}"
    for flat in np.flatnonzero(dropped):
        told[flat] = f"layer {layer[flat]}, unit {unit[flat]}: dropped"
    for flat in np.flatnonzero(receives):
        score = sharing.score.flat[flat]
        told[flat] = (
            f"layer {layer[flat]}, unit {unit[flat]} uses {sharing.unit_tie.flat[flat]} of layer {layer[donor[flat]]}, "
            f"unit {unit[donor[flat]]}" + ("" if np.isnan(score) else f"<br>score {score:.4f}")
        )
    figure = go.Figure()
    x, y = _arcs(layer, unit, donor, receives)
    figure.add_scatter(
        x=x, y=y, mode="lines", line={"color": _DONOR[0], "width": 1}, opacity=0.4, hoverinfo="skip", showlegend=False
    )
    for name, chosen, colour, symbol, size in kinds:
        if not chosen.any():
            continue
        figure.add_scatter(
            name=name, x=layer[chosen], y=unit[chosen], mode="markers",
            marker={"color": colour, "symbol": symbol, "size": size},
            text=[told[flat] for flat in np.flatnonzero(chosen)], hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        **_layout(120 + 26 * (units + 1)), legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"}
    )
    figure.update_layout(margin_t=40)
    figure.update_xaxes(title_text="layer", range=[-0.7, layers - 0.3], **_axis())
    figure.update_yaxes(title_text="unit", range=[units - 0.5, -0.9], dtick=max(1, units // 8), **_axis())
    return figure


def _arcs(layer: np.ndarray, unit: np.ndarray, donor: np.ndarray, receives: np.ndarray) -> tuple[Any, Any]:
    """Lines from donors to receivers, bent so that those along one row can be seen; a gap between any two."""
    receivers = np.flatnonzero(receives)
    ends = [(layer[donor[receivers]], layer[receivers]), (unit[donor[receivers]], unit[receivers])]
    x, y = (start[:, None] * (1 - _ARC)[None] + stop[:, None] * _ARC[None] for start, stop in ends)
    y = y - np.minimum(0.2 + 0.03 * np.abs(x[:, -1:] - x[:, :1]), 0.6) * (4 * _ARC * (1 - _ARC))[None]
    gap = np.full((len(receivers), 1), np.nan)
    return np.hstack([x, gap]).ravel(), np.hstack([y, gap]).ravel()


def _heatmap(result: MatchResult) -> "Figure":
    """The score of every (receiver, donor) pair."""
    import plotly.graph_objects as go

    assert result.scores is not None
    layers, units = result.value.shape
    labels = [f"{layer}.{unit}" for layer in range(layers) for unit in range(units)]
    scores = np.where(np.isfinite(result.scores), result.scores, np.nan)
    low, high = float(np.nanmin(scores)), float(np.nanmax(scores))
    colours: dict[str, Any] = {"colorscale": "Cividis"}
    if result.match != "functional":
        # Cosines, which have a middle.
        high = max(-low, high)
        low, colours = -high, {"colorscale": "RdBu", "reversescale": True}
    figure = go.Figure()
    figure.add_heatmap(
        z=scores.astype(np.float32),
        x=labels,
        y=labels,
        hoverongaps=False,
        hovertemplate="receiver %{y}<br>donor %{x}<br>score %{z:.4f}<extra></extra>",
        colorbar={
            # In the half that no pair fills.
            "orientation": "h", "thickness": 10, "len": 0.45, "x": 0.95, "xanchor": "right", "y": 1, "yanchor": "top",
            "title": {"text": "score", "side": "top", "font": {"size": 13}}, "outlinewidth": 0,
            # A tick at the very end would be left out.
            "tickvals": [low + 0.001 * (high - low), (low + high) / 2, high - 0.001 * (high - low)],
            "tickformat": ".2~g",
        },
        zmin=low,
        zmax=high,
        **colours,
    )  # fmt: skip
    ticks = range(0, layers, max(1, math.ceil(layers / 8)))
    axis = _axis() | {
        "type": "category",
        "tickvals": [labels[layer * units + units // 2] for layer in ticks],
        "ticktext": [str(layer) for layer in ticks],
        "showgrid": False,
    }
    figure.update_layout(**_layout(560))
    figure.update_xaxes(title_text="donor's layer", **axis)
    figure.update_yaxes(title_text="receiver's layer", autorange="reversed", **axis)
    return figure


def _score_name(match: str | None) -> str:
    if match == "functional":
        return "what donors compute in the receiver's place (minus the error that is left; 0 is best)"
    return f"cosine of {match} weights (1 is best)"


def _layout(height: int) -> dict[str, Any]:
    return {
        "template": "none",
        "height": height,
        "margin": {"l": 56, "r": 8, "t": _TOP, "b": _BOTTOM},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        "hoverlabel": {"bgcolor": "white", "bordercolor": _FAINT, "font": {"color": _INK}},
        "dragmode": False,
    }


def _axis() -> dict[str, Any]:
    return {"gridcolor": _GRID, "zeroline": False, "fixedrange": True, "title_font_size": 13, "title_standoff": 8}
