"""NaN and infinities, in weights and in what is made of them: refused by name and number, by every command alike."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_cli_model
from support import random_tokens, sharing_by_hand, tiny_model
from support_native import replace_array

import headshare_jax as hs
from headshare_jax import HeadshareError, cli
from headshare_jax.convert.gguf_header import read_header
from headshare_jax.convert.safetensors_files import header
from headshare_jax.matching.cosine import magnitudes
from headshare_jax.parameters import parameter_names
from headshare_jax.sharing.finite import NotFinite, is_finite

TYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
TEXT = "The quick brown fox jumps over the lazy dog. " * 60


@pytest.mark.parametrize("dtype", TYPES)
def test_nan_and_infinities_are_found_wherever_they_are(dtype: Any) -> None:
    largest = float(ml_dtypes.finfo(dtype).max)
    values = np.linspace(-largest, largest, 63).astype(dtype).reshape(7, 9)
    values[0, 0], values[3, 3], values[3, 4] = -0.0, ml_dtypes.finfo(dtype).smallest_subnormal, 0
    assert is_finite(values)
    assert is_finite(values.T[2:, ::2])
    assert is_finite(values[:0])
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for place in ((0, 0), (3, 5), (6, 8)):
            damaged = values.copy()
            damaged[place] = bad
            assert not is_finite(damaged), (bad, place)
            assert not is_finite(damaged.T)


def at_byte(path: Path, place: int, value: np.ndarray) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(value.tobytes())


def damage_safetensors(folder: Path, tensor: str, value: np.ndarray) -> None:
    entries, _ = header(folder / "model.safetensors")
    at_byte(folder / "model.safetensors", entries[tensor].start, value)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cli_model.saved_without_torch(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture
def damaged(dense: Path, tmp_path: Path) -> Path:
    """A model with three values that are not finite in one of its matrices."""
    folder = Path(shutil.copytree(dense, tmp_path / "damaged"))
    bad = np.array([np.nan, np.inf, -np.inf], np.float32)
    damage_safetensors(folder, "model.layers.1.self_attn.k_proj.weight", bad)
    return folder


def test_every_command_that_reads_weights_says_the_same(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    commands: list[tuple[object, ...]] = [
        ("eval", damaged, "--text", text),
        ("generate", damaged, "--prompt", "The"),
        ("convert", damaged, out, "--to", "native"),
        ("convert", damaged, tmp_path / "out.gguf", "--to", "gguf"),
        ("match", damaged),
        ("share", damaged, out, "--ratio", 0.3, "--method", "direct"),
        ("share", damaged, out, "--ratio", 0.3, "--method", "fitted", "--calibrate", text, "--seq-len", 32,
         "--calibrate-tokens", 256),
        ("sweep", damaged, "-o", out, "--methods", "direct", "--ratios", 0.3, "--text", text, "--seq-len", 32),
        ("postshare", "--config", "smollm2-cpu", "-o", out, "--set", f"model={damaged}", f"data.train={text}",
         f"data.eval={text}", "data.seq_len=32", "sharing.refit_windows=4", "batch_size=8"),
    ]  # fmt: skip
    file = damaged / "model.safetensors"
    expected = f"model.layers.1.self_attn.k_proj.weight in {file} holds 1 NaN and 2 infinite of 2,048 values"
    for command in commands:
        capsys.readouterr()
        assert cli.run([str(part) for part in command]) == 2, command
        said = capsys.readouterr().err
        assert expected in said, command
        assert "Warning" not in said
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("format", ["native", "hf", "hf-compact", "gguf"])
def test_every_format_and_type_is_looked_at(format: str, dtype: str, tmp_path: Path) -> None:
    model = tiny_model(dtype=dtype)
    shared = hs.share(model, sharing_by_hand(model, "qkv", {3: 0}))
    ending = ".gguf" if format == "gguf" else ""
    path = tmp_path / f"model{ending}"
    hs.save(shared, path, to=format)
    bad = np.array([np.nan], TYPES[("float32", "float16", "bfloat16").index(dtype)])
    match format:
        case "native":
            name = "gate_ldf of layer 1"
            values = np.stack([model.read("gate_ldf", layer) for layer in range(model.config.num_layers)])
            values[1, 0, 0] = np.nan
            replace_array(path, "gate_ldf", values)
        case "gguf":
            name = "blk.1.ffn_gate.weight"
            at_byte(path, read_header(path).tensors[name].offset, bad)
        case _:
            name = "model.layers.1.mlp.gate_proj.weight"
            damage_safetensors(path, name, bad)
    with pytest.raises(HeadshareError, match=rf"{name} in .* holds 1 NaN of 6,144 values: the model is damaged"):
        hs.load(path)


def test_a_pool_of_a_compact_checkpoint_is_looked_at(tmp_path: Path) -> None:
    model = tiny_model()
    hs.save(hs.share(model, sharing_by_hand(model, "qkv", {3: 0})), tmp_path / "model", to="hf-compact")
    entries, _ = header(tmp_path / "model" / "model.safetensors")
    block = next(name for name in entries if name.startswith("model.v_pool."))
    damage_safetensors(tmp_path / "model", block, np.array([np.inf], np.float32))
    with pytest.raises(NotFinite, match=rf"{block} in .* holds 1 infinite of"):
        hs.load(tmp_path / "model")


def test_a_model_in_memory_is_not_written(tmp_path: Path) -> None:
    model = tiny_model()
    model.up_ldf[...] = model.up_ldf[...].at[2, 0, 0].set(jnp.nan)
    with pytest.raises(NotFinite, match="up_ldf of layer 2 in the model holds 1 NaN"):
        hs.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def large(name: str, value: float) -> hs.Llama:
    """A model with large values in the second layer, or of a pool the second head."""
    model = tiny_model()
    arrays = {other: model.array(other) for other in parameter_names(model.config)}
    return hs.Llama(model.config, arrays | {name: arrays[name].at[1].set(value)})


def test_casts_that_overflow_are_refused(tmp_path: Path) -> None:
    hs.save(large("down_lfd", 7e4), tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            NotFinite, match=r"down_lfd of layer 1 does not fit float16.* 6,144 infinite of 6,144 .* is 7e\+04"
        ):
            hs.load(tmp_path / "model", dtype="float16")
        for kind in ("f16", "q4_0", "q8_0"):
            with pytest.raises(NotFinite, match=rf"blk.1.ffn_down.weight does not fit {kind}"):
                hs.save(large("down_lfd", 1e8), tmp_path / "model.gguf", to="gguf", quantize=kind)
        # Of this size a scale of 8 bits is still finite.
        hs.save(large("down_lfd", 7e4), tmp_path / "model.gguf", to="gguf", quantize="q8_0")
    assert hs.load(tmp_path / "model", dtype="bfloat16").dtype("down_lfd") == ml_dtypes.bfloat16
    assert cli.run(["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--dtype", "float16"]) == 2
    assert not (tmp_path / "out").exists()


def test_predictions_that_are_not_finite_are_a_sentence() -> None:
    model = large("down_lfd", 3e38)
    with pytest.raises(NotFinite, match=r"perplexity is not finite: \d+ of 63 predictions"):
        hs.perplexity(model, random_tokens((256,)), seq_len=64)
    with pytest.raises(NotFinite, match=r"The model's logits are NaN or infinite"):
        hs.generate(model, [[5, 6], [7]], max_new_tokens=4)
    with pytest.raises(NotFinite, match="The other model's predictions on this text are not finite"):
        hs.agreement(tiny_model(), model, random_tokens((2, 32)))


def test_sums_that_are_not_finite_name_their_layer() -> None:
    model, windows = large("down_lfd", 3e38), random_tokens((4, 32))
    shared = hs.share(model, sharing_by_hand(model, "qkv", {4: 0}), check_source=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NotFinite, match="Sums over the calibration text in the attention of layer 2 are NaN"):
            hs.refit(model, shared, windows)
        with pytest.raises(NotFinite, match=r"Gradients of the model's predictions by layer \d are NaN"):
            hs.match_functional(model, windows)
        measures: list[Callable[[hs.Llama], Any]] = [hs.match, magnitudes]
        for measure in measures:
            with pytest.raises(NotFinite, match="Sums of squares of the heads' weights in layer 0 are NaN or infinite"):
                measure(large("k_pool_pdh", 1e30))


def test_a_refit_that_its_type_cannot_hold_is_not_written() -> None:
    model = tiny_model(dtype="float16")
    # The donor's values are small, so that output weights, which are large, would have to grow beyond the type.
    model.v_pool_pdh[...] = (model.v_pool_pdh[...] * 0.1).at[0].multiply(0.1)
    model.o_pool_phd[...] = model.o_pool_phd[...] * 6e4 * 2.5
    shared = hs.share(model, sharing_by_hand(model, "qkv", {4: 0}), check_source=False)
    with pytest.raises(NotFinite, match="The refit of o_pool_phd of layer 2 does not fit float16"):
        hs.refit(model, shared, random_tokens((12, 64)))
