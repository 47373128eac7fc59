"""Models with some parameters replaced, and models of the same function with other weights."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from headshare_jax import Llama, parameters


def with_params(model: Llama, **params: Any) -> Llama:
    """The same model with some parameters replaced."""
    old = {name: getattr(model, name)[...] for name in parameters.parameter_names(model.config)}
    return Llama(model.config, old | params, sharing=model.sharing)


def equivalent(model: Llama, block: str, rng: np.random.Generator) -> Llama:
    """The same function with other weights: V and O by any invertible matrix, Q and K by a complex number per pair."""
    q, k, v, o = (
        np.asarray(getattr(model, name)[...]) for name in ("q_pool_pdh", "k_pool_pdh", "v_pool_pdh", "o_pool_phd")
    )
    group, width = model.config.heads_per_unit, model.config.head_dim
    if block == "vo":
        left, right = (np.linalg.qr(rng.normal(size=(len(v), width, width)))[0] for _ in range(2))
        mix = left * rng.uniform(0.5, 2, (len(v), 1, width)) @ right
        undo = np.repeat(np.linalg.inv(mix), group, axis=0)
        return with_params(
            model,
            v_pool_pdh=jnp.asarray(np.einsum("pdh,phi->pdi", v, mix), jnp.float32),
            o_pool_phd=jnp.asarray(np.einsum("phi,pid->phd", undo, o), jnp.float32),
        )
    turn = rng.uniform(0.5, 2, (len(k), width // 2)) * np.exp(1j * rng.uniform(0, 6.28, (len(k), width // 2)))

    def times(pool: np.ndarray, factor: np.ndarray) -> Any:
        pairs = (pool[..., : width // 2] + 1j * pool[..., width // 2 :]) * factor[:, None]
        return jnp.asarray(np.concatenate([pairs.real, pairs.imag], axis=-1), jnp.float32)

    return with_params(model, k_pool_pdh=times(k, turn), q_pool_pdh=times(q, np.repeat(1 / turn.conj(), group, axis=0)))
