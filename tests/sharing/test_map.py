"""Sharing maps: what they store, and their JSON document."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from support_maps import SLIM, VALID, config_of, maps, slim_maps, slim_units

from headshare_jax import SharingMap, parameters
from headshare_jax.sharing.source import stored_shape
from headshare_jax.sharing.tie import DROPPED
from headshare_jax.sharing.widths import Widths


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
