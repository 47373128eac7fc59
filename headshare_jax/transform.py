"""Sharing a model by a map, and undoing it."""

import jax
import jax.numpy as jnp

from headshare_jax import parameters
from headshare_jax.errors import HeadshareError
from headshare_jax.modeling import Llama
from headshare_jax.parameters import fingerprint, index_name
from headshare_jax.sharing import PROJECTIONS, SharingMap


def share(model: Llama, sharing: SharingMap, *, check_source: bool = True) -> Llama:
    """A model in which receivers use their donors' weights and dropped units none; pools keep only what is used.

    Args:
      model: a dense model; it is left as it is. Parameters that the map does not touch are the same arrays in both.
      sharing: who shares with whom, and who is dropped.
      check_source: compare the map's fingerprint with the model's weights, unless every receiver's are its donor's
        already; turn off for weights that were trained on.

    Raises:
      HeadshareError: the model already shares heads, or the map is for another model.
    """
    if model.sharing is not None:
        raise HeadshareError(
            "The model already shares heads; give a dense one. `headshare convert SRC DST --to hf` (in Python, "
            "`unshare`) writes every head out."
        )
    sharing.check_model(model.config)
    if check_source and sharing.source not in (None, fingerprint(model)) and not _is_tied(model, sharing):
        raise HeadshareError(
            "The map was made for other weights: its source fingerprint is not this model's; make a map for this model "
            'with a ratio, or set "source" to null in the map to use its pairs all the same.'
        )
    return _with_pools(model, sharing, {p: jnp.asarray(sharing.stored_slots(p)) for p in sharing.pooled})


def unshare(model: Llama) -> Llama:
    """The dense model that computes the same: receivers hold copies of their donors' weights, dropped units zeros."""
    slots = {p: getattr(model, index_name(p))[...].ravel() for p in PROJECTIONS}
    return _with_pools(model, None, slots)


def _is_tied(model: Llama, sharing: SharingMap) -> bool:
    """Whether receivers hold their donors' weights, and dropped units zeros, as in a dense export of a shared model."""
    pools = (
        (getattr(model, name)[...], parameters.pooled_projection(name))
        for name in parameters.parameter_names(model.config)
    )
    return all(
        bool(jnp.array_equal(rows, _rows(rows, jnp.asarray(sharing.slot_donor(projection).ravel()))))
        for rows, projection in pools
        if projection is not None and projection in sharing.pooled
    )


def _with_pools(model: Llama, sharing: SharingMap | None, rows: dict[str, jax.Array]) -> Llama:
    params = {}
    for name in parameters.parameter_names(model.config):
        value = getattr(model, name)[...]
        projection = parameters.pooled_projection(name)
        params[name] = _rows(value, rows[projection]) if projection in rows else value
    return Llama(model.config, params, sharing=sharing, compute_dtype=model.compute_dtype, remat=model.remat)


def _rows(pool: jax.Array, slots: jax.Array) -> jax.Array:
    """Rows of a pool; zeros where a slot is outside it, as those of dropped units are."""
    return pool.at[slots].get(mode="fill", fill_value=0, wrap_negative_indices=False)
