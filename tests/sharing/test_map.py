"""Sharing maps: what they store, their JSON document, and that no document is trusted."""

import json
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headshare_jax import HeadshareError, LlamaConfig, SharingMap, parameters
from headshare_jax.sharing.source import stored_shape
from headshare_jax.sharing.tie import DROPPED
from headshare_jax.sharing.widths import Widths

TIES = tuple("".join(letters) for size in range(1, 5) for letters in combinations("qkvo", size))
VALID: dict[str, Any] = {
    "format": "headshare-map",
    "version": 1,
    "model": {"num_layers": 3, "units_per_layer": 2, "heads_per_unit": 2},
    "tie": "qkv",
    "method": "direct",
    "match": "qk",
    "chains": "resolve",
    "ratio": 0.4,
    "seed": None,
    "source": "sha256:0",
    "receivers": [
        {"layer": 1, "unit": 1, "donor": [0, 0], "score": 0.25},
        {"layer": 2, "unit": 0, "donor": [0, 1], "tie": "qk", "score": None},
    ],
    "dropped": [{"layer": 2, "unit": 1, "score": 0.5}],
}
# Heads of 8 columns, 4 of which turn: pairs 0 and 1 turn, columns 4 to 7 are their pairs 2 to 5.
SLIM: dict[str, Any] = VALID | {
    "version": 2,
    "model": VALID["model"] | {"head_dim": 8, "rotary_dim": 4},
    "slim": [
        {"layer": 1, "unit": 0, "rank": 3, "pairs": [1, 2, 5], "score": -0.25},
        {"layer": 0, "unit": 1, "rank": 8, "pairs": [0]},
    ],
    "receivers": VALID["receivers"][:1],
}


@st.composite
def maps(draw: st.DrawFn) -> SharingMap:
    """Any valid map of a small model, with ties and drops; donors need not be in earlier layers."""
    layers, units = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    size = layers * units
    roots = sorted(draw(st.sets(st.integers(0, size - 1), min_size=1)))
    tie, uniform = draw(st.sampled_from(TIES)), draw(st.booleans())
    donor, score, unit_tie = np.arange(size), np.full(size, np.nan), np.full(size, "", "<U4")
    for unit in set(range(size)) - set(roots):
        donor[unit] = draw(st.sampled_from([*roots, DROPPED]))
        score[unit] = draw(st.floats(-1, 1) | st.just(np.nan))
        if donor[unit] != DROPPED:
            unit_tie[unit] = tie if uniform else draw(st.sampled_from(TIES))
    return SharingMap(
        donor.reshape(layers, units),
        score.reshape(layers, units),
        heads_per_unit=draw(st.integers(1, 3)),
        tie=tie,
        unit_tie=None if uniform else unit_tie.reshape(layers, units),
        match=draw(st.none() | st.text(max_size=5)),
        ratio=draw(st.none() | st.floats(0, 1, exclude_max=True)),
        seed=draw(st.none() | st.integers(0, 2**40)),
        source=draw(st.none() | st.text(max_size=5)),
    )


@st.composite
def slim_maps(draw: st.DrawFn) -> SharingMap:
    """A map as `maps` gives them, of which any units that keep their weights for themselves are slim."""
    sharing, head_dim = draw(maps()), draw(st.sampled_from([2, 4, 6]))
    count = head_dim - draw(st.integers(1, head_dim // 2))
    rank, pairs = np.full(sharing.donor.shape, head_dim), np.ones((*sharing.donor.shape, count), bool)
    score = sharing.score.copy()
    donors = set(sharing.donor.flat[sharing.receivers])
    for flat in np.flatnonzero(~sharing.receives & ~sharing.dropped):
        place = np.unravel_index(flat, score.shape)
        if flat not in donors and draw(st.booleans()):
            rank[place] = draw(st.integers(1, head_dim))
            pairs[place] = np.isin(np.arange(count), list(draw(st.sets(st.integers(0, count - 1), min_size=1))))
            score[place] = draw(st.floats(-1, 0)) if rank[place] < head_dim or not pairs[place].all() else np.nan
    return replace(sharing, widths=Widths(rank, pairs, head_dim), score=score)


def config_of(sharing: SharingMap) -> LlamaConfig:
    layers, units = sharing.donor.shape
    return LlamaConfig(
        vocab_size=11,
        hidden_size=6,
        intermediate_size=7,
        num_layers=layers,
        num_heads=units * sharing.heads_per_unit,
        num_kv_heads=units,
        head_dim=4,
        attention_bias=True,
    )


@given(maps() | slim_maps())
def test_every_pool_row_is_one_stored_head_or_column_in_use(sharing: SharingMap) -> None:
    for projection in "qkvo":
        index, stored = sharing.pool_index(projection), sharing.stored_slots(projection)
        assert index.dtype == np.int32
        slots = sharing.slot_donor(projection)
        assert set(index[slots != DROPPED]) == set(range(len(stored)))
        assert set(index[slots == DROPPED]) <= {len(stored)}
        assert len(set(stored)) == len(stored)
        np.testing.assert_array_equal(np.append(stored, DROPPED)[index], slots)
        np.testing.assert_array_equal(stored[index.ravel()[stored]], stored)


@given(maps())
def test_a_unit_follows_its_donor_as_a_whole(sharing: SharingMap) -> None:
    assert sharing.unit_tie is not None
    group = sharing.heads_per_unit
    for projection in "qkvo":
        heads = group if projection in "qo" else 1
        slots = sharing.slot_donor(projection).reshape(-1, heads)
        for unit, (donor, tie) in enumerate(zip(sharing.donor.flat, sharing.unit_tie.flat, strict=True)):
            expected = (donor if projection in tie else unit) * heads + np.arange(heads)
            np.testing.assert_array_equal(slots[unit], DROPPED if donor == DROPPED else expected)


@given(slim_maps())
def test_every_column_that_a_unit_keeps_is_stored_once(sharing: SharingMap) -> None:
    if sharing.widths is None:
        return
    head_dim = sharing.widths.head_dim
    for projection in "qkvo":
        group = sharing.heads_per_unit if projection in "qo" else 1
        whole = replace(sharing, widths=None).stored_slots(projection)
        kept = (sharing.widths.qk if projection in "qk" else sharing.widths.vo).reshape(-1, head_dim)
        columns = [head * head_dim + column for head in whole for column in np.flatnonzero(kept[head // group])]
        np.testing.assert_array_equal(sharing.stored_slots(projection), columns)
        index = sharing.pool_index(projection)
        assert index.shape == (len(sharing.donor), sharing.donor.shape[1] * group * head_dim)
        assert stored_shape(
            config_of(sharing), f"{projection}_pool_{'phd' if projection == 'o' else 'pdh'}", sharing
        ) == (
            len(columns),
            6,
        )


@given(maps())
def test_the_parameter_count_falls_by_what_the_map_says(sharing: SharingMap) -> None:
    config = config_of(sharing)
    heads = {"q": sharing.heads_per_unit, "k": 1, "v": 1, "o": sharing.heads_per_unit}
    width, head_dim = config.hidden_size, config.head_dim
    unit = {p: heads[p] * (width * head_dim + (head_dim if p != "o" else 0)) for p in "qkvo"}
    assert sharing.unit_tie is not None
    gone = [p for tie in sharing.unit_tie.flat for p in tie] + ["q", "k", "v", "o"] * int(sharing.dropped.sum())

    def count(sharing: SharingMap | None) -> int:
        return sum(int(np.prod(stored_shape(config, name, sharing))) for name in parameters.parameter_names(config))

    assert count(None) - count(sharing) == sum(unit[p] for p in gone)


@given(maps() | slim_maps())
def test_json_round_trip(sharing: SharingMap) -> None:
    text = sharing.to_json()
    again = SharingMap.from_json(text)
    assert again == sharing
    assert hash(again) == hash(sharing)
    assert again.to_json() == text


def test_the_document_has_one_unit_a_line() -> None:
    sharing = SharingMap.from_json(json.dumps(VALID))
    text = sharing.to_json()
    assert json.loads(text) == VALID
    assert [line.strip() for line in text.splitlines() if '"layer"' in line] == [
        '{"layer": 2, "unit": 1, "score": 0.5}',
        '{"layer": 1, "unit": 1, "donor": [0, 0], "score": 0.25},',
        '{"layer": 2, "unit": 0, "donor": [0, 1], "tie": "qk", "score": null}',
    ]


def test_slim_units_are_a_list_of_what_is_kept() -> None:
    sharing = SharingMap.from_json(json.dumps(SLIM))
    assert sharing.widths is not None
    assert sharing.slim.tolist() == [[False, True], [True, False], [False, False]]
    assert (sharing.widths.rotary_dim, sharing.widths.rank.tolist()) == (4, [[8, 8], [3, 8], [8, 8]])
    assert np.flatnonzero(sharing.widths.qk[1, 0]).tolist() == [1, 3, 4, 7]
    assert np.flatnonzero(sharing.widths.qk[0, 1]).tolist() == [0, 2]
    assert np.flatnonzero(sharing.widths.kept("o")[1, 0]).tolist() == [0, 1, 2]
    assert sharing.score[1, 0] == -0.25
    assert [line.strip() for line in sharing.to_json().splitlines() if '"pairs"' in line] == [
        '{"layer": 0, "unit": 1, "pairs": [0], "score": null},',
        '{"layer": 1, "unit": 0, "rank": 3, "pairs": [1, 2, 5], "score": -0.25}',
    ]


def test_widths_that_cut_nothing_are_none() -> None:
    whole = SharingMap.from_json(json.dumps(VALID))
    assert replace(whole, widths=Widths(np.full((3, 2), 4), np.ones((3, 2, 2), bool), 4)) == whole


def test_the_version_is_the_first_that_can_hold_the_map() -> None:
    assert json.loads(SharingMap.from_json(json.dumps(SLIM)).to_json())["version"] == 2
    assert json.loads(SharingMap.from_json(json.dumps(VALID | {"version": 2})).to_json())["version"] == 1


def test_a_document_need_not_speak_of_drops_and_ties() -> None:
    document = {name: value for name, value in VALID.items() if name != "dropped"}
    document["receivers"] = VALID["receivers"][:1]
    sharing = SharingMap.from_json(json.dumps(document))
    assert not sharing.dropped.any()
    assert sharing.tied("v").tolist() == [[False, False], [False, True], [False, False]]
    assert json.loads(sharing.to_json()) == document


@pytest.mark.parametrize(
    ("changes", "summary"),
    [
        ({}, "2 of 6 units use another unit's qk or qkv weights, 1 is dropped"),
        (
            {"receivers": [], "dropped": [{"layer": 1, "unit": 0}, {"layer": 1, "unit": 1}]},
            "2 of 6 units are dropped",
        ),
        ({"receivers": VALID["receivers"][1:], "dropped": []}, "1 of 6 units use another unit's qk weights"),
        ({"receivers": [], "dropped": []}, "0 of 6 units use another unit's qkv weights"),
        (
            SLIM,
            "1 of 6 units use another unit's qkv weights, 1 is dropped, 2 are slim; values 3 to 8 of 8, "
            "queries and keys 2 to 8",
        ),
        (SLIM | {"receivers": [], "dropped": []}, "2 of 6 units are slim; values 3 to 8 of 8, queries and keys 2 to 8"),
    ],
)
def test_summaries_tell_ties_and_drops(changes: dict[str, Any], summary: str) -> None:
    assert SharingMap.from_json(json.dumps(VALID | changes)).summary() == summary


def test_maps_differ_by_any_of_their_fields() -> None:
    one = SharingMap.from_json(json.dumps(VALID))
    other_values: dict[str, Any] = {
        "tie": "qk",
        "method": "fitted",
        "match": "v",
        "chains": "forbid",
        "ratio": 0.3,
        "seed": 1,
    }
    other_values |= {"source": None, "receivers": VALID["receivers"][:1], "dropped": []}
    for name, value in other_values.items():
        assert SharingMap.from_json(json.dumps(VALID | {name: value})) != one
    slim = SharingMap.from_json(json.dumps(SLIM))
    assert slim.widths is not None
    assert slim != SharingMap.from_json(json.dumps(SLIM | {"slim": []}))
    for pairs in ([0], [1, 2]):
        assert slim != SharingMap.from_json(json.dumps(SLIM | {"slim": slim_units((1, 0, 3, pairs))}))
    assert one != "a map"


def test_arrays_of_a_map_cannot_be_changed() -> None:
    donor = np.array([[0, 1], [0, 1]])
    sharing = SharingMap(donor, np.zeros((2, 2)), heads_per_unit=1)
    donor[1, 0] = 1
    assert sharing.donor[1, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        sharing.donor[0, 0] = 1


EVERY_UNIT = [{"layer": layer, "unit": unit} for layer in range(3) for unit in range(2)]


def slim_units(*units: tuple[int, int, int, list[Any]]) -> list[dict[str, Any]]:
    return [{"layer": layer, "unit": unit, "rank": rank, "pairs": pairs} for layer, unit, rank, pairs in units]


def receivers(*pairs: tuple[int, int, int, int]) -> dict[str, Any]:
    return {"receivers": [{"layer": a, "unit": b, "donor": [c, d], "score": 0.1} for a, b, c, d in pairs]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (receivers((1, 0, 2, 0), (2, 0, 1, 0)), r"cycle: 1\.0 -> 2\.0 -> 1\.0"),
        (receivers((2, 0, 1, 0), (1, 0, 0, 1)), r"chain: 2\.0 -> 1\.0 -> 0\.1.*root 0\.1"),
        (receivers((1, 2, 0, 0)), r"1\.2.*3 layers of 2 units"),
        (receivers((3, 0, 0, 0)), r"3\.0.*3 layers of 2 units"),
        (receivers((1, 0, 7, 0)), r"7\.0.*3 layers of 2 units"),
        (receivers((1, -1, 0, 0)), "unit"),
        (receivers((1, 0, 0, 0), (1, 0, 0, 1)), r"1\.0.*twice"),
        (receivers((1, 0, 1, 0)), r"1\.0.*its own donor"),
        ({"receivers": [{"layer": 1, "unit": 0}]}, "donor"),
        ({"receivers": [{"layer": 1, "unit": 0, "donor": [0]}]}, r"donor\.1 in the map is missing"),
        ({"receivers": [{"layer": 1, "unit": 0, "donor": [0, 0], "score": "high"}]}, "score in the map.*not 'high'"),
        ({"receivers": [{"layer": 1.0, "unit": 0, "donor": [0, 0]}]}, "layer"),
        ({"receivers": None}, "receivers in the map must be a valid array, not None"),
        ({"receivers": ["1.0"]}, r"receivers\.0 in the map must be an object, not '1\.0'"),
        ({"dropped": [{"layer": 2, "unit": 1}] * 2}, r"names unit 2\.1 \(layer\.unit\) twice"),
        ({"dropped": [{"layer": 1, "unit": 1}]}, r"names unit 1\.1 \(layer\.unit\) twice"),
        ({"dropped": [{"layer": 0, "unit": 1}]}, r"drops unit 0\.1 \(layer\.unit\), the donor of 2\.0; keep it, or"),
        ({"dropped": [{"layer": 3, "unit": 0}]}, r"3\.0.*3 layers of 2 units"),
        ({"dropped": [{"layer": 2}]}, r"dropped\.0\.unit in the map is missing"),
        ({"dropped": None}, "dropped in the map must be a valid array, not None"),
        ({"receivers": [], "dropped": EVERY_UNIT}, "drops every unit; keep at least one"),
        ({"receivers": [VALID["receivers"][0] | {"tie": "qx"}]}, "tie must name some of q, k, v, o.*not 'qx'"),
        ({"receivers": [VALID["receivers"][0] | {"tie": ""}]}, "tie must name some of q, k, v, o.*not ''"),
        ({"receivers": [VALID["receivers"][0] | {"tie": None}]}, "tie in the map must be a valid string"),
        ({"receivers": [{"unit": 0, "donor": [0, 0]}]}, r"receivers\.0\.layer in the map is missing"),
        ({"version": 3}, "version in the map must be 1 or 2, not 3"),
        ({"version": None}, "version"),
        ({"format": "safetensors"}, "format"),
        ({"tie": "vq"}, "tie"),
        ({"tie": None}, "tie"),
        ({"method": 3}, "method"),
        ({"chains": None}, "chains"),
        ({"match": 3}, "match"),
        ({"source": []}, "source"),
        ({"seed": [1]}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"ratio": "0.3"}, "ratio"),
        ({"ratio": 1.5}, "ratio"),
        ({"model": {"num_layers": 3, "units_per_layer": 2}}, "heads_per_unit"),
        ({"model": {"num_layers": 0, "units_per_layer": 2, "heads_per_unit": 1}}, "num_layers"),
        ({"model": {"num_layers": 10**9, "units_per_layer": 10**9, "heads_per_unit": 1}}, "more than any model"),
        ({"model": [3, 2, 2]}, "model in the map must be an object"),
        ({"droped": []}, r"^droped in the map is no known key; did you mean dropped\?"),
        ({"comment": "mine"}, r"^comment in the map is no known key\.$"),
        (
            {"model": VALID["model"] | {"head_per_unit": 2}},
            r"^model\.head_per_unit in the map is no known key; did you mean heads_per_unit",
        ),
        ({"receivers": [VALID["receivers"][0] | {"tei": "qk"}]}, r"^receivers\.0\.tei in the map.*did you mean tie\?"),
        (
            {"receivers": [{"layer": 1, "unit": 1, "doner": [0, 0]}]},
            r"receivers\.0\.doner in the map.*did you mean donor",
        ),
        (
            {"dropped": [{"layer": 2, "unit": 1, "donor": [0, 0]}]},
            r"dropped\.0\.donor in the map has no place there; leave",
        ),
        ({"receivers": [{"layer": 1, "unit": 0, "donor": [0.0, 0]}]}, r"donor\.0 in the map must be a valid integer"),
        ({"receivers": [{"layer": 1, "unit": 0, "donor": [True, 0]}]}, r"donor\.0 in the map must be a valid integer"),
        ({"receivers": [{"layer": 1, "unit": 0, "donor": ["0", 0]}]}, r"donor\.0 in the map must be a valid integer"),
        ({"receivers": [{"layer": 1, "unit": 0, "donor": [0, 0, 0]}]}, r"donor in the map"),
        ({"receivers": [{"layer": 1, "unit": 0, "donor": [0, 10**30]}]}, r"donor\.1 in the map|names unit"),
        ({"receivers": [{"layer": True, "unit": 0, "donor": [0, 0]}]}, "layer in the map must be a valid integer"),
        (
            {"model": VALID["model"] | {"heads_per_unit": 0}},
            "heads_per_unit in the map must be greater than or equal to 1",
        ),
        ({"model": VALID["model"] | {"heads_per_unit": 2.0}}, "heads_per_unit in the map must be a valid integer"),
        ({"chains": "resolved"}, "chains in the map must be 'resolve' or 'forbid'"),
    ],
)
def test_an_impossible_map_is_refused_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(HeadshareError, match=reason):
        SharingMap.from_json(json.dumps(VALID | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"slim": slim_units((1, 0, 0, [1]))},
            r"keeps 0 of the 8 value columns of unit 1\.0 .*1 to 8 of them, or drop the unit",
        ),
        ({"slim": slim_units((1, 0, 9, [1]))}, r"keeps 9 of the 8 value columns of unit 1\.0"),
        ({"slim": slim_units((1, 0, -1, [1]))}, r"slim\.0\.rank in the map must be greater than or equal to 0"),
        ({"slim": slim_units((1, 0, 3, []))}, r"keeps no pair of q and k of unit 1\.0.*or drop the unit instead"),
        ({"slim": slim_units((1, 0, 3, [6]))}, r"keeps pair 6 of unit 1\.0 .*pairs 0 to 5"),
        ({"slim": slim_units((1, 0, 3, [-1]))}, r"keeps pair -1 of unit 1\.0 .*pairs 0 to 5"),
        ({"slim": slim_units((1, 0, 3, [1, 2, 1]))}, r"names pair 1 of unit 1\.0 \(layer\.unit\) twice"),
        ({"slim": slim_units((1, 0, 3, [0.5]))}, r"slim\.0\.pairs\.0 in the map must be a valid integer"),
        ({"slim": slim_units((1, 0, 3, [1])) * 2}, r"names unit 1\.0 \(layer\.unit\) twice"),
        ({"slim": slim_units((1, 1, 3, [1]))}, r"names unit 1\.1 \(layer\.unit\) twice"),
        ({"slim": slim_units((2, 1, 3, [1]))}, r"names unit 2\.1 \(layer\.unit\) twice"),
        ({"slim": slim_units((0, 0, 3, [1]))}, r"makes unit 0\.0 .* slim, which is another unit's donor; only a unit"),
        ({"slim": slim_units((3, 0, 3, [1]))}, r"names unit 3\.0.*3 layers of 2 units"),
        ({"slim": slim_units((1, 0, 8, [0, 1, 2, 3, 4, 5]))}, r"cuts nothing of slim unit 1\.0.*leave it out"),
        ({"slim": [{"layer": 1, "unit": 0}]}, r"cuts nothing of slim unit 1\.0"),
        ({"slim": [{"layer": 1, "unit": 0, "ranks": 2}]}, r"slim\.0\.ranks in the map.*did you mean rank\?"),
        ({"version": 1}, 'no place in one of version 1; set "version" to 2'),
        ({"model": VALID["model"]}, "its model needs head_dim and rotary_dim too"),
        ({"model": SLIM["model"] | {"rotary_dim": 3}}, "A head of 8 columns, 3 of which turn, cannot be slim"),
        ({"model": SLIM["model"] | {"rotary_dim": 10}}, "A head of 8 columns, 10 of which turn, cannot be slim"),
        ({"model": SLIM["model"] | {"head_dim": 10**9}}, "layers of 2 units with heads of 1000000000, more than any"),
    ],
)
def test_impossible_widths_are_refused_with_their_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(HeadshareError, match=reason):
        SharingMap.from_json(json.dumps(SLIM | changes))


@pytest.mark.parametrize(
    ("rank", "pairs", "reason"),
    [
        (np.full((2, 2), 4.0), np.ones((2, 2, 2), bool), "whole numbers as ranks"),
        (np.full((2, 2), 4), np.ones((2, 2, 2), int), "pairs that are kept"),
        (np.full((2, 2), 4), np.ones((2, 2), bool), r"pairs \[layers, units, pairs of a head\]"),
        (np.full((2, 2), 4), np.ones((2, 2, 1), bool), "4 columns, 6 of which turn"),
        (np.full((3, 2), 4), np.ones((3, 2, 2), bool), r"must have its shape \[layers, units\]"),
        (np.array([[3, 3], [4, 4]]), np.ones((2, 2, 2), bool), r"0\.1 .* slim, which is dropped"),
        (np.array([[4, 4], [3, 4]]), np.ones((2, 2, 2), bool), r"1\.0 .* slim, which uses another unit's weights"),
    ],
)
def test_widths_made_by_hand_are_checked(rank: np.ndarray, pairs: np.ndarray, reason: str) -> None:
    whole = SharingMap(np.array([[0, -1], [3, 3]]), np.zeros((2, 2)), heads_per_unit=1)
    with pytest.raises(HeadshareError, match=reason):
        replace(whole, widths=Widths(rank, pairs, 4))


@pytest.mark.parametrize("place", ['"tie": "qkv"', '"layer": 1'])
def test_a_key_that_stands_twice_is_refused(place: str) -> None:
    text = json.dumps(VALID).replace(place, f"{place}, {place.replace('1', '0')}", 1)
    with pytest.raises(HeadshareError, match=f"The map has the key {json.loads('{' + place + '}').popitem()[0]} twice"):
        SharingMap.from_json(text)


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "3", '"headshare-map"', json.dumps(VALID)[:-20], "[" * 100_000, "9" * 10_000, "\ud800"],
)
def test_what_is_no_map_document_is_refused(text: str) -> None:
    with pytest.raises(HeadshareError):
        SharingMap.from_json(text)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Path of every value inside a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**30)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([0, 1, 2]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=500)
@given(path=st.sampled_from(places(SLIM)), value=JSON_VALUES)
def test_a_document_changed_anywhere_is_a_valid_map_or_refused(path: tuple[Any, ...], value: Any) -> None:
    try:
        sharing = SharingMap.from_json(json.dumps(replaced(SLIM, path, value)))
    except HeadshareError:
        return
    assert SharingMap.from_json(sharing.to_json()) == sharing
    assert not set(sharing.donor.flat[sharing.receivers]) & set(sharing.receivers)


@given(st.text() | JSON_VALUES.map(json.dumps))
def test_garbage_is_refused(text: str) -> None:
    with pytest.raises(HeadshareError):
        SharingMap.from_json(text)


@pytest.mark.parametrize(
    ("donor", "reason"),
    [
        ([[0, 1], [4, 3]], "outside"),
        ([[-2, 1], [2, 3]], "outside"),
        ([[2, 1], [3, 3]], "chain"),
        ([[-1, 1], [0, 3]], r"drops unit 0\.0"),
        ([0, 1], "shape"),
        ([[0.0, 1.0]], "whole numbers"),
        ([[0, 2**32]], "whole numbers"),
        ([[False, True]], "whole numbers"),
    ],
)
def test_a_map_made_by_hand_is_checked(donor: list[Any], reason: str) -> None:
    with pytest.raises(HeadshareError, match=reason):
        SharingMap(np.array(donor), np.zeros(np.shape(donor)), heads_per_unit=1)


@pytest.mark.parametrize("heads", [0, -1, 2.0, True, "2"])
def test_a_unit_has_at_least_one_head(heads: Any) -> None:
    with pytest.raises(HeadshareError, match="heads_per_unit of a map must be a whole number of at least 1"):
        SharingMap(np.array([[0, 1]]), np.zeros((1, 2)), heads_per_unit=heads)


@pytest.mark.parametrize(
    ("ties", "reason"),
    [
        ([["", ""], ["", ""]], "a tie for every receiver"),
        ([["", "q"], ["q", ""]], "for no other unit"),
        ([["", "", "q", ""]], "a tie for every"),
        ([["", ""], ["vq", ""]], "in that order"),
    ],
)
def test_ties_made_by_hand_are_checked(ties: list[list[str]], reason: str) -> None:
    with pytest.raises(HeadshareError, match=reason):
        SharingMap(np.array([[0, -1], [0, 3]]), np.zeros((2, 2)), heads_per_unit=1, unit_tie=np.array(ties))


@pytest.mark.parametrize("change", [{"num_layers": 4}, {"num_kv_heads": 1}, {"num_kv_heads": 4}])
def test_a_map_for_another_model_is_refused(change: dict[str, int]) -> None:
    sharing = SharingMap.from_json(json.dumps(VALID))
    sizes: dict[str, Any] = {"num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    fields: dict[str, Any] = {"vocab_size": 11, "hidden_size": 6, "intermediate_size": 7}
    sharing.check_model(LlamaConfig(**fields, **sizes))
    with pytest.raises(HeadshareError, match="another model"):
        sharing.check_model(LlamaConfig(**fields, **(sizes | change)))


def test_widths_for_another_kind_of_head_are_refused() -> None:
    sharing = SharingMap.from_json(json.dumps(SLIM))
    sizes: dict[str, Any] = {"num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    fields: dict[str, Any] = {"vocab_size": 11, "hidden_size": 6, "intermediate_size": 7, **sizes}
    sharing.check_model(LlamaConfig(**fields, family="phi3", partial_rotary_factor=0.5))
    with pytest.raises(HeadshareError, match="heads have 8 columns, 4 of which turn, the model's 8, of which 8 turn"):
        sharing.check_model(LlamaConfig(**fields))
    all_turn = SLIM | {"model": VALID["model"] | {"head_dim": 8, "rotary_dim": 8}, "slim": slim_units((1, 0, 3, [2]))}
    normed = LlamaConfig(**fields, family="qwen3", qk_norm=True)
    with pytest.raises(HeadshareError, match=r"cuts pairs of q and k of unit 1\.0.*norms.*keep all pairs"):
        SharingMap.from_json(json.dumps(all_turn)).check_model(normed)
    values_only = all_turn | {"slim": [{"layer": 1, "unit": 0, "rank": 3}]}
    SharingMap.from_json(json.dumps(values_only)).check_model(normed)
