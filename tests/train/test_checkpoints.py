"""Checkpoints of a run: which are kept, and how damage is passed over."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import buckets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from headshare_jax import HeadshareError
from headshare_jax.convert import storage, stored_tree
from headshare_jax.errors import TryAgain
from headshare_jax.model.mesh import make_mesh
from headshare_jax.train.checkpoints import RunCheckpoints

SHAPE = (4, 4)


def arrays(value: float) -> dict[str, Any]:
    return {"state": {"a": jnp.full(SHAPE, value)}, "frozen": {"b": jnp.full(SHAPE, -1.0)}}


def save(checkpoints: RunCheckpoints, step: int, perplexity: float | None = None, stage: int = 0) -> None:
    """A checkpoint with its step for values."""
    checkpoints.save(step, arrays(float(step)), {"number": step, "stage": stage}, perplexity).start()


def saved(folder: Path, perplexities: dict[int, float | None], keep: int = 2) -> Path:
    """Checkpoints of these steps."""
    with RunCheckpoints(folder, keep) as checkpoints:
        checkpoints.restore(abstract)
        for step, perplexity in perplexities.items():
            save(checkpoints, step, perplexity)
    return folder


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def abstract(document: dict[str, Any]) -> Any:
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=where)
    return {"state": {"a": leaf}, "frozen": {"b": leaf}}


def restored(folder: Path) -> int | None:
    """The step that is gone on from; its values and document are its own."""
    with RunCheckpoints(folder, 2) as checkpoints:
        found = checkpoints.restore(abstract)
        if found is None:
            return None
        step, values, document = found
        assert np.array_equal(values["state"]["a"], np.full(SHAPE, step))
        assert np.array_equal(values["frozen"]["b"], np.full(SHAPE, -1.0))
        assert document["number"] == step
        # The steps of those that were passed over are saved again.
        save(checkpoints, step + 2)
    assert step + 2 in steps(folder)
    return int(step)


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    assert steps(saved(tmp_path / "run", {2: 9.0, 4: 5.0, 6: 7.0, 8: None, 10: 6.0})) == [4, 8, 10]


def test_the_best_is_known_after_a_restart(tmp_path: Path) -> None:
    saved(tmp_path / "run", {2: 5.0, 4: 9.0, 6: 8.0}, keep=1)
    assert steps(saved(tmp_path / "run", {8: 7.0, 10: 6.0}, keep=1)) == [2, 10]


def test_nothing_to_restore(tmp_path: Path) -> None:
    assert restored(tmp_path / "run") is None


def test_what_does_not_train_is_written_once_a_stage(tmp_path: Path) -> None:
    saved(tmp_path / "run", {2: None, 4: None})
    (frozen,) = tmp_path.glob("run/frozen.*")
    before = {path: path.stat().st_mtime_ns for path in frozen.rglob("*")}
    assert restored(tmp_path / "run") == 4
    assert {path: path.stat().st_mtime_ns for path in frozen.rglob("*")} == before
    with RunCheckpoints(tmp_path / "run", 1) as checkpoints:
        checkpoints.restore(abstract)
        save(checkpoints, 8, stage=1)
    assert [path.name for path in tmp_path.glob("run/frozen.*")] == ["frozen.1"]


def overwritten(part: str, content: bytes) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        for path in checkpoint.rglob(part):
            path.write_bytes(content)

    return damage


def without(part: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        path = checkpoint / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def values_of(checkpoint: Path) -> Path:
    """The file that holds a checkpoint's array."""
    return checkpoint / "arrays" / "a" / "c" / "0" / "0"


def halved(checkpoint: Path) -> None:
    os.truncate(values_of(checkpoint), 32)


def edited(checkpoint: Path) -> None:
    path = checkpoint / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"number": 5}))


def bit_changed(checkpoint: Path) -> None:
    content = bytearray(values_of(checkpoint).read_bytes())
    content[17] ^= 1
    values_of(checkpoint).write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        overwritten("checkpoint.json", b"{"),
        overwritten("checkpoint.json", json.dumps({"format": "another"}).encode()),
        edited,
        overwritten("zarr.json", b"{}"),
        overwritten("sums.0.json", b"{}"),
        without("arrays/sums.0.json"),
        without("arrays/a/c/0/0"),
        without("arrays"),
        halved,
        bit_changed,
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "run", {2: 9.0, 4: 8.0})
    damage(tmp_path / "run" / "4")
    assert restored(tmp_path / "run") == 2
    assert "step 4 cannot be used" in caplog.text


def test_a_save_that_was_cut_off_is_told_and_cleared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path / "run", {2: None, 4: None})
    without("checkpoint.json")(tmp_path / "run" / "4")
    shutil.copytree(tmp_path / "run" / "frozen.0", tmp_path / "run" / "frozen.1")
    assert restored(tmp_path / "run") == 2
    assert "Removing what a save that was cut off left of step 4" in caplog.text
    assert not (tmp_path / "run" / "frozen.1").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("shape", [(8, 16, 4), (7, 8), (48, 4), (8,), ()])
def test_arrays_come_back_on_any_mesh(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Chunks of a few rows.
    monkeypatch.setattr(stored_tree, "CHUNK_BYTES", 100)
    values = jnp.asarray(np.random.default_rng(0).normal(size=shape) * 99, dtype)
    # As parameters are cut, an axis that does not divide is left whole.
    specs = {
        (8, 16, 4): (PartitionSpec(None, ("fsdp", "tensor")), PartitionSpec(None, "fsdp", "tensor"), PartitionSpec()),
        (7, 8): (PartitionSpec(None, "fsdp"), PartitionSpec(None, ("fsdp", "tensor"))),
        (48, 4): (PartitionSpec("tensor", "fsdp"), PartitionSpec("tensor")),
        (8,): (PartitionSpec("fsdp"), PartitionSpec()),
        (): (PartitionSpec(),),
    }[shape]
    for first in specs:
        for second in specs:
            one, other = make_mesh((1, 4, 2)), make_mesh((2, 2, 2))
            array = jax.device_put(values, NamedSharding(one, first))
            target = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(other, second))
            folder = tmp_path / f"{first}-{second}".replace("/", "-")
            with RunCheckpoints(folder, 1) as checkpoints:
                checkpoints.save(1, {"state": {"a": array}, "frozen": {}}, {"stage": 0}, None).start()
            found = RunCheckpoints(folder, 1).restore(
                lambda document, target=target: {"state": {"a": target}, "frozen": {}}
            )
            assert found is not None
            assert found[1]["state"]["a"].sharding == target.sharding
            assert np.array_equal(found[1]["state"]["a"], values)


def test_steps_may_change_what_is_being_saved(tmp_path: Path) -> None:
    change = jax.jit(lambda a: a + 1, donate_argnums=0)
    with RunCheckpoints(tmp_path / "run", 1) as checkpoints:
        state = {"a": jnp.zeros((512, 512))}
        write = checkpoints.save(0, {"state": state, "frozen": {}}, {"stage": 0}, None)
        state = {"a": change(state["a"])}
        write.start()
        jax.block_until_ready(change(state["a"]))
    leaf = jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=abstract({})["state"]["a"].sharding)
    found = RunCheckpoints(tmp_path / "run", 1).restore(lambda document: {"state": {"a": leaf}, "frozen": {}})
    assert found is not None
    assert not np.asarray(found[1]["state"]["a"]).any()


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
        overwritten("checkpoint.json", b'{"format": "another"}')(tmp_path / "run" / step)
    with pytest.raises(HeadshareError, match=r"None of the 2 checkpoints .* step 4: .*not a checkpoint of a PostShare"):
        restored(tmp_path / "run")
    assert steps(tmp_path / "run") == [2, 4]


def test_checkpoints_in_a_bucket(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = storage.path(f"{bucket}/run/checkpoints")
    saved(folder, {2: None, 4: None, 6: None})
    assert steps(folder) == [4, 6]
    # What a save leaves that was cut off.
    storage.remove_file(folder / "6" / "checkpoint.json")
    with RunCheckpoints(folder, 2) as checkpoints:
        found = checkpoints.restore(abstract)
        assert found is not None
        assert (found[0], float(found[1]["state"]["a"][0, 0])) == (4, 4.0)
        assert "Removing what a save that was cut off left of step 6" in caplog.text
        assert steps(folder) == [4]
        save(checkpoints, 6)
    values = folder / "6" / "arrays" / "a" / "c" / "0" / "0"
    content = bytearray(values.read_bytes())
    content[17] ^= 1
    values.write_bytes(bytes(content))
    with RunCheckpoints(folder, 2) as checkpoints:
        found = checkpoints.restore(abstract)
    assert found is not None
    assert found[0] == 4


def test_a_bucket_that_forbids_writing_is_told(servers: Any) -> None:
    checkpoints = RunCheckpoints(storage.path("gs://forbidden/run/checkpoints"), 2)
    save(checkpoints, 2)
    with pytest.raises(HeadshareError, match=r"could not be written \(it cannot be used: .* forbids it"):
        checkpoints.wait()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_storage_that_goes_away_during_a_save_is_told(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with buckets.process(scheme) as (process, server):
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        checkpoints = RunCheckpoints(storage.path(f"{scheme}://{buckets.BUCKET}/run/checkpoints"), 2)
        save(checkpoints, 1)
        checkpoints.wait()
        write = checkpoints.save(2, arrays(2.0), {"stage": 0}, None)
        process.kill()
        process.wait()
        write.start()
        with pytest.raises(TryAgain, match=r"checkpoints/2 was not written: it was not reached"):
            checkpoints.wait()
        assert checkpoints.newest == 1
