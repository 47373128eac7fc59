"""A model whose attention heads share weights, are slim or dropped: each stored head is held once, and what is cut or
dropped is neither held nor computed nor cached.

Made by headshare-jax, and self-contained: needs PyTorch and transformers only.
"""

# mypy: allow-untyped-calls

from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward


class HeadshareConfig(LlamaConfig):
    """LlamaConfig with the sharing map, as in `headshare_map.json`; None for a model that shares nothing."""

    model_type = "headshare"
    # Layers that share heads cannot cut them among devices; every device holds the attention whole.
    base_model_tp_plan: ClassVar[dict[str, Any]] = {
        name: way for name, way in (LlamaConfig.base_model_tp_plan or {}).items() if "self_attn" not in name
    }
    headshare_map: dict[str, Any] | None = None

    @property
    def sharing(self) -> dict[str, Any]:
        """The map."""
        assert self.headshare_map is not None
        return self.headshare_map

    @property
    def units(self) -> int:
        """Key/value heads of a layer, each with its query heads."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    def group(self, projection: str) -> int:
        """Heads of a unit."""
        return self.num_attention_heads // self.units if projection in "qo" else 1


def donors(config: HeadshareConfig, projection: str) -> list[int | None]:
    """The unit whose weights each unit uses, by flat index; None for a dropped unit."""
    sharing, units = config.sharing, config.units
    donor: list[int | None] = list(range(config.num_hidden_layers * units))
    for receiver in sharing["receivers"]:
        if projection in receiver.get("tie", sharing["tie"]):
            donor_layer, donor_unit = receiver["donor"]
            donor[receiver["layer"] * units + receiver["unit"]] = donor_layer * units + donor_unit
    for unit in sharing.get("dropped", ()):
        donor[unit["layer"] * units + unit["unit"]] = None
    return donor


def kept_columns(config: HeadshareConfig, projection: str) -> dict[int, list[int]]:
    """The columns of a head that slim units keep, by flat index; of o, rows."""
    kept: dict[int, list[int]] = {}
    for unit in config.sharing.get("slim", ()):
        flat = unit["layer"] * config.units + unit["unit"]
        if projection in "vo" and "rank" in unit:
            kept[flat] = list(range(unit["rank"]))
        elif projection in "qk" and "pairs" in unit:
            # Of a rotary pair, two columns; behind those that turn, columns are told one by one.
            half = config.sharing["model"]["rotary_dim"] // 2
            kept[flat] = [pair for pair in unit["pairs"] if pair < half] + [half + pair for pair in unit["pairs"]]
    return kept


def is_pooled(config: HeadshareConfig, projection: str) -> bool:
    """Whether some unit does not store all of its own weights of this projection."""
    return config.headshare_map is not None and (
        any(unit != donor for unit, donor in enumerate(donors(config, projection)))
        or bool(kept_columns(config, projection))
    )


def blocks(config: HeadshareConfig, projection: str) -> tuple[dict[int, int], list[list[int]]]:
    """Blocks of stored units of one layer, side by side, that no layer uses without each other.

    Returns the size of every block by its first unit, and every layer's blocks in order.
    """
    donor, units = donors(config, projection), config.units
    layers = [donor[start : start + units] for start in range(0, len(donor), units)]
    firsts = set(range(0, len(donor), units))
    for layer in layers:
        for before, unit in pairwise([None, *layer, None]):
            if before is None or before + 1 != unit:
                firsts |= {-1 if unit is None else unit, -1 if before is None else before + 1}
    sizes: dict[int, int] = {}
    first = 0
    for unit, its_donor in enumerate(donor):
        if unit == its_donor:
            first = unit if unit in firsts else first
            sizes[first] = sizes.get(first, 0) + 1
    return sizes, [[unit for unit in layer if unit in firsts] for layer in layers]


@dataclass(frozen=True)
class Running:
    """What a layer runs: the units that are not dropped, each with its query heads, all as wide as the widest of them.

    Attributes:
      units: how many.
      qk: width of a head of q or k: its rotary pairs' first columns, then their second ones, then what does not turn.
      vo: width of a head of v, or of what o reads.
      turned: rotary pairs of unit after unit; None where every pair has its own place.
      places: where the columns that each unit keeps lie in its heads, of every projection.
    """

    units: int
    qk: int
    vo: int
    turned: list[int] | None
    places: dict[str, list[list[int]]]


def running(config: HeadshareConfig, layer: int, head_dim: int) -> Running:
    """What a layer runs."""
    donor, every = donors(config, "q"), list(range(head_dim))
    units = [unit for unit in range(layer * config.units, (layer + 1) * config.units) if donor[unit] is not None]
    columns, rows = ([kept_columns(config, p).get(unit, every) for unit in units] for p in "qo")
    half = config.sharing["model"].get("rotary_dim", head_dim) // 2
    turned = [[column for column in its if column < half] for its in columns]
    still = [len(its) - 2 * len(pairs) for its, pairs in zip(columns, turned, strict=True)]
    widest = max(map(len, turned), default=0)
    firsts = turned if widest == half else [list(range(len(pairs))) for pairs in turned]
    places = [
        [*first, *(widest + place for place in first), *range(2 * widest, 2 * widest + rest)]
        for first, rest in zip(firsts, still, strict=True)
    ]
    return Running(
        units=len(units),
        qk=2 * widest + max(still, default=0),
        vo=max(map(len, rows), default=0),
        # What fills up a head may turn by any angle.
        turned=None if widest == half else [pair for its in turned for pair in (its + [0] * widest)[:widest]],
        places={"q": places, "k": places, "v": rows, "o": rows},
    )


class HeadPool(nn.Module):
    """The stored heads of one projection: an `nn.Linear` for every block, named by its layer and first unit."""

    def __init__(self, config: HeadshareConfig, projection: str, head_dim: int, bias: bool):
        super().__init__()
        units, width, group = config.units, config.hidden_size, config.group(projection)
        self.is_out, self.width = projection == "o", width
        kept, every = kept_columns(config, projection), range(head_dim)
        sizes, layers = blocks(config, projection)
        unit_sizes = [group * len(kept.get(unit, every)) for unit in range(len(layers) * units)]
        numbers = {first: sum(unit_sizes[first : first + size]) for first, size in sizes.items()}
        names = {first: f"{first // units}_{first % units}" for first in sizes}
        for first, heads in numbers.items():
            linear = nn.Linear(heads, width, bias=False) if self.is_out else nn.Linear(width, heads, bias=bias)
            self.add_module(names[first], linear)
        # Of every layer the names of its blocks, and how many numbers are its heads'.
        self.parts = [[(names[first], numbers[first]) for first in layer] for layer in layers]

    def forward(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        parts = self.parts[layer]
        if not self.is_out:
            return torch.cat([getattr(self, name)(x) for name, _ in parts], dim=-1)
        heads = x.split([size for _, size in parts], dim=-1)
        outs = [getattr(self, name)(part) for part, (name, _) in zip(heads, parts, strict=True)]
        return reduce(torch.add, outs) if outs else x.new_zeros((*x.shape[:-1], self.width))


class Pick(nn.Module):
    """Takes columns by their numbers, which follow from the map and lie in no file; zeros for one past the last."""

    index: torch.Tensor

    def __init__(self, columns: list[int], size: int):
        super().__init__()
        self.columns, self.pads = columns, size in columns
        self.register_buffer("index", torch.tensor(columns), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (nn.functional.pad(x, (0, 1)) if self.pads else x).index_select(-1, self.index)


def picks(places: list[list[int]], group: int, width: int, *, back: bool) -> nn.Module:
    """Takes what lies at places of heads, side by side; `back`: makes such heads of it, with zeros elsewhere."""
    heads = [its for its in places for _ in range(group)]
    taken = [head * width + place for head, its in enumerate(heads) for place in its]
    numbers = len(heads) * width
    if taken == list(range(numbers)):
        return nn.Identity()
    if not back:
        return Pick(taken, numbers)
    columns = [len(taken)] * numbers
    for number, column in enumerate(taken):
        columns[column] = number
    return Pick(columns, len(taken))


class Heads(nn.Module):
    """One layer's q, k, v or o projection, in place of its `nn.Linear`; the bias of o is the layer's own."""

    pool: HeadPool

    def __init__(self, pool: HeadPool, layer: int, pick: nn.Module, bias: nn.Parameter | None = None):
        super().__init__()
        # Past nn.Module's own attributes: the pool belongs to the model, not to this layer.
        self.__dict__["pool"] = pool
        self.layer, self.pick, self.bias = layer, pick, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Through the modules' calls, so that hooks run; the pool may lie on another device.
        out: torch.Tensor = self.pool(self.pick(x) if self.pool.is_out else x, self.layer).to(x.device)
        out = out if self.pool.is_out else self.pick(out)
        return out if self.bias is None else out + self.bias


class HeadshareAttention(LlamaAttention):
    """LlamaAttention of a layer that has dropped or slim units: it runs and caches the rest alone, by `Running`."""

    config: HeadshareConfig
    # Of some families.
    q_norm: nn.Module
    k_norm: nn.Module
    qkv_proj: nn.Module

    def __init__(self, config: HeadshareConfig, layer_idx: int, runs: Running):
        super().__init__(config, layer_idx)
        self.runs = runs
        self.pairs: nn.Module = nn.Identity() if runs.turned is None else Pick(runs.turned, -1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Releases of transformers differ in what they call it.
        cache = kwargs.pop("past_key_values" if "past_key_values" in kwargs else "cache", None)
        at = {"cache_position": kwargs.get("cache_position")}
        units, group = self.runs.units, self.num_key_value_groups
        if not units:
            if cache is not None:
                # A number for every position: how many there are is read off the first layer.
                count = hidden_states.new_zeros((hidden_states.shape[0], 1, hidden_states.shape[1], 1))
                cache.update(count, count[..., :0], self.layer_idx, at)
            return self.o_proj(hidden_states[..., :0]), None
        query, key, value = self.projected(hidden_states)
        query, key = query.unflatten(-1, (units, group, -1)), key.unflatten(-1, (units, 1, -1))
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        if getattr(self, "use_rope", True):
            cos, sin = (
                self.pairs(angle[..., : angle.shape[-1] // 2]).unflatten(-1, (units if self.runs.turned else 1, 1, -1))
                for angle in position_embeddings
            )
            query, key = turn(query, cos, sin), turn(key, cos, sin)
        query, key = query.flatten(2, 3).transpose(1, 2), key.flatten(2, 3).transpose(1, 2)
        value = value.unflatten(-1, (units, -1)).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, at)
        out, weights = self.attended(query, key, value, attention_mask, **kwargs)
        out = self.o_proj(out.flatten(-2))
        return nn.functional.dropout(out, getattr(self, "residual_dropout", 0.0), self.training), weights

    def projected(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, whether in one product or in three."""
        if not hasattr(self, "qkv_proj"):
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        sizes = (self.num_key_value_groups * self.runs.qk, self.runs.qk, self.runs.vo)
        together: torch.Tensor = self.qkv_proj(x)
        return together.split([self.runs.units * size for size in sizes], -1)

    def attended(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the heads give, [B, T, heads, vo], and weights if the implementation gives them."""
        kind, (heads, length), width = self.config._attn_implementation, query.shape[1:3], value.shape[-1]
        interface = eager_attention_forward if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]
        wide = missing = 0
        if kind == "sdpa" and length > 1 and key.shape[-1] != width:
            # Kernels that hold no scores in memory take keys and values of one width.
            wide = max(key.shape[-1], width)
        elif kind not in ("eager", "sdpa"):
            # Others count on heads of the number and width that the configuration says.
            wide, missing = self.head_dim, self.config.units - self.runs.units
        if wide:
            query, key, value = (
                nn.functional.pad(x, (0, wide - x.shape[-1], 0, 0, 0, more * missing))
                for x, more in ((query, self.num_key_value_groups), (key, 1), (value, 1))
            )
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        kwargs |= {"dropout": self.attention_dropout if self.training else 0.0, "sliding_window": window}
        out, weights = interface(self, query, key, value, mask, scaling=self.scaling, **kwargs)
        return out.reshape(-1, length, query.shape[1], value.shape[-1])[..., :heads, :width], weights


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs of heads [B, T, units, heads of a unit, qk] by angles [B, T, units or 1, 1, pairs]."""
    pairs = cos.shape[-1]
    first, second, still = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, still], -1)


class Apart(nn.Module):
    """One layer's q, k and v projections as modules, in place of one `nn.Linear` that fuses them."""

    def __init__(self, fused: nn.Linear, rows: list[int]):
        super().__init__()
        for projection, size in zip("qkv", rows, strict=True):
            setattr(self, f"{projection}_proj", nn.Linear(fused.in_features, size, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([module(x) for module in self.children()], dim=-1)


class HeadshareModel(LlamaModel):
    """LlamaModel with one pool of heads for every projection of which some unit does not store its own."""

    config: HeadshareConfig
    config_class = HeadshareConfig

    def __init__(self, config: HeadshareConfig):
        super().__init__(config)
        if config.headshare_map is not None:
            self.share(config)
        self.post_init()

    def share(self, config: HeadshareConfig) -> None:
        """Puts pools in place of layers' own heads, and narrow attention where it leaves something out."""
        layers: list[Any] = list(self.layers)
        head_dim = layers[0].self_attn.head_dim
        runs = [running(config, number, head_dim) for number in range(len(layers))]
        for number, its in enumerate(runs):
            if (its.units, its.qk, its.vo) != (config.units, head_dim, head_dim):
                layers[number].self_attn = HeadshareAttention(config, number, its)
        attentions = [layer.self_attn for layer in layers]
        for projection in filter(partial(is_pooled, config), "qkvo"):
            is_out, group = projection == "o", config.group(projection)
            places = [attention if is_out else apart(attention, config) for attention in attentions]
            linears: list[nn.Linear] = [getattr(place, f"{projection}_proj") for place in places]
            pool = HeadPool(config, projection, head_dim, linears[0].bias is not None)
            setattr(self, f"{projection}_pool", pool)
            for number, (place, linear, its) in enumerate(zip(places, linears, runs, strict=True)):
                width = its.qk if projection in "qk" else its.vo
                pick = picks(its.places[projection], group, width, back=not is_out)
                setattr(place, f"{projection}_proj", Heads(pool, number, pick, linear.bias if is_out else None))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Pick):
            # What was made on no device has no numbers yet.
            module.index.copy_(torch.tensor(module.columns))


class HeadshareForCausalLM(LlamaForCausalLM, GenerationMixin):
    """HeadshareModel with a language modelling head."""

    config: HeadshareConfig
    config_class = HeadshareConfig

    def __init__(self, config: HeadshareConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = HeadshareModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _get_static_cache_init_shape(self) -> None:
        """None: heads of layers differ, and a static cache takes their sizes from the first keys and values."""


class HeadshareForSequenceClassification(GenericForSequenceClassification, LlamaPreTrainedModel):
    """HeadshareModel with a head that classifies texts."""

    config: HeadshareConfig
    config_class = HeadshareConfig

    def __init__(self, config: HeadshareConfig):
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = HeadshareModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


def apart(attention: Any, config: HeadshareConfig) -> Any:
    """The module that has the q, k and v projections of an attention as parts."""
    if not hasattr(attention, "qkv_proj"):
        return attention
    if not isinstance(attention.qkv_proj, Apart):
        heads = [config.num_attention_heads, config.units, config.units]
        attention.qkv_proj = Apart(attention.qkv_proj, [count * attention.head_dim for count in heads])
    return attention.qkv_proj
