"""Compact Hugging Face checkpoints: the small model in PyTorch against JAX and the expanded export, and round trips."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file, save_file
from support import FAMILY_VARIANTS, hf_logits, jax_logits, random_tokens, saved_hf_model, sharing_by_hand, tiny_model
from support_compact import COMBINED, PAIRS, SHARED, assert_close, assert_same, exported, in_pytorch, shared_model

import headshare_jax
from headshare_jax import HeadshareError, Llama, parameters
from headshare_jax.convert import MAP_FILE, compact, tokenizer
from headshare_jax.sharing.running import running


@pytest.mark.parametrize("case", SHARED)
def test_logits_and_size(tmp_path: Path, case: str) -> None:
    tie, overrides = SHARED[case]
    model = shared_model(tie, **overrides)
    small = in_pytorch(exported(model, tmp_path / "compact"))
    headshare_jax.save(model, tmp_path / "hf", to="hf")
    expanded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    # Longer than the original context, so that dynamic scaling has something to scale.
    tokens = random_tokens((2, 70))
    logits = hf_logits(small, tokens)
    assert_close(logits, hf_logits(expanded, tokens))
    if case in COMBINED:
        assert_close(logits, jax_logits(model, tokens))
    assert sum(parameter.numel() for parameter in small.parameters()) == headshare_jax.ledger(model).stored


@pytest.mark.parametrize(
    "case",
    [
        "mixed with biases",
        "phi3 + mixed",
        "phi3, partial rotary + narrow",
        *(case for case in SHARED if case.startswith("narrow")),
    ],
)
def test_generates_what_jax_generates(tmp_path: Path, case: str) -> None:
    tie, overrides = SHARED[case]
    model = shared_model(tie, **overrides)
    small = in_pytorch(exported(model, tmp_path / "compact"))
    prompts = random_tokens((3, 9)).tolist()
    prompts[1] = prompts[1][:4]
    padded = [[0] * (9 - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (9 - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    out = small.generate(
        torch.tensor(padded), attention_mask=torch.tensor(mask), max_new_tokens=24, do_sample=False, pad_token_id=2
    )
    answers = [row[9:] for row in out.tolist()]
    answers = [row[: row.index(2)] if 2 in row else row for row in answers]
    assert answers == headshare_jax.generate(model, prompts, max_new_tokens=24)


@pytest.mark.parametrize("case", ["mixed with biases", "biases + slim", "phi3, partial rotary + narrow"])
def test_the_cache_is_as_small_as_is_told(tmp_path: Path, case: str) -> None:
    tie, overrides = SHARED[case]
    model = shared_model(tie, **overrides)
    with torch.no_grad():
        out = in_pytorch(exported(model, tmp_path / "compact"))(torch.zeros((2, 12), dtype=torch.long))
    layers = out["cache" if "cache" in out else "past_key_values"].layers
    assert model.sharing is not None
    empty = int(model.sharing.dropped.all(axis=1).sum())
    told = running(model.config, model.sharing, context=12, batch=2, itemsize=4)
    assert told.model.cache_bytes < told.dense.cache_bytes
    # A layer without units counts positions, by a number each.
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) == told.model.cache_bytes + 4 * 24 * empty


@pytest.mark.parametrize("overrides", [{"attention_bias": True}, FAMILY_VARIANTS["phi3"]], ids=["llama", "phi3"])
def test_a_dense_model_brings_no_code(tmp_path: Path, overrides: dict[str, Any]) -> None:
    model = tiny_model(**overrides)
    folder = exported(model, tmp_path / "compact")
    assert not list(folder.glob("*.py"))
    assert "trust_remote_code" not in (folder / "README.md").read_text()
    small = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = random_tokens((2, 12))
    assert_close(hf_logits(small, tokens), jax_logits(model, tokens))
    assert_same(headshare_jax.load(folder), model)
    assert not (folder / MAP_FILE).exists()


def test_a_normalised_head_is_stored_normalised(tmp_path: Path) -> None:
    plain = tiny_model()
    names = parameters.parameter_names(plain.config)
    model = Llama(replace(plain.config, normalize_head=True), {name: getattr(plain, name)[...] for name in names})
    tokens = random_tokens((1, 12))
    model = headshare_jax.share(model, sharing_by_hand(model, "qkv", PAIRS))
    expected = jax_logits(model, tokens)
    assert_close(hf_logits(in_pytorch(exported(model, tmp_path / "compact")), tokens), expected)
    assert_close(jax_logits(headshare_jax.load(tmp_path / "compact"), tokens), expected)


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    model = shared_model("narrow", dtype="bfloat16")
    small = in_pytorch(exported(model, tmp_path / "compact"))
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    headshare_jax.save(model, tmp_path / "hf", to="hf")
    expanded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = random_tokens((2, 12))
    expected = hf_logits(expanded, tokens)
    assert np.abs(hf_logits(small, tokens) - expected).max() < 2**-6 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tie", ["qkv", "qkvo", "k", "mixed", "slim"])
def test_files_are_smaller_by_the_saving(tmp_path: Path, tie: str, dtype: str) -> None:
    model = shared_model(tie, dtype=dtype, attention_bias=True)
    headshare_jax.save(model, tmp_path / "hf", to="hf")
    full, small = (payload(folder) for folder in (tmp_path / "hf", exported(model, tmp_path / "compact")))
    sizes = headshare_jax.ledger(model)
    assert full - small == sizes.dense_bytes - sizes.stored_bytes
    assert small == sizes.stored_bytes


def payload(folder: Path) -> int:
    """Bytes of a checkpoint's tensors."""
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", COMBINED)
def test_round_trips_are_exact(tmp_path: Path, case: str, dtype: str) -> None:
    tie, overrides = SHARED[case]
    model = shared_model(tie, dtype=dtype, **overrides)
    folder = exported(model, tmp_path / "compact")
    assert_same(headshare_jax.load(folder), model)
    for form in ("native", "hf", "hf-compact"):
        headshare_jax.save(model, tmp_path / f"direct-{form}", to=form)
        headshare_jax.save(headshare_jax.open_checkpoint(folder), tmp_path / form, to=form)
        assert_same(*(headshare_jax.open_checkpoint(tmp_path / name) for name in (form, f"direct-{form}")))
    headshare_jax.save(headshare_jax.open_checkpoint(tmp_path / "native"), tmp_path / "again", to="hf-compact")
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    # The card names what each was made from.
    for name in set(files) - {"README.md"}:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_shards(tmp_path: Path) -> None:
    model = shared_model("qkvo")
    folder = tmp_path / "compact"
    folder.mkdir()
    compact.write(model, folder, shard_bytes=60_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert_same(headshare_jax.load(folder), model)
    tokens = random_tokens((1, 12))
    assert_close(hf_logits(in_pytorch(folder), tokens), jax_logits(model, tokens))


def test_the_tokenizer_needs_no_trust_in_the_code(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "head": 1, "share": 2}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    headshare_jax.save(shared_model(), tmp_path / "compact", to="hf-compact", tokenizer_from=tmp_path / "words")
    assert tokenizer.load(tmp_path / "compact")("share head")["input_ids"] == [2, 1]


def test_export_and_reading_need_no_torch(tmp_path: Path) -> None:
    source = saved_hf_model(tmp_path / "hf")
    script = f"""
import sys
sys.modules["torch"] = None
import headshare_jax
model = headshare_jax.load({str(source)!r})
shared = headshare_jax.share(model, headshare_jax.sharing_map(headshare_jax.match(model), 0.3))
headshare_jax.save(shared, {str(tmp_path / "compact")!r}, to="hf-compact")
assert headshare_jax.load({str(tmp_path / "compact")!r}).sharing == shared.sharing
assert "headshare_jax.convert.modeling_headshare" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_map(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / "config.json").read_text())["headshare_map"]
    edit(document)
    edit_config(folder, headshare_map=document)


def tensor_damage(edit: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, edit)


def map_damage(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_map(folder, edit)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a receiver less": (
        map_damage(lambda document: document["receivers"].pop()),
        r"missing: model\.q_pool\.2_1\.weight.*model\.k_pool\.2_1\.weight.*model\.v_pool\.2_1\.weight",
    ),
    "a donor outside the model": (
        map_damage(lambda document: document["receivers"][0].update(donor=[9, 0])),
        r"unit 9\.0 .*3 layers of 2 units",
    ),
    "a map of another model": (
        map_damage(lambda document: document["model"].update(heads_per_unit=1)),
        "for another model",
    ),
    "no map": (
        lambda folder: edit_config(folder, headshare_map=None),
        r"missing: model\.layers\.0\.self_attn\.q_proj\.weight.*unexpected: .*model\.q_pool\.0_0\.weight",
    ),
    "a map that is no map": (
        lambda folder: edit_config(folder, headshare_map=[1]),
        r"The map must be an object, not \[1\]",
    ),
    "missing tensors": (
        tensor_damage(lambda tensors: [tensors.pop(f"model.{name}.weight") for name in ("q_pool.0_0", "v_pool.1_1")]),
        r"missing: model\.q_pool\.0_0\.weight.*model\.v_pool\.1_1\.weight",
    ),
    "an unexpected tensor": (
        tensor_damage(lambda tensors: tensors.update(extra=np.zeros(3, np.float32))),
        "unexpected: extra",
    ),
    "a misshapen block": (
        tensor_damage(lambda tensors: tensors.update({"model.k_pool.0_1.weight": np.zeros((8, 64), np.float32)})),
        r"misshapen: model\.k_pool\.0_1\.weight has shape \[8, 64\] instead of \[16, 64\]",
    ),
    "a block of whole numbers": (
        tensor_damage(lambda tensors: tensors.update({"model.k_pool.0_1.weight": np.zeros((16, 64), np.int32)})),
        r"not float32, float16 or bfloat16: model\.k_pool\.0_1\.weight",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "half the weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:100_000]
        ),
        "corrupt or no safetensors file",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    folder = exported(shared_model(), tmp_path / "compact")
    damage(folder)
    with pytest.raises(HeadshareError, match=message):
        headshare_jax.load(folder)
