"""Pictures as files and as SVG: what they say, the same bytes each time, and ids that do not clash."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import headshare_jax as hs
from headshare_jax.report.curves import draw_perplexity, draw_training, method_styles
from headshare_jax.report.heatmap import draw_scores
from headshare_jax.report.map import draw_map, map_svg
from headshare_jax.report.picture import FORMATS, Picture
from headshare_jax.sharing.scores import best_donors
from headshare_jax.sharing.tie import DROPPED


def sharing(donor: int = 1) -> hs.SharingMap:
    """Three layers of two units: 2.0 uses a unit of layer 0, 1.1 is dropped."""
    score = np.full((3, 2), np.nan)
    score[2, 0] = 0.25
    return hs.SharingMap(np.array([[0, 1], [2, DROPPED], [donor, 5]]), score, heads_per_unit=2)


def slim() -> hs.SharingMap:
    """The same with a slim unit, 1.0."""
    rank, pairs = np.full((3, 2), 8), np.ones((3, 2, 4), bool)
    rank[1, 0], pairs[1, 0, 2] = 5, False
    return replace(sharing(), widths=hs.Widths(rank, pairs, 8))


def matched() -> hs.MatchResult:
    layer = np.arange(6) // 2
    scores = np.where(layer[:, None] > layer, np.random.default_rng(0).normal(size=(6, 6)), -np.inf).astype(np.float32)
    return hs.MatchResult(*best_donors(scores, 2), match="qk", scores=scores)


def point(method: str, attention_bytes: int, perplexity: float | None) -> dict[str, object]:
    return {"method": method, "amount": "some", "attention_bytes": attention_bytes, "bytes": 2 * attention_bytes,
            "perplexity": perplexity}  # fmt: skip


POINTS = [
    point("dense", 10_000_000, 20.0),
    point("direct", 8_000_000, 90.0),
    point("fitted", 8_000_000, 22.0),
    point("fitted", 6_000_000, None),
    point("random", 8_000_000, 95.0),
    point("random", 6_000_000, None),
]


def drawings() -> dict[str, Picture]:
    return {
        "map": draw_map(sharing()),
        "slim map": draw_map(slim()),
        "scores": draw_scores(matched()),
        "curves": draw_perplexity(POINTS, method_styles(POINTS)),
        "far": draw_perplexity(POINTS[:2], method_styles(POINTS)),
        "dense": draw_perplexity(POINTS[:1], {}),
        "training": draw_training([{"step": step, "lm_loss": 1 / step, "dense_perplexity": 9.0} for step in (1, 2, 3)]),
    }


@pytest.mark.parametrize("ending", FORMATS)
def test_files_are_the_same_each_time(tmp_path: Path, ending: str) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name, picture in drawings().items():
            picture.save(tmp_path / folder / f"{name}{ending}")
    for name in drawings():
        one, two = ((tmp_path / folder / f"{name}{ending}").read_bytes() for folder in ("one", "two"))
        assert one == two, name


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(hs.HeadshareError, match=r"\.png, \.svg, \.pdf"):
        draw_map(sharing()).save(tmp_path / "map.doc")


def test_letters_stay_letters() -> None:
    texts = {name: re.findall(r"<text[^>]*>([^<]*)</text>", picture.svg(name)) for name, picture in drawings().items()}
    assert sharing().summary() in " ".join(texts["map"])
    assert {"donor", "receiver", "dropped", "own weights"} <= set(texts["map"])
    assert {"slim", "values and outputs kept", "queries and keys kept", "50%"} <= set(texts["slim map"])
    assert {"score (qk)", "best donor"} <= set(texts["scores"])
    assert {"fitted", "dense: 20.0", "perplexity"} <= set(texts["curves"])
    # What lies beyond the edge stands there with its figure.
    assert {"direct 4.5\u00d7", "random 4.8\u00d7", "random not finite", "fitted not finite"} <= set(texts["curves"])
    assert {"direct", "dense: 20.0", "perplexity (log scale)"} <= set(texts["far"])
    assert {"loss per token", "held-out perplexity", "dense perplexity"} <= set(texts["training"])


def test_a_map_says_of_every_unit_what_it_does() -> None:
    titles = [
        title.text for title in ElementTree.fromstring(map_svg(sharing())).iter("{http://www.w3.org/2000/svg}title")
    ]
    assert sorted(filter(None, titles)) == [
        "layer 0, unit 0: its own weights",
        "layer 0, unit 1: donor of 1",
        "layer 1, unit 0: its own weights",
        "layer 1, unit 1: dropped",
        "layer 2, unit 0 uses qkv of layer 0, unit 1, score 0.2500",
        "layer 2, unit 1: its own weights",
    ]


def test_a_map_says_how_slim_a_unit_is() -> None:
    assert "layer 1, unit 0: slim, 5 of 8 values and 3 of 4 pairs kept" in map_svg(slim())


def test_ids_of_different_maps_do_not_clash() -> None:
    one, two = (set(re.findall(r'id="([^"]*)"', map_svg(sharing(donor)))) for donor in (0, 1))
    assert one
    assert not one & two


def test_an_element_changes_nothing_outside_itself() -> None:
    for name, picture in drawings().items():
        svg = picture.svg(name)
        assert "<style" not in svg, name
        assert not re.findall(r'(?:href|src)="(?!#|data:)', svg), name


def test_scores_of_best_donors_alone_cannot_be_drawn() -> None:
    result = matched()
    with pytest.raises(hs.HeadshareError, match="match again"):
        draw_scores(hs.MatchResult(result.donor_layer, result.donor_unit, result.value))


def test_every_method_has_a_colour_and_a_symbol_of_its_own() -> None:
    names = ["dense", "random", "direct", "refit", "fitted", "random-refit", "plan", "slim", "drop"]
    styles = method_styles([{"method": name} for name in names])
    assert set(styles) == set(names) - {"dense"}
    for kind in zip(*styles.values(), strict=True):
        assert len(set(kind)) == len(styles)
