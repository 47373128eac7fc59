"""Functional matching: what it costs when a unit runs on another unit's weights, or is dropped.

A unit J = G * H features wide is replaced by what a donor's q, k and v give on the receiver's own input, and the output
projection is refitted. Sums of products tell for all pairs what then is left of the error, and the gradients of the
model's predictions what that does to them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from headshare_jax.calibration.fisher import attention_gradients
from headshare_jax.calibration.journal import Journal, Journals, NoJournal
from headshare_jax.calibration.streams import (
    Weights,
    advance,
    batches,
    calibration_mesh,
    cut,
    embedded,
    layer_weights,
    on_disk,
    output_weight,
    residual_weights,
    through_layer,
    window_heads,
)
from headshare_jax.calibration.windows import tokens_digest
from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.matching.elimination import TINY, dropped_solution, pair_residuals, regular_inverse, shared_solution
from headshare_jax.parameters import PARAMETERS
from headshare_jax.sharing.scores import MatchResult, best_donors
from headshare_jax.sharing.source import WeightSource, fingerprint, whole_fingerprint

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
        counts = (self.windows, self.span, self.prefilter, self.keep, self.batch_tokens)
        if min(counts) < 1 or not 0 < self.ridge < np.inf:
            raise HeadshareError(
                "windows, span, prefilter, keep and batch_tokens must be at least 1, and the ridge above 0."
            )


def match_functional(
    source: WeightSource,
    windows_wt: np.ndarray,
    settings: FunctionalSettings | None = None,
    *,
    ties: Sequence[str] = (),
    devices: Sequence[jax.Device] | None = None,
    journals: Journals | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MatchResult:
    """Scores the units of the nearest earlier layers as donors of every unit, by what they compute on a text.

    A receiver computes with its donor's q, k and v on its own layer's input in the dense model, and the layer's output
    projection is refitted. With g_t the gradient of the model's predictions by the layer's attention output at token t
    (`calibration.attention_gradients`) and e_t what is left of the error there, the pair's cost is half the mean of
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
      devices: what the windows are cut among, by default all devices of this process.
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
    journal = _journal(journals, source, windows_wt, settings, ties)
    found = {layer: journal.read(_step(layer)) for layer in range(config.num_layers)}
    finished = {layer: costs for layer, costs in found.items() if costs is not None}
    if len(finished) < config.num_layers:
        mesh = calibration_mesh(devices)
        finished |= _match_layers(source, windows_wt, settings, ties, finished, mesh, journal, progress)
    scores = {
        name: -np.concatenate([finished[layer][name] for layer in range(config.num_layers)]) for name in ("drop", *ties)
    }
    drop_score = scores.pop("drop").reshape(config.num_layers, -1)
    return _result(scores.pop("qkv"), scores, drop_score, config, fingerprint(source))


def _journal(
    journals: Journals | None,
    source: WeightSource,
    windows_wt: np.ndarray,
    settings: FunctionalSettings,
    ties: tuple[str, ...],
) -> Journal:
    if journals is None:
        return NoJournal()
    key = {"model": whole_fingerprint(source), "text": tokens_digest(windows_wt)}
    return journals.of("match", key | {"settings": asdict(settings), "ties": ties})


def _step(layer: int) -> str:
    return f"layer-{layer}"


def _match_layers(
    source: WeightSource,
    windows_wt: np.ndarray,
    settings: FunctionalSettings,
    ties: tuple[str, ...],
    finished: Mapping[int, Costs],
    mesh: Mesh,
    journal: Journal,
    progress: Callable[[int, int], None],
) -> dict[int, Costs]:
    """Costs of all layers but those that are finished; each goes to the journal as soon as it is there."""
    config, layers = source.config, source.config.num_layers
    found: dict[int, Costs] = {}
    near: dict[int, Weights] = {}
    with ExitStack() as files:
        gradients_lwtd = files.enter_context(
            attention_gradients(
                source,
                windows_wt,
                batch_tokens=settings.batch_tokens,
                mesh=mesh,
                progress=lambda done, total: progress(done, total + layers),
            )
        )
        x_wtd = files.enter_context(on_disk(embedded(source, windows_wt)))
        for layer in range(layers):
            weights = layer_weights(source, layer, mesh)
            near = {below: near[below] for below in range(max(0, layer - settings.span), layer)} | {layer: weights}
            if layer not in finished:
                scorer = _LayerScorer(config, near, x_wtd, gradients_lwtd[layer], settings, mesh)
                found[layer] = scorer.layer_costs(ties)
                journal.write(_step(layer), found[layer])
            for part in batches(slice(0, len(x_wtd)), settings.batch_tokens, x_wtd.shape[1], mesh.size):
                x_wtd[part] = through_layer(config, weights, cut(x_wtd[part], mesh))
            progress(2 * layers + layer + 1, 3 * layers)
    return found


def _result(
    scores: np.ndarray, tie_scores: Mapping[str, np.ndarray], drop_score: np.ndarray, config: LlamaConfig, source: str
) -> MatchResult:
    return MatchResult(
        *best_donors(scores, config.num_kv_heads),
        match="functional",
        heads_per_unit=config.heads_per_unit,
        scores=scores,
        tie_scores=tie_scores,
        drop_score=drop_score,
        source=source,
    )


class _LayerScorer:
    """Costs of one layer's units, from sums over the windows of its input."""

    def __init__(
        self,
        config: LlamaConfig,
        near: dict[int, Weights],
        x_wtd: np.ndarray,
        gradients_wtd: np.ndarray,
        settings: FunctionalSettings,
        mesh: Mesh,
    ):
        self.config, self.near, self.x_wtd, self.settings, self.mesh = config, near, x_wtd, settings, mesh
        self.layer, self.first_layer = max(near), min(near)
        self.gradients_wtd = gradients_wtd
        g_md = gradients_wtd.reshape(-1, config.hidden_size)
        metric_dd = np.asarray(g_md.T @ g_md, np.float64) / max(np.sum(np.square(g_md)), TINY)
        o_id = np.asarray(output_weight(near[self.layer], "attention"), np.float64)
        self.outer_ii = o_id @ metric_dd @ o_id.T

    def own_units(self) -> np.ndarray:
        """Flat indices of the layer's units."""
        units = self.config.num_kv_heads
        return np.arange(self.layer * units, (self.layer + 1) * units)

    def layer_costs(self, ties: Sequence[str]) -> Costs:
        """Costs of all units, infinite for pairs that are not tried; `qkv` is among the ties."""
        own, (donors, sums) = self.own_units(), self.kept_donors()
        rank_us = np.full((len(own), self.config.num_units), np.inf)
        rank_us[:, donors] = self.ranks(donors, sums)
        receivers, best = self.best_pairs(rank_us)
        places, rows = np.searchsorted(donors, best), receivers - own[0]
        drop, costs = self.costs(receivers, best, "qkv", (sums[0], sums[1][places], sums[2][places]))
        share = {tie: np.full(rank_us.shape, np.inf, np.float32) for tie in ties}
        for row, place in {row: place for place, row in reversed(list(enumerate(rows)))}.items():
            share["qkv"][row] = rank_us[row] * (costs[place] / max(rank_us[row, best[place]], TINY))
        share["qkv"][rows, best] = costs
        for tie in share.keys() - {"qkv"} if len(receivers) else ():
            sums = self.sums(receivers, best, tie, self.all_windows())
            share[tie][rows, best] = self.costs(receivers, best, tie, sums)[1]
        return {"drop": drop.astype(np.float32), **share}

    def all_windows(self) -> list[slice]:
        """Batches of all windows."""
        return self._batches(slice(0, len(self.x_wtd)))

    def kept_donors(self) -> tuple[np.ndarray, Sums]:
        """Donors worth trying on all windows, flat and ascending, and the sums over all windows; never none."""
        units, first = self.config.num_kv_heads, min(self.settings.prefilter, len(self.x_wtd))
        donors = np.arange(self.first_layer * units, (self.layer + 1) * units)
        if not self.settings.same_layer and self.first_layer < self.layer:
            donors = donors[:-units]
        sums = self.sums(donors, donors, "qkv", self._batches(slice(0, first)))
        if first == len(self.x_wtd):
            return donors, sums
        kept = _promising(pair_residuals(*sums, self.outer_ii, self.settings.ridge), self.settings.keep * units)
        more = self.sums(donors[kept], donors[kept], "qkv", self._batches(slice(first, len(self.x_wtd))))
        return donors[kept], (sums[0] + more[0], sums[1][kept] + more[1], sums[2][kept] + more[2])

    def ranks(self, donors: np.ndarray, sums: Sums) -> np.ndarray:
        """What is left when q, k and v are shared, [U, donors]; infinite where a unit is no donor of the layer."""
        below_c = donors // self.config.num_kv_heads < self.layer
        another_uc = self.own_units()[:, None] != donors[None, :]
        wanted_uc = another_uc & (below_c | self.settings.same_layer)[None, :]
        return pair_residuals(*sums, self.outer_ii, self.settings.ridge, wanted_uc)

    def best_pairs(self, rank_us: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Flat receivers and donors of the pairs with the least rank, up to `keep` for each unit, its best first."""
        best_uk = np.argsort(rank_us, axis=1, kind="stable")[:, : self.settings.keep]
        found = np.isfinite(np.take_along_axis(rank_us, best_uk, axis=1))
        return np.repeat(self.own_units(), found.sum(axis=1)), best_uk[found]

    def costs(self, receivers: np.ndarray, donors: np.ndarray, tie: str, sums: Sums) -> tuple[np.ndarray, np.ndarray]:
        """Costs [U] of dropping each unit, and [pairs] of sharing, from the pairs' sums over all windows."""
        own, (gram, cross_cij, own_cjj) = self.own_units(), sums
        inverse, rho = regular_inverse(gram, self.settings.ridge)
        size = own_cjj.shape[-1] if len(own_cjj) else len(gram) // len(own)
        rows = [slice(unit * size, (unit + 1) * size) for unit in range(len(own))]
        solutions = [dropped_solution(inverse, rows[unit]) for unit in range(len(own))]
        for receiver, cross_ij, own_jj in zip(receivers, cross_cij, own_cjj, strict=True):
            solutions.append(shared_solution(inverse, rho, cross_ij, own_jj, rows[receiver - own[0]]))
        # A dropped unit is one whose donor gives zeros.
        receivers, donors = np.concatenate([own, receivers]), np.concatenate([own, donors])
        shared_c = np.arange(len(donors)) >= len(own)
        candidates = self._candidates(receivers, donors, tie)
        solution_cij = jnp.asarray(np.stack(solutions), jnp.float32)
        total = np.zeros(len(donors))
        for part in self.all_windows():
            total += np.asarray(
                _squares(
                    self.config, self.near[self.layer], candidates, cut(self.x_wtd[part], self.mesh),
                    cut(self.gradients_wtd[part], self.mesh), receivers - own[0], solution_cij, shared_c,
                ),
                np.float64,
            )  # fmt: skip
        costs = total / (2 * self.x_wtd[..., 0].size)
        return costs[: len(own)], costs[len(own) :]

    def _candidates(self, receivers: np.ndarray, donors: np.ndarray, tie: str) -> Weights:
        letters = {letter: donors if letter in tie else receivers for letter in "qkv"}
        return _units(self.near, letters, self.config.num_kv_heads)

    def _batches(self, windows: slice) -> list[slice]:
        return list(batches(windows, self.settings.batch_tokens, self.x_wtd.shape[1], self.mesh.size))

    def sums(self, receivers: np.ndarray, donors: np.ndarray, tie: str, parts: Sequence[slice]) -> Sums:
        """Sums over some windows, of units with their donors' weights of `tie` and their receivers' of the rest."""
        candidates = self._candidates(receivers, donors, tie)
        weights = self.near[self.layer]
        size, width = len(self.outer_ii) // self.config.num_kv_heads, len(self.outer_ii)
        total = (np.zeros((width, width)), np.zeros((len(donors), width, size)), np.zeros((len(donors), size, size)))
        for part in parts:
            x_btd = cut(self.x_wtd[part], self.mesh)
            for sums, more in zip(total, batch_sums(self.config, weights, candidates, x_btd), strict=True):
                sums += np.asarray(more, np.float64)
        return total


@partial(jax.jit, static_argnames="config")
def batch_sums(
    config: LlamaConfig, weights: Weights, donors: Weights, x_btd: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`Sums` of a batch, float32, weighted as a refit weights tokens."""
    with jax.default_matmul_precision("highest"):
        w_m1 = residual_weights(advance(config, weights, x_btd, "attention")).reshape(-1, 1)
        h_mi = w_m1 * window_heads(config, weights, x_btd).reshape(len(w_m1), -1)
        g_mcj = w_m1[..., None] * window_heads(config, _in_layer(weights, donors), x_btd).reshape(
            len(w_m1), donors["k_pool_pdh"].shape[0], -1
        )
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
        h_mi = window_heads(config, weights, x_btd).reshape(-1, solution_cij.shape[1])
        count, size = solution_cij.shape[0], solution_cij.shape[2]
        donor_mcj = window_heads(config, _in_layer(weights, candidates), x_btd).reshape(len(h_mi), count, size)
        o_ujd = output_weight(weights, "attention").reshape(-1, size, x_btd.shape[-1])
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


def _units(layers: dict[int, Weights], units: Mapping[str, np.ndarray], per_layer: int) -> Weights:
    """Units side by side as if they were one layer's: `units` says by flat index whose q, whose k and whose v."""

    def of_unit(name: str, unit: int) -> jax.Array:
        layer, place = divmod(unit, per_layer)
        pool = layers[layer][name]
        return pool.reshape(per_layer, -1, *pool.shape[1:])[place]

    names = {name: PARAMETERS[name].pool for name in next(iter(layers.values()))}
    return {
        name: jnp.concatenate([of_unit(name, int(unit)) for unit in units[projection]])
        for name, projection in names.items()
        if projection in ("q", "k", "v")
    }


def _in_layer(weights: Weights, units: Weights) -> Weights:
    """Units that read the stream as a layer's own do."""
    return units | {"attn_norm_ld": weights["attn_norm_ld"]}


def _promising(residual_uc: np.ndarray, count: int) -> np.ndarray:
    """The donors that rank highest for any unit, ascending: a fixed number, so that all layers compile once."""
    rank_uc = np.argsort(np.argsort(residual_uc, axis=1, kind="stable"), axis=1, kind="stable")
    return np.sort(np.argsort(rank_uc.min(axis=0), kind="stable")[:count])
