"""Checkpoints of a run: which are kept, and how damage is passed over."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from headshare_jax import HeadshareError
from headshare_jax.train.checkpoints import FORMAT, RunCheckpoints, checksums

SHAPE = (4, 4)


def saved(folder: Path, perplexities: dict[int, float | None], keep: int = 2) -> Path:
    """Checkpoints of these steps, each with its step for values."""
    with RunCheckpoints(folder, keep) as checkpoints:
        for step, perplexity in perplexities.items():
            checkpoints.save(step, {"a": jnp.full(SHAPE, float(step))}, {"number": step}, perplexity)
    return folder


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def abstract(document: dict[str, Any]) -> Any:
    return {"a": jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}


def restored(folder: Path) -> int | None:
    """The step that is gone on from; its values and document are its own."""
    with RunCheckpoints(folder, 2) as checkpoints:
        found = checkpoints.restore(abstract)
        if found is None:
            return None
        step, arrays, document = found
        assert np.array_equal(arrays["a"], np.full(SHAPE, step))
        assert document["number"] == step
        # The steps of those that were passed over are saved again.
        checkpoints.save(step + 2, {"a": jnp.zeros(SHAPE)}, {"number": 0}, None)
    assert step + 2 in steps(folder)
    return int(step)


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    assert steps(saved(tmp_path / "run", {2: 9.0, 4: 5.0, 6: 7.0, 8: None, 10: 6.0})) == [4, 8, 10]


def test_the_best_is_known_after_a_restart(tmp_path: Path) -> None:
    saved(tmp_path / "run", {2: 5.0, 4: 9.0, 6: 8.0}, keep=1)
    assert steps(saved(tmp_path / "run", {8: 7.0, 10: 6.0}, keep=1)) == [2, 10]


def test_nothing_to_restore(tmp_path: Path) -> None:
    assert restored(tmp_path / "run") is None


def overwritten(part: str, content: bytes) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        for path in (checkpoint / part).rglob("*"):
            if path.is_file():
                path.write_bytes(content)

    return damage


def halved(checkpoint: Path) -> None:
    largest = max((checkpoint / "arrays").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    os.truncate(largest, largest.stat().st_size // 2)


@pytest.mark.parametrize(
    "damage",
    [
        overwritten("document", b"{"),
        overwritten("document", json.dumps({"format": "another"}).encode()),
        overwritten("document", json.dumps({"format": FORMAT, "number": 4}).encode()),
        overwritten("arrays", b""),
        halved,
        lambda checkpoint: shutil.rmtree(checkpoint / "arrays"),
        lambda checkpoint: shutil.rmtree(checkpoint / "document"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "run", {2: 9.0, 4: 8.0})
    damage(tmp_path / "run" / "4")
    assert restored(tmp_path / "run") == 2
    assert "step 4 cannot be used" in caplog.text


def test_a_changed_bit_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = {"a": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)}
    target = {"a": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=abstract({})["a"].sharding)}
    with RunCheckpoints(tmp_path, 2) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, jax.tree.map(jnp.asarray, values), {}, None)
    largest = max((tmp_path / "4" / "arrays").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with RunCheckpoints(tmp_path, 2) as checkpoints:
        found = checkpoints.restore(lambda document: target)
    assert found is not None
    assert found[0] == 2
    assert np.array_equal(found[1]["a"], values["a"])
    assert "step 4 cannot be used (its arrays are not those that were saved)" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_checksums_tell_arrays_apart_wherever_they_lie(dtype: str) -> None:
    values = jnp.asarray(np.random.default_rng(0).integers(0, 2, (8, 6, 4)), dtype)
    (one,) = checksums([values])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.device_put(values, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    assert checksums([cut, jnp.int32(7)]) == [one, 7]
    other = (values[3, 2, 1] == jnp.zeros((), dtype)).astype(dtype)
    others = [values.at[3, 2, 1].set(other), values[::-1], values.swapaxes(0, 1)]
    assert one not in checksums(others)


def test_damaged_metrics_do_not_matter(tmp_path: Path) -> None:
    saved(tmp_path / "run", {2: 9.0, 4: 8.0})
    overwritten("metrics", b"{")(tmp_path / "run" / "4")
    assert restored(tmp_path / "run") == 4


@pytest.mark.parametrize("name", ["notes.txt", "abc/x"])
def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path, name: str) -> None:
    saved(tmp_path / "run", {2: 9.0, 4: 8.0})
    (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / name).write_text("x")
    assert restored(tmp_path / "run") == 4
    assert (tmp_path / "run" / name).is_file()


def test_where_all_are_damaged_the_newest_says_why(tmp_path: Path) -> None:
    saved(tmp_path / "run", {2: 9.0, 4: 8.0})
    for step in ("2", "4"):
        overwritten("document", b'{"format": "another"}')(tmp_path / "run" / step)
    with pytest.raises(HeadshareError, match=r"None of the 2 checkpoints .* step 4: .*not a checkpoint of a PostShare"):
        restored(tmp_path / "run")
    assert steps(tmp_path / "run") == [2, 4]
