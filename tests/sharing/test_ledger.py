"""Sizes: what is counted is what is stored."""

from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx
from support import ALL_VARIANTS, VARIANTS, saved_hf_model, sharing_by_hand, tiny_hf_model, tiny_model

import headshare_jax
from headshare_jax import ledger, share

ARCHITECTURES = ["mha", "gqa", "tied", "wide heads", "attention bias", "mlp bias", "qwen2"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_dense_model_has_as_many_parameters_as_in_transformers(name: str) -> None:
    sizes, theirs = ledger(tiny_model(**ALL_VARIANTS[name])), tiny_hf_model(**ALL_VARIANTS[name])
    attention = sum(x.numel() for key, x in theirs.named_parameters() if "self_attn" in key)
    assert sizes.dense == sizes.stored == sum(x.numel() for x in theirs.parameters())
    assert sizes.attention_dense == sizes.attention_stored == attention
    assert sizes.stored_bytes == sizes.dense_bytes == sizes.live_bytes == 4 * sizes.dense
    assert sizes.nominal_saving == 0


# Heads of each projection that are not stored: all of three receivers, or those of `mixed_sharing`.
GONE = {tie: {p: 3 * {"q": 2, "k": 1, "v": 1, "o": 2}[p] for p in tie} for tie in ("q", "kv", "qkv", "qkvo")}
GONE["mixed"] = {"q": 2 + 2 + 3 * 2, "k": 1 + 3, "v": 1 + 3, "o": 2 + 3 * 2}


@pytest.mark.parametrize("tie", GONE)
@pytest.mark.parametrize("name", ["gqa", "attention bias"])
def test_the_nominal_saving_is_the_real_one(name: str, tie: str) -> None:
    model = tiny_model(**VARIANTS[name])
    sizes = ledger(share(model, sharing_by_hand(model, tie, {2: 0, 4: 0, 5: 1})))
    bias = 16 if name == "attention bias" else 0
    saving = sum(heads * (64 * 16 + (bias if p != "o" else 0)) for p, heads in GONE[tie].items())
    assert sizes.nominal_saving == saving
    assert sizes.dense - sizes.stored == sizes.attention_dense - sizes.attention_stored == saving
    assert sizes.live_bytes == sizes.stored_bytes == 4 * (sizes.dense - saving)


def test_parts_are_named_and_sum_to_the_whole() -> None:
    sizes = ledger(tiny_model(**VARIANTS["attention bias"], mlp_bias=True))
    stored = {row.part: row.stored for row in sizes.rows}
    assert stored == {
        "q": 3 * 4 * (64 * 16 + 16),
        "k": 3 * 2 * (64 * 16 + 16),
        "v": 3 * 2 * (64 * 16 + 16),
        "o": 3 * (4 * 64 * 16 + 64),
        "mlp": 3 * (3 * 64 * 96 + 2 * 96 + 64),
        "norms": 7 * 64,
        "embedding": 160 * 64,
        "head": 160 * 64,
    }
    assert sum(stored.values()) == sizes.stored


def test_half_precision_counts_half() -> None:
    model = tiny_model(dtype="bfloat16")
    sizes = ledger(model)
    assert sizes.stored_bytes == 2 * sizes.stored
    assert sizes.live_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_a_checkpoint_counts_as_its_model_does(tmp_path: Path) -> None:
    folder = saved_hf_model(tmp_path)
    on_disk, loaded = (
        ledger(headshare_jax.open_checkpoint(folder), path=folder),
        ledger(headshare_jax.load(folder)),
    )
    assert on_disk.rows == loaded.rows
    assert on_disk.live_bytes is None
    assert loaded.disk_bytes is None
    assert on_disk.disk_bytes == sum(file.stat().st_size for file in folder.iterdir())
    one_file = ledger(headshare_jax.open_checkpoint(folder), path=folder / "model.safetensors")
    assert one_file.disk_bytes == (folder / "model.safetensors").stat().st_size


def test_a_shared_checkpoint_is_smaller_by_the_saving(tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"hidden_size": 256, "head_dim": 64}
    model = tiny_model(**overrides)
    shared = share(model, sharing_by_hand(model, "qkvo", {2: 0, 3: 0, 4: 0, 5: 0}))
    sizes = {}
    for name, saved in (("dense", model), ("shared", shared)):
        headshare_jax.save(saved, tmp_path / name)
        sizes[name] = ledger(headshare_jax.open_checkpoint(tmp_path / name), path=tmp_path / name)
    dense_disk, shared_disk = sizes["dense"].disk_bytes, sizes["shared"].disk_bytes
    assert sizes["shared"].rows == ledger(shared).rows
    assert dense_disk is not None
    assert shared_disk is not None
    saving = 4 * sizes["shared"].nominal_saving
    assert dense_disk - shared_disk == pytest.approx(saving, rel=0.01)
