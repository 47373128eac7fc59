"""The LLaMA-family decoder on pooled attention heads, as a Flax NNX module."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding

from headshare_jax import parameters
from headshare_jax.attention import Rows, attend, flash_attention, has_kernel, rows_apart, rows_in_place
from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import WeightSource, index_name, pool_name
from headshare_jax.projection import STACKED_MATRICES, LayerOf, Matrices, heads_in, heads_out, product, rows
from headshare_jax.rope import rotary_angles, rotate, rotate_queries
from headshare_jax.sharing import PROJECTIONS, SharingMap
from headshare_jax.stack_kernel import InStack

COMPUTE_DTYPES = ("float32", "bfloat16")
# What costs a product or the attention; norms and the gated product are computed again in the backward pass, which is
# cheaper than writing them to memory and reading them back.
_COSTLY = ("query", "key", "value", "heads", "middle", "gate", "up")
# Activations of a layer kept for the backward pass, most first; everything else is computed again.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.save_only_these_names(*_COSTLY),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

LayerWeights = Mapping[str, Any]

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class HeadIndex(nnx.Variable[jax.Array]):
    """int32 pool row of every head of every layer; not trained."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions already seen.

    Attributes:
      k_lbskh, v_lbskh: [L, B, S, K, H], in the compute dtype; rotary embedding already applied to the keys.
      length: int32 scalar, slots filled; the same for every row of the batch.
      prompt_b: int32 [B], tokens of every row's prompt, which fill its first slots.
      prompt_slots: int32 scalar, slots that prompts take; from its prompt's end to here a row holds padding.
    """

    k_lbskh: jax.Array
    v_lbskh: jax.Array
    length: jax.Array
    prompt_b: jax.Array
    prompt_slots: jax.Array

    def with_layer(self, layer: jax.Array | int, k_btkh: jax.Array, v_btkh: jax.Array) -> "KVCache":
        """The cache with a layer's next T keys and values; `length` stays, for other layers write there too."""
        at = (layer, 0, self.length, 0, 0)
        return replace(
            self,
            k_lbskh=jax.lax.dynamic_update_slice(self.k_lbskh, k_btkh[None], at),
            v_lbskh=jax.lax.dynamic_update_slice(self.v_lbskh, v_btkh[None], at),
        )


class Llama(nnx.Module):
    """A decoder whose heads are rows of one pool per projection; a dense model is the identity map.

    Attribute names spell their axes (see `parameters`). Layers are stacked on a leading axis. Where the configuration
    has no such parameter (biases, a head of its own), the attribute is absent.

    Attributes:
      config: the architecture.
      sharing: who shares with whom, or None for a dense model.
      compute_dtype: `float32` or `bfloat16`: type of matrix products and activations. Norms, softmax, rotary angles
        and logits are float32 always.
      remat: which activations of a layer a training step keeps: `none` computes only norms and other cheap things
        again, `dots` also the attention, `full` everything.
      batch_sharding: where activations lie on a mesh of devices, by their first axis; None leaves it to the compiler.
      q_index_ln, k_index_lk, v_index_lk, o_index_ln: pool row of every head; P, one past the last, of a dropped one.
    """

    embed_vd: nnx.Param[jax.Array]
    attn_norm_ld: nnx.Param[jax.Array]
    q_pool_pdh: nnx.Param[jax.Array]
    k_pool_pdh: nnx.Param[jax.Array]
    v_pool_pdh: nnx.Param[jax.Array]
    o_pool_phd: nnx.Param[jax.Array]
    mlp_norm_ld: nnx.Param[jax.Array]
    gate_ldf: nnx.Param[jax.Array]
    up_ldf: nnx.Param[jax.Array]
    down_lfd: nnx.Param[jax.Array]
    final_norm_d: nnx.Param[jax.Array]
    head_vd: nnx.Param[jax.Array]
    q_index_ln: HeadIndex
    k_index_lk: HeadIndex
    v_index_lk: HeadIndex
    o_index_ln: HeadIndex

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
        """Takes the parameters as they are; `parameters.stored_shape` gives the shape each must have."""
        if compute_dtype not in COMPUTE_DTYPES:
            raise HeadshareError(f"compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}, not {compute_dtype!r}.")
        if remat not in REMAT_POLICIES:
            raise HeadshareError(f"remat must be one of {', '.join(REMAT_POLICIES)}, not {remat!r}.")
        self.config = config
        self.sharing = sharing
        self.compute_dtype = compute_dtype
        self.remat = remat
        self.batch_sharding = batch_sharding
        for name in parameters.parameter_names(config):
            setattr(self, name, nnx.Param(params[name]))
        for projection in PROJECTIONS:
            index = parameters.pool_index(config, projection, sharing)
            setattr(self, index_name(projection), HeadIndex(jnp.asarray(index)))

    @classmethod
    def of(cls, source: WeightSource, **settings: Any) -> Self:
        """A source's model in memory; peak memory is its own size plus one parameter.

        Args:
          source: a model, or an opened checkpoint.
          settings: keyword arguments of the constructor: `compute_dtype`, `remat`, `batch_sharding`.
        """
        names = parameters.parameter_names(source.config)
        params = {name: _held(source, name) for name in names}
        return cls(source.config, params, sharing=source.sharing, **settings)

    @classmethod
    def init(cls, config: LlamaConfig, key: jax.Array, *, dtype: str = "float32", **settings: Any) -> Self:
        """A dense model with random weights: normal with standard deviation 0.02, norms 1, biases 0."""
        names = parameters.parameter_names(config)

        def draw(name: str, key: jax.Array) -> jax.Array:
            shape = parameters.stored_shape(config, name)
            if "norm" in name:
                return jnp.ones(shape, dtype)
            if "bias" in name:
                return jnp.zeros(shape, dtype)
            return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

        keys = jax.random.split(key, len(names))
        return cls(config, {name: draw(name, key) for name, key in zip(names, keys, strict=True)}, **settings)

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
        length = tokens_bt.shape[1]
        mask_bts = None
        if segments_bt is not None:
            earlier_ts = jnp.tril(jnp.ones((length, length), bool))
            mask_bts = earlier_ts[None] & (segments_bt[:, :, None] == segments_bt[:, None, :])
        if positions_bt is None:
            positions_bt = _positions(tokens_bt, segments_bt)
        angles = rotary_angles(self.config, positions_bt)
        kernel_mesh = self._kernel_mesh(length)
        in_turns = rows_apart if self._on_one_device() else None
        document_bt = jnp.zeros_like(tokens_bt) if segments_bt is None else segments_bt

        def layer(x_btd: jax.Array, weights: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            q_btnh, k_btkh, v_btkh = self._qkv(x_btd, weights, *angles)
            if kernel_mesh is not None:
                heads_btnh = flash_attention(q_btnh, k_btkh, v_btkh, document_bt, kernel_mesh)
            else:
                heads_btnh = attend(q_btnh, k_btkh, v_btkh, mask_bts, causal=True, in_turns=in_turns)
            return self._placed(self._layer_output(x_btd, heads_btnh, weights)), None

        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        x_btd, _ = jax.lax.scan(layer, self._placed(self._embed(tokens_bt)), self._layer_weights())
        return self._rms_norm(x_btd, self.final_norm_d[...])

    def prefill(
        self, tokens_bt: jax.Array, prompt_b: jax.Array, cache: KVCache, *, parts: int = 1
    ) -> tuple[jax.Array, KVCache]:
        """Reads prompts into an empty cache.

        The last layer computes its output for the last tokens alone: nothing reads the others.

        Args:
          tokens_bt: int32 [B, T], prompts, with padding behind them.
          prompt_b: int32 [B], tokens of every prompt, at least 1.
          cache: empty, with room for T slots.
          parts: in how many parts a layer runs the batch, side by side: where one leaves a core idle, another does not.

        Returns:
          Normalised output of the last layer at every prompt's last token, [B, D] in the compute dtype, and the cache.
        """
        length = tokens_bt.shape[1]
        slot_t = jnp.arange(length, dtype=jnp.int32)
        # Padding must not count as length, by which `dynamic` scaling goes.
        angles = rotary_angles(self.config, jnp.minimum(slot_t, jnp.max(prompt_b) - 1)[None])
        stacked, last = self._layer_weights(), self.config.num_layers - 1

        def of_part(x_btd: jax.Array, weights: LayerWeights) -> tuple[jax.Array, jax.Array, jax.Array]:
            q_btnh, k_btkh, v_btkh = self._qkv(x_btd, weights, *angles)
            heads_btnh = attend(q_btnh, k_btkh, v_btkh, in_turns=rows_in_place)
            return self._layer_output(x_btd, heads_btnh, weights), k_btkh, v_btkh

        def layer(carry: tuple[Rows, KVCache], place: jax.Array) -> tuple[tuple[Rows, KVCache], None]:
            xs_btd, cache = carry
            weights = {name: stack[place] for name, stack in stacked.items()}
            xs_btd, ks_btkh, vs_btkh = zip(*(of_part(x_btd, weights) for x_btd in xs_btd), strict=True)
            return (xs_btd, cache.with_layer(place, jnp.concatenate(ks_btkh), jnp.concatenate(vs_btkh))), None

        carry = (tuple(jnp.array_split(self._embed(tokens_bt), parts)), cache)
        (xs_btd, cache), _ = jax.lax.scan(layer, carry, jnp.arange(last, dtype=jnp.int32))
        x_btd = jnp.concatenate(xs_btd)
        weights = {name: stack[last] for name, stack in stacked.items()}
        normed_btd = self._rms_norm(x_btd, weights["attn_norm_ld"])
        k_btkh, v_btkh = self._keys_values(normed_btd, weights, *angles)
        end_b1 = prompt_b[:, None] - 1
        x_b1d, normed_b1d = (jnp.take_along_axis(of_all, end_b1[..., None], axis=1) for of_all in (x_btd, normed_btd))
        q_b1nh = self._queries(normed_b1d, weights, *(angle_1th[0][end_b1] for angle_1th in angles))
        heads_b1nh = attend(q_b1nh, k_btkh, v_btkh, slot_t[None, None] <= end_b1[..., None])
        x_b1d = self._rms_norm(self._layer_output(x_b1d, heads_b1nh, weights), self.final_norm_d[...])
        filled = jnp.int32(length)
        cache = replace(cache.with_layer(last, k_btkh, v_btkh), length=filled, prompt_b=prompt_b, prompt_slots=filled)
        return x_b1d[:, 0], cache

    def extend(
        self,
        tokens_bt: jax.Array,
        cache: KVCache,
        *,
        layers: Matrices | None = None,
        in_stack: bool = False,
    ) -> tuple[jax.Array, KVCache]:
        """Runs T more tokens of every row against the cache.

        Args:
          tokens_bt: int32 [B, T]; they take the cache's next T slots.
          cache: has room for T more slots.
          layers: what `unstacked` gave for this model, to use instead of its stacked matrices.
          in_stack: read matrices where they lie, by `stack_kernel`; for a few tokens, on one GPU.

        Returns:
          Normalised output of the last layer, [B, T, D] in the compute dtype, and the cache with T more slots.
        """
        length = tokens_bt.shape[1]
        slot_t = cache.length + jnp.arange(length, dtype=jnp.int32)
        slot_s = jnp.arange(cache.k_lbskh.shape[2], dtype=jnp.int32)
        padding_b = cache.prompt_slots - cache.prompt_b
        angles = rotary_angles(self.config, slot_t[None, :] - padding_b[:, None])
        earlier_ts = slot_s[None, :] <= slot_t[:, None]
        used_bs = (slot_s[None, :] < cache.prompt_b[:, None]) | (slot_s[None, :] >= cache.prompt_slots)
        mask_bts = earlier_ts[None] & used_bs[:, None]

        def layer(
            carry: tuple[jax.Array, KVCache], scanned: tuple[jax.Array, LayerWeights]
        ) -> tuple[tuple[jax.Array, KVCache], None]:
            x_btd, cache = carry
            place, weights = scanned
            if layers is not None:
                weights = {**weights, **{name: LayerOf(each, place) for name, each in layers.items()}}
            elif in_stack:
                weights = {**weights, **self._in_stack(place, weights)}
            q_btnh, k_btkh, v_btkh = self._qkv(x_btd, weights, *angles)
            cache = cache.with_layer(place, k_btkh, v_btkh)
            heads_btnh = attend(q_btnh, cache.k_lbskh[place], cache.v_lbskh[place], mask_bts, in_turns=rows_in_place)
            return (self._layer_output(x_btd, heads_btnh, weights), cache), None

        places = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        apart = STACKED_MATRICES if in_stack or layers is not None else ()
        stacked = {name: value for name, value in self._layer_weights().items() if name not in apart}
        (x_btd, cache), _ = jax.lax.scan(layer, (self._embed(tokens_bt), cache), (places, stacked))
        return self._rms_norm(x_btd, self.final_norm_d[...]), replace(cache, length=cache.length + length)

    def empty_cache(self, batch: int, slots: int) -> KVCache:
        """A cache with room for `slots` positions of every row."""
        config = self.config
        shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
        return KVCache(
            k_lbskh=jnp.zeros(shape, self.compute_dtype),
            v_lbskh=jnp.zeros(shape, self.compute_dtype),
            length=jnp.zeros((), jnp.int32),
            prompt_b=jnp.zeros(batch, jnp.int32),
            prompt_slots=jnp.zeros((), jnp.int32),
        )

    def logits(self, features_btd: jax.Array) -> jax.Array:
        """Output head on the features of `features` or `extend`: float32 [..., V]."""
        return head_logits(features_btd, self.head_weights())

    def head_weights(self) -> jax.Array:
        """Weights of the output head, [V, D] in the compute dtype."""
        head_vd = self.embed_vd if self.config.tie_word_embeddings else self.head_vd
        weights_vd = head_vd[...]
        if self.config.normalize_head:
            weights_vd = normalized_rows(weights_vd)
        return weights_vd.astype(self.compute_dtype)

    def dtype(self, name: str) -> np.dtype:
        """Stored type of a parameter."""
        return np.dtype(getattr(self, name).dtype)

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """One layer's slice of a parameter on the host, as `parameters.WeightSource` has it."""
        value = getattr(self, name)[...]
        if layer is None:
            return np.asarray(value)
        if parameters.pooled_projection(name) is None:
            return np.asarray(value[layer])
        return parameters.read_heads(self, name, layer, lambda rows: np.asarray(value[rows]))

    def _layer_weights(self) -> dict[str, jax.Array]:
        """What the scan over layers slices: everything with a leading layer axis."""
        names = [name for name in parameters.parameter_names(self.config) if parameters.axes(name)[0] == "l"]
        names += [index_name(projection) for projection in PROJECTIONS]
        return {name: getattr(self, name)[...] for name in names}

    def _in_stack(self, place: jax.Array, weights: LayerWeights) -> dict[str, InStack]:
        """A layer's matrices and heads where they lie."""
        matrices = {name: InStack(getattr(self, name)[...], place[None]) for name in STACKED_MATRICES}
        heads = {p: InStack(getattr(self, pool_name(p))[...], weights[index_name(p)]) for p in PROJECTIONS}
        return matrices | {pool_name(p): of for p, of in heads.items()}

    def _placed(self, x_btd: jax.Array) -> jax.Array:
        """Activations kept where the batch lies: else they would follow the weights, which are cut along D."""
        if self.batch_sharding is None:
            return x_btd
        return jax.lax.with_sharding_constraint(x_btd, self.batch_sharding)

    def _kernel_mesh(self, length: int) -> Mesh | None:
        """The mesh to run an attention kernel on; None where there is none for its devices or this length."""
        mesh = None if self.batch_sharding is None else self.batch_sharding.mesh
        if not isinstance(mesh, Mesh) or not has_kernel(mesh, length, self.config.head_dim, self.compute_dtype):
            return None
        return mesh

    def _on_one_device(self) -> bool:
        """Whether a batch is known to lie on one device."""
        return self.batch_sharding is None or self.batch_sharding.mesh.size == 1

    def _embed(self, tokens_bt: jax.Array) -> jax.Array:
        return self.embed_vd[...][tokens_bt].astype(self.compute_dtype)

    def _qkv(
        self, x_btd: jax.Array, weights: LayerWeights, cos_bth: jax.Array, sin_bth: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of one layer for the same tokens."""
        normed_btd = self._rms_norm(x_btd, weights["attn_norm_ld"])
        q_btnh = self._queries(normed_btd, weights, cos_bth, sin_bth)
        return q_btnh, *self._keys_values(normed_btd, weights, cos_bth, sin_bth)

    def _queries(
        self, normed_btd: jax.Array, weights: LayerWeights, cos_bth: jax.Array, sin_bth: jax.Array
    ) -> jax.Array:
        """Queries [B, T, N, H] of one layer as `attend` takes them."""
        q_btnh = self._project_in(normed_btd, "q", weights)
        return checkpoint_name(rotate_queries(q_btnh, cos_bth, sin_bth), "query")

    def _keys_values(
        self, normed_btd: jax.Array, weights: LayerWeights, cos_bth: jax.Array, sin_bth: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, T, K, H] of one layer, rotary embedding applied to the keys."""
        k_btkh = rotate(self._project_in(normed_btd, "k", weights), cos_bth, sin_bth)
        v_btkh = self._project_in(normed_btd, "v", weights)
        return checkpoint_name(k_btkh, "key"), checkpoint_name(v_btkh, "value")

    def _project_in(self, x_btd: jax.Array, projection: str, weights: LayerWeights) -> jax.Array:
        name, index_n = pool_name(projection), weights[index_name(projection)]
        if name in weights:
            out_btnh = weights[name].heads_in(x_btd)
        else:
            out_btnh = heads_in(x_btd, getattr(self, name)[...], index_n)
        if self.config.attention_bias:
            bias_nh = rows(getattr(self, f"{projection}_bias_ph")[...], index_n)
            out_btnh += bias_nh.astype(x_btd.dtype)[None, None]
        return out_btnh

    def _project_out(self, heads_btnh: jax.Array, weights: LayerWeights) -> jax.Array:
        pool_phd, index_n = self.o_pool_phd[...], weights["o_index_ln"]
        if self.sharing is not None and self.sharing.dropped.any():
            # A dropped head has no row: the last one stands in for it, on an output of zero.
            kept_n = (index_n < pool_phd.shape[0]).astype(heads_btnh.dtype)
            heads_btnh = heads_btnh * kept_n[None, None, :, None]
        if "o_pool_phd" in weights:
            return weights["o_pool_phd"].heads_out(heads_btnh)
        return heads_out(heads_btnh, pool_phd, index_n)

    def _layer_output(self, x_btd: jax.Array, heads_btnh: jax.Array, weights: LayerWeights) -> jax.Array:
        """Residual stream after a layer whose attention heads gave `heads_btnh`."""
        attention_btd = self._project_out(checkpoint_name(heads_btnh, "heads"), weights)
        if self.config.attention_bias:
            attention_btd += weights["o_bias_ld"].astype(x_btd.dtype)[None, None]
        x_btd = checkpoint_name(x_btd + attention_btd, "middle")
        return x_btd + self._mlp(self._rms_norm(x_btd, weights["mlp_norm_ld"]), weights)

    def _mlp(self, x_btd: jax.Array, weights: LayerWeights) -> jax.Array:
        def linear(x: jax.Array, name: str, bias: str) -> jax.Array:
            y = product(weights[name], x)
            return y + weights[bias].astype(x.dtype)[None] if self.config.mlp_bias else y

        # Tokens along one axis: the gradient of a weight sums over them, and over two axes XLA would first copy.
        x_md = x_btd.reshape(-1, x_btd.shape[-1])
        gate_mf = checkpoint_name(linear(x_md, "gate_ldf", "gate_bias_lf"), "gate")
        up_mf = checkpoint_name(linear(x_md, "up_ldf", "up_bias_lf"), "up")
        out_md = linear(_ACTIVATIONS[self.config.hidden_act](gate_mf) * up_mf, "down_lfd", "down_bias_ld")
        return out_md.reshape(x_btd.shape)

    def _rms_norm(self, x_btd: jax.Array, scale_d: jax.Array) -> jax.Array:
        x_f32 = x_btd.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return (x_f32 * inverse).astype(x_btd.dtype) * scale_d.astype(x_btd.dtype)[None, None]


def _held(source: WeightSource, name: str) -> jax.Array:
    """A parameter of a source in memory of its own."""
    value = parameters.assemble(source, name)
    # Without layers it may be a view of a mapped file or of another model's memory, which must not be taken over.
    return jax.device_put(value) if parameters.is_layered(name) else jnp.array(value)


def head_logits(features_btd: jax.Array, head_vd: jax.Array) -> jax.Array:
    """Logits, float32 [..., V], of features [..., D]."""
    return jnp.einsum("...d,vd->...v", features_btd, head_vd, preferred_element_type=jnp.float32)


def normalized_rows(weights_vd: jax.Array) -> jax.Array:
    """Rows divided by their L2 norm, in the input's dtype (Baichuan-2's output head)."""
    rows = weights_vd.astype(jnp.float32)
    norm = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return (rows / jnp.maximum(norm, 1e-12)).astype(weights_vd.dtype)


def _positions(tokens_bt: jax.Array, segments_bt: jax.Array | None) -> jax.Array:
    """Position of every token within its segment, int32 [B, T]."""
    place_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1], dtype=jnp.int32)[None], tokens_bt.shape)
    if segments_bt is None:
        return place_bt
    begins_bt = jnp.diff(segments_bt, axis=1, prepend=segments_bt[:, :1] - 1) != 0
    return place_bt - jax.lax.cummax(jnp.where(begins_bt, place_bt, 0), axis=1)
