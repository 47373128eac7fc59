"""The walk of a refit: the streams of both models side by side, block after block, and sums over them."""

import json
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from headshare_jax.calibration import streams
from headshare_jax.calibration.streams import OUTPUT, Weights
from headshare_jax.fit.moments import Moments, Totals, batch_features, batch_moments, behind
from headshare_jax.model.mesh import put, replicated, rows_of
from headshare_jax.model.spread import from_first, slice_sharding
from headshare_jax.sharing import finite
from headshare_jax.sharing.source import WeightSource

# What is kept of a block: its `BlockFit` as JSON, and its new output weight if that changed.
FIT, WEIGHT = "fit", "weight"
Step = dict[str, Any]
# Room for a fit's JSON.
_FIT_BYTES = 2048


class Walk:
    """Both streams, at one block of one layer; they are one until the first layer that the map changes."""

    def __init__(
        self,
        dense: WeightSource,
        windows_wt: np.ndarray,
        held_out: float,
        batch_tokens: int,
        mesh: Mesh,
        files: ExitStack,
    ):
        self.source, self.config, self.mesh, self.files = dense, dense.config, mesh, files
        self.windows, self.seq_len = windows_wt.shape
        kept = self.windows - min(max(1, round(held_out * self.windows)), self.windows - 1)
        self.fit_to, self.held_out = (
            streams.batches(part, batch_tokens, self.seq_len, rows_of(mesh))
            for part in (slice(0, kept), slice(kept, self.windows))
        )
        # The streams run in these batches alone, so that they have the same bits whether or not a block is fitted.
        self.parts = self.fit_to + self.held_out
        self.x_wtd = files.enter_context(streams.embedded(dense, windows_wt, self.parts, mesh))
        self.compressed_wtd = self.x_wtd
        self.compressed: Weights = {}
        # What attention's output weight multiplies in the compressed model, and the windows for which it is there.
        self.heads_wti: streams.Stream | None = None
        self.known = set[int]()

    @property
    def parted(self) -> bool:
        """Whether the compressed stream is one of its own."""
        return self.compressed_wtd is not self.x_wtd

    def enter(self, layer: int, compressed: Weights | None) -> None:
        """Goes on to a layer; `compressed` are its weights in the compressed model, None where they are the dense's."""
        self.layer, self.dense = layer, streams.layer_weights(self.source, layer, self.mesh)
        if compressed is None:
            return
        self.compressed = compressed
        if not self.parted:
            self.compressed_wtd = self.files.enter_context(streams.copied(self.x_wtd))
            width = streams.output_weight(self.dense, "attention").shape[0]
            self.heads_wti = self.files.enter_context(self.x_wtd.beside(width))

    def advance_dense(self, block: str) -> None:
        """Takes the dense stream alone behind a block."""
        self._advance(self.x_wtd, self.dense, block)

    def advance_compressed(self, block: str) -> None:
        """Takes the compressed stream alone behind a block."""
        if block == "mlp":
            self._advance(self.compressed_wtd, self.compressed, block)
            return
        for part in self.parts:
            h_bti = self._features(part, block)
            self.compressed_wtd[part] = behind(self.compressed, self.compressed_wtd[part], h_bti, block, self.mesh)
        self.known.clear()

    def _advance(self, x_wtd: streams.Stream, weights: Weights, block: str) -> None:
        for part in self.parts:
            x_wtd[part] = streams.advance(self.config, weights, x_wtd[part], block, self.mesh)

    def _features(self, part: slice, block: str) -> jax.Array:
        """What a block's output weight multiplies in the compressed model; attention's is computed once."""
        assert self.heads_wti is not None
        if block == "attention" and part.start in self.known:
            return self.heads_wti[part]
        h_bti = batch_features(self.config, self.compressed, self.compressed_wtd[part], block, self.mesh)
        if block == "attention":
            self.heads_wti[part] = h_bti
            self.known.add(part.start)
        return h_bti

    @property
    def several(self) -> bool:
        """Whether the mesh has devices of other processes."""
        return len({device.process_index for device in self.mesh.devices.flat}) > 1

    def replace(self, block: str, weight: np.ndarray | jax.Array) -> None:
        """Takes a block's new output weight."""
        name = OUTPUT[block]
        sharding = slice_sharding(self.mesh, self.config, name)
        placed = weight if isinstance(weight, jax.Array) else put(weight, sharding)
        self.compressed[name] = placed.astype(jnp.float32)

    def of_first(self, step: Step, weight: jax.ShapeDtypeStruct) -> Step:
        """What the first process of the mesh has fitted, on all of them; its weight, if any, lies on the mesh."""
        if not self.several:
            return step
        mine = step.get(FIT)
        words = None if mine is None else np.pad(mine, (0, _FIT_BYTES - len(mine)), constant_values=ord(" "))
        said = jax.ShapeDtypeStruct((_FIT_BYTES,), np.uint8, sharding=replicated(self.mesh))
        agreed: Step = {FIT: np.asarray(from_first(words, said, self.mesh))}
        if json.loads(agreed[FIT].tobytes())["drift"] is not None:
            agreed[WEIGHT] = from_first(step.get(WEIGHT), weight, self.mesh)
        return agreed

    def moments(self, block: str, parts: list[slice]) -> Moments:
        """Sums over some windows, whose dense stream is then behind the block."""
        width, hidden = streams.output_weight(self.dense, block).shape
        totals, tokens = Totals.nothing(width, hidden, self.mesh), 0
        for part in parts:
            x_btd, compressed_btd, there_b = self.x_wtd[part], self.compressed_wtd[part], streams.there(part, self.mesh)
            y_btd, after_btd = streams.run_block(self.config, self.dense, x_btd, block, self.mesh)
            h_bti = self._features(part, block)
            states = h_bti, x_btd, y_btd, after_btd, compressed_btd, there_b
            totals = batch_moments(totals, self.compressed, *states, block, self.mesh)
            tokens += (part.stop - part.start) * self.seq_len
            self.x_wtd[part] = after_btd
        total = totals.moments(tokens)
        what = f"Sums over the calibration text in the {block} of layer {self.layer}"
        finite.check_computed(what, total.gram, total.cross, total.energy)
        return total
