"""Checkpoints of the Hugging Face hub: fetched once, or refused in one sentence."""

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import (
    saved_hf_model,
)

import headshare_jax
from headshare_jax import HeadshareError


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_hf_model(tmp_path_factory.mktemp("pristine"))


def test_a_hub_id_without_a_network_is_refused_in_one_sentence() -> None:
    with pytest.raises(HeadshareError) as caught:
        headshare_jax.open_checkpoint("nobody/no-such-model")
    message = str(caught.value)
    assert message.startswith(
        "nobody/no-such-model is not a local path, and fetching it from the Hugging Face hub failed"
    )
    assert "check the name and the network, or give a local folder" in message
    assert "\n" not in message


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_hub_id_is_fetched_once_and_only_what_is_needed(
    tmp_path: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    asked: list[list[str]] = []

    def snapshot_download(hub_id: str, *, allow_patterns: list[str]) -> str:
        assert hub_id == "somebody/tiny"
        asked.append(allow_patterns)
        held = ["config.json", weights, "onnx/model.onnx"]
        for name in (name for name in held if any(fnmatch(name, pattern) for pattern in allow_patterns)):
            if name == "pytorch_model.bin":
                torch.save(load_file(pristine / "model.safetensors"), tmp_path / name)
            else:
                shutil.copyfile(pristine / name, tmp_path / name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    expected = headshare_jax.open_checkpoint(pristine)
    source = headshare_jax.open_checkpoint("somebody/tiny")
    assert np.array_equal(source.read("gate_ldf", 1), expected.read("gate_ldf", 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["config.json", weights])
    assert len(asked) == (1 if weights == "model.safetensors" else 2)


@pytest.mark.parametrize(
    "error", [OSError("No space left on device"), ValueError("Repo id must be\nshort"), Exception()]
)
def test_whatever_the_hub_raises_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*args: Any, **settings: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(HeadshareError) as caught:
        headshare_jax.open_checkpoint("somebody/tiny")
    assert "\n" not in str(caught.value)
    assert str(caught.value).split("failed: ")[1]
