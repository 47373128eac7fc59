"""Repairing a shared model in closed form: output weights are fitted to the dense model on calibration text.

The dense and the compressed model are walked side by side. A layer consists of two blocks, attention and MLP, and each
adds H W + b to the residual stream, H [M, I] being what its output weight W [I, D] multiplies. On the compressed
model's own input x', W is fitted to what brings its stream back to the dense one.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from headshare_jax.calibration import streams
from headshare_jax.calibration.journal import Journals, journal_of
from headshare_jax.calibration.streams import BLOCKS, OUTPUT
from headshare_jax.errors import HeadshareError
from headshare_jax.fit.moments import Moments
from headshare_jax.fit.walk import FIT, WEIGHT, Step, Walk
from headshare_jax.model.llama import Llama
from headshare_jax.model.mesh import batch_sharding
from headshare_jax.model.spread import slice_sharding
from headshare_jax.parameters import PARAMETERS, layered_names, parameter_names
from headshare_jax.sharing import finite
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.source import WeightSource, pool_index, slots_per_head, stored_shape
from headshare_jax.sharing.view import ReplacedView, SharedView, View
from headshare_jax.sharing.widths import Widths
from headshare_jax.typed import check_fields, typed

SCOPES = ("receivers", "attention", "all")


@dataclass(frozen=True)
class RefitSettings:
    """How output weights are fitted.

    Attributes:
      scope: which output weights: `receivers`, those of attention in layers with receivers, dropped or slim units;
        `attention`, those of attention in the first such layer and all above it; `all`, those of its MLPs too.
      ridges: lambda, of which each block takes what is best on held-out text; times the mean square of a feature.
      drifts: beta, likewise: the part of the distance between the streams that a block is to make good.
      held_out: part of the windows, the last ones, that choose lambda and beta; the weights are then fitted to all.
      batch_tokens: tokens run at a time on a device.
    """

    scope: str = "receivers"
    ridges: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    drifts: tuple[float, ...] = (0.0, 0.5, 1.0)
    held_out: float = 1 / 6
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        check_fields(self)
        if self.scope not in SCOPES:
            raise HeadshareError(f"The scope of a refit must be one of {', '.join(SCOPES)}, not {self.scope!r}.")
        if not self.ridges or not all(0 <= ridge < np.inf for ridge in self.ridges):
            raise HeadshareError(f"The ridges must be numbers of at least 0, unlike {self.ridges}.")
        if not self.drifts or not all(0 <= drift <= 1 for drift in self.drifts):
            raise HeadshareError(f"The drifts must lie between 0 and 1, unlike {self.drifts}.")
        if not 0 < self.held_out < 1 or self.batch_tokens < 1:
            raise HeadshareError(
                f"held_out ({self.held_out}) must lie between 0 and 1, and batch_tokens ({self.batch_tokens}) be "
                "positive."
            )


@dataclass(frozen=True)
class BlockFit:
    """What fitting one block did.

    Errors are distances between the two streams behind the block, relative to the dense stream's norm, as root mean
    square over tokens.

    Attributes:
      layer: the block's layer.
      block: `attention` or `mlp`.
      rows: I, rows of the output weight.
      fitted_rows: rows that are stored and used by no other head, so that they could be fitted.
      error_before: on all calibration text, before the fit.
      error_after: the same after it.
      held_out_before: on the held-out part of the text, before the fit.
      held_out_after: the same after a fit to the rest.
      ridge: lambda that was chosen; None where the weights stay as they were.
      drift: beta, likewise.
      raised: lambda had to be raised for the system to be solvable.
    """

    layer: int
    block: str
    rows: int
    fitted_rows: int
    error_before: float
    error_after: float
    held_out_before: float
    held_out_after: float
    ridge: float | None
    drift: float | None
    raised: bool


@dataclass(frozen=True)
class RefitReport:
    """What a refit did, block by block, in the order of the walk."""

    blocks: tuple[BlockFit, ...]
    windows: int
    seq_len: int
    settings: RefitSettings


@typed
def refit(
    dense: WeightSource,
    shared: WeightSource,
    windows_wt: np.ndarray,
    settings: RefitSettings | None = None,
    *,
    mesh: Mesh | None = None,
    journals: Journals | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[WeightSource, RefitReport]:
    """Fits the output weights of a shared model to the dense one.

    Per block, in order: min over W of sum over tokens of w^2 ||H W - t||^2 + rho ||W - W_0||^2 with t = y + beta
    (x - x'), y what the dense block adds to its stream, x and x' the two streams before it, and w the reciprocal of
    the dense stream's norm behind it, which is what the next norm divides by. Weights that do not lower the error on
    held-out text stay as they were. Rows of the output projection that several heads use are never fitted, and dropped
    heads have none. Below the first layer that the map changes both models are the same, and nothing is fitted.

    Memory of a device: its part of one layer's parameters in both models, the layer's sums of products, and a batch of
    tokens. The host has the sums in float64, [I, I] and [2, I, D]; streams are in temporary files. A `Llama` comes back
    if one was given, and on a mesh of several processes; else a view of the shared source in which the fitted weights,
    alone in memory, take the place of its own.

    Args:
      dense: the model to come close to.
      shared: the model to repair, such as a `SharedView` of the dense one; it is left as it is.
      windows_wt: int32 [W, T], the calibration text.
      settings: by default `RefitSettings()`.
      mesh: devices, over which windows and each layer's weights are cut; by default all of this process. All processes
        of the mesh call it together: only the first one solves, and the fitted weights lie on the mesh.
      journals: where finished blocks are kept, as the steps of a work `refit`; those that are there already, for these
        models, this text and these settings, are not fitted again.
      progress: called with the layers done and in all.

    Raises:
      HeadshareError: too few windows to hold any out, a dense model that the shared one was not made of, or no room for
        the streams or the journal.

    Examples:
      >>> repaired, report = hs.refit(model, shared, windows)
      >>> all(fit.error_after <= fit.error_before for fit in report.blocks)
      True
    """
    return watched_refit(
        dense, shared, windows_wt, settings or RefitSettings(), mesh=mesh, journals=journals, progress=progress
    )


def watched_refit(
    dense: WeightSource,
    shared: WeightSource,
    windows_wt: np.ndarray,
    settings: RefitSettings,
    *,
    mesh: Mesh | None = None,
    journals: Journals | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    watch: Callable[[int, streams.Stream], None] = lambda layer, stream: None,
) -> tuple[WeightSource, RefitReport]:
    """`refit`; `watch` is called with what each layer of the fitted model reads, and in the end what the last gives."""
    if len(windows_wt) < 2:
        raise HeadshareError(
            f"A refit needs at least two windows of text, one of them to hold out, so {2 * windows_wt.shape[1]} tokens "
            f"at {windows_wt.shape[1]} a window; give more tokens or shorter windows."
        )
    if shared.sharing is None or dense.config != shared.config:
        raise HeadshareError("A refit needs a shared model and the dense model that it was made from.")
    _check_origin(dense, shared, shared.sharing)
    assert shared.sharing.unit_tie is not None
    journal = journal_of(
        journals,
        "refit",
        {"model": dense, "shared model": shared},
        windows_wt,
        settings,
        types={name: str(shared.dtype(name)) for name in OUTPUT.values()},
        donor=shared.sharing.donor.tolist(),
        tie=shared.sharing.unit_tie.tolist(),
        **_told(shared.sharing.widths),
    )
    fitted: dict[tuple[str, int], Any] = {}
    blocks: list[BlockFit] = []
    with ExitStack() as files:
        mesh = mesh or streams.calibration_mesh()
        walk = Walk(dense, windows_wt, settings.held_out, settings.batch_tokens, mesh, files)
        for layer in range(dense.config.num_layers):
            changed = bool((shared.sharing.receives | shared.sharing.dropped | shared.sharing.slim)[layer].any())
            walk.enter(layer, streams.layer_weights(shared, layer, walk.mesh) if changed or walk.parted else None)
            watch(layer, walk.compressed_wtd)
            for block in BLOCKS:
                if walk.parted and _in_scope(settings.scope, block, changed):
                    name = f"layer-{layer}-{block}"
                    step = journal.read(name)
                    if step is None:
                        step = _fit_block(walk, shared, layer, block, settings)
                        journal.write(name, step)
                    else:
                        walk.advance_dense(block)
                    if WEIGHT in step:
                        fitted[OUTPUT[block], layer] = step[WEIGHT]
                        walk.replace(block, step[WEIGHT])
                    blocks.append(BlockFit(**json.loads(step[FIT].tobytes())))
                else:
                    walk.advance_dense(block)
                if walk.parted:
                    walk.advance_compressed(block)
            progress(layer + 1, dense.config.num_layers)
        watch(dense.config.num_layers, walk.compressed_wtd)
    report = RefitReport(tuple(blocks), walk.windows, walk.seq_len, settings)
    if walk.several:
        return _with_fitted(shared, fitted, walk.mesh), report
    view = ReplacedView(shared, fitted)
    return Llama.of(view, **shared.settings) if isinstance(shared, Llama) else view, report


def _told(widths: Widths | None) -> dict[str, Any]:
    """Widths as a journal tells a refit by them."""
    return {} if widths is None else {"rank": widths.rank.tolist(), "pairs": widths.pairs.astype(int).tolist()}


def _with_fitted(shared: WeightSource, fitted: Mapping[tuple[str, int], jax.Array], mesh: Mesh) -> Llama:
    """The refitted model of several processes on their mesh; what is there already and is not fitted is not copied."""
    base = shared
    while isinstance(base, View):
        base = base.base
    model = Llama.of(shared, mesh=None if isinstance(base, Llama) else mesh, batch_sharding=batch_sharding(mesh))
    return Llama.of(ReplacedView(model, fitted), **model.settings)


def _check_origin(dense: WeightSource, shared: WeightSource, sharing: SharingMap) -> None:
    """Raises HeadshareError unless what is never fitted of the shared model is the dense one's."""
    if isinstance(shared, SharedView) and _below_slim(shared.base) is dense:
        return
    expected, layered = SharedView(dense, sharing, check_source=False), layered_names(dense.config)
    for name in parameter_names(dense.config):
        if name in OUTPUT.values():
            continue
        for layer in range(dense.config.num_layers) if name in layered else (None,):
            found = shared.read(name, layer)
            made = expected.read(name, layer).astype(found.dtype)
            if PARAMETERS[name].pool == "v" and layer is not None:
                # The values of slim units are written anew.
                found, made = found[~sharing.slim[layer]], made[~sharing.slim[layer]]
            if not np.array_equal(found, made, equal_nan=True):
                raise HeadshareError(
                    f"The shared model was not made of this dense model: they differ in {name}"
                    f"{'' if layer is None else f' of layer {layer}'}; give the one that it was made of."
                )


def _below_slim(source: WeightSource) -> WeightSource:
    """What lies below new values and outputs, as slimming writes them."""
    while isinstance(source, ReplacedView) and all(PARAMETERS[name].pool in ("v", "o") for name, _ in source.values):
        source = source.base
    return source


def _in_scope(scope: str, block: str, changed: bool) -> bool:
    return scope == "all" or (block == "attention" and (changed or scope == "attention"))


def fit_weight(
    fit: Moments, held_out: Moments, rows: np.ndarray, layer: int, block: str, settings: RefitSettings
) -> tuple[np.ndarray, BlockFit]:
    """The change of an output weight, float64 [I, D], zero outside `rows`; and what it does to the errors."""
    own, judge = fit.of_rows(rows), held_out.of_rows(rows)
    everything = own + judge
    error_before = error_after = everything.error()
    before = best = judge.error()
    change: np.ndarray | float = 0.0
    chosen: tuple[float, float] | None = None
    for ridge in settings.ridges if len(rows) else ():
        for drift, found in zip(settings.drifts, own.solutions(ridge, settings.drifts)[0], strict=True):
            error = judge.error(found.change)
            if error < best:
                best, chosen = error, (ridge, drift)
    raised = False
    if chosen is not None:
        (found,), used = everything.solutions(chosen[0], chosen[1:])
        raised = bool(used > chosen[0])
        if found.error < error_before:
            change, error_after, chosen = found.change, found.error, (float(used), float(chosen[1]))
        else:
            best, chosen = before, None
    whole = np.zeros_like(fit.cross[0])
    whole[rows] = change
    return whole, BlockFit(
        layer=layer,
        block=block,
        rows=len(whole),
        fitted_rows=len(rows),
        error_before=error_before,
        error_after=error_after,
        held_out_before=before,
        held_out_after=best,
        ridge=chosen and chosen[0],
        drift=chosen and chosen[1],
        raised=raised,
    )


def _fit_block(walk: Walk, shared: WeightSource, layer: int, block: str, settings: RefitSettings) -> Step:
    """What a journal keeps of a block, which is fitted for it; the dense stream is then behind the block."""
    fit_to, held_out = (walk.moments(block, parts) for parts in (walk.fit_to, walk.held_out))
    name, dtype = OUTPUT[block], shared.dtype(OUTPUT[block])
    before = streams.on_host(walk.compressed[name], walk.mesh).astype(dtype)
    like = jax.ShapeDtypeStruct(before.shape, dtype, sharding=slice_sharding(walk.mesh, shared.config, name))
    if jax.process_index() != walk.mesh.devices.flat[0].process_index:
        return walk.of_first({}, like)
    change, fit = fit_weight(fit_to, held_out, _free_rows(shared, layer, block), layer, block, settings)
    step: Step = {FIT: np.frombuffer(json.dumps(asdict(fit)).encode(), np.uint8)}
    if fit.drift is not None:
        with np.errstate(over="ignore"):
            fitted = (before.astype(np.float64) + change.reshape(before.shape)).astype(before.dtype)
        if not finite.is_finite(fitted):
            raise finite.NotFinite(
                f"The refit of {finite.slice_name(name, layer)} does not fit {before.dtype}, which makes "
                f"{finite.said(fitted)} of it; convert the model to float32 or bfloat16 first."
            )
        step[WEIGHT] = fitted
    return walk.of_first(step, like)


def _free_rows(shared: WeightSource, layer: int, block: str) -> np.ndarray:
    """Rows of the block's output weight that are stored and that nothing else uses, ascending."""
    config = shared.config
    if block == "mlp":
        return np.arange(config.intermediate_size)
    index_ln = pool_index(config, "o", shared.sharing)
    users = np.bincount(index_ln.ravel())
    stored_n = index_ln[layer] < stored_shape(config, OUTPUT[block], shared.sharing)[0]
    free_n = (users[index_ln[layer]] == 1) & stored_n
    return np.flatnonzero(np.repeat(free_n, config.head_dim // slots_per_head(shared.sharing)))
