"""The LLaMA-family decoder on pooled attention heads, as a Flax NNX module."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.model.attention import InTurns, Window, among_tokens, attend_cached, rows_in_place, tokens_last
from headshare_jax.model.cache import JOINED_BYTES, KVCache, RingCache, empty_cache
from headshare_jax.model.embedding import look_up
from headshare_jax.model.gather import on_host
from headshare_jax.model.layer import REMAT_POLICIES, attention_block, layer_kinds, mlp_block, rms_norm
from headshare_jax.model.mesh import batch_sharding, cut_along_weights, rows_of
from headshare_jax.model.place import place
from headshare_jax.model.reading import PER_HEAD_TOKENS, Gathered, OneByOne, Reading
from headshare_jax.model.stacks import Layer, Stacks, stacks_of
from headshare_jax.model.tokens import check_tokens, positions
from headshare_jax.output_head import head_logits, normalized_rows
from headshare_jax.parameters import PARAMETERS, PROJECTIONS, index_name, parameter_names
from headshare_jax.rope import rotary_angles
from headshare_jax.sharing import finite
from headshare_jax.sharing.ledger import described
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.shapes import TPU_MULTIPLE, HeadShape, head_shapes, running_tables
from headshare_jax.sharing.source import WeightSource, pool_index, read_held, stored_shape

COMPUTE_DTYPES = ("float32", "bfloat16")
Carry = TypeVar("Carry")
# The residual stream of a batch of prompts, cut along the batch.
Parts = tuple[jax.Array, ...]


class HeadIndex(nnx.Variable[jax.Array]):
    """int32 pool row of every head of every layer; not trained."""


class Llama(nnx.Module):
    """A decoder whose heads are rows of one pool per projection; a dense model is the identity map.

    Its parameters are attributes, by the names of `parameters.PARAMETERS`, which spell their axes; layers are stacked
    on a leading axis. Where the architecture has no such parameter (biases, its own head), the attribute is absent.

    Attributes:
      config: the architecture.
      sharing: who shares with whom, or None for a dense model.
      compute_dtype: `float32` or `bfloat16`: type of matrix products and activations. Norms, softmax, rotary angles
        and logits are float32 always.
      remat: which activations of a layer a training step keeps: `none` computes only norms and other cheap things
        again, `dots` also the attention, `full` everything.
      batch_sharding: where activations lie on a mesh of devices, by their first axis, if it divides; None leaves it to
        the compiler.
      q_index_ln: pool row of every query head; P, one past the last, of a dropped one. Where some unit is slim, row of
        every column of every head, [L, N * H], P of what is cut.
      k_index_lk: of every key head, likewise.
      v_index_lk: of every value head.
      o_index_ln: of every query head's rows of the output projection.

    Examples:
      >>> tokens_bt = np.zeros((1, 8), np.int32)
      >>> model(tokens_bt).shape
      (1, 8, 259)
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: Mapping[str, Any],
        *,
        sharing: SharingMap | None = None,
        compute_dtype: str = "float32",
        remat: str = "none",
        batch_sharding: NamedSharding | None = None,
    ):
        """Takes the parameters as they are; `source.stored_shape` gives the shape each must have."""
        if compute_dtype not in COMPUTE_DTYPES:
            raise HeadshareError(f"compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}, not {compute_dtype!r}.")
        if remat not in REMAT_POLICIES:
            raise HeadshareError(f"remat must be one of {', '.join(REMAT_POLICIES)}, not {remat!r}.")
        self.config = config
        self.sharing = sharing
        self.compute_dtype = compute_dtype
        self.remat = remat
        self.batch_sharding = batch_sharding
        for name in parameter_names(config):
            setattr(self, name, nnx.Param(params[name]))
        for projection in PROJECTIONS:
            setattr(self, index_name(projection), HeadIndex(jnp.asarray(pool_index(config, projection, sharing))))

    @classmethod
    def of(cls, source: WeightSource, *, mesh: Mesh | None = None, dtype: str | None = None, **settings: Any) -> Self:
        """A source's model, placed straight from it: on one device, or on a mesh of which each process reads its part.

        Args:
          source: an opened checkpoint, a model, or a view of either; what a view leaves of a model in memory is not
            copied.
          mesh: devices to lie on, over which batches are then cut; by default one.
          dtype: type to hold the parameters in; by default the source's own.
          settings: keyword arguments of the constructor: `compute_dtype`, `remat`, `batch_sharding`.
        """
        params = place(source, parameter_names(source.config), mesh, dtype)
        if mesh is not None:
            settings.setdefault("batch_sharding", batch_sharding(mesh))
        return cls(source.config, params, sharing=source.sharing, **settings)

    @classmethod
    def init(cls, config: LlamaConfig, key: jax.Array, *, dtype: str = "float32", **settings: Any) -> Self:
        """A dense model with random weights: normal with standard deviation 0.02, norms 1, biases 0."""
        names = parameter_names(config)

        def draw(name: str, key: jax.Array) -> jax.Array:
            shape, kind = stored_shape(config, name), PARAMETERS[name].init
            if kind == "normal":
                return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
            return jnp.ones(shape, dtype) if kind == "ones" else jnp.zeros(shape, dtype)

        keys = jax.random.split(key, len(names))
        return cls(config, {name: draw(name, key) for name, key in zip(names, keys, strict=True)}, **settings)

    def __repr__(self) -> str:
        return f"Llama({described(self)})"

    __str__ = __repr__

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the constructor that do not depend on the weights."""
        return {name: getattr(self, name) for name in ("compute_dtype", "remat", "batch_sharding")}

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters, all devices together where they are cut and not copied."""
        return sum(self.array(name).nbytes for name in parameter_names(self.config))

    @property
    def mesh(self) -> Mesh | None:
        """The devices that batches are cut over, if it was made for a mesh."""
        mesh = None if self.batch_sharding is None else self.batch_sharding.mesh
        return mesh if isinstance(mesh, Mesh) else None

    @property
    def device(self) -> jax.Device | None:
        """The one device that holds all parameters, which may be NumPy arrays; None if there are several or none."""
        arrays = [leaf for leaf in jax.tree.leaves(self) if isinstance(leaf, jax.Array)]
        devices = {device for array in arrays for device in array.devices()}
        return devices.pop() if len(devices) == 1 else None

    def __call__(
        self,
        tokens_bt: jax.Array,
        *,
        positions_bt: jax.Array | None = None,
        segments_bt: jax.Array | None = None,
    ) -> jax.Array:
        """Next-token logits, float32 [B, T, V].

        Args:
          tokens_bt: int32 [B, T].
          positions_bt: int32 [B, T], rotary position of every token; by default counted from the start of its segment.
          segments_bt: int32 [B, T], packed documents and padding: a token sees the earlier tokens of its own segment
            only. Segments are contiguous; give padding a segment of its own.

        Raises:
          HeadshareError: tokens that are not [B, T], no whole numbers, or outside the vocabulary. Inside `jax.jit` and
            other transformations their values are not known, and not looked at.
        """
        return self.logits(self.features(tokens_bt, positions_bt=positions_bt, segments_bt=segments_bt))

    def features(
        self,
        tokens_bt: jax.Array,
        *,
        positions_bt: jax.Array | None = None,
        segments_bt: jax.Array | None = None,
    ) -> jax.Array:
        """Normalised output of the last layer, [B, T, D] in the compute dtype; arguments as in `__call__`."""
        check_tokens(tokens_bt, self.config.vocab_size)
        if positions_bt is None:
            positions_bt = positions(tokens_bt, segments_bt)
        angles = rotary_angles(self.config, positions_bt)
        stacks = self._stacks()
        attention = among_tokens(self.config, self.compute_dtype, self.mesh, tokens_bt, segments_bt)

        def layer(x_btd: jax.Array, slices: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            weights = stacks.held(slices)
            x_btd, _ = attention_block(self.config, weights, x_btd, angles, attention)
            return self._placed(mlp_block(self.config, weights, x_btd)), None

        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        # Scanned, not sliced by a counter: the gradient of a slice is then written where it belongs.
        x_btd, _ = jax.lax.scan(layer, self._placed(self._embed(tokens_bt)), dict(stacks.layered))
        return self._final_norm(x_btd)

    def prefill(
        self, tokens_bt: jax.Array, prompt_b: jax.Array, cache: KVCache, reading: Reading | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Reads prompts into an empty cache.

        The last layer computes its output for the last tokens alone: nothing reads the others.

        Args:
          tokens_bt: int32 [B, T], prompts, with padding behind them.
          prompt_b: int32 [B], tokens of every prompt, at least 1.
          cache: empty, with room for T slots, or a `RingCache`.
          reading: how heads and matrices are read; by default `Gathered()`.

        Returns:
          Normalised output of the last layer at every prompt's last token, [B, D] in the compute dtype, and the cache.
        """
        reading = reading or Gathered()
        slot_t = jnp.arange(tokens_bt.shape[1], dtype=jnp.int32)
        # Padding must not count as length, by which `dynamic` scaling goes.
        angles = rotary_angles(self.config, jnp.minimum(slot_t, jnp.max(prompt_b) - 1)[None])

        def attend_and_keep(
            q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, window: Window
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            keys_values = tokens_last(k_btkh), tokens_last(v_btkh)
            return attend_cached(q_btnh, *keys_values, window=window, in_turns=self._in_turns), keys_values

        def step(carry: tuple[Parts, KVCache], place: jax.Array | int, layer: Layer) -> tuple[Parts, KVCache]:
            parts_btd, cache = carry
            run = [attention_block(self.config, layer, x_btd, angles, attend_and_keep) for x_btd in parts_btd]
            parts_btd = tuple(mlp_block(self.config, layer, x_btd) for x_btd, _ in run)
            k_bkht, v_bkht = (jnp.concatenate(parts) for parts in zip(*(kept for _, kept in run), strict=True))
            return parts_btd, cache.with_prompts(place, k_bkht, v_bkht, prompt_b)

        last, end_b = self.config.num_layers - 1, prompt_b - 1
        parts_btd = tuple(jnp.array_split(self._embed(tokens_bt), reading.parts))
        parts_btd, cache = self._run_layers(step, (parts_btd, cache), reading, last)
        seen_b1s = slot_t[None, None] <= end_b[:, None, None]

        def attention(
            q_b1nh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, window: Window
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            near_b1s = seen_b1s if window is None else seen_b1s & (slot_t[None, None] > end_b[:, None, None] - window)
            keys_values = tokens_last(k_btkh), tokens_last(v_btkh)
            return attend_cached(q_b1nh, *keys_values, near_b1s, in_turns=self._in_turns), keys_values

        layer = reading.layer(self._running(), last)
        x_b1d, (k_bkht, v_bkht) = attention_block(
            self.config, layer, jnp.concatenate(parts_btd), angles, attention, at_b=end_b
        )
        x_b1d = self._final_norm(mlp_block(self.config, layer, x_b1d))
        filled = jnp.int32(tokens_bt.shape[1])
        cache = cache.with_prompts(last, k_bkht, v_bkht, prompt_b)
        return x_b1d[:, 0], replace(cache, length=filled, prompt_b=prompt_b, prompt_slots=filled)

    def extend(self, tokens_bt: jax.Array, cache: KVCache, reading: Reading | None = None) -> tuple[jax.Array, KVCache]:
        """Runs T more tokens of every row against the cache.

        Args:
          tokens_bt: int32 [B, T]; they take the cache's next T slots.
          cache: has room for T more slots, or is a `RingCache`.
          reading: how heads and matrices are read; by default what suits so many tokens on any device.

        Returns:
          Normalised output of the last layer, [B, T, D] in the compute dtype, and the cache with T more slots.
        """
        if reading is None:
            reading = OneByOne() if tokens_bt.size <= PER_HEAD_TOKENS else Gathered()
        length = tokens_bt.shape[1]
        if length > 1 and isinstance(cache, RingCache):
            return self._extend_by_one(tokens_bt, cache, reading)
        slot_t = cache.length + jnp.arange(length, dtype=jnp.int32)
        angles = rotary_angles(self.config, cache.positions(slot_t))
        seen_bts, cut = cache.seen_by(slot_t), partial(cut_along_weights, mesh=self.mesh)

        def step(carry: tuple[jax.Array, KVCache], place: jax.Array | int, layer: Layer) -> tuple[jax.Array, KVCache]:
            x_btd, cache = carry

            def attention(
                q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, window: Window
            ) -> tuple[jax.Array, KVCache]:
                grown = cache.with_layer(place, tokens_last(k_btkh), tokens_last(v_btkh))
                keys_values = (grown.k_lbkhs[place], grown.v_lbkhs[place])
                near_bts = seen_bts
                # Of a window that all layers have, the cache holds no more.
                if isinstance(window, jax.Array):
                    near_bts = seen_bts & (cache.behind(slot_t) < window)
                return attend_cached(q_btnh, *keys_values, near_bts, in_turns=self._in_turns), grown

            x_btd, cache = attention_block(self.config, layer, x_btd, angles, attention)
            return cut(mlp_block(self.config, layer, cut(x_btd))), cache

        x_btd = cut(self._embed(tokens_bt))
        x_btd, cache = self._run_layers(step, (x_btd, cache), reading, self.config.num_layers)
        return cut(self._final_norm(x_btd)), replace(cache, length=cache.length + length)

    def _extend_by_one(self, tokens_bt: jax.Array, cache: KVCache, reading: Reading) -> tuple[jax.Array, KVCache]:
        """`extend`, token after token, where a later one takes a slot that an earlier one still sees."""

        def step(cache: KVCache, token_b: jax.Array) -> tuple[KVCache, jax.Array]:
            x_b1d, cache = self.extend(token_b[:, None], cache, reading)
            return cache, x_b1d[:, 0]

        cache, x_tbd = jax.lax.scan(step, cache, tokens_bt.T)
        return x_tbd.swapaxes(0, 1), cache

    @property
    def head_shapes(self) -> tuple[HeadShape, ...]:
        """The heads of every layer, as they run where no gradient is taken."""
        parts = 1 if self.mesh is None else self.mesh.shape["tensor"]
        return head_shapes(self.config, self.sharing, parts, TPU_MULTIPLE if self._on_tpu else 1)

    @property
    def _on_tpu(self) -> bool:
        platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        return platform == "tpu"

    def empty_cache(self, batch: int, slots: int) -> KVCache:
        """A cache with room for `slots` positions of every row; of windows, no more than the last ones."""
        joined = JOINED_BYTES if self._on_tpu else 0
        return empty_cache(self.config, self.compute_dtype, batch, slots, self.head_shapes, self.mesh, joined)

    def logits(self, features_btd: jax.Array) -> jax.Array:
        """Output head on the features of `features` or `extend`: float32 [..., V]."""
        return head_logits(features_btd, self.head_weights())

    def head_weights(self) -> jax.Array:
        """Weights of the output head, [V, D] in the compute dtype."""
        weights_vd = self.array("embed_vd" if self.config.tie_word_embeddings else "head_vd")
        if self.config.normalize_head:
            weights_vd = normalized_rows(weights_vd)
        return weights_vd.astype(self.compute_dtype)

    def whole_head(self) -> NamedSharding | None:
        """Where the output head lies for a loop that reads all of it in each round: gathered but over tensor."""
        if self.mesh is None:
            return None
        cut = "tensor" if self.config.vocab_size % self.mesh.shape["tensor"] == 0 else None
        return NamedSharding(self.mesh, PartitionSpec(cut))

    def array(self, name: str) -> jax.Array:
        """A parameter, or a projection's head index, as it is stored."""
        value: jax.Array = getattr(self, name)[...]
        return value

    def dtype(self, name: str) -> np.dtype:
        """Stored type of a parameter."""
        return np.dtype(getattr(self, name).dtype)

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        """As `WeightSource` has it; of a model on several processes, all must read the same, and all get it."""

        def read(stored: int | np.ndarray | None) -> np.ndarray:
            value = on_host(self.array(name), stored)
            return finite.check_weights(value, finite.slice_name(name, layer), "the model")

        return read_held(self, name, layer, rows, read)

    @property
    def _in_turns(self) -> InTurns | None:
        """How rows run that no gradient is taken of: on a mesh, all of a device's together."""
        return rows_in_place if self.mesh is None or self.mesh.size == 1 else None

    def _stacks(self) -> Stacks:
        kinds = {name: jnp.asarray(kinds_l) for name, kinds_l in layer_kinds(self.config).items()}
        return stacks_of(self.config, self.sharing, self.array, kinds)

    def _running(self) -> Stacks:
        """What runs where no gradient is taken: nothing of dropped heads, and no more of others than they keep."""
        stacks, shapes = replace(self._stacks(), mesh=self.mesh), self.head_shapes
        if self.sharing is None or (shapes == head_shapes(self.config) and not stacks.by_columns):
            return stacks
        return stacks.of_heads(running_tables(self.sharing, shapes))

    def _run_layers(
        self, step: Callable[[Carry, jax.Array | int, Layer], Carry], carry: Carry, reading: Reading, count: int
    ) -> Carry:
        """What `step(carry, place, layer)` makes of a carry in the first `count` layers."""
        stacks = self._running()
        if stacks.apart:
            for place in range(count):
                carry = step(carry, place, reading.layer(stacks, place))
            return carry

        def body(carry: Carry, place: jax.Array) -> tuple[Carry, None]:
            return step(carry, place, reading.layer(stacks, place)), None

        carry, _ = jax.lax.scan(body, carry, jnp.arange(count, dtype=jnp.int32))
        return carry

    def _placed(self, x_btd: jax.Array) -> jax.Array:
        """Activations kept where the batch lies: else they would follow the weights, which are cut along D."""
        if self.batch_sharding is None or len(x_btd) % rows_of(self.batch_sharding.mesh):
            return x_btd
        return jax.lax.with_sharding_constraint(x_btd, self.batch_sharding)

    def _embed(self, tokens_bt: jax.Array) -> jax.Array:
        return look_up(self.array("embed_vd"), tokens_bt, self.compute_dtype, self.batch_sharding)

    def _final_norm(self, x_btd: jax.Array) -> jax.Array:
        return rms_norm(x_btd, self.array("final_norm_d"), self.config.rms_norm_eps)
