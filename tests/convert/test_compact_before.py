"""Compact checkpoints as release 0.1.0 wrote them: each pool one tensor, with an index beside it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import headshare_jax
from headshare_jax import HeadshareError

WRITTEN = Path(__file__).parents[1] / "fixtures" / "written_by_0.1" / "shared-compact"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(WRITTEN, tmp_path / "written"))


def damage_tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def another_donor(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    donor = config["headshare_map"]["receivers"][0]["donor"]
    donor[1] = 1 - donor[1]
    (folder / "config.json").write_text(json.dumps(config))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "another donor": (another_donor, r"q_pool\.index disagrees.*k_pool\.index disagrees.*v_pool\.index disagrees"),
    "an index outside its pool": (
        damage_tensors(lambda tensors: tensors["model.k_pool.index"].__setitem__((1, 1), 99)),
        r"model\.k_pool\.index disagrees with headshare_map",
    ),
    "an index that was cast": (
        damage_tensors(
            lambda tensors: tensors.update({"model.k_pool.index": tensors["model.k_pool.index"].bfloat16() + 300})
        ),
        r"model\.k_pool\.index disagrees with headshare_map",
    ),
    "missing tensors": (
        damage_tensors(lambda tensors: [tensors.pop(f"model.{name}") for name in ("q_pool.weight", "v_pool.index")]),
        r"missing: .*model\.q_pool\.weight.*model\.v_pool\.index",
    ),
    "a pool of whole numbers": (
        damage_tensors(lambda tensors: tensors.update({"model.k_pool.weight": tensors["model.k_pool.weight"].int()})),
        r"not float32, float16 or bfloat16: model\.k_pool\.weight",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(folder: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(HeadshareError, match=message):
        headshare_jax.load(folder)
