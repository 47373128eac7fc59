"""The page of a sweep: one HTML file that needs no network."""

import base64
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np

from headshare_jax.report.curves import draw_perplexity, method_styles
from headshare_jax.report.heatmap import draw_scores
from headshare_jax.report.map import draw_map
from headshare_jax.resources import megabytes
from headshare_jax.sharing.ledger import NOT_SAVED
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.scores import MatchResult


def page(record: dict[str, Any], scores: Sequence[MatchResult]) -> str:
    """The page as HTML.

    Args:
      record: a sweep's plain data, as in `sweep.json`; its first point is the dense model.
      scores: match results to draw; those drawn at random, or without all pairs, are left out.
    """
    points = record["points"]
    styles, best = method_styles(points), _best(points)
    shown = {result.match: result for result in scores if result.scores is not None and result.match != "random"}
    maps = [
        (point, draw_map(SharingMap.from_json(json.dumps(point["map"]))).svg(f"map {place}"))
        for place, point in enumerate(points)
        if point.get("map") is not None
    ]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"megabytes": megabytes, "brief": _brief}
    template = environment.from_string(resources.files(__package__).joinpath("page.html.jinja").read_text("utf-8"))
    return template.render(
        record=record,
        dense=points[0],
        best=best,
        charts=[
            {"name": name, "svg": draw_perplexity([points[0], *drawn], styles).svg(f"curves {name}")}
            for name in ("ratio", "budget")
            if (drawn := [point for point in points[1:] if point[name] is not None and "attention_bytes" in point])
        ],
        undrawn=[point for point in points if "attention_bytes" not in point],
        maps=maps,
        not_saved=NOT_SAVED,
        # The middle one.
        shown=best[(len(best) - 1) // 2] if best else None,
        scores=[
            {
                "name": _score_name(name),
                "units": result.value.shape[1],
                "packed": base64.b64encode(np.asarray(result.scores, "<f4").tobytes()).decode(),
                "svg": draw_scores(result).svg(f"scores {name}"),
            }
            for name, result in shown.items()
        ],
    )


def _brief(value: float) -> str:
    """Two decimals, or none of a large number."""
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _best(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points with the lowest perplexity that keep no more than those of every amount, from the largest on."""
    measured = [point for point in points[1:] if point["perplexity"] is not None]
    best = []
    for amount in {point["amount"] for point in measured}:
        limit = max(point["attention_bytes"] for point in measured if point["amount"] == amount)
        within = [point for point in measured if point["attention_bytes"] <= limit]
        best.append(min(within, key=lambda point: (point["perplexity"], point["attention_bytes"])))
    return [point for point in sorted(measured, key=lambda point: -point["attention_bytes"]) if point in best]


def _score_name(match: str | None) -> str:
    if match == "functional":
        return "what donors compute in the receiver's place (minus the error that is left; 0 is best)"
    return f"cosine of {match} weights (1 is best)"
