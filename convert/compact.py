"""Compact Hugging Face checkpoints: every stored head once, and the PyTorch code that runs the model at that size.

The heads of a projection that a map pools lie in blocks: units of one layer, side by side, that no layer uses without
each other. `model.q_pool.3_1.weight` has layer 3's from unit 1 on, as a part of the family's own projection: rows of q,
k and v, columns of o; of a slim unit, those alone that it keeps. Everything else lies as in a plain checkpoint of the
model's family; where that fuses projections of which some are pooled, the others lie apart. Which blocks a layer uses
follows from the map in `config.json`.

Before, each pool was one tensor with an index beside it (`compact_before`).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from headshare_jax import parameters
from headshare_jax.config import LlamaConfig
from headshare_jax.convert import compact_before, huggingface, keys
from headshare_jax.convert.safetensors_files import SafetensorsReader
from headshare_jax.convert.tensor_files import TensorCheckpoint
from headshare_jax.convert.written import Written
from headshare_jax.errors import HeadshareError
from headshare_jax.families import FAMILIES
from headshare_jax.parameters import PARAMETERS
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.source import WeightSource, read_heads

MODEL_TYPE, MAP_FIELD = "headshare", "headshare_map"
# Shipped inside every checkpoint, with the classes of its family in place of Llama's, and run there by transformers;
# never imported here, since it needs torch.
MODELING = Path(__file__).with_name("modeling_headshare.py")
_CLASSES = {
    "AutoConfig": "HeadshareConfig",
    "AutoModel": "HeadshareModel",
    "AutoModelForCausalLM": "HeadshareForCausalLM",
    "AutoModelForSequenceClassification": "HeadshareForSequenceClassification",
}

BLOCKS: keys.KeyTable = {
    "q_pool_pdh": keys.Key("model.q_pool.{block}.weight", keys.HEADS_IN),
    "k_pool_pdh": keys.Key("model.k_pool.{block}.weight", keys.HEADS_IN),
    "v_pool_pdh": keys.Key("model.v_pool.{block}.weight", keys.HEADS_IN),
    "o_pool_phd": keys.Key("model.o_pool.{block}.weight", keys.HEADS_OUT),
    "q_bias_ph": keys.Key("model.q_pool.{block}.bias", keys.HEAD_BIAS),
    "k_bias_ph": keys.Key("model.k_pool.{block}.bias", keys.HEAD_BIAS),
    "v_bias_ph": keys.Key("model.v_pool.{block}.bias", keys.HEAD_BIAS),
}
# Where a projection that is not pooled lies beside pooled ones that its family fuses it with.
_APART: keys.KeyTable = {
    f"{projection}_pool_pdh": keys.Key(
        f"model.layers.{{layer}}.self_attn.qkv_proj.{projection}_proj.weight", keys.HEADS_IN
    )
    for projection in "qkv"
}


@dataclass(frozen=True)
class Block:
    """Stored heads that lie in one tensor.

    Attributes:
      layer: whose they are.
      name: its layer and its first unit.
      heads: their places among the layer's heads.
      row: pool row of the first.
      rows: pool rows of them all: heads, or the columns that they keep.
      kept: bool [n, H], the columns of heads that are kept; None where nothing of any unit is cut.
    """

    layer: int
    name: str
    heads: range
    row: int
    rows: int
    kept: np.ndarray | None


def blocks(sharing: SharingMap, projection: str) -> list[Block]:
    """The blocks in which a projection's stored heads lie, in the order of pool rows."""
    units = sharing.donor.shape[1]
    group = sharing.heads_per_unit if projection in "qo" else 1
    unit_lu = sharing.head_donor(projection)[:, ::group] // group
    kept_lnh = None if sharing.widths is None else sharing.kept_columns(projection)
    before_lu = np.pad(unit_lu[:, :-1], ((0, 0), (1, 0)), constant_values=-2)
    breaks = before_lu + 1 != unit_lu
    firsts = np.concatenate([unit_lu[breaks], before_lu[breaks] + 1, unit_lu[:, -1] + 1])
    firsts = np.union1d(firsts, np.arange(0, unit_lu.size, units))
    stored = np.flatnonzero(unit_lu.ravel() == np.arange(unit_lu.size))
    runs = np.split(stored, np.flatnonzero(np.isin(stored, firsts))[1:])
    found, row = [], 0
    for run in filter(len, runs):
        layer, unit = divmod(int(run[0]), units)
        heads = range(unit * group, (unit + len(run)) * group)
        kept = None if kept_lnh is None else kept_lnh[layer, heads.start : heads.stop]
        found.append(Block(layer, f"{layer}_{unit}", heads, row, len(heads) if kept is None else int(kept.sum()), kept))
        row += found[-1].rows
    return found


def is_compact(path: Path) -> bool:
    """Whether a folder is a compact checkpoint."""
    return family(path) is not None


def family(path: Path) -> str | None:
    """The family of a compact checkpoint; None for another kind of folder."""
    config = path / "config.json"
    kind = huggingface.read_json(config).get("model_type") if config.is_file() else None
    return next((name for name in FAMILIES if kind == _model_type(name)), None)


def _model_type(family: str) -> str:
    return MODEL_TYPE if family == "llama" else f"{MODEL_TYPE}_{family}"


class CompactCheckpoint(TensorCheckpoint):
    """A compact checkpoint on disk, as a `WeightSource`; reads no more than the heads of the layer asked for."""

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        projection = PARAMETERS[name].pool
        if layer is None or projection is None or self.sharing is None or projection not in self.sharing.pooled:
            return super().read(name, layer, rows)
        found, axis = blocks(self.sharing, projection), BLOCKS[name].layout.heads_axis
        by_columns = self.sharing.widths is not None
        width = 1 if by_columns else self.config.head_dim
        first_rows = [block.row for block in found]

        def read_rows(stored: np.ndarray) -> np.ndarray:
            places = np.searchsorted(first_rows, stored, side="right") - 1
            breaks = np.flatnonzero((np.diff(places) != 0) | (np.diff(stored) != 1)) + 1
            return np.concatenate(
                [
                    read_run(found[place[0]], run)
                    for place, run in zip(np.split(places, breaks), np.split(stored, breaks), strict=True)
                ]
            )

        def read_run(block: Block, run: np.ndarray) -> np.ndarray:
            tensor, start = _tensor_name(name, block), int(run[0]) - block.row
            part = slice(start * width, (start + len(run)) * width)
            values = self.values(tensor, None if len(run) == block.rows else keys.Cut(axis, [part]))
            if by_columns:
                return np.moveaxis(values, axis, 0)
            return keys.decode(BLOCKS, self.config, name, values)

        return read_heads(self, name, layer, rows, read_rows)

    def _expected(self) -> dict[str, keys.Tensor]:
        dense = not_pooled(super()._expected(), self.sharing)
        return dense | {tensor: shape for tensor, (_, shape) in _tensors(self.config, self.sharing).items()}


def open_directory(path: Path) -> TensorCheckpoint:
    """Opens a compact checkpoint, whether this library wrote it or PyTorch's `save_pretrained`.

    Raises:
      HeadshareError: no configuration, no map, no weights, or one of them unusable or at odds with another.
    """
    fields = huggingface.read_json(path / "config.json")
    document = fields.pop(MAP_FIELD, None)
    sharing = None if document is None else SharingMap.from_json(json.dumps(document))
    config = LlamaConfig.from_hf(fields | {"model_type": family(path), "architectures": None})
    config = huggingface.with_stop_tokens(config, path)
    if sharing is not None:
        sharing.check_model(config)
    files = huggingface.weight_files(path, "model.safetensors")
    if not files:
        raise HeadshareError(f"{path} has a config.json but no weights (model*.safetensors); fetch them.")
    reader = SafetensorsReader(files)
    kind = compact_before.PoolsCheckpoint if compact_before.has_pools(reader) else CompactCheckpoint
    return kind(path, config, _table(config, sharing), reader, sharing=sharing)


def write(
    source: WeightSource,
    folder: Path,
    *,
    shard_bytes: int = huggingface.SHARD_BYTES,
    notes: Written | None = None,
) -> None:
    """Writes a source into an existing folder; arguments and peak memory are those of `huggingface.write`.

    A model without a map is written as a plain one of its family, which runs without code of its own. A normalised
    output head (Baichuan-2) is written already normalised.
    """
    config, sharing = source.config, source.sharing
    if sharing is None:
        huggingface.write(source, folder, shard_bytes=shard_bytes, notes=notes)
        return
    table, pooled = _table(config, sharing), _tensors(config, sharing)
    dense = not_pooled(keys.tensors(table, config), sharing)
    every = dense | {name: tensor for name, (_, tensor) in pooled.items()}
    layout = {name: (tensor.shape, keys.dtype(source, tensor)) for name, tensor in every.items()}

    def heads(name: str) -> np.ndarray:
        block, tensor = pooled[name]
        (parameter,) = tensor.parts
        return _tensor(config, parameter, source.read(parameter, block.layer, list(block.heads)), block)

    def reads(name: str) -> keys.Reads:
        return keys.reads(table, source, dense[name]) if name in dense else [partial(heads, name)]

    huggingface.write_weights(folder, layout, reads, shard_bytes, notes)
    (folder / MODELING.name).write_text(_modeling(config.family), encoding="utf-8")
    huggingface.write_settings(source, folder, _settings(config, sharing))


def _modeling(family: str) -> str:
    """The PyTorch code of a family's model."""
    text = MODELING.read_text(encoding="utf-8").replace(f'"{MODEL_TYPE}"', f'"{_model_type(family)}"')
    text = text.replace("models.llama.modeling_llama", f"models.{family}.modeling_{family}")
    return text.replace("Llama", FAMILIES[family].architecture.removesuffix("ForCausalLM"))


def _table(config: LlamaConfig, sharing: SharingMap | None) -> keys.KeyTable:
    """Where the parameters that are not pooled lie."""
    table = keys.of_family(config.family)
    fuses_heads = len(keys.fused(table, config, "q_pool_pdh")) > 1
    pooled = set() if sharing is None else set("qkv").intersection(sharing.pooled)
    return {**table, **_APART} if fuses_heads and pooled else table


def _settings(config: LlamaConfig, sharing: SharingMap) -> dict[str, Any]:
    """What `config.json` says beyond the family's fields, and in place of some."""
    return {
        "architectures": [_CLASSES["AutoModelForCausalLM"]],
        "model_type": _model_type(config.family),
        "auto_map": {auto: f"{MODELING.stem}.{name}" for auto, name in _CLASSES.items()},
        MAP_FIELD: json.loads(sharing.to_json()),
    }


def not_pooled(dense: dict[str, keys.Tensor], sharing: SharingMap | None) -> dict[str, keys.Tensor]:
    """The tensors of a plain checkpoint that hold no pooled projection."""
    pooled = "" if sharing is None else sharing.pooled
    return {name: tensor for name, tensor in dense.items() if (PARAMETERS[tensor.parts[0]].pool or "-") not in pooled}


def _tensors(config: LlamaConfig, sharing: SharingMap | None) -> dict[str, tuple[Block, keys.Tensor]]:
    """Every block's tensors by name."""
    return {} if sharing is None else dict(_each_tensor(config, sharing))


def _each_tensor(config: LlamaConfig, sharing: SharingMap) -> Iterator[tuple[str, tuple[Block, keys.Tensor]]]:
    for name in parameters.parameter_names(config):
        projection = PARAMETERS[name].pool
        if projection is not None and projection in sharing.pooled:
            sizes = parameters.slice_shape(config, name)[1:]
            for block in blocks(sharing, projection):
                like = np.broadcast_to(np.int8(0), (len(block.heads), *sizes))
                shape = _tensor(config, name, like, block).shape
                yield _tensor_name(name, block), (block, keys.Tensor((name,), block.layer, shape))


def _tensor(config: LlamaConfig, name: str, heads: np.ndarray, block: Block) -> np.ndarray:
    """A block's tensor, of its heads in full."""
    values = keys.encode(BLOCKS, config, name, heads)
    return values if block.kept is None else np.compress(block.kept.ravel(), values, BLOCKS[name].layout.heads_axis)


def _tensor_name(name: str, block: Block) -> str:
    return BLOCKS[name].template.format(block=block.name)
