"""Maps from elsewhere, documents and arrays alike: none is trusted."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_maps import SLIM, VALID, slim_units

from headshare_jax import HeadshareError, LlamaConfig, SharingMap
from headshare_jax.sharing.widths import Widths

EVERY_UNIT = [{"layer": layer, "unit": unit} for layer in range(3) for unit in range(2)]


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
