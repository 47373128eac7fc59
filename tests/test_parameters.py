"""The parameter tree, and fingerprints of attention weights."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support import ALL_VARIANTS, saved_hf_model, sharing_by_hand, tiny_model, torch_or_skip

import headshare_jax
from headshare_jax import Llama, fingerprint, parameters, share, unshare
from headshare_jax.model import place
from headshare_jax.parameters import PARAMETERS
from headshare_jax.sharing.source import WeightSource, assemble, stored_shape
from headshare_jax.sharing.view import View


@pytest.mark.parametrize("name", ["gqa", "tied", "attention bias", "mlp bias", "wide heads", "qwen2", "qwen3, biases"])
def test_parameters_have_the_shapes_that_their_names_spell(name: str) -> None:
    dense = tiny_model(**ALL_VARIANTS[name])
    for model in (dense, share(dense, sharing_by_hand(dense, "qk", {3: 0}))):
        for parameter in parameters.parameter_names(model.config):
            value = getattr(model, parameter)
            assert value.shape == stored_shape(model.config, parameter, model.sharing)
            assert value.ndim == len(PARAMETERS[parameter].axes)
            layer = 1 if PARAMETERS[parameter].layered else None
            assert model.read(parameter, layer).shape == parameters.slice_shape(model.config, parameter)


def test_a_model_assembled_from_its_slices_is_the_same() -> None:
    dense = tiny_model(attention_bias=True)
    for model in (dense, *(share(dense, sharing_by_hand(dense, tie, {2: 0, 5: 1})) for tie in ("qkvo", "mixed"))):
        for name in parameters.parameter_names(model.config):
            np.testing.assert_array_equal(assemble(model, name), getattr(model, name)[...])


def test_a_loaded_model_takes_over_what_was_built_for_it_and_nothing_of_its_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = View(tiny_model())
    built: dict[str, np.ndarray] = {}

    def noted(source: WeightSource, name: str) -> np.ndarray:
        built[name] = assemble(source, name)
        return built[name]

    monkeypatch.setattr(place, "assemble", noted)
    model = Llama.of(source)
    for name, value in built.items():
        held = model.array(name).unsafe_buffer_pointer()
        assert (held == value.ctypes.data) == PARAMETERS[name].layered
        assert held != source.base.array(name).unsafe_buffer_pointer()  # type: ignore[attr-defined]


def changed(model: Llama, name: str) -> Llama:
    """A copy in which one number of a parameter is another."""
    params = {name: getattr(model, name)[...] for name in parameters.parameter_names(model.config)}
    place = (-1,) * params[name].ndim
    params[name] = params[name].at[place].add(jnp.ones((), params[name].dtype))
    return Llama(model.config, params)


def test_fingerprints_are_of_the_attention_weights() -> None:
    model = tiny_model()
    for name in parameters.parameter_names(model.config):
        same = fingerprint(changed(model, name)) == fingerprint(model)
        assert same == (PARAMETERS[name].pool is None), name


def test_a_fingerprint_does_not_depend_on_storage(tmp_path: Path) -> None:
    folder = saved_hf_model(tmp_path, dtype=torch_or_skip().bfloat16)
    on_disk = headshare_jax.open_checkpoint(folder)
    model = headshare_jax.load(folder, dtype="float32")
    assert fingerprint(on_disk) == fingerprint(model)
    shared = share(model, sharing_by_hand(model, "qkv", {3: 0}))
    assert fingerprint(shared) == fingerprint(unshare(shared)) != fingerprint(model)
