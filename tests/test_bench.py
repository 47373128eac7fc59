"""Every benchmark runs and writes what it measured; the sizes here are far too small to assert speed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import support
import tiny_cli_model

import headshare_jax as hs

# Those that compile a model several times take a minute, and find little that other tests do not: they are `slow`.
BENCH = Path(__file__).parents[1] / "bench"


def run_quick(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    path = folder / "result.json"
    command = [sys.executable, str(BENCH / f"{name}.py"), *arguments, "--quick", "--json", str(path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=BENCH.parent).stdout
    result: dict[str, Any] = json.loads(path.read_text())
    assert {"cpu", "cores", "python", "jax"} <= result["machine"].keys()
    assert result["machine"]["cpu"] in " ".join(printed.split())
    return result


def test_matching_is_compared_with_pairs_and_with_matrix_products(tmp_path: Path) -> None:
    result = run_quick("match", tmp_path)
    layers, heads, block = result["options"]["layers"], result["options"]["heads"], result["layers_per_block"]
    assert 1 <= block < layers, "several blocks"
    assert result["pairs"] == layers * (layers - 1) // 2 * heads**2
    assert all(value > 0 for value in result["seconds"].values())
    assert result["speedup"]["scores"] == result["seconds"]["pytorch_loop"] / result["seconds"]["scores"]
    # PyTorch computed the same thing.
    assert result["largest_difference"] < 1e-6
    assert result["fraction_of_matmul"] == result["gflops"] / max(result["matmul_gflops"].values())
    sizes = result["bytes"]
    assert sizes["weights"] + sizes["libraries"] < sizes["peak_rss"]
    assert [row["layers"] for row in result["growth"]] == [2, 4, 8]


def test_conversion_is_compared_with_two_layers_and_with_copies(tmp_path: Path) -> None:
    result = run_quick("convert", tmp_path, str(tiny_cli_model.saved(tmp_path / "model")))
    assert [row["name"] for row in result["directions"]] == ["HF -> native", "native -> HF", "HF -> native"]
    for row in result["directions"]:
        sizes, took = row["bytes"], row["seconds"]
        assert all(value > 0 for value in took.values())
        assert row["ratio"]["to_copy_of_output"] == took["convert"] / took["copy_output"]
        assert 0 < sizes["layer"] < sizes["output"]
        assert sizes["layer"] < sizes["libraries_rss"] < sizes["peak_rss"]
        assert row["peak_of_limit"] == pytest.approx(sizes["peak_rss"] / (2 * sizes["layer"] + 1e9))
        assert row["files"] > 3


@pytest.mark.slow
def test_fitting_is_measured_at_several_sizes(tmp_path: Path) -> None:
    one, two = run_quick("fit", tmp_path)["sizes"]
    assert (one["units"], two["tokens"]) == (3, 2 * one["tokens"])
    for row in (one, two):
        assert row["seconds"].keys() == {"match", "refit"}
        assert row["model_bytes"] < row["rss_before"] <= row["peak_rss"]


@pytest.mark.slow
def test_training_steps_are_compared_with_pytorch(tmp_path: Path) -> None:
    result = run_quick("train", tmp_path)
    rival, dense, tied, align = result["contenders"]
    assert rival["speedup"] == dense["over_dense"] == 1
    for row in (rival, dense, tied, align):
        assert row["speedup"] == rival["seconds"] / row["seconds"]
        assert row["tokens_per_second"] == pytest.approx(2 * 64 / row["seconds"])
        assert 0 < row["mfu"] < 1
        assert row["peak_rss"] > 1e8


@pytest.mark.slow
def test_serving_is_compared_with_pytorch(tmp_path: Path) -> None:
    result = run_quick("serve", tmp_path, str(tiny_cli_model.saved(tmp_path / "model")))
    rows = result["contenders"]
    rival, dense, shared = (rows[name] for name in ("transformers", "headshare, dense", "headshare, shared"))
    assert rival["prefill_speedup"] == rival["decode_speedup"] == 1
    for row in (rival, dense, shared):
        assert row["prefill_tokens_per_second"] == pytest.approx(2 * 64 / row["prefill_seconds"])
        assert row["decode_speedup"] == rival["decode_seconds"] / row["decode_seconds"]
        assert 0 < row["of_matrix_rate"] < 1
        assert row["serving_rss"] > 1e8
    assert rival["stored_bytes"] == dense["stored_bytes"]
    assert result["memory"]["bytes_saved"] == dense["stored_bytes"] - shared["stored_bytes"] > 0
    assert result["first_token_seconds"].keys() == {"not compiled before", "dense", "shared"}


@pytest.mark.slow
def test_a_gpu_is_compared_with_transformers_on_it(tmp_path: Path) -> None:
    result = run_quick("gpu", tmp_path)
    rival, dense, shared = result["rows"]
    for row in (rival, dense, shared):
        rates = row["tokens_per_second"]
        assert rates.keys() == {"decode 1", "prompts 2 x 64", "train 2 x 64"}
        assert row["speedup"] == {stage: rate / rival["tokens_per_second"][stage] for stage, rate in rates.items()}


@pytest.mark.slow
def test_training_steps_are_read_as_compiled_for_a_pod(tmp_path: Path) -> None:
    align, tied = run_quick("pods", tmp_path)["steps"]
    for row in (align, tied):
        assert row["fits"]
        assert row["argument_bytes"] + row["temporary_bytes"] <= row["needed_bytes"]
        assert row["step_seconds"] == max(row["seconds"].values())
    assert tied["parameter_bytes"] < align["parameter_bytes"]
    assert sum(tied["collective_bytes"].values()) <= sum(align["collective_bytes"].values())


@pytest.mark.slow
def test_slim_units_are_compiled_beside_the_ledger_and_run_beside_a_dense_model(tmp_path: Path) -> None:
    dense = support.tiny_model(num_key_value_heads=4)
    models = {"dense": dense, "slim": hs.share(dense, support.slim_sharing(dense))}
    for name, model in models.items():
        hs.save(model, tmp_path / name)
    result = run_quick("slim", tmp_path, "--models", *(str(tmp_path / name) for name in models))
    assert [(row["stage"], row["map"]) for row in result["tpu"]] == [
        (stage, name) for stage in ("decode", "prefill") for name in ("dense", "slim, --even")
    ]
    for row in result["tpu"]:
        assert row["fits"]
        assert row["flops"] == pytest.approx(row["by_ledger"]["flops"], rel=0.05)
        assert row["hbm_bytes_accessed"] > 0
    (row,) = result["cpu"]
    for name, model in models.items():
        assert row["cache_bytes"][name] == model.empty_cache(2, 128).nbytes
        assert row["peak_rss"][name] > 1e8
    assert row["cache_bytes"]["ratio"] == row["cache_bytes"]["slim"] / row["cache_bytes"]["dense"]


@pytest.mark.slow
def test_slimming_is_counted_for_a_chip_and_timed_on_the_host(tmp_path: Path) -> None:
    result = run_quick("slim_time", tmp_path)
    for part in ("chip", "host"):
        assert all(row["runs"] > 0 and row["seconds"] > 0 for row in result[part])
        whole = sum(row["runs"] * row["seconds"] for row in result[part])
        assert result["seconds"][part] == pytest.approx(whole)
    # Three rounds of 8,192 tokens scored, and as many fitted, in batches of 2,048 of which some are held out.
    runs = {row["name"]: row["runs"] for row in result["chip"]}
    assert runs["costs of a layer"] == 2 * 3 * 4
    assert runs["sums of a fit"] == 2 * 3 * 5


@pytest.mark.slow
def test_methods_are_compared_on_a_model_trained_here(tmp_path: Path) -> None:
    texts = [tmp_path / "train.txt", tmp_path / "held-out.txt"]
    for number, text in enumerate(texts):
        text.write_text(" ".join(str(word * (7 + number)) for word in range(2000)))
    given = ("--train", str(texts[0]), "--held-out", str(texts[1]), "--folder", str(tmp_path / "model"))
    first = run_quick("mha", tmp_path, *given)
    assert [(row["method"], row["budget"]) for row in first["rows"]] == [("slim", 0.7), ("drop", 0.7)]
    assert (first["rows"][1]["against_last"], first["rows"][1]["against_last_error"]) == (1, 0)
    for row in first["rows"]:
        assert row["against_last"] == pytest.approx(row["ratio"] / first["rows"][1]["ratio"])
    # 3 layers of 4 heads, 16 wide, each with q, k, v and o.
    assert first["model"]["attention"] == 3 * 4 * 4 * 16 * 64
    assert first["model"]["training"]["tokens"] == 3 * 2 * 32
    # The model that lies there is not trained again.
    again = run_quick("mha", tmp_path, *given)
    assert again["model"] == first["model"] | {"training": None}
