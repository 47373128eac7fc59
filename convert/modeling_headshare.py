"""A model whose attention heads share weights or are slim: each stored head is held once, and no column that is cut.

Made by headshare-jax, and self-contained: needs PyTorch and transformers only.
"""

# mypy: allow-untyped-calls

from functools import partial, reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification


class HeadshareConfig(LlamaConfig):
    """LlamaConfig with the sharing map, as in `headshare_map.json`; None for a model that shares nothing."""

    model_type = "headshare"
    # Layers that share heads cannot cut them among devices; every device holds the attention whole.
    base_model_tp_plan: ClassVar[dict[str, Any]] = {
        name: way for name, way in (LlamaConfig.base_model_tp_plan or {}).items() if "self_attn" not in name
    }
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


def kept_columns(config: HeadshareConfig, projection: str) -> dict[int, list[int]]:
    """The columns of a head that slim units keep, by flat index; of o, rows."""
    sharing = config.headshare_map
    assert sharing is not None
    kept: dict[int, list[int]] = {}
    for unit in sharing.get("slim", ()):
        assert config.num_key_value_heads is not None
        flat = unit["layer"] * config.num_key_value_heads + unit["unit"]
        if projection in "vo" and "rank" in unit:
            kept[flat] = list(range(unit["rank"]))
        elif projection in "qk" and "pairs" in unit:
            # Of a rotary pair, two columns; behind those that turn, columns are told one by one.
            half = sharing["model"]["rotary_dim"] // 2
            kept[flat] = [pair for pair in unit["pairs"] if pair < half] + [half + pair for pair in unit["pairs"]]
    return kept


def is_pooled(config: HeadshareConfig, projection: str) -> bool:
    """Whether some unit does not store all of its own weights of this projection."""
    return config.headshare_map is not None and (
        any(unit != donor for unit, donor in enumerate(donors(config, projection)))
        or bool(kept_columns(config, projection))
    )


def blocks(config: HeadshareConfig, projection: str) -> tuple[dict[int, int], list[list[int | None]]]:
    """The stored units in blocks: units of one layer, side by side, that no layer uses without each other.

    Returns:
      the size of every block by its first unit, and every layer's blocks in order, with None for a dropped unit.
    """
    donor = donors(config, projection)
    assert config.num_key_value_heads is not None
    units = config.num_key_value_heads
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
    return sizes, [[unit for unit in layer if unit is None or unit in firsts] for layer in layers]


class HeadPool(nn.Module):
    """The stored heads of one projection: an `nn.Linear` for every block, named by its layer and first unit.

    Attributes:
      parts: for every layer the names of its blocks (None for a dropped unit) and how many numbers are its heads'.
      places: for every layer with slim units, where its heads' columns lie among the blocks', one past them for what is
        cut; of o, which columns of its heads the blocks take.
    """

    def __init__(self, config: HeadshareConfig, projection: str, head_dim: int, bias: bool):
        super().__init__()
        assert config.num_key_value_heads is not None
        units, width = config.num_key_value_heads, config.hidden_size
        self.is_out, self.width = projection == "o", width
        group = config.num_attention_heads // units if projection in "qo" else 1
        kept, every = kept_columns(config, projection), list(range(head_dim))
        sizes, layers = blocks(config, projection)
        unit_sizes = [group * len(kept.get(unit, every)) for unit in range(len(layers) * units)]
        numbers = {first: sum(unit_sizes[first : first + size]) for first, size in sizes.items()}
        for first, heads in numbers.items():
            linear = nn.Linear(heads, width, bias=False) if self.is_out else nn.Linear(width, heads, bias=bias)
            self.add_module(block_name(first, units), linear)
        self.parts = [
            [
                (None, group * head_dim) if first is None else (block_name(first, units), numbers[first])
                for first in layer
            ]
            for layer in layers
        ]
        self.places: dict[int, torch.Tensor] = {}
        for layer in {unit // units for unit in kept}:
            heads_kept = [kept.get(layer * units + head // group, every) for head in range(units * group)]
            self.places[layer] = places_of(heads_kept, head_dim, back=not self.is_out)

    def forward(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        parts, places = self.parts[layer], self.places.get(layer)
        places = None if places is None else places.to(x.device)
        if self.is_out:
            x = x if places is None else x.index_select(-1, places)
            heads = x.split([size for _, size in parts], dim=-1)
            outs = [getattr(self, name)(part) for part, (name, _) in zip(heads, parts, strict=True) if name]
            return reduce(torch.add, outs) if outs else x.new_zeros((*x.shape[:-1], self.width))
        out = torch.cat(
            [getattr(self, name)(x) if name else x.new_zeros((*x.shape[:-1], size)) for name, size in parts], dim=-1
        )
        return out if places is None else nn.functional.pad(out, (0, 1)).index_select(-1, places)


def places_of(heads_kept: list[list[int]], head_dim: int, *, back: bool) -> torch.Tensor:
    """Which columns of heads, side by side, are kept; `back`: where each lies among the kept, or else one past them."""
    taken = [head * head_dim + column for head, kept in enumerate(heads_kept) for column in kept]
    if not back:
        return torch.tensor(taken, device="cpu")
    places = [len(taken)] * (len(heads_kept) * head_dim)
    for place, column in enumerate(taken):
        places[column] = place
    return torch.tensor(places, device="cpu")


def block_name(first: int, units: int) -> str:
    """Name of the block that begins with a unit, by flat index."""
    return f"{first // units}_{first % units}"


class Heads(nn.Module):
    """One layer's q, k, v or o projection, in place of its `nn.Linear`; the bias of o is the layer's own."""

    pool: HeadPool

    def __init__(self, pool: HeadPool, layer: int, bias: nn.Parameter | None = None):
        super().__init__()
        # Past nn.Module's own attributes: the pool belongs to the model, not to this layer.
        self.__dict__["pool"] = pool
        self.layer = layer
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Through the modules' calls, so that hooks run; the pool may lie on another device.
        out: torch.Tensor = self.pool(x, self.layer).to(x.device)
        return out if self.bias is None else out + self.bias


class ReadsPools:
    """Reads also the files of headshare-jax 0.1, in which each pool was one tensor with an index beside it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        folder, load = Path(str(pretrained_model_name_or_path)), super().from_pretrained  # type: ignore[misc]
        files = [safe_open(file, framework="pt") for file in sorted(folder.glob("model*.safetensors"))]
        if not any(name.endswith("_pool.index") for file in files for name in file.keys()):  # noqa: SIM118
            return load(pretrained_model_name_or_path, *args, **kwargs)
        kwargs["config"] = kwargs.get("config") or HeadshareConfig.from_pretrained(folder)
        state = {name: file.get_tensor(name) for file in files for name in file.keys()}  # noqa: SIM118
        kwargs["state_dict"] = in_blocks(state, kwargs["config"])
        return load(None, *args, **kwargs)


def in_blocks(state: dict[str, torch.Tensor], config: HeadshareConfig) -> dict[str, torch.Tensor]:
    """Such a file's tensors as they lie now; a pool's weight was [P, H, D], its bias [P, H]."""
    assert config.num_key_value_heads is not None
    units = config.num_key_value_heads
    made: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        prefix, _, kind = name.rpartition(".")
        projection = prefix.removesuffix("_pool")[-1:]
        if not prefix.endswith("_pool"):
            made[name] = value
        elif kind != "index":
            group = config.num_attention_heads // units if projection in "qo" else 1
            sizes, _ = blocks(config, projection)
            pieces = value.split([size * group for size in sizes.values()])
            for first, piece in zip(sizes, pieces, strict=True):
                rows = piece.flatten(0, 1)
                made[f"{prefix}.{block_name(first, units)}.{kind}"] = (
                    rows.T if projection == "o" else rows
                ).contiguous()
    return made


class Apart(nn.Module):
    """One layer's q, k and v projections as modules, in place of one `nn.Linear` that fuses them."""

    def __init__(self, fused: nn.Linear, rows: list[int]):
        super().__init__()
        for projection, size in zip("qkv", rows, strict=True):
            setattr(self, f"{projection}_proj", nn.Linear(fused.in_features, size, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([module(x) for module in self.children()], dim=-1)


class HeadshareModel(ReadsPools, LlamaModel):
    """LlamaModel with one pool of heads for every projection of which some unit does not store its own."""

    config: HeadshareConfig
    config_class = HeadshareConfig

    def __init__(self, config: HeadshareConfig):
        super().__init__(config)
        attentions: list[Any] = [layer.self_attn for layer in self.layers]
        for projection in filter(partial(is_pooled, config), "qkvo"):
            places = [attention if projection == "o" else apart(attention, config) for attention in attentions]
            linears: list[nn.Linear] = [getattr(place, f"{projection}_proj") for place in places]
            pool = HeadPool(config, projection, attentions[0].head_dim, linears[0].bias is not None)
            setattr(self, f"{projection}_pool", pool)
            for layer, (place, linear) in enumerate(zip(places, linears, strict=True)):
                heads = Heads(pool, layer, linear.bias if projection == "o" else None)
                setattr(place, f"{projection}_proj", heads)
        self.post_init()


class HeadshareForCausalLM(ReadsPools, LlamaForCausalLM, GenerationMixin):
    """HeadshareModel with a language modelling head."""

    config: HeadshareConfig
    config_class = HeadshareConfig

    def __init__(self, config: HeadshareConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = HeadshareModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class HeadshareForSequenceClassification(ReadsPools, GenericForSequenceClassification, LlamaPreTrainedModel):
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
        assert config.num_key_value_heads is not None
        heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        attention.qkv_proj = Apart(attention.qkv_proj, [count * attention.head_dim for count in heads])
    return attention.qkv_proj
