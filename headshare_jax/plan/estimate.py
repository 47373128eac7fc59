"""A step to plan, how it can be spread over chips, and what it needs as far as shapes tell."""

from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import AbstractMesh

from headshare_jax.chips import Chip
from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.model.layer import REMAT_POLICIES
from headshare_jax.model.mesh import AXES
from headshare_jax.parameters import parameter_names
from headshare_jax.plan.costs import Costs
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.shapes import TPU_MULTIPLE, HeadShape, cache_slots, columns, head_shapes
from headshare_jax.train.losses import HEAD_TOKENS
from headshare_jax.train.placement import abstract_params, bytes_on_device

STAGES = ("decode", "prefill", "postshare", "run")
# What `speed` tells.
COSTS = (
    *("flops", "hbm_bytes_accessed", "collective_bytes", "largest_collective_bytes"),
    *("seconds", "step_seconds", "bound_by", "tokens_per_second"),
)
# Part of the needed memory that an estimate adds for what it leaves out.
MARGIN = 0.1


@dataclass(frozen=True)
class Workload:
    """A step to plan, in bfloat16.

    Attributes:
      config: the architecture.
      sharing: the map of the shared model; sizes depend on its number of receivers and its tie alone.
      stage: `decode`, a round of the loop that adds a token to every sequence; `prefill`, the run over the prompts;
        `postshare`, a training step: of the dense model with the penalty (align), and of the shared one (tied); or
        `run`, the same and what a run does outside its steps.
      batch: sequences, over all chips.
      length: tokens of a sequence; in `decode`, positions that the cache has room for, all of which are read, or as
        many of them as it keeps of sliding windows.
    """

    config: LlamaConfig
    sharing: SharingMap
    stage: str
    batch: int
    length: int

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise HeadshareError(f"The stage must be one of {', '.join(STAGES)}, not {self.stage!r}.", option="stage")
        if self.batch < 1 or self.length < 2:
            raise HeadshareError(
                f"A batch of {self.batch} x {self.length} tokens is none; give at least 1 x 2.",
                option=("batch", "length"),
            )

    @property
    def trains(self) -> bool:
        """Whether gradients are taken."""
        return self.stage in ("postshare", "run")

    def filled(self, layout: "Layout") -> "Workload":
        """With as many sequences as `generate` runs on a layout that the batch does not fill; training runs its own."""
        missing = 0 if self.trains else -self.batch % layout.batch_parts
        return replace(self, batch=self.batch + missing)

    def shapes(self, layout: "Layout", *, shared: bool) -> tuple[HeadShape, ...]:
        """The heads that each layer runs with, of the shared model or the dense one."""
        sharing = self.sharing if shared and not self.trains else None
        return head_shapes(self.config, sharing, layout.mesh[2], TPU_MULTIPLE)

    @property
    def tokens(self) -> int:
        """Tokens that a step adds or learns from, over all chips."""
        return self.batch if self.stage == "decode" else self.batch * self.length


@dataclass(frozen=True)
class Layout:
    """How a step is spread over chips: sizes of the mesh's axes (data, fsdp, tensor), and what is kept for gradients.

    Attributes:
      mesh: sizes of the mesh's axes.
      remat: `none`, `dots` or `full`; `none` where nothing is trained.
    """

    mesh: tuple[int, ...]
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.remat not in REMAT_POLICIES:
            raise HeadshareError(
                f"remat must be one of {', '.join(REMAT_POLICIES)}, not {self.remat!r}.", option="remat"
            )

    @property
    def batch_parts(self) -> int:
        """Parts that a batch is cut into."""
        return self.mesh[0] * self.mesh[1]

    def gathers(self, workload: Workload) -> bool:
        """Whether chips gather the weights of a layer that the fsdp axis cuts."""
        return self.mesh[1] > 1 and workload.stage != "decode"


def meshes(workload: Workload, count: int) -> list[tuple[int, ...]]:
    """Meshes of `count` chips that the batch can be cut over, those that move fewest weights first."""
    tensors = [2**power for power in range(count.bit_length()) if count % 2**power == 0]
    replicas: list[tuple[int, ...]] = [(count // tensor, 1, tensor) for tensor in tensors]
    shards: list[tuple[int, ...]] = [(1, count // tensor, tensor) for tensor in tensors]
    sizes = [(count, 1, 1), *shards] if workload.trains else [*replicas, *reversed(shards)]
    return [mesh for mesh in dict.fromkeys(sizes) if workload.batch % (mesh[0] * mesh[1]) == 0]


def estimated(workload: Workload, layout: Layout, chip: Chip, *, shared: bool) -> dict[str, Any]:
    """What a step needs and costs on a chip, from shapes: exact for what is stored, rough for all else.

    The keys are those of `planning.measured`; `compile_seconds` is None.
    """
    if workload.batch % layout.batch_parts:
        raise HeadshareError(
            f"The batch ({workload.batch}) must be a multiple of the mesh's data x fsdp ({layout.batch_parts}); "
            "change either.",
            option=("batch", "mesh"),
        )
    config, tensor, train = workload.config, layout.mesh[2], workload.trains
    stored, local = _parameters(workload, layout, shared=shared)
    used = _used_parameters(workload, layout, shared=shared)
    tokens = workload.tokens // layout.batch_parts
    cache, kept = (0, activation_bytes(workload, layout))
    if not train:
        cache, kept = cache_bytes(workload, layout, shared=shared), 0
    held = {
        "parameter_bytes": local * (4 if train else 2),
        "optimizer_bytes": local * 8 if train else 0,
        "cache_bytes": cache,
    }
    layer = 2 * tokens * (8 * config.hidden_size + 4 * config.intermediate_size) // tensor
    head = 8 * config.vocab_size * min(tokens, HEAD_TOKENS) + 4 * config.vocab_size * config.hidden_size
    # A round of decoding leaves weights where they lie; all else gathers a layer's for its tokens.
    parts = tensor * (layout.mesh[1] if workload.stage == "decode" else 1)
    gathered = (4 if train else 2) * used // config.num_layers // tensor if layout.gathers(workload) else 0
    temporary = kept + layer + gathered + (4 * local + head // tensor if train else 0)
    passes = (4 if layout.remat == "full" else 3) if train else 1
    flops = passes * 2 * used * tokens / tensor + attention_flops(workload, layout, shared=shared)
    traffic = (passes * 2 * used / parts) + cache + 2 * kept + passes * layer * config.num_layers
    traffic += 7 * 4 * local if train else 0
    needed = sum(held.values()) + temporary
    return {
        **held,
        "argument_bytes": sum(held.values()),
        "activation_bytes": kept,
        "temporary_bytes": temporary,
        **fit(chip, round(needed * (1 + MARGIN))),
        **speed(workload, chip, Costs(flops, traffic, _network(workload, layout, stored, tokens), {})),
        "costs_estimated": True,
        "compile_seconds": None,
    }


def cache_bytes(workload: Workload, layout: Layout, *, shared: bool) -> int:
    """Bytes of the key/value cache on a chip, where nothing is trained."""
    config, rows, tensor = workload.config, workload.batch // layout.batch_parts, layout.mesh[2]
    parts = tensor if config.num_kv_heads % tensor == 0 else 1
    return 2 * rows * columns(workload.shapes(layout, shared=shared)) * cache_slots(config, workload.length) // parts


def activation_bytes(workload: Workload, layout: Layout) -> int:
    """Bytes on a chip that the remat policy keeps for the backward pass of a training step."""
    config = workload.config
    width = config.hidden_size
    if layout.remat != "full":
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        width += heads + config.hidden_size + 2 * config.intermediate_size // layout.mesh[2]
    if layout.remat == "none":
        width += config.num_heads * config.head_dim
    return 2 * config.num_layers * width * workload.tokens // layout.batch_parts


def attention_flops(workload: Workload, layout: Layout, *, shared: bool = False) -> float:
    """FLOPs on a chip of scores and weighted values, each query with the keys before it in its window.

    Without a policy that keeps everything, training runs the forward pass's two products twice; the backward pass's
    two kernels have seven.
    """
    config = workload.config
    if workload.stage == "decode":
        seen_l = [float(cache_slots(config, workload.length))] * config.num_layers
    else:
        # Where layers differ, only the kernels that train spare the keys before a window.
        alike = len(set(config.windows)) == 1
        seen_l = [_keys(workload.length, each if alike or workload.trains else None) for each in config.windows]
    pairs = zip(seen_l, workload.shapes(layout, shared=shared), strict=True)
    forward = 2 * sum(seen * config.heads_per_unit * columns([shape]) for seen, shape in pairs)
    products = (9 if layout.remat == "none" else 11) if workload.trains else 2
    return products / 2 * forward * workload.tokens / layout.batch_parts / layout.mesh[2]


def _keys(length: int, window: int | None) -> float:
    """Keys that a query sees, the mean over all places in a sequence."""
    most = min(length, window or length)
    return most - most * most / (2 * length)


def fit(chip: Chip, needed: int) -> dict[str, Any]:
    """Whether so many bytes fit a chip, and what room is left."""
    room = chip.hbm_bytes - needed
    return {"needed_bytes": needed, "room_bytes": room, "fits": room >= 0}


def speed(workload: Workload, chip: Chip, costs: Costs) -> dict[str, Any]:
    """Costs of a step, and the least time it can take at the chip's published rates."""
    seconds = {
        "compute": costs.flops / chip.flops,
        "memory": costs.hbm_bytes / chip.hbm_bandwidth,
        "network": sum(costs.collective_bytes.values()) / chip.network_bandwidth,
    }
    bound_by = max(seconds, key=lambda name: seconds[name])
    return {
        "flops": costs.flops,
        "hbm_bytes_accessed": costs.hbm_bytes,
        "collective_bytes": costs.collective_bytes,
        "largest_collective_bytes": costs.collective_largest,
        "seconds": seconds,
        "step_seconds": seconds[bound_by],
        "bound_by": bound_by,
        "tokens_per_second": workload.tokens / seconds[bound_by],
    }


def _parameters(workload: Workload, layout: Layout, *, shared: bool) -> tuple[int, int]:
    """Stored parameters of the whole model, and on a chip."""
    config, sharing, mesh = workload.config, workload.sharing if shared else None, AbstractMesh(layout.mesh, AXES)
    params = abstract_params(config, sharing, mesh, dict.fromkeys(parameter_names(config), "int8"))
    return sum(param.size for param in params.values()), bytes_on_device(params)


def _used_parameters(workload: Workload, layout: Layout, *, shared: bool) -> int:
    """Parameters that a token is multiplied by."""
    config, (dense, _) = workload.config, _parameters(workload, layout, shared=False)
    gone = columns(head_shapes(config)) - columns(workload.shapes(layout, shared=shared))
    return dense - gone * config.hidden_size * (1 + config.heads_per_unit)


def _network(workload: Workload, layout: Layout, stored: int, tokens: int) -> dict[str, float]:
    config, tensor = workload.config, layout.mesh[2]
    sent: dict[str, float] = {}
    if layout.gathers(workload):
        sent = {"all-gather": (2 if workload.trains else 1) * 2 * stored / tensor}
    if workload.trains and layout.mesh[1] > 1:
        sent["reduce-scatter"] = 2 * stored / tensor
    elif workload.trains and layout.mesh[0] > 1:
        sent = {"all-reduce": 2 * 4 * stored}
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim + 2 * config.hidden_size
    summed = (3 if workload.trains else 1) * tokens * width if tensor > 1 else 0
    if workload.stage == "decode" and layout.mesh[1] > 1:
        summed += layout.mesh[1] * tokens * (width + 2 * config.intermediate_size // tensor)
    if summed:
        sent["all-reduce"] = sent.get("all-reduce", 0) + 2 * 2 * config.num_layers * summed
    return sent
