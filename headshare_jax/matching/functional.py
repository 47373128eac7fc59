"""Functional matching: what it costs when a unit runs on another unit's weights, or is dropped.

A unit J = G * H features wide is replaced by what a donor's q, k and v give on the receiver's own input, and the output
projection is refitted. Sums of products tell for all pairs what then is left of the error, and the gradients of the
model's predictions what that does to them.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from headshare_jax.calibration import streams
from headshare_jax.calibration.fisher import attention_gradients
from headshare_jax.calibration.journal import Journals, journal_of
from headshare_jax.calibration.streams import Weights
from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.matching.elimination import TINY, dropped_solution, pair_residuals, regular_inverse, shared_solution
from headshare_jax.model.mesh import rows_of
from headshare_jax.parameters import PARAMETERS, layered_names
from headshare_jax.sharing import finite
from headshare_jax.sharing.scores import MatchResult, best_donors
from headshare_jax.sharing.source import WeightSource, fingerprint
from headshare_jax.typed import check_fields, typed

# Float64 sums over tokens: the layer's own features [I, I], those with each donor's [C, I, J], each donor's [C, J, J].
Sums = tuple[np.ndarray, np.ndarray, np.ndarray]
# A layer's costs, float32: of dropping its units [U] by the name `drop`, of its pairs [U, L * U] by their tie.
Costs = dict[str, np.ndarray]


@dataclass(frozen=True)
class FunctionalSettings:
    """Where functional matching looks for donors.

    Attributes:
      windows: windows of the text, the first ones, that are looked at.
      span: number of earlier layers whose units are tried.
      same_layer: try the other units of the receiver's own layer too.
      ridge: lambda of the refit, above 0.
      prefilter: windows, of those, on which all donors are tried; the others see only the best.
      keep: how many of the best donors of each unit stay for the other windows, and for ties other than `qkv`.
      batch_tokens: tokens run at a time on a device.

    Raises:
      HeadshareError: an impossible setting.
    """

    windows: int = 8
    span: int = 5
    same_layer: bool = False
    ridge: float = 1e-2
    prefilter: int = 4
    keep: int = 3
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        check_fields(self)
        counts = (self.windows, self.span, self.prefilter, self.keep, self.batch_tokens)
        if min(counts) < 1 or not 0 < self.ridge < np.inf:
            raise HeadshareError(
                "windows, span, prefilter, keep and batch_tokens must be at least 1, and the ridge above 0."
            )


@typed
def match_functional(
    source: WeightSource,
    windows_wt: np.ndarray,
    settings: FunctionalSettings | None = None,
    *,
    ties: Sequence[str] = (),
    mesh: Mesh | None = None,
    journals: Journals | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MatchResult:
    """Scores the units of the nearest earlier layers as donors of every unit, by what they compute on a text.

    A receiver computes with its donor's q, k and v on its own layer's input in the dense model, and the layer's output
    projection is refitted. With g_t the gradient of the model's predictions by the layer's attention output at token t
    (`fisher.attention_gradients`) and e_t what is left of the error there, the pair's cost is half the mean of
    (g_t e_t)^2: by the Fisher information an estimate of the KL divergence of the predictions, in nats per token. The
    score is minus the cost, 0 where donor and receiver do the same. Dropping a unit is scored likewise.

    Candidates are ranked by sums of products alone, with w_t^2 e_t^T G e_t for (g_t e_t)^2: w_t as in a refit, and G =
    sum g g^T / sum |g|^2. Every unit's best are then scored token by token; the others keep their rank, as multiples of
    the best.

    Scores hold for one change in a layer, and for donors that keep their weights: choose with
    `sharing_map(..., chains="forbid")` or `budget_map`.

    Args:
      source: a dense model, or an opened checkpoint.
      windows_wt: int32 [W, T], the calibration text.
      settings: by default `FunctionalSettings()`.
      ties: subsets of `qkv` to score besides it, with every unit's best donors of `qkv`.
      mesh: devices of this process, over which windows and each layer's weights are cut; by default all.
      journals: where finished layers are kept, as the steps of a work `match`; those that are there already, for this
        model, text and settings, are not scored again.
      progress: called with the steps done and in all; a layer is three.

    Raises:
      HeadshareError: fewer than two layers, or no room for the streams or the journal.

    Examples:
      >>> scores = hs.match_functional(model, windows)
      >>> sharing = hs.sharing_map(scores, ratio=0.4, chains="forbid")
    """
    settings = settings or FunctionalSettings()
    config = source.config
    if config.num_layers < 2:
        raise HeadshareError("Matching needs at least two layers: donors come from earlier layers.")
    windows_wt, ties = windows_wt[: settings.windows], tuple(dict.fromkeys(("qkv", *ties)))
    journal = journal_of(journals, "match", {"model": source}, windows_wt, settings, ties=ties)
    steps = [f"layer-{layer}" for layer in range(config.num_layers)]
    costs = {layer: found for layer, step in enumerate(steps) if (found := journal.read(step)) is not None}
    if len(costs) < config.num_layers:
        mesh = mesh or streams.calibration_mesh()
        for layer, found in _match_layers(source, windows_wt, settings, ties, costs, mesh, progress):
            costs[layer] = found
            journal.write(steps[layer], found)
    scores = {name: -np.concatenate([costs[layer][name] for layer in sorted(costs)]) for name in ("drop", *ties)}
    drop_score, qkv_scores = scores.pop("drop"), scores.pop("qkv")
    return MatchResult(
        *best_donors(qkv_scores, config.num_kv_heads),
        match="functional",
        heads_per_unit=config.heads_per_unit,
        scores=qkv_scores,
        tie_scores=scores,
        drop_score=drop_score.reshape(config.num_layers, -1),
        source=fingerprint(source),
    )


def _match_layers(
    source: WeightSource,
    windows_wt: np.ndarray,
    settings: FunctionalSettings,
    ties: tuple[str, ...],
    finished: Container[int],
    mesh: Mesh,
    progress: Callable[[int, int], None],
) -> Iterator[tuple[int, Costs]]:
    """Costs of one layer after another, but for those that are finished."""
    layers = source.config.num_layers
    gradients = attention_gradients(
        source,
        windows_wt,
        batch_tokens=settings.batch_tokens,
        mesh=mesh,
        progress=lambda done, total: progress(done, total + layers),
    )
    near: dict[int, Weights] = {}
    parts = streams.batches(slice(0, len(windows_wt)), settings.batch_tokens, windows_wt.shape[1], rows_of(mesh))
    with gradients as gradients_lwtd, streams.embedded(source, windows_wt, parts, mesh) as stream:
        for layer in range(layers):
            weights = streams.layer_weights(source, layer, mesh)
            near = {below: near[below] for below in range(max(0, layer - settings.span), layer)} | {layer: weights}
            if layer not in finished:
                scorer = _LayerScorer(source.config, near, stream, gradients_lwtd[layer], settings)
                yield layer, scorer.layer_costs(ties)
            for part in parts:
                stream[part] = streams.through_layer(source.config, weights, stream[part], mesh)
            progress(2 * layers + layer + 1, 3 * layers)


class _LayerScorer:
    """Costs of one layer's units, from sums over the windows of its input."""

    def __init__(
        self,
        config: LlamaConfig,
        near: dict[int, Weights],
        stream: streams.Stream,
        gradients_wtd: np.ndarray,
        settings: FunctionalSettings,
    ):
        self.config, self.near, self.stream, self.settings, self.mesh = config, near, stream, settings, stream.mesh
        self.windows, self.seq_len = gradients_wtd.shape[:2]
        self.gradients = streams.Stream(gradients_wtd, stream.windows, stream.mesh)
        self.layer, self.units = max(near), config.num_kv_heads
        # Flat indices of the layer's units.
        self.own = np.arange(self.layer * self.units, (self.layer + 1) * self.units)
        self.parts = self._batches(slice(0, self.windows))
        finite.check_computed(f"Gradients of the model's predictions by layer {self.layer}", gradients_wtd)
        g_md = gradients_wtd.reshape(-1, config.hidden_size)
        metric_dd = np.asarray(g_md.T @ g_md, np.float64) / max(np.sum(np.square(g_md)), TINY)
        o_id = np.asarray(streams.output_weight(near[self.layer], "attention"), np.float64)
        self.outer_ii = o_id @ metric_dd @ o_id.T

    def layer_costs(self, ties: Sequence[str]) -> Costs:
        """Costs of all units, infinite for pairs that are not tried; `qkv` is among the ties."""
        donors, sums = self._kept_donors()
        # What is left when q, k and v are shared; infinite where a unit is no donor of the layer.
        rank_us = np.full((self.units, self.config.num_units), np.inf)
        wanted_uc = (self.own[:, None] != donors) & (self.settings.same_layer | (donors < self.own[0]))
        rank_us[:, donors] = pair_residuals(*sums, self.outer_ii, self.settings.ridge, wanted_uc)
        # The pairs with the least rank, up to `keep` for each unit, its best first.
        best_uk = np.argsort(rank_us, axis=1, kind="stable")[:, : self.settings.keep]
        found_uk = np.isfinite(np.take_along_axis(rank_us, best_uk, axis=1))
        rows, best = np.nonzero(found_uk)[0], best_uk[found_uk]
        receivers, places = self.own[rows], np.searchsorted(donors, best)
        drop, costs = self._costs(receivers, best, "qkv", (sums[0], sums[1][places], sums[2][places]))
        share = {tie: np.full(rank_us.shape, np.inf, np.float32) for tie in ties}
        for row, place in zip(*np.unique(rows, return_index=True), strict=True):
            share["qkv"][row] = rank_us[row] * (costs[place] / max(rank_us[row, best[place]], TINY))
        share["qkv"][rows, best] = costs
        for tie in share.keys() - {"qkv"} if len(receivers) else ():
            sums = self._sums(receivers, best, tie, self.parts)
            share[tie][rows, best] = self._costs(receivers, best, tie, sums)[1]
        return {"drop": drop.astype(np.float32), **share}

    def _kept_donors(self) -> tuple[np.ndarray, Sums]:
        """Donors worth trying on all windows, flat and ascending, and the sums over all windows; never none."""
        first = min(self.settings.prefilter, self.windows)
        donors = np.arange(min(self.near) * self.units, (self.layer + 1) * self.units)
        if not self.settings.same_layer and len(self.near) > 1:
            donors = donors[: -self.units]
        sums = self._sums(donors, donors, "qkv", self._batches(slice(0, first)))
        if first == self.windows:
            return donors, sums
        residual_uc = pair_residuals(*sums, self.outer_ii, self.settings.ridge)
        kept = _promising(residual_uc, self.settings.keep * self.units)
        more = self._sums(donors[kept], donors[kept], "qkv", self._batches(slice(first, self.windows)))
        return donors[kept], (sums[0] + more[0], sums[1][kept] + more[1], sums[2][kept] + more[2])

    def _costs(self, receivers: np.ndarray, donors: np.ndarray, tie: str, sums: Sums) -> tuple[np.ndarray, np.ndarray]:
        """Costs [U] of dropping each unit, and [pairs] of sharing, from the pairs' sums over all windows."""
        gram, cross_cij, own_cjj = sums
        inverse, rho = regular_inverse(gram, self.settings.ridge)
        size = len(gram) // self.units
        rows = [slice(unit * size, (unit + 1) * size) for unit in range(self.units)]
        solutions = [dropped_solution(inverse, rows_of_unit) for rows_of_unit in rows]
        for receiver, cross_ij, own_jj in zip(receivers, cross_cij, own_cjj, strict=True):
            solutions.append(shared_solution(inverse, rho, cross_ij, own_jj, rows[receiver - self.own[0]]))
        # A dropped unit is one whose donor gives zeros.
        receivers, donors = np.concatenate([self.own, receivers]), np.concatenate([self.own, donors])
        shared_c = np.arange(len(donors)) >= self.units
        candidates = self._candidates(receivers, donors, tie)
        solution_cij = jnp.asarray(np.stack(solutions), jnp.float32)
        total = np.zeros(len(donors))
        unit_c, weights = receivers - self.own[0], self.near[self.layer]
        for part in self.parts:
            states = self.stream[part], self.gradients[part]
            more = _squares(self.config, weights, candidates, *states, unit_c, solution_cij, shared_c)
            total += np.asarray(more, np.float64)
        finite.check_computed(f"Costs of the units of layer {self.layer}", total)
        costs = total / (2 * self.windows * self.seq_len)
        return costs[: self.units], costs[self.units :]

    def _sums(self, receivers: np.ndarray, donors: np.ndarray, tie: str, parts: Sequence[slice]) -> Sums:
        """Sums over some windows, of units with their donors' weights of `tie` and their receivers' of the rest."""
        candidates, width = self._candidates(receivers, donors, tie), len(self.outer_ii)
        count, size = len(donors), width // self.units
        total = (np.zeros((width, width)), np.zeros((count, width, size)), np.zeros((count, size, size)))
        for part in parts:
            there_b = streams.there(part, self.mesh)
            of_batch = batch_sums(self.config, self.near[self.layer], candidates, self.stream[part], there_b)
            for sums, more in zip(total, of_batch, strict=True):
                sums += np.asarray(more, np.float64)
        finite.check_computed(f"Sums over the calibration text in the attention of layer {self.layer}", *total)
        return total

    def _candidates(self, receivers: np.ndarray, donors: np.ndarray, tie: str) -> Weights:
        """Units side by side as if they were one layer's, with the donors' weights of `tie`."""

        def of_unit(name: str, flat: int) -> jax.Array:
            layer, unit = divmod(flat, self.units)
            pool = self.near[layer][name]
            return pool.reshape(self.units, -1, *pool.shape[1:])[unit]

        candidates = {}
        for name in layered_names(self.config):
            projection = PARAMETERS[name].pool
            if projection is not None and projection in "qkv":
                users = donors if projection in tie else receivers
                candidates[name] = jnp.concatenate([of_unit(name, int(flat)) for flat in users])
        return candidates

    def _batches(self, windows: slice) -> list[slice]:
        return streams.batches(windows, self.settings.batch_tokens, self.seq_len, rows_of(self.mesh))


@partial(jax.jit, static_argnames="config")
def batch_sums(
    config: LlamaConfig, weights: Weights, donors: Weights, x_btd: jax.Array, there_b: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`Sums` of a batch, float32, weighted as a refit weights tokens; `there_b` is as of `streams.there`."""
    with jax.default_matmul_precision("highest"):
        w_bt1 = streams.residual_weights(streams.advance(config, weights, x_btd, "attention"))
        w_m1 = (w_bt1 * there_b[:, None, None]).reshape(-1, 1)
        h_mi = w_m1 * streams.window_heads(config, weights, x_btd).reshape(len(w_m1), -1)
        g_mcj = w_m1[..., None] * _donor_heads(config, weights, donors, x_btd)
        cross_cij = jnp.einsum("mi,mcj->cij", h_mi, g_mcj)
        return h_mi.T @ h_mi, cross_cij, jnp.einsum("mci,mcj->cij", g_mcj, g_mcj)


@partial(jax.jit, static_argnames="config")
def _squares(
    config: LlamaConfig,
    weights: Weights,
    candidates: Weights,
    x_btd: jax.Array,
    gradient_btd: jax.Array,
    unit_c: jax.Array,
    solution_cij: jax.Array,
    shared_c: jax.Array,
) -> jax.Array:
    """Sums over tokens of (g e)^2 of every candidate, float32 [C]; e is the error that the refit leaves."""
    with jax.default_matmul_precision("highest"):
        h_mi = streams.window_heads(config, weights, x_btd).reshape(-1, solution_cij.shape[1])
        donor_mcj, size = _donor_heads(config, weights, candidates, x_btd), solution_cij.shape[2]
        o_ujd = streams.output_weight(weights, "attention").reshape(-1, size, x_btd.shape[-1])
        wanted_muj = jnp.einsum("md,ujd->muj", gradient_btd.reshape(len(h_mi), -1), o_ujd)

        def of_candidate(candidate: tuple[jax.Array, ...]) -> jax.Array:
            unit, solution_ij, shared, donor_mj = candidate
            donor_mj = donor_mj * shared.astype(donor_mj.dtype)
            start = (jnp.int32(0), unit * size)
            own_mj = jax.lax.dynamic_slice(h_mi, start, donor_mj.shape)
            changed_mi = jax.lax.dynamic_update_slice(h_mi, donor_mj, start)
            left_mj = own_mj - donor_mj - changed_mi @ solution_ij
            along_m = jnp.sum(left_mj * jax.lax.dynamic_index_in_dim(wanted_muj, unit, axis=1, keepdims=False), axis=1)
            return jnp.sum(jnp.square(along_m))

        rows = (jnp.asarray(unit_c, jnp.int32), solution_cij, shared_c, donor_mcj.swapaxes(0, 1))
        return jax.lax.map(of_candidate, rows)


def _donor_heads(config: LlamaConfig, weights: Weights, units: Weights, x_btd: jax.Array) -> jax.Array:
    """Head outputs [M, C, J] of units that read the stream as the layer's own do."""
    heads_btnh = streams.window_heads(config, weights | units, x_btd)
    return heads_btnh.reshape(x_btd.shape[0] * x_btd.shape[1], units["k_pool_pdh"].shape[0], -1)


def _promising(residual_uc: np.ndarray, count: int) -> np.ndarray:
    """The donors that rank highest for any unit, ascending: a fixed number, so that all layers compile once."""
    rank_uc = np.argsort(np.argsort(residual_uc, axis=1, kind="stable"), axis=1, kind="stable")
    return np.sort(np.argsort(rank_uc.min(axis=0), kind="stable")[:count])
