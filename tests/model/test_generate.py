"""Generation: transformers' greedy tokens, draws that stay within bounds, few compilations, no second cache."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalent_models import with_params
from support import (
    ALL_VARIANTS,
    compilations,
    random_tokens,
    saved_hf_model,
    sharing_by_hand,
    tied_by_hand,
    tiny_hf_model,
    tiny_model,
    torch_or_skip,
)
from transformers import AutoModelForCausalLM

import headshare_jax
from headshare_jax import HeadshareError, Llama, Sampling, generate, parameters, share
from headshare_jax.model import generate as generation
from headshare_jax.model import reading as readings
from headshare_jax.model.mesh import batch_sharding, make_mesh, parameter_sharding
from headshare_jax.model.stream import stream
from headshare_jax.output_head import drawn, most_likely

# 20 tokens more go beyond the context of 64, where dynamic scaling begins.
PROMPTS = [random_tokens((length,), seed=length).tolist() for length in (3, 55, 9, 1)]
NO_STOP: tuple[int, ...] = ()


def hf_generate(folder: Path, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    """Greedy continuations by transformers, padded on the left."""
    torch = torch_or_skip()
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.eval().generate(tokens, attention_mask=mask, do_sample=False, pad_token_id=0, **settings)
    return [row[longest:] for row in out.tolist()]


@pytest.mark.parametrize("name", ["mha", "dynamic", "attention bias", "qwen3", "smollm3", "phi3, partial rotary"])
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    folder = saved_hf_model(tmp_path, eos_token_id=None, **ALL_VARIANTS[name])
    assert generate(headshare_jax.load(folder), PROMPTS, max_new_tokens=20) == hf_generate(
        folder, PROMPTS, max_new_tokens=20
    )


@pytest.mark.parametrize("name", [name for name in ALL_VARIANTS if "window" in name])
def test_tokens_beyond_the_window_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    folder = saved_hf_model(tmp_path, eos_token_id=None, **ALL_VARIANTS[name])
    model = headshare_jax.load(folder)
    assert model.config.sliding_window == 10
    assert generate(model, PROMPTS, max_new_tokens=40) == hf_generate(folder, PROMPTS, max_new_tokens=40)


# The original context is of 32 tokens: the second prompt begins beyond it.
@pytest.mark.parametrize("rows", [[0], [1], [0, 2, 3], [0, 1, 2, 3]])
def test_beyond_the_original_context_everything_is_read_again(tmp_path: Path, rows: list[int]) -> None:
    folder = saved_hf_model(tmp_path, eos_token_id=None, **ALL_VARIANTS["phi3, longrope"])
    prompts = [PROMPTS[row] for row in rows]
    expected = hf_generate(folder, prompts, max_new_tokens=60)
    assert generate(headshare_jax.load(folder), prompts, max_new_tokens=60) == expected


def test_a_row_ends_within_the_original_context_at_its_last_token_and_beyond_it() -> None:
    model, prompt = tiny_model(eos_token_id=None, **ALL_VARIANTS["phi3, longrope"]), PROMPTS[0]
    greedy = generate(model, [prompt], max_new_tokens=60)[0]
    assert len(greedy) == 60
    within = 32 - len(prompt) + 1
    for count in (1, within - 1, within, within + 1):
        assert generate(model, [prompt], max_new_tokens=count)[0] == greedy[:count]
    for place in (2, within - 1, within, within + 9):
        ended = greedy[: greedy.index(greedy[place])]
        assert generate(model, [prompt], max_new_tokens=60, stop_tokens=(greedy[place],))[0] == ended


def test_prompts_read_in_two_parts_continue_as_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prompts = saved_hf_model(tmp_path, eos_token_id=None), PROMPTS[:3]
    monkeypatch.setattr(readings, "PART_TOKENS", len(prompts) * generation.BUCKET // 2)
    before = compilations(generation.prefill)
    model = headshare_jax.load(folder)
    assert generate(model, prompts, max_new_tokens=20) == hf_generate(folder, prompts, max_new_tokens=20)
    monkeypatch.setattr(readings, "PART_TOKENS", len(prompts) * generation.BUCKET)
    assert generate(model, prompts, max_new_tokens=20) == hf_generate(folder, prompts, max_new_tokens=20)
    assert compilations(generation.prefill) == before + 2


@pytest.mark.parametrize(
    ("tie", "device"),
    [
        ("mixed", None),
        ("mixed", SimpleNamespace(platform="cpu")),
        ("qkvo", SimpleNamespace(platform="cpu")),
        ("mixed", SimpleNamespace(platform="gpu", compute_capability="9.0")),
    ],
    ids=["copied from the stack", "unstacked", "one tie, unstacked", "in the stack"],
)
def test_a_shared_model_continues_as_one_edited_by_hand_does_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tie: str, device: SimpleNamespace | None
) -> None:
    monkeypatch.setattr(Llama, "device", property(lambda model: device))
    hf = tiny_hf_model(eos_token_id=None)
    hf.save_pretrained(tmp_path / "dense")
    model = headshare_jax.load(tmp_path / "dense")
    sharing = sharing_by_hand(model, tie, {2: 0, 5: 1})
    tied_by_hand(hf, sharing).save_pretrained(tmp_path / "edited")
    continuations = generate(share(model, sharing), PROMPTS, max_new_tokens=20)
    assert continuations == hf_generate(tmp_path / "edited", PROMPTS, max_new_tokens=20)
    assert continuations != generate(model, PROMPTS, max_new_tokens=20)


def test_it_does_not_matter_where_parameters_lie(model: Llama, greedy: list[list[int]]) -> None:
    mesh = make_mesh((2, 2, 2))
    params = {name: getattr(model, name)[...] for name in parameters.parameter_names(model.config)}
    shardings = {name: parameter_sharding(mesh, model.config, name, value.shape) for name, value in params.items()}
    assert generate(Llama(model.config, jax.device_get(params)), PROMPTS, max_new_tokens=20) == greedy
    assert generate(Llama(model.config, jax.device_put(params, shardings)), PROMPTS, max_new_tokens=20) == greedy


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("dense", (1, 4, 2)), ("qkv", (1, 1, 2)), ("mixed", (1, 1, 1)), ("mixed", (8, 1, 1)), ("mixed", (1, 4, 2))],
)
def test_devices_together_continue_as_one_does(model: Llama, kind: str, sizes: tuple[int, ...]) -> None:
    if kind != "dense":
        model = share(model, sharing_by_hand(model, kind, {2: 0, 5: 1}))
    # Three prompts are filled up to as many as the mesh has rows.
    prompts, settings = PROMPTS[:3], {"max_new_tokens": 20}
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes)])
    assert generate(model, prompts, **settings, mesh=mesh) == generate(model, prompts, **settings)
    if kind == "mixed":
        spread, drawn = Llama.of(model, mesh=mesh), {"sampling": Sampling(0.7, top_k=20), "seed": 3}
        assert generate(spread, prompts, **settings, **drawn) == generate(model, prompts, **settings, **drawn)
        assert [*stream(spread, prompts[0], **settings)] == generate(model, prompts[:1], **settings)[0]


def test_a_mesh_has_its_part_of_the_cache_on_each_device() -> None:
    spread = Llama.of(tiny_model(), mesh=make_mesh((2, 2, 2)))
    shape = (3, 8, 2, 16, 64)
    cache = spread.empty_cache(8, 64)
    assert cache.k_lbkhs.shape == shape
    assert {shard.data.shape for shard in cache.k_lbkhs.addressable_shards} == {(3, 2, 1, 16, 64)}


def test_reading_prompts_puts_no_pool_and_no_layers_heads_together_on_a_device() -> None:
    mesh = make_mesh((2, 2, 2))
    model = tiny_model(num_attention_heads=8, num_key_value_heads=4, attention_bias=True)
    spread = Llama.of(share(model, sharing_by_hand(model, "qkv", {5: 0})), mesh=mesh)
    tokens_bt = jax.device_put(np.zeros((4, 64), np.int32), batch_sharding(mesh))
    cache, key = spread.empty_cache(4, 128), jax.random.key(0)
    lowered = generation.prefill.lower(spread, tokens_bt, tokens_bt[:, 0] + 9, cache, key, sampling=Sampling())
    text = lowered.compile().as_text()
    assert "f32[4,64,8]" in text
    for name in ("q_pool_pdh", "o_pool_phd"):
        pool, sizes = spread.array(name).shape[0], ",".join(map(str, spread.array(name).shape[1:]))
        assert f"f32[8,{sizes}]" not in text
        assert f"f32[{pool},{sizes}]" not in text


def unstacked(model: Llama) -> dict[str, tuple[jax.Array, ...]]:
    return readings.unstacked({name: model.array(name) for name in readings.STACKED_MATRICES})


def test_unstacked_layers_are_views_of_the_model() -> None:
    model = tiny_model(hidden_size=64, head_dim=16, intermediate_size=128)
    for name, matrices in unstacked(model).items():
        whole = np.asarray(getattr(model, name)[...])
        assert all(np.shares_memory(np.asarray(part), whole) for part in jax.tree.leaves(matrices)), name


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_model(eos_token_id=None)


@pytest.fixture(scope="module")
def greedy(model: Llama) -> list[list[int]]:
    """20 tokens after each prompt."""
    rows = generate(model, PROMPTS, max_new_tokens=20)
    assert [len(row) for row in rows] == [20] * 4
    return rows


def test_a_row_ends_before_its_first_stop_token(model: Llama, greedy: list[list[int]]) -> None:
    stops = (greedy[0][0], greedy[1][7])
    expected = [row[: min([row.index(stop) for stop in stops if stop in row], default=20)] for row in greedy]
    assert len({len(row) for row in expected}) > 1
    assert generate(model, PROMPTS, max_new_tokens=20, stop_tokens=stops) == expected


def test_the_models_own_end_token_stops_by_default(greedy: list[list[int]]) -> None:
    stop = greedy[1][7]
    expected = [row[: row.index(stop)] if stop in row else row for row in greedy]
    stopping = tiny_model(eos_token_id=stop)
    assert generate(stopping, PROMPTS, max_new_tokens=20) == expected
    assert generate(stopping, PROMPTS, max_new_tokens=20, stop_tokens=NO_STOP) == greedy


def test_a_prompt_is_continued_alone_as_in_a_batch(model: Llama, greedy: list[list[int]]) -> None:
    assert generate(model, PROMPTS[1:2], max_new_tokens=20) == greedy[1:2]


def test_one_token_compiles_no_loop(model: Llama, greedy: list[list[int]]) -> None:
    before = compilations(generation.decode)
    assert generate(model, PROMPTS[:3], max_new_tokens=1) == [row[:1] for row in greedy[:3]]
    stop = greedy[1][0]
    expected = [[] if row[0] == stop else row[:1] for row in greedy[:3]]
    assert generate(model, PROMPTS[:3], max_new_tokens=1, stop_tokens=(stop,)) == expected
    assert compilations(generation.decode) == before


def test_a_map_adds_no_work_to_a_decoded_token(model: Llama) -> None:
    def costs(model: Llama) -> tuple[float, float]:
        """Floating-point operations, and bytes of the parameters that are read."""
        reading = readings.OwnMatrices(readings.OneByOne(), unstacked(model))
        arguments = (model, jnp.zeros((1, 1), jnp.int32), model.empty_cache(1, slots=64), reading)
        compiled = jax.jit(Llama.extend).lower(*arguments).compile()
        analysis: Any = compiled.cost_analysis()
        return analysis["flops"], analysis["bytes accessed"]

    (flops, accessed), (dense_flops, dense_accessed) = (
        costs(each) for each in (share(model, sharing_by_hand(model, "qkvo", {2: 0, 5: 1})), model)
    )
    assert flops == dense_flops > 0
    assert accessed <= dense_accessed


def test_nearby_lengths_and_other_seeds_do_not_compile_again(model: Llama) -> None:
    sampling = Sampling(temperature=0.7)
    generate(model, PROMPTS, max_new_tokens=20, sampling=sampling)
    before = compilations(generation.prefill), compilations(generation.decode)
    nearby = [prompt + prompt[:7] for prompt in PROMPTS]
    generate(model, nearby, max_new_tokens=33, sampling=sampling, seed=5)
    generate(tiny_model(seed=1, eos_token_id=None), PROMPTS, max_new_tokens=1, sampling=Sampling(temperature=0.7))
    assert (compilations(generation.prefill), compilations(generation.decode)) == before


def test_the_cache_is_written_in_place(model: Llama) -> None:
    tokens = jnp.asarray(random_tokens((2, 8)))
    empty = model.empty_cache(2, slots=16)
    key, greedily = jax.random.key(0), Sampling()
    token, filled = generation.prefill(model, tokens, jnp.array([8, 3]), empty, key, sampling=greedily)
    no_stop = jnp.zeros(0, jnp.int32)
    generation.decode(model, token, filled, key, jnp.int32(8), no_stop, room=8, sampling=greedily)
    for cache in (empty, filled):
        assert cache.k_lbkhs.is_deleted()
        assert cache.v_lbkhs.is_deleted()


def test_the_likeliest_token_is_all_that_top_k_1_leaves(model: Llama, greedy: list[list[int]]) -> None:
    assert generate(model, PROMPTS, max_new_tokens=20, sampling=Sampling(temperature=2.0, top_k=1)) == greedy


def test_tokens_are_drawn_as_jax_draws_them_and_the_first_of_the_likeliest_is_taken() -> None:
    logits_bv = jax.random.normal(jax.random.key(1), (64, 160))
    np.testing.assert_array_equal(
        drawn(jax.random.key(2), logits_bv), jax.random.categorical(jax.random.key(2), logits_bv)
    )
    whole_bv = jnp.round(logits_bv)
    np.testing.assert_array_equal(most_likely(whole_bv), jnp.argmax(whole_bv, axis=-1))


def test_draws_are_set_by_the_seed(model: Llama) -> None:
    sampling = Sampling(temperature=1.0)
    one, same, other = (generate(model, PROMPTS, sampling=sampling, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert (
        generate(model, [PROMPTS[0]] * 2, sampling=sampling)[0]
        != generate(model, [PROMPTS[0]] * 2, sampling=sampling)[1]
    )


PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.2, 0.25], np.float32)
ROWS, LENGTH = 128, 128
DRAWS = ROWS * LENGTH


@pytest.fixture(scope="module")
def forgetful() -> Llama:
    """A model whose next token has the same probabilities whatever came before."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = tiny_model(vocab_size=5, num_hidden_layers=1, eos_token_id=None, **sizes)
    nothing = {name: jnp.zeros_like(model.array(name)) for name in ("o_pool_phd", "down_lfd")}
    ones = {name: jnp.ones_like(model.array(name)) for name in ("embed_vd", "final_norm_d")}
    head_vd = jnp.asarray(np.repeat(np.log(PROBABILITIES)[:, None] / 8, 8, axis=1))
    return with_params(model, **nothing, **ones, head_vd=head_vd)


def frequencies(model: Llama, sampling: Sampling) -> np.ndarray:
    """Of each token, among many draws."""
    rows = generate(model, [[0]] * ROWS, max_new_tokens=LENGTH, sampling=sampling, stop_tokens=NO_STOP)
    return np.bincount(np.concatenate(rows), minlength=PROBABILITIES.size) / DRAWS


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0, 1, 0, 0, 0]),
        (Sampling(temperature=1.0), [0.05, 0.4, 0.1, 0.2, 0.25]),
        (Sampling(temperature=0.5), np.square([0.05, 0.4, 0.1, 0.2, 0.25]) / 0.275),
        (Sampling(temperature=1.0, top_k=2), [0, 0.4 / 0.65, 0, 0, 0.25 / 0.65]),
        (Sampling(temperature=1.0, top_k=99), [0.05, 0.4, 0.1, 0.2, 0.25]),
        (Sampling(temperature=1.0, top_p=0.3), [0, 1, 0, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.5), [0, 0.4 / 0.65, 0, 0, 0.25 / 0.65]),
        (Sampling(temperature=1.0, top_p=0.8), [0, 0.4 / 0.85, 0, 0.2 / 0.85, 0.25 / 0.85]),
        (Sampling(temperature=1.0, top_k=4, top_p=0.8), [0, 0.4 / 0.85, 0, 0.2 / 0.85, 0.25 / 0.85]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(forgetful: Llama, sampling: Sampling, expected: Any) -> None:
    drawn = frequencies(forgetful, sampling)
    expected = np.asarray(expected)
    assert (drawn[expected == 0] == 0).all()
    # Four standard deviations of a frequency among so many draws.
    assert np.abs(drawn - expected).max() < 4 * 0.5 / np.sqrt(DRAWS)


@pytest.mark.parametrize(
    ("prompts", "settings", "reason"),
    [
        ([], {}, "at least one token"),
        ([[1], []], {}, "at least one token"),
        ([[160]], {}, "vocabulary of 160"),
        ([[-1]], {}, "vocabulary of 160"),
        ([[10**30]], {}, "vocabulary of 160"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    model: Llama, prompts: list[list[int]], settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(HeadshareError, match=reason):
        generate(model, prompts, **settings)


@pytest.mark.parametrize(
    "setting", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_impossible_sampling_is_refused(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(HeadshareError, match=name):
        Sampling(**setting)
