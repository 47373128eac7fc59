"""FP8 checkpoints, against transformers and by the numbers; other quantised ones are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ALL_VARIANTS, saved_hf_model
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import headshare_jax
from headshare_jax import HeadshareError
from headshare_jax.convert import huggingface

LARGEST = 448.0
BLOCK = (32, 16)


def configure(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def quantized(
    folder: Path, steps: tuple[int | None, int | None], ending: str, **scheme: Any
) -> dict[str, torch.Tensor]:
    """Replaces the matrices of all layers by FP8 with scales; returns what they stand for, in bfloat16."""
    path, meant = folder / "model.safetensors", {}
    tensors = load_file(path)
    for name in [name for name in tensors if "_proj.weight" in name]:
        weight = tensors[name].float()
        rows, columns = (step or size for step, size in zip(steps, weight.shape, strict=True))
        blocks = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        scale = blocks.abs().amax(dim=(1, 3)) / LARGEST
        stored = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        meant[name] = (stored.float() * scale[:, None, :, None]).flatten(2, 3).flatten(0, 1).to(torch.bfloat16)
        tensors[name] = stored.flatten(2, 3).flatten(0, 1)
        tensors[name + ending] = scale
        tensors[name.replace("weight", "input_scale")] = torch.ones(1)
    save_file(tensors, path)
    configure(folder, quantization_config=scheme)
    return meant


SCHEMES: dict[str, tuple[tuple[int | None, int | None], str, dict[str, Any]]] = {
    "blocks": (BLOCK, "_scale_inv", {"quant_method": "fp8", "weight_block_size": BLOCK}),
    "matrices": ((None, None), "_scale_inv", {"quant_method": "fp8", "weight_block_size": None}),
    "rows": ((1, None), "_scale", {"quant_method": "fbgemm_fp8"}),
    "rows of compressed-tensors": (
        (1, None),
        "_scale",
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
    ),
    "blocks of compressed-tensors": (
        BLOCK,
        "_scale",
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "block_structure": BLOCK}}},
        },
    ),
}


@pytest.mark.parametrize("variant", ["wide heads", "phi3"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_fp8_weights_are_read_as_what_they_stand_for(tmp_path: Path, scheme: str, variant: str) -> None:
    folder = saved_hf_model(tmp_path / "fp8", dtype=torch.bfloat16, **ALL_VARIANTS[variant])
    steps, ending, fields = SCHEMES[scheme]
    meant = quantized(folder, steps, ending, **fields)
    source = headshare_jax.open_checkpoint(folder)
    whole, heads = source.read("k_pool_pdh", 1), source.read("k_pool_pdh", 1, [1])
    assert np.array_equal(heads, whole[[1]])
    assert np.array_equal(source.read("o_pool_phd", 2, [0, 3]), source.read("o_pool_phd", 2)[[0, 3]])
    headshare_jax.save(source, tmp_path / "out", to="hf")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert meant.keys() <= exported.keys()
    assert all(torch.equal(value, exported[name]) for name, value in meant.items())


def test_fp8_weights_are_those_that_transformers_reads(tmp_path: Path) -> None:
    folder = saved_hf_model(tmp_path / "fp8", dtype=torch.bfloat16, **ALL_VARIANTS["qwen3, biases"])
    meant = quantized(folder, BLOCK, "_scale_inv", quant_method="fp8", weight_block_size=BLOCK)
    stored = load_file(folder / "model.safetensors")
    headshare_jax.save(headshare_jax.open_checkpoint(folder), tmp_path / "out", to="hf")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name in meant:
        pair = {"weight": stored[name], "weight_scale_inv": stored[f"{name}_scale_inv"]}
        assert torch.equal(exported[name], Fp8Dequantize(None).convert(pair)["weight"].to(torch.bfloat16))


def test_a_model_in_float32_is_read_in_float32(tmp_path: Path) -> None:
    folder = saved_hf_model(tmp_path / "fp8")
    quantized(folder, BLOCK, "_scale_inv", quant_method="fp8", weight_block_size=BLOCK)
    assert headshare_jax.open_checkpoint(folder).read("v_pool_pdh", 0).dtype == np.float32


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised with GPTQ"),
        ({"quant_method": "awq"}, "quantised with AWQ"),
        ({"load_in_4bit": True}, "quantised with bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, r"compressed-tensors \(pack-quantized\)"),
        ({"quant_method": "mxfp4"}, "quantised with mxfp4"),
        ({"quant_method": "fp8", "weight_block_size": "wide"}, "blocks of FP8 weights .* must be two numbers"),
        ([4], r"quantization_config in config.json must be an object, not \[4\]"),
    ],
)
def test_other_schemes_are_refused_by_name(tmp_path: Path, scheme: Any, message: str) -> None:
    folder = saved_hf_model(tmp_path / "model")
    configure(folder, quantization_config=scheme)
    with pytest.raises(HeadshareError, match=message):
        headshare_jax.open_checkpoint(folder)


def test_an_old_gptq_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved_hf_model(tmp_path / "model")
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    with pytest.raises(
        HeadshareError, match=r"quantised with GPTQ.* give the checkpoint that they were quantised from"
    ):
        headshare_jax.open_checkpoint(folder)


def test_scales_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = saved_hf_model(tmp_path / "fp8")
    quantized(folder, (16, 16), "_scale_inv", quant_method="fp8", weight_block_size=BLOCK)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.self_attn.k_proj.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(HeadshareError) as caught:
        huggingface.open_directory(folder)
    assert "layers.0.mlp.up_proj.weight_scale_inv does not hold a scale for every part of" in str(caught.value)
    assert "not float32, float16 or bfloat16: model.layers.2.self_attn.k_proj.weight" in str(caught.value)
