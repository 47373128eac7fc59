"""The page of a sweep: one HTML file that needs no network."""

import base64
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np

from headshare_jax.report.curves import LOG_FROM, draw_perplexity, method_styles
from headshare_jax.report.heatmap import draw_scores
from headshare_jax.report.map import draw_map
from headshare_jax.sharing.ledger import megabytes
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.scores import MatchResult

# Up to this ratio to the dense perplexity, points are drawn a second time if others are far above.
_NEAR = 2


def page(record: dict[str, Any], scores: Sequence[MatchResult]) -> str:
    """The page as HTML.

    Args:
      record: a sweep's plain data, as in `sweep.json`; its first point is the dense model.
      scores: match results to draw; those drawn at random, or without all pairs, are left out.
    """
    points = record["points"]
    styles, best, near = method_styles(points), _best(points), _near(points)
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
        curves=draw_perplexity(points, styles).svg("curves"),
        near=draw_perplexity(near, styles).svg("near") if near else None,
        near_limit=_NEAR,
        maps=maps,
        # The best point of the middle amount.
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
    """The point with the lowest perplexity of every amount."""
    measured = [point for point in points[1:] if point["perplexity"] is not None]
    return [
        min((point for point in measured if point["amount"] == amount), key=lambda point: point["perplexity"])
        for amount in dict.fromkeys(point["amount"] for point in measured)
    ]


def _near(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points that lie near the dense model, if there are some and others hide them; none otherwise."""
    measured = [point for point in points if point["perplexity"] is not None]
    near = [point for point in measured if point["relative"] <= _NEAR]
    return near if len(near) > 1 and any(point["relative"] > LOG_FROM for point in measured) else []


def _score_name(match: str | None) -> str:
    if match == "functional":
        return "what donors compute in the receiver's place (minus the error that is left; 0 is best)"
    return f"cosine of {match} weights (1 is best)"
