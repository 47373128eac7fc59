"""The PyTorch classes of compact checkpoints do what Llama's do: training, compilation, export, offload, adapters."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import hf_logits, jax_logits, random_tokens
from support_compact import COMBINED, SHARED, assert_close, exported, in_pytorch, shared_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import headshare_jax
from headshare_jax.sharing.source import pool_index


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with receivers of two ties and dropped units."""
    return exported(shared_model("mixed", attention_bias=True), tmp_path_factory.mktemp("model") / "compact")


def token_ids(shape: tuple[int, int] = (2, 12)) -> torch.Tensor:
    return torch.as_tensor(random_tokens(shape), dtype=torch.long)


def blocks(model: Any) -> list[torch.nn.Module]:
    """The modules that hold a model's pooled heads."""
    return [
        block
        for p in "qkvo"
        if hasattr(model.model, f"{p}_pool")
        for block in getattr(model.model, f"{p}_pool").children()
    ]


@pytest.mark.parametrize("case", COMBINED)
def test_what_pytorch_trained_and_saved_comes_back(tmp_path: Path, case: str) -> None:
    tie, overrides = SHARED[case]
    model = shared_model(tie, **overrides)
    small = in_pytorch(exported(model, tmp_path / "compact"))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter += torch.rand_like(parameter)
    small.save_pretrained(tmp_path / "trained")
    back = headshare_jax.load(tmp_path / "trained")
    assert back.sharing == model.sharing
    assert back.config == model.config
    stored = torch.cat([block.weight for block in small.model.k_pool.children()]).detach().numpy()
    by_columns = model.sharing is not None and model.sharing.widths is not None
    heads = stored if by_columns else stored.reshape(-1, model.config.head_dim, stored.shape[1]).swapaxes(1, 2)
    assert np.array_equal(back.k_pool_pdh, heads)
    tokens = random_tokens((2, 12))
    logits = jax_logits(back, tokens)
    assert_close(hf_logits(small, tokens), logits)
    assert_close(hf_logits(in_pytorch(tmp_path / "trained"), tokens), logits)


@pytest.mark.parametrize("tie", ["qkvo", "mixed"])
def test_a_head_gets_the_gradients_of_all_its_users(tmp_path: Path, tie: str) -> None:
    model = shared_model(tie)
    small = in_pytorch(exported(model, tmp_path / "compact"))
    headshare_jax.save(model, tmp_path / "hf", to="hf")
    expanded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = token_ids()
    for network in (small, expanded):
        network(tokens, labels=tokens).loss.backward()
    for projection in "qo":
        grads = [block.weight.grad for block in getattr(small.model, f"{projection}_pool").children()]
        mine = torch.cat([grad.T if projection == "o" else grad for grad in grads]).reshape(-1, 16, 64)
        # One row more, for what dropped heads get.
        gradient = torch.zeros(len(mine) + 1, 16, 64)
        index = pool_index(model.config, projection, model.sharing)
        for rows, layer in zip(index, expanded.model.layers, strict=True):
            theirs = getattr(layer.self_attn, f"{projection}_proj").weight.grad
            heads = (theirs.T if projection == "o" else theirs).reshape(4, 16, 64)
            gradient.index_add_(0, torch.tensor(rows), heads)
        assert_close(mine.numpy(), gradient[:-1].numpy())


def test_a_model_from_its_configuration_alone(tmp_path: Path) -> None:
    folder = exported(shared_model("narrow", attention_bias=True), tmp_path / "compact")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    fresh = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    empty.to_empty(device="cpu").init_weights()
    for model in (fresh, empty):
        assert len(blocks(model)) > 4
        for block in blocks(model):
            assert 0.01 < block.weight.std().item() < 0.03
            assert block.bias is None or not block.bias.any()
    # What follows from the map alone is right before and after.
    for mine, theirs in zip(fresh.buffers(), empty.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_body_without_a_head(tmp_path: Path) -> None:
    model = shared_model()
    folder = exported(model, tmp_path / "compact")
    body = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = random_tokens((2, 12))
    with torch.no_grad():
        features = body(torch.as_tensor(tokens, dtype=torch.long)).last_hidden_state.numpy()
    assert_close(features, np.asarray(model.features(tokens)))


def test_a_classifier_of_texts(tmp_path: Path, folder: Path) -> None:
    auto = transformers.AutoModelForSequenceClassification
    classifier = auto.from_pretrained(folder, trust_remote_code=True, num_labels=3).eval()
    body = in_pytorch(folder).model
    tokens = token_ids((1, 9))
    with torch.no_grad():
        logits = classifier(tokens).logits
        assert_close(logits.numpy(), classifier.score(body(tokens).last_hidden_state)[:, -1].numpy())
    classifier.save_pretrained(tmp_path / "classifier")
    with torch.no_grad():
        assert torch.equal(in_pytorch(tmp_path / "classifier", auto)(tokens).logits, logits)


@pytest.mark.parametrize("kind", ["eager", "wide"])
def test_other_attention_gets_heads_that_it_takes(tmp_path: Path, kind: str) -> None:
    """Kernels that take any width get what runs; all but those of PyTorch, heads as the configuration counts them."""
    seen = set()

    def wide(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        seen.add((*query.shape[1::2], *key.shape[1::2], *value.shape[1::2]))
        return sdpa_attention_forward(module, query, key, value, mask, **settings)

    transformers.AttentionInterface.register("wide", wide)
    model = shared_model("narrow", attention_bias=True)
    small = in_pytorch(exported(model, tmp_path / "compact"), attn_implementation=kind)
    tokens = random_tokens((2, 12))
    assert_close(hf_logits(small, tokens), jax_logits(model, tokens))
    assert seen == ({(4, 16, 2, 16, 2, 16)} if kind == "wide" else set())


def test_a_static_cache_is_as_narrow(tmp_path: Path) -> None:
    model = in_pytorch(exported(shared_model("narrow"), tmp_path / "compact"))
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(token_ids(), **settings)
    settings |= {"cache_implementation": "static", "return_dict_in_generate": True}
    for chunks in ({}, {"prefill_chunk_size": 5}):
        out = model.generate(token_ids(), **settings, **chunks)
        assert torch.equal(out.sequences, expected)
    widths = [(layer.keys.shape[1::2], layer.values.shape[1::2]) for layer in out.past_key_values.layers]
    assert widths == [((1, 1), (1, 0)), ((2, 10), (2, 9)), ((1, 10), (1, 7))]


@pytest.mark.parametrize("tie", ["mixed", "narrow"])
def test_compiles_whole_and_exports(tmp_path: Path, tie: str) -> None:
    model = in_pytorch(exported(shared_model(tie, attention_bias=True), tmp_path / "compact"))
    tokens = token_ids()
    with torch.no_grad():
        expected = model(tokens).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(tokens).logits, expected)
        exported_program = torch.export.export(model, (tokens,), {"use_cache": False})
        assert_close(exported_program.module()(tokens, use_cache=False).logits.numpy(), expected.numpy())


def test_casts_leave_who_uses_what(tmp_path: Path) -> None:
    """Weights that a type holds exactly come back from it, with the logits that they had."""
    model = in_pytorch(exported(shared_model("narrow"), tmp_path / "compact")).to(torch.bfloat16).float()
    expected = hf_logits(model, random_tokens((2, 12)))
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
    assert np.array_equal(hf_logits(model, random_tokens((2, 12))), expected)


def test_hooks_of_blocks_run(folder: Path) -> None:
    """What keeps weights elsewhere, or shards them, brings them as a module is called."""
    model = in_pytorch(folder)
    tokens = random_tokens((2, 12))
    expected = hf_logits(model, tokens)
    for module in [*blocks(model), *(getattr(model.model, f"{p}_pool") for p in "qkvo")]:
        weights = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}

        def fetch(module: Any, args: Any, weights: dict[str, torch.Tensor] = weights) -> None:
            for name, value in weights.items():
                getattr(module, name).data = value

        def put_away(module: Any, args: Any, output: Any, weights: dict[str, torch.Tensor] = weights) -> None:
            for name, value in weights.items():
                getattr(module, name).data = torch.full_like(value, torch.nan)

        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(put_away)
        put_away(module, (), None)
    assert np.array_equal(hf_logits(model, tokens), expected)


def test_projections_are_linear_modules_that_can_be_replaced(folder: Path) -> None:
    """As quantisers and adapters do, which look for `nn.Linear`."""
    model = in_pytorch(folder)
    tokens = random_tokens((2, 12))
    expected = hf_logits(model, tokens)
    held = sum(p.numel() for name, p in model.named_parameters() if "proj" in name or "_pool" in name)
    linear = [(name, module) for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    # The biases of o are the layers' own.
    biases = sum(layer.self_attn.o_proj.bias.numel() for layer in model.model.layers)
    assert sum(p.numel() for name, m in linear if name != "lm_head" for p in m.parameters()) == held - biases

    class Twice(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    for name, module in linear:
        if "v_pool" in name:
            model.set_submodule(name, Twice(module))
    doubled = in_pytorch(folder)
    with torch.no_grad():
        for block in doubled.model.v_pool.children():
            for parameter in block.parameters():
                parameter *= 2
    assert_close(hf_logits(model, tokens), hf_logits(doubled, tokens))
    assert not np.allclose(hf_logits(model, tokens), expected)


def test_a_copy_is_whole(folder: Path) -> None:
    model = in_pytorch(folder)
    tokens = random_tokens((2, 12))
    expected = hf_logits(model, tokens)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert np.array_equal(hf_logits(other, tokens), expected)


def test_a_plan_for_tensor_parallelism_leaves_attention_whole(folder: Path) -> None:
    plan = in_pytorch(folder).tp_plan
    assert {"model.layers.*.mlp.gate_proj", "model.layers.*.mlp.down_proj", "lm_head"} <= set(plan)
    assert not any("attn" in name or "pool" in name for name in plan)
