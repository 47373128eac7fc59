"""The one table of parameters: what every parameter of a decoder is called, and all that is to be known of it.

A name's suffix spells its axes: `v` vocabulary, `d` width, `f` MLP width, `h` head width, `l` layer, `p` pool row. To
give the decoder another parameter, add a row to `PARAMETERS` (and what it depends on to `LlamaConfig`), a row to each
key table in `convert/keys.py`, and its use in `model/layer.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from headshare_jax.config import LlamaConfig

PROJECTIONS = ("q", "k", "v", "o")
# Which axes of a parameter are cut over which axes of a device mesh. A pool is cut along D, never along its rows, so
# that gathering rows stays local.
Cuts = Mapping[str, str | tuple[str, ...]]
_MATRIX: Cuts = {"d": "fsdp", "f": "tensor", "v": "tensor"}
_POOL: Cuts = {"d": ("fsdp", "tensor")}


@dataclass(frozen=True)
class Parameter:
    """A row of the table.

    Attributes:
      name: attribute of `Llama`, key of a checkpoint; ends in its axes.
      part: part of the model that it counts to in a ledger: a projection, `embedding`, `mlp`, `norms` or `head`.
      pool: the projection whose pool rows it is stored by (`q`, `k`, `v` or `o`), or None.
      init: `normal` (standard deviation 0.02), `ones` or `zeros`.
      decays: whether weight decay applies.
      cuts: mesh axes by the letter of an array's axis.
      exists: whether an architecture has it.
    """

    name: str
    part: str
    pool: str | None = None
    init: str = "normal"
    decays: bool = True
    cuts: Cuts = field(default_factory=lambda: _MATRIX)
    exists: Callable[[LlamaConfig], bool] = lambda config: True

    @property
    def axes(self) -> str:
        """Letters of its axes, such as `pdh`."""
        return self.name.rsplit("_", 1)[1]

    @property
    def layered(self) -> bool:
        """Whether it is read layer by layer."""
        return self.axes[0] in "lp"


def _pool(projection: str) -> Parameter:
    return Parameter(pool_name(projection), projection, projection, cuts=_POOL)


def _norm(name: str, exists: Callable[[LlamaConfig], bool] = lambda config: True) -> Parameter:
    return Parameter(name, "norms", init="ones", decays=False, exists=exists)


def _bias(name: str, part: str, exists: Callable[[LlamaConfig], bool], pool: str | None = None) -> Parameter:
    return Parameter(name, part, pool, "zeros", False, _MATRIX if pool is None else _POOL, exists)


def pool_name(projection: str) -> str:
    """Parameter that holds the heads of a projection."""
    return f"{projection}_pool_{'phd' if projection == 'o' else 'pdh'}"


def bias_name(projection: str) -> str:
    """Parameter that holds a projection's biases; that of `o` belongs to the layer, the others to their heads."""
    return "o_bias_ld" if projection == "o" else f"{projection}_bias_ph"


def index_name(projection: str) -> str:
    """Attribute that holds a projection's head index, e.g. `q_index_ln`."""
    return f"{projection}_index_l{'n' if projection in 'qo' else 'k'}"


# In the order they are stored.
PARAMETERS: Mapping[str, Parameter] = {
    parameter.name: parameter
    for parameter in (
        Parameter("embed_vd", "embedding"),
        _norm("attn_norm_ld"),
        *map(_pool, PROJECTIONS),
        *(_bias(bias_name(p), p, lambda config: bool(config.attention_bias), pool=p) for p in "qkv"),
        _bias("o_bias_ld", "o", lambda config: config.attention_bias is True),
        # All heads of a layer have these scales in common: they are the layer's, also of heads from elsewhere.
        *(_norm(f"{p}_norm_lh", lambda config: config.qk_norm) for p in "qk"),
        _norm("mlp_norm_ld"),
        Parameter("gate_ldf", "mlp"),
        Parameter("up_ldf", "mlp"),
        Parameter("down_lfd", "mlp"),
        _bias("gate_bias_lf", "mlp", lambda config: config.mlp_bias),
        _bias("up_bias_lf", "mlp", lambda config: config.mlp_bias),
        _bias("down_bias_ld", "mlp", lambda config: config.mlp_bias),
        _norm("final_norm_d"),
        Parameter("head_vd", "head", exists=lambda config: not config.tie_word_embeddings),
    )
}


def parameter_names(config: LlamaConfig) -> tuple[str, ...]:
    """Names of all parameters of an architecture, in the order they are stored."""
    return tuple(name for name, parameter in PARAMETERS.items() if parameter.exists(config))


def layered_names(config: LlamaConfig) -> tuple[str, ...]:
    """Those of them that are read layer by layer."""
    return tuple(name for name in parameter_names(config) if PARAMETERS[name].layered)


def heads_per_layer(config: LlamaConfig, projection: str) -> int:
    """N for q and o, K for k and v."""
    return config.num_heads if projection in "qo" else config.num_kv_heads


def slice_shape(config: LlamaConfig, name: str) -> tuple[int, ...]:
    """Shape of one layer's slice of a parameter, with all heads of the layer; the whole of one without layers."""
    sizes = {"v": config.vocab_size, "d": config.hidden_size, "f": config.intermediate_size, "h": config.head_dim}
    parameter = PARAMETERS[name]
    if parameter.pool is not None:
        sizes["p"] = heads_per_layer(config, parameter.pool)
    return tuple(sizes[axis] for axis in parameter.axes if axis != "l")
