"""Recipes: what is read is what was written, and what cannot be meant is refused in one sentence."""

import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from headshare_jax import HeadshareError
from headshare_jax.matching.cosine import MATCH_FUNCTIONS
from headshare_jax.model.layer import REMAT_POLICIES
from headshare_jax.model.llama import COMPUTE_DTYPES
from headshare_jax.train import recipe as recipes
from headshare_jax.train.losses import PENALTIES

SMALL: dict[str, Any] = {"model": "tiny", "data": {"train": "text.txt"}}
FULL: dict[str, Any] = {
    "model": "tiny",
    "data": {"train": "text.txt", "eval": "held-out.txt", "text_field": "body", "seq_len": 128, "workers": 2},
    "sharing": {"map": "map.json", "ratio": 0.1, "match": "q", "tie": "qkvo", "chains": "forbid", "refit_windows": 8},
    "stages": [{"penalty": "js", "steps": 3}, {"kind": "tied", "trainable": "[qkv]_pool_*, *_norm_*"}],
    "optimizer": {"schedule": "wsd", "warmup": 2, "end_rate": 0.1, "clip": 0.5},
    "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    "checkpoints": {"every": 7, "keep": 1, "eval_every": 3},
    "batch_size": 6,
    "accumulate": 3,
    "compute_dtype": "float32",
    "remat": "dots",
    "max_bad_steps": 4,
    "seed": 5,
}


def written(folder: Path, text: str) -> Path:
    """A recipe file with this text."""
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


SLIM: dict[str, Any] = {
    **SMALL,
    "sharing": {"method": "slim", "budget": 0.7, "even": "layer", "refit_windows": 8},
    "stages": [{"kind": "tied"}],
}
SEVERAL = [{"source": "a.txt", "weight": 2, "text_field": "body"}, {"source": "b.jsonl"}]
MIXED = {**SMALL, "data": {"train": SEVERAL, "streaming": True}}


@pytest.mark.parametrize("document", [SMALL, FULL, MIXED, SLIM], ids=["defaults", "all set", "several texts", "slim"])
def test_yaml_round_trip(tmp_path: Path, document: dict[str, Any]) -> None:
    recipe = recipes.from_mapping(document)
    text = recipes.to_yaml(recipe)
    assert recipes.load(written(tmp_path, text)) == recipe
    assert recipes.to_yaml(recipes.load(written(tmp_path, text))) == text


def test_one_text_is_written_by_its_name_and_several_as_a_list() -> None:
    one, several = (yaml.safe_load(recipes.to_yaml(recipes.from_mapping(document))) for document in (SMALL, MIXED))
    assert one["data"]["train"] == "text.txt"
    assert several["data"]["train"] == [SEVERAL[0], {"source": "b.jsonl", "weight": 1.0, "text_field": None}]


def test_values_that_are_given_are_used_and_others_are_the_published_ones() -> None:
    recipe = recipes.from_mapping({**SMALL, "stages": [{"steps": 3}, {"kind": "tied", "steps": 4}]})
    assert recipe.total_steps == 7
    stage, optimizer = recipe.stages[0], recipe.optimizer
    assert (stage.learning_rate, stage.lm_weight, stage.sim_weight, stage.penalty) == (5e-5, 0.5, 0.5, "norm")
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay) == (0.9, 0.95, 1e-8, 0.1)
    assert (optimizer.clip, optimizer.schedule, recipe.batch_size, recipe.data.seq_len) == (1.0, "cosine", 128, 4096)


@pytest.mark.parametrize(
    ("section", "key", "choices"),
    [
        (recipes.Sharing, "match", (*MATCH_FUNCTIONS, "functional")),
        (recipes.Stage, "penalty", PENALTIES),
        (recipes.Recipe, "compute_dtype", COMPUTE_DTYPES),
        (recipes.Recipe, "remat", REMAT_POLICIES),
    ],
)
def test_a_recipe_can_choose_all_that_there_is(section: Any, key: str, choices: Any) -> None:
    assert typing.get_args(section.model_fields[key].annotation) == tuple(choices)


def test_a_tied_stage_is_written_without_what_it_does_not_use() -> None:
    recipe = recipes.from_mapping({**SMALL, "stages": [{"kind": "align"}, {"kind": "tied"}]})
    align, tied = yaml.safe_load(recipes.to_yaml(recipe))["stages"]
    assert set(align) - set(tied) == {"lm_weight", "sim_weight", "sim_schedule", "penalty"}


@pytest.mark.parametrize("text", ["5e-5", "5.0e-5", "0.00005"])
def test_numbers_are_read_as_people_write_them(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, f"model: tiny\ndata: {{train: t}}\nstages: [{{learning_rate: {text}, sim_weight: 1}}]\n")
    stage = recipes.load(path).stages[0]
    assert stage.learning_rate == pytest.approx(5e-5)
    assert isinstance(stage.sim_weight, float)


def test_changes_replace_and_add_values(tmp_path: Path) -> None:
    path = written(tmp_path, "model: tiny\ndata: {train: t}\nstages: [{steps: 3}, {kind: tied}]\n")
    changes = ["stages.1.steps=50", "stages.0.learning_rate=1e-4", "optimizer.clip=2", "data.eval=null", "seed=9"]
    recipe = recipes.load(path, changes)
    assert [stage.steps for stage in recipe.stages] == [3, 50]
    assert (recipe.stages[0].learning_rate, recipe.optimizer.clip, recipe.data.eval, recipe.seed) == (1e-4, 2, None, 9)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("seed", "form key=value"),
        ("=3", "form key=value"),
        ("seed=[", "not readable YAML"),
        ("seed=2020-99-99", "not readable YAML"),
        ("sed=3", "did you mean seed?"),
        ("stages.2.steps=3", "no 2 to change in stages.2.steps; it has 1 there, counted from 0"),
        ("stages.².steps=3", "no ² to change"),
        ("stages.0=3", "no 0 to change"),
        ("model.x=3", "no x to change in model.x"),
        ("optimizer.clip=low", "optimizer.clip must be a valid number"),
    ],
)
def test_changes_that_cannot_be_made_are_refused(tmp_path: Path, change: str, said: str) -> None:
    path = written(tmp_path, "model: tiny\ndata: {train: t}\nstages: [{steps: 3}]\n")
    with pytest.raises(HeadshareError, match=said):
        recipes.load(path, [change])


def with_value(key: str, value: Any) -> dict[str, Any]:
    """A small recipe with one value at a dotted key, of the first stage where the key begins with `stage`."""
    section, _, name = key.rpartition(".")
    if section == "stage":
        return {**SMALL, "stages": [{name: value}]}
    return {**SMALL, section: {**SMALL.get(section, {}), name: value}} if section else {**SMALL, name: value}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("modle", "x", "unknown key modle; did you mean model?"),
        ("data.seqlen", 3, "unknown key data.seqlen; did you mean seq_len?"),
        ("stage.learning_rat", 1.0, "unknown key stages.0.learning_rat; did you mean learning_rate?"),
        ("optimizer.zzz", 1, "unknown key optimizer.zzz; the keys are schedule, warmup"),
        (3, 1, "unknown key 3"),
        ("model", 3, "model must be a valid string, not 3"),
        ("model", None, "model must be a valid string, not None"),
        ("data", "text.txt", "data must be a mapping"),
        ("data.train", 5, "data.train must be a list, not 5"),
        ("data.train", [], r"data.train must have at least one entry, not \[\]"),
        ("data.train", ["a"], "data.train.0 must be a mapping of keys to values, not 'a'"),
        ("data.train", [{"weight": 1}], "lacks data.train.0.source"),
        ("data.train", [{"source": "a", "wieght": 1}], "unknown key data.train.0.wieght; did you mean weight?"),
        ("data.train", [{"source": "a", "weight": 0}], "data.train.0.weight must be greater than 0, not 0"),
        ("data.train", [{"source": "a"}, {"source": "b", "weight": -1}], "data.train.1.weight must be greater than 0"),
        ("stages", {}, "stages must be a list"),
        ("stages", [3], "stages.0 must be a mapping"),
        ("stage.steps", 1.5, "stages.0.steps must be a valid integer, not 1.5"),
        ("stage.steps", True, "stages.0.steps must be a valid integer, not True"),
        ("stage.learning_rate", "fast", "stages.0.learning_rate must be a valid number, not 'fast'"),
        ("stage.learning_rate", True, "must be a valid number, not True"),
        ("stage.learning_rate", float("nan"), "must be a finite number, not nan"),
        ("stage.learning_rate", "1e999", "must be a finite number, not '1e999'"),
        ("stage.learning_rate", 10**400, "must be a valid number"),
        ("batch_size", "128", "batch_size must be a valid integer, not '128'"),
        ("stages", [], "at least one stage"),
        ("stages", [{"kind": "tied"}, {"kind": "align"}], "align before tied"),
        ("stage.kind", "alone", "stages.0.kind must be 'align' or 'tied', not 'alone'"),
        ("stages", [{"kind": "tied", "lm_weight": 0.3}], "stages.0.lm_weight is of align stages only; leave it out"),
        ("stage.penalty", "cosine", "stages.0.penalty must be 'norm', 'mse', 'kl' or 'js'"),
        ("stage.sim_schedule", "wsd", "stages.0.sim_schedule must be 'constant', 'linear' or 'cosine'"),
        ("optimizer.schedule", "linear", "optimizer.schedule must be 'cosine', 'wsd' or 'constant'"),
        ("compute_dtype", "float16", "compute_dtype must be 'float32' or 'bfloat16'"),
        ("remat", "some", "remat must be 'none', 'dots' or 'full'"),
        ("sharing.match", "best", "sharing.match must be 'q', 'k', 'v'"),
        ("sharing.chains", "keep", "sharing.chains must be 'resolve' or 'forbid'"),
        ("sharing.tie", "kq", "tie must name some of q, k, v, o"),
        ("sharing.ratio", 1.0, "sharing.ratio must be less than 1"),
        ("sharing.refit_windows", -2, "sharing.refit_windows must be greater than or equal to 0, not -2"),
        ("sharing.refit_windows", 2**32, "sharing.refit_windows must be less than or equal to 1000000, not 4294967296"),
        ("sharing.refit_windows", 1, "sharing.refit_windows must be 0, or at least 2, as one is held out"),
        ("sharing", {"start": "small", "refit_windows": 2}, "shared model already; leave sharing.refit_windows out"),
        ("sharing", {"method": "fitted"}, "sharing.method must be 'slim', not 'fitted'"),
        ("sharing", {"method": "slim", "budget": 0.7}, "looks at text; give sharing.refit_windows"),
        ("sharing", {"method": "slim", "refit_windows": 8}, "needs sharing.budget"),
        ("sharing", {"method": "slim", "budget": 1.5}, "sharing.budget must be less than or equal to 1, not 1.5"),
        ("sharing", {"method": "slim", "budget": 0}, "sharing.budget must be greater than 0, not 0"),
        ("sharing", {"method": "slim", "budget": 0.7, "ratio": 0.1}, "has no use for sharing.ratio; leave it out"),
        ("sharing", {"method": "slim", "budget": 0.7, "map": "map.json"}, "has no use for sharing.map"),
        ("sharing", {"method": "slim", "budget": 0.7, "refit_windows": 8}, "no receivers to align"),
        ("sharing", {"budget": 0.7}, "sharing.budget is of sharing.method slim alone"),
        ("sharing", {"even": "layer"}, "sharing.even is of sharing.method slim alone"),
        ("sharing", {"method": "slim", "budget": 0.7, "even": "head"}, "sharing.even must be 'layer' or 'model'"),
        ("stage.steps", 0, "stages.0.steps must be greater than or equal to 1, not 0"),
        ("stage.temperature", 0, "stages.0.temperature must be greater than 0"),
        ("stage.sim_weight", -1.0, "stages.0.sim_weight must be greater than or equal to 0"),
        ("stage.learning_rate", -1e-4, "stages.0.learning_rate must be greater than 0"),
        ("optimizer.beta2", 1.0, "optimizer.beta2 must be less than 1"),
        ("optimizer.end_rate", 2.0, "optimizer.end_rate must be less than or equal to 1"),
        ("optimizer.warmup", -1, "optimizer.warmup must be greater than or equal to 0"),
        ("optimizer.clip", 0.0, "optimizer.clip must be greater than 0"),
        ("data.seq_len", 1, "data.seq_len must be greater than or equal to 2"),
        ("checkpoints.keep", 0, "checkpoints.keep must be greater than or equal to 1"),
        ("batch_size", 10**30, "tokens is more than can be"),
        ("accumulate", 3, r"batch_size \(128\) must be a multiple of accumulate \(3\)"),
    ],
)
def test_what_cannot_be_meant_is_refused(key: Any, value: Any, said: str) -> None:
    document = with_value(key, value) if isinstance(key, str) else {**SMALL, key: value}
    with pytest.raises(HeadshareError, match=said) as caught:
        recipes.from_mapping(document)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"data": {"train": "t"}}, "The recipe lacks model."),
        ({}, "The recipe lacks model."),
        ({"model": "m", "data": {}}, "The recipe lacks data.train."),
        ([], "The recipe must be a mapping of keys to values"),
        (None, "The recipe must be a mapping"),
    ],
)
def test_incomplete_recipes_are_refused(document: Any, said: str) -> None:
    with pytest.raises(HeadshareError, match=said):
        recipes.from_mapping(document)


@pytest.mark.parametrize(
    "content",
    [b"a: [", b"\xff\xfe\x00", b"a: 2020-99-99", b"!!python/object:os.system x", b"? [1]\n: 2", b"[" * 5000],
    ids=["open", "bytes", "date", "object", "key", "deep"],
)
def test_files_that_are_no_yaml_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(HeadshareError, match=r"recipe.yaml is not readable YAML"):
        recipes.load(path)
    with pytest.raises(HeadshareError, match=r"no recipe .*absent.yaml; give .* smollm2-cpu"):
        recipes.load(tmp_path / "absent.yaml")


KEYS = st.sampled_from(["model", "data", "train", "stages", "steps", "learning_rate", "sharing", "mesh", "seed", "x"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.integers(), inner, max_size=4),
    max_leaves=12,
)


@given(document=VALUES)
@example(document={**SMALL, "seed": 10**30})
def test_any_document_is_a_recipe_or_is_refused(document: Any) -> None:
    try:
        recipe = recipes.from_mapping(document)
    except HeadshareError:
        return
    assert recipes.from_mapping(document) == recipe


def test_difference_names_every_value_that_differs() -> None:
    old = recipes.from_mapping({**SMALL, "stages": [{"steps": 3}]})
    assert recipes.difference(old, old) == []
    new = recipes.from_mapping(
        {"model": "other", "data": {"train": "text.txt", "eval": "e"}, "stages": [{"steps": 4}, {"kind": "tied"}]}
    )
    lines = recipes.difference(old, new)
    assert lines[:4] == [
        "model: 'tiny' -> 'other'",
        "data.eval: None -> 'e'",
        "stages.0.steps: 3 -> 4",
        "stages.1.kind: None -> 'tied'",
    ]
    assert all(line.startswith("stages.1.") for line in lines[3:])
