"""A model whose attention heads share weights: each stored head is held once, whoever uses it.

Made by headshare-jax, and self-contained: needs PyTorch and transformers only.
"""

# mypy: allow-untyped-calls

from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

# Where many small products cost less than one copy of the weights; elsewhere every launch of a product costs more.
VIEWS_ON = ("cpu",)


class HeadshareConfig(LlamaConfig):
    """LlamaConfig with the sharing map, as in `headshare_map.json`; None for a model that shares nothing."""

    model_type = "headshare"
    # The family's plan splits projections that are pooled here.
    base_model_tp_plan: ClassVar[dict[str, Any]] = {}
    headshare_map: dict[str, Any] | None = None


def donors(config: HeadshareConfig, projection: str) -> list[int | None]:
    """The unit whose weights each unit uses, by flat index; None for a dropped unit."""
    sharing = config.headshare_map
    assert sharing is not None
    assert config.num_key_value_heads is not None
    units = config.num_key_value_heads
    donor: list[int | None] = list(range(config.num_hidden_layers * units))
    for receiver in sharing["receivers"]:
        if projection in receiver.get("tie", sharing["tie"]):
            donor_layer, donor_unit = receiver["donor"]
            donor[receiver["layer"] * units + receiver["unit"]] = donor_layer * units + donor_unit
    for unit in sharing.get("dropped", ()):
        donor[unit["layer"] * units + unit["unit"]] = None
    return donor


def pool_index(config: HeadshareConfig, projection: str) -> tuple[list[list[int]], int]:
    """Pool row of every head of every layer, and the number of rows, which is also the row of every dropped head."""
    donor = donors(config, projection)
    assert config.num_key_value_heads is not None
    units = config.num_key_value_heads
    heads = config.num_attention_heads // units if projection in "qo" else 1
    stored = [unit for unit, its_donor in enumerate(donor) if unit == its_donor]
    first_row = {unit: place * heads for place, unit in enumerate(stored)}
    count = len(stored) * heads
    rows = [count if unit is None else first_row[unit] + head for unit in donor for head in range(heads)]
    width = units * heads
    return [rows[start : start + width] for start in range(0, len(rows), width)], count


def is_pooled(config: HeadshareConfig, projection: str) -> bool:
    """Whether some unit does not store its own weights of this projection."""
    return config.headshare_map is not None and any(
        unit != donor for unit, donor in enumerate(donors(config, projection))
    )


class HeadPool(nn.Module):
    """The stored heads of one projection.

    Attributes:
      weight: [P, H, D], one stored head a row.
      bias: [P, H], or None.
      index: int32 [L, heads], row of every head of every layer; P for a dropped head.
      drops: whether any head is dropped.
    """

    index: torch.Tensor

    def __init__(self, index: list[list[int]], rows: int, head_dim: int, hidden_size: int, bias: bool):
        super().__init__()
        self.drops = any(rows in layer for layer in index)
        self.weight = nn.Parameter(torch.empty(rows, head_dim, hidden_size))
        self.bias = nn.Parameter(torch.empty(rows, head_dim)) if bias else None
        self.register_buffer("index", torch.tensor(index, dtype=torch.int32))

    def pieces(self, layer: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """One layer's heads in order: weights [n * H, D] and biases [n * H] of pieces of n heads.

        On a CPU these are views of the pool's runs of rows, elsewhere one copy. The last row stands in for dropped
        heads.
        """
        index = self.index[layer].clamp(max=self.weight.shape[0] - 1)
        rows: list[Any] = _runs(index.tolist()) if self.weight.device.type in VIEWS_ON else [index]
        bias = self.bias
        return [(self.weight[row].flatten(0, 1), None if bias is None else bias[row].flatten()) for row in rows]


class HeadsIn(nn.Module):
    """One layer's q, k or v projection, in place of its `nn.Linear`."""

    pool: HeadPool

    def __init__(self, pool: HeadPool, layer: int):
        super().__init__()
        # Past nn.Module's own attributes: the pool belongs to the model, not to this layer.
        self.__dict__["pool"] = pool
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pieces = self.pool.pieces(self.layer)
        return torch.cat([nn.functional.linear(x, weight, bias) for weight, bias in pieces], dim=-1)


class HeadsOut(nn.Module):
    """One layer's o projection, in place of its `nn.Linear`; its bias is the layer's own."""

    pool: HeadPool

    def __init__(self, pool: HeadPool, layer: int, bias: nn.Parameter | None):
        super().__init__()
        self.__dict__["pool"] = pool
        self.layer = layer
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool.drops:
            kept = (self.pool.index[self.layer] < self.pool.weight.shape[0]).to(x.dtype)
            x = x * kept.repeat_interleave(self.pool.weight.shape[1])
        weights = [weight for weight, _ in self.pool.pieces(self.layer)]
        parts = x.split([weight.shape[0] for weight in weights], dim=-1)
        out: torch.Tensor = sum(part @ weight for part, weight in zip(parts, weights, strict=True))
        return out if self.bias is None else out + self.bias


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
        attentions: list[Any] = [layer.self_attn for layer in self.layers]
        width = attentions[0].head_dim
        for projection in filter(partial(is_pooled, config), "qkvo"):
            places = [attention if projection == "o" else apart(attention, config) for attention in attentions]
            linear: nn.Linear = getattr(places[0], f"{projection}_proj")
            index, rows = pool_index(config, projection)
            bias = linear.bias is not None and projection != "o"
            pool = HeadPool(index, rows, width, config.hidden_size, bias)
            setattr(self, f"{projection}_pool", pool)
            for layer, place in enumerate(places):
                if projection == "o":
                    place.o_proj = HeadsOut(pool, layer, place.o_proj.bias)
                else:
                    setattr(place, f"{projection}_proj", HeadsIn(pool, layer))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HeadPool):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class HeadshareForCausalLM(LlamaForCausalLM):
    """HeadshareModel with a language modelling head."""

    config: HeadshareConfig
    config_class = HeadshareConfig

    def __init__(self, config: HeadshareConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = HeadshareModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def apart(attention: Any, config: HeadshareConfig) -> Any:
    """The module that has the q, k and v projections of an attention as parts."""
    if not hasattr(attention, "qkv_proj"):
        return attention
    if not isinstance(attention.qkv_proj, Apart):
        assert config.num_key_value_heads is not None
        heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        attention.qkv_proj = Apart(attention.qkv_proj, [count * attention.head_dim for count in heads])
    return attention.qkv_proj


def _runs(rows: list[int]) -> list[slice]:
    """The rows as slices of consecutive ones."""
    runs: list[slice] = []
    for row in rows:
        if runs and runs[-1].stop == row:
            runs[-1] = slice(runs[-1].start, row + 1)
        else:
            runs.append(slice(row, row + 1))
    return runs
