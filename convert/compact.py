"""Compact Hugging Face checkpoints: every stored head once, and the PyTorch code that runs the model at that size.

The projections that a map pools lie in pools, `model.q_pool.weight` [P, H, D] with `model.q_pool.index` [layers, heads]
saying which row each head is; everything else lies as in a plain checkpoint of the model's family. Where that fuses
projections of which some are pooled, the others lie apart.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headshare_jax import parameters
from headshare_jax.config import LlamaConfig
from headshare_jax.convert import huggingface, keys
from headshare_jax.convert.safetensors_files import SafetensorsReader
from headshare_jax.convert.tensor_files import TensorCheckpoint
from headshare_jax.errors import HeadshareError
from headshare_jax.families import FAMILIES
from headshare_jax.parameters import PARAMETERS
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.source import WeightSource, assemble, pool_index, read_heads, stored_shape

MODEL_TYPE, ARCHITECTURE, MAP_FIELD = "headshare", "HeadshareForCausalLM", "headshare_map"
# Shipped inside every checkpoint, with the classes of its family in place of Llama's, and run there by transformers;
# never imported here, since it needs torch.
MODELING = Path(__file__).with_name("modeling_headshare.py")

# [P, H, D] <-> [P, D, H]
_ROWS_TURNED = keys.Layout(lambda tensor, width: tensor.swapaxes(1, 2), lambda value, width: value.swapaxes(1, 2))
POOLS: keys.KeyTable = {
    "q_pool_pdh": keys.Key("model.q_pool.weight", _ROWS_TURNED),
    "k_pool_pdh": keys.Key("model.k_pool.weight", _ROWS_TURNED),
    "v_pool_pdh": keys.Key("model.v_pool.weight", _ROWS_TURNED),
    "o_pool_phd": keys.Key("model.o_pool.weight", keys.SAME),
    "q_bias_ph": keys.Key("model.q_pool.bias", keys.SAME),
    "k_bias_ph": keys.Key("model.k_pool.bias", keys.SAME),
    "v_bias_ph": keys.Key("model.v_pool.bias", keys.SAME),
}
# Where a projection that is not pooled lies beside pooled ones that its family fuses it with.
_APART: keys.KeyTable = {
    f"{projection}_pool_pdh": keys.Key(
        f"model.layers.{{layer}}.self_attn.qkv_proj.{projection}_proj.weight", keys.HEADS_IN
    )
    for projection in "qkv"
}


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
    """A compact checkpoint on disk, as a `WeightSource`; reads no more than the heads of the layer asked for.

    Raises:
      HeadshareError: as `TensorCheckpoint`, or an index is not that of the map.
    """

    def read(self, name: str, layer: int | None = None, heads: Sequence[int] | None = None) -> np.ndarray:
        projection = PARAMETERS[name].pool
        if layer is None or projection is None or projection not in _pooled_projections(self.sharing):
            return super().read(name, layer, heads)
        pool = POOLS[name].template

        def read_rows(rows: np.ndarray) -> np.ndarray:
            cut = keys.Cut(0, [slice(row, row + 1) for row in rows.tolist()])
            return keys.decode(POOLS, self.config, name, self.values(pool, cut))

        return read_heads(self, name, layer, heads, read_rows)

    def _expected(self) -> dict[str, keys.Tensor]:
        return _pooled(super()._expected(), self.config, self.sharing)

    def _contradictions(self) -> list[str]:
        indices = _indices(self.config, self.sharing)
        wrong = [
            name
            for name, index in indices.items()
            if not np.array_equal(self.reader.read(self._infos[name], name), index)
        ]
        return super()._contradictions() + [f"{name} disagrees with {MAP_FIELD} in config.json" for name in wrong]


def open_directory(path: Path) -> CompactCheckpoint:
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
    return CompactCheckpoint(path, config, _table(config, sharing), SafetensorsReader(files), sharing=sharing)


def write(source: WeightSource, folder: Path, *, shard_bytes: int = huggingface.SHARD_BYTES) -> None:
    """Writes a source into an existing folder; peak memory is two copies of its largest tensor, such as a pool.

    A normalised output head (Baichuan-2) is written already normalised.
    """
    config, sharing = source.config, source.sharing
    indices, table = _indices(config, sharing), _table(config, sharing)
    tensors = _pooled(keys.tensors(table, config), config, sharing)
    layout = {
        name: (tensor.shape, indices[name].dtype if name in indices else keys.dtype(source, tensor))
        for name, tensor in tensors.items()
    }
    pools = {key.template: name for name, key in POOLS.items()}

    def value(name: str) -> np.ndarray:
        if name in indices:
            return indices[name]
        if name in pools:
            return keys.encode(POOLS, config, pools[name], assemble(source, pools[name]))
        return keys.encoded(table, source, tensors[name])

    huggingface.write_weights(folder, layout, value, shard_bytes)
    huggingface.write_settings(source, folder, _settings(config, sharing))
    (folder / MODELING.name).write_text(_modeling(config.family))


def _modeling(family: str) -> str:
    """The PyTorch code of a family's model."""
    text = MODELING.read_text().replace(f'"{MODEL_TYPE}"', f'"{_model_type(family)}"')
    return text.replace("Llama", FAMILIES[family].architecture.removesuffix("ForCausalLM"))


def _table(config: LlamaConfig, sharing: SharingMap | None) -> keys.KeyTable:
    """Where the parameters that are not pooled lie."""
    table = keys.of_family(config.family)
    fuses_heads = len(keys.fused(table, config, "q_pool_pdh")) > 1
    return {**table, **_APART} if fuses_heads and set("qkv").intersection(_pooled_projections(sharing)) else table


def _settings(config: LlamaConfig, sharing: SharingMap | None) -> dict[str, Any]:
    """What `config.json` says beyond the family's fields, and in place of some."""
    module = MODELING.stem
    return {
        "architectures": [ARCHITECTURE],
        "model_type": _model_type(config.family),
        "auto_map": {
            "AutoConfig": f"{module}.HeadshareConfig",
            "AutoModel": f"{module}.HeadshareModel",
            "AutoModelForCausalLM": f"{module}.{ARCHITECTURE}",
        },
        MAP_FIELD: None if sharing is None else json.loads(sharing.to_json()),
    }


def _pooled(dense: dict[str, keys.Tensor], config: LlamaConfig, sharing: SharingMap | None) -> dict[str, keys.Tensor]:
    """Every tensor of a compact checkpoint, from those of the expanded one."""
    pooled = _pooled_projections(sharing)
    tensors = {name: tensor for name, tensor in dense.items() if PARAMETERS[tensor.parts[0]].pool not in pooled}
    for name in parameters.parameter_names(config):
        if PARAMETERS[name].pool in pooled:
            shape = stored_shape(config, name, sharing)
            shape = keys.encode(POOLS, config, name, np.broadcast_to(np.int8(0), shape)).shape
            tensors[POOLS[name].template] = keys.Tensor((name,), None, shape)
    # An index is no parameter's tensor.
    return tensors | {name: keys.Tensor((), None, index.shape) for name, index in _indices(config, sharing).items()}


def _indices(config: LlamaConfig, sharing: SharingMap | None) -> dict[str, np.ndarray]:
    """The tensors that say which pool row each head of each layer is, int32 [L, heads], by name."""
    return {_index_name(p): pool_index(config, p, sharing) for p in _pooled_projections(sharing)}


def _index_name(projection: str) -> str:
    return f"model.{projection}_pool.index"


def _pooled_projections(sharing: SharingMap | None) -> tuple[str, ...]:
    """The projections that lie in pools."""
    return () if sharing is None else tuple(sharing.pooled)
