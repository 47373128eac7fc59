"""Sharing a model in memory by a map, and undoing it."""

from headshare_jax.model.llama import Llama
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.view import DenseView, SharedView
from headshare_jax.typed import typed


@typed
def share(model: Llama, sharing: SharingMap, *, check_source: bool = True) -> Llama:
    """A model in which receivers use their donors' weights and dropped units none; pools keep only what is used.

    Args:
      model: a dense model; it is left as it is. Parameters that the map does not touch are the same arrays in both.
      sharing: who shares with whom, and who is dropped.
      check_source: as for `SharedView`, which does the same to a model that is not in memory.

    Raises:
      HeadshareError: the model already shares heads, or the map is for another model.

    Examples:
      >>> shared = hs.share(model, sharing)
      >>> shared.nbytes < model.nbytes
      True
    """
    return Llama.of(SharedView(model, sharing, check_source=check_source), **model.settings)


def unshare(model: Llama) -> Llama:
    """The dense model that computes the same: receivers hold copies of their donors' weights, dropped units zeros.

    Examples:
      >>> hs.unshare(shared).nbytes == model.nbytes
      True
    """
    return Llama.of(DenseView(model), **model.settings)
