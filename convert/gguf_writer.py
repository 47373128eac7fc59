"""GGUF files written for llama.cpp, tensor by tensor."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.convert import (
    generation_config,
    gguf_heads,
    gguf_settings,
    gguf_vocabulary,
    huggingface,
    keys,
    pieces,
    storage,
    tokenizer,
)
from headshare_jax.convert.gguf_header import read_header
from headshare_jax.convert.gguf_tensors import PLAIN, GgufReader, Kind, can_quantise, quantised
from headshare_jax.convert.partial import temporary_folder
from headshare_jax.convert.written import Written
from headshare_jax.errors import HeadshareError
from headshare_jax.sharing.ledger import ledger
from headshare_jax.sharing.source import WeightSource
from headshare_jax.sharing.view import CastView, View

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ENDING = ".gguf"
_ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
# These say how the source's file was laid out.
_LAYOUT = tuple(f"general.{name}" for name in ("architecture", "alignment", "file_type", "quantization_version"))
# How the values and the items of lists that are not carried from a file are stored.
_TYPES = {
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
    str: gguf.GGUFValueType.STRING,
}
# A value, how it is stored, and how the items of a list are.
Stored = tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]


def types() -> list[str]:
    """Types in which matrices can be written, for `write`."""
    named = [kind for kind in Kind if kind is Kind.F32 or f"MOSTLY_{kind.name}" in gguf.LlamaFileType.__members__]
    return [kind.name.lower() for kind in named if can_quantise(kind)]


def check_type(quantize: str | None) -> None:
    """Raises HeadshareError unless a type is None or one of `types()`."""
    if quantize is None or quantize.lower() in types():
        return
    if {f"MOSTLY_{quantize.upper()}", f"MOSTLY_{quantize.upper()}_M"} & gguf.LlamaFileType.__members__.keys():
        raise HeadshareError(
            f"{quantize} cannot be written here; write f16, and make it with llama.cpp's own tool: "
            f"llama-quantize model-f16.gguf model-{quantize}.gguf {quantize.upper()}",
            option="quantize",
        )
    raise HeadshareError(f"The type {quantize!r} is not one of {', '.join(types())}.", option="quantize")


def write(
    source: WeightSource,
    path: Path,
    *,
    name: str,
    quantize: str | None = None,
    tokenizer_from: "Path | PreTrainedTokenizerBase | None" = None,
    provenance: Mapping[str, Any] | None = None,
    documents: Mapping[str, str] | None = None,
    generation: Mapping[str, Any] | None = None,
    notes: Written | None = None,
) -> None:
    """Writes a source as one file; peak memory is a few copies of its largest tensor.

    A model of which a map only drops heads is written without them, as llama.cpp's architecture `deci`, if it is a
    Llama. Any other map is written out: every receiver gets its own copy of its donor's weights.

    Args:
      source: a model or an opened checkpoint.
      path: the file.
      name: of the model, where neither its source nor a GGUF file that it comes from has one.
      quantize: type of the matrices, one of `types()`; vectors are float32. By default each keeps its own type, also
        that of the GGUF file that it comes from.
      tokenizer_from: what has the tokenizer; a GGUF file's general metadata is carried too.
      provenance, documents: kept in the metadata.
      generation: fields of a `generation_config.json`; what GGUF has keys for is kept.
      notes: of what was written before, by a process that was killed; none by default.

    Raises:
      HeadshareError: an architecture that llama.cpp does not have, a tokenizer that GGUF cannot hold, or rows that are
        not a whole number of a type's blocks.
    """
    config = replace(source.config, normalize_head=False)
    architecture, kept_lu = gguf_settings.architecture_of(config), None
    sharing = source.sharing
    if sharing is not None and architecture == "llama" and sharing.dropped.any() and not sharing.receives.any():
        architecture, kept_lu = "deci", gguf_heads.units_written(config, sharing)
    table, view = keys.GGUF[architecture], source
    if kept_lu is None:
        tensors = keys.tensors(table, config)
    else:
        tensors, view = gguf_heads.tensors(table, config, kept_lu), gguf_heads.KeptView(source, kept_lu)
    weights = _Weights(view, table, tensors, _origin(source), quantize)
    settings = gguf_settings.written(architecture, config)
    told = dict(provenance or {})
    _tell_limits(config, architecture)
    metadata: dict[str, Stored] = {}
    for values in (
        _general(weights, told, name),
        settings,
        {} if kept_lu is None else gguf_heads.head_counts(config, kept_lu),
        {} if kept_lu is None else _norms(source, kept_lu),
        _own(source, config, told, documents or {}),
        _token_ids(config),
        generation_config.gguf_keys(generation or {}),
    ):
        metadata |= {key: _typed(value) for key, value in values.items()}
    metadata |= _carried(tokenizer_from, config)
    _describe(source, metadata, kept_lu is not None)
    _write(path, architecture, metadata, weights, notes)


def expected_bytes(source: WeightSource, quantize: str | None) -> int:
    """About how large a GGUF file of a source becomes."""
    origin = _origin(source)
    if quantize is None and origin is not None:
        return sum(tensor.size for tensor in origin.header.tensors.values())
    sizes = ledger(source)
    if quantize is None:
        return sizes.dense_bytes
    block, block_bytes = gguf.GGML_QUANT_SIZES[Kind.__members__[quantize.upper()]]
    return sizes.dense * block_bytes // block


def _tell_limits(config: LlamaConfig, architecture: str) -> None:
    if config.sliding_window is not None and config.sliding_window < config.max_position_embeddings:
        logger.warning(
            "llama.cpp's architecture %s has no sliding window: past %s tokens it computes something else.",
            architecture,
            config.sliding_window,
        )


def _origin(source: WeightSource) -> GgufReader | None:
    """The GGUF file that a source is a view of, unless all of it is cast to a type."""
    while isinstance(source, View) and not isinstance(source, CastView):
        source = source.base
    reader = getattr(source, "reader", None)
    return reader if isinstance(reader, GgufReader) else None


class _Weights:
    """The tensors of a file to be written: how each is stored, and its values when their turn comes.

    Attributes:
      shapes: by name, in file order.
      kinds: how each is stored.
      file_type: llama.cpp's name of most of them.
    """

    def __init__(
        self,
        source: WeightSource,
        table: keys.KeyTable,
        tensors: Mapping[str, keys.Tensor],
        origin: GgufReader | None,
        quantize: str | None,
    ):
        self._source, self._table, self._tensors, self._origin = source, table, tensors, origin
        self._rope = gguf_settings.rope_tensors(source.config)
        self.shapes = {name: values.shape for name, values in self._rope.items()}
        self.shapes |= {name: tensor.shape for name, tensor in tensors.items()}
        wanted = None if quantize is None else Kind.__members__[quantize.upper()]
        self.kinds = {name: self._kind(name, wanted) for name in self.shapes}
        carried = None if origin is None or wanted is not None else origin.header.metadata.get("general.file_type")
        self.file_type = carried if isinstance(carried, int) else self._file_type()
        for name, kind in self.kinds.items():
            block, _ = gguf.GGML_QUANT_SIZES[kind]
            if self.shapes[name][-1] % block:
                raise HeadshareError(
                    f"{name} has rows of {self.shapes[name][-1]} values, which {kind.name.lower()}, in blocks of "
                    f"{block}, cannot hold; quantize to f16 instead.",
                    option="quantize",
                )

    def _file_type(self) -> int:
        counts = Counter(kind.name for name, kind in self.kinds.items() if len(self.shapes[name]) > 1)
        ((name, _),) = counts.most_common(1)
        types = gguf.LlamaFileType
        return int(types.ALL_F32 if name == "F32" else types.__members__.get(f"MOSTLY_{name}", types.GUESSED))

    def _kind(self, name: str, wanted: Kind | None) -> Kind:
        if len(self.shapes[name]) == 1:
            return Kind.F32
        if wanted is not None:
            # The output head suffers most from few bits, and is a small part of the model.
            head = "output.weight" if "output.weight" in self.shapes else "token_embd.weight"
            return Kind.Q8_0 if name == head and wanted.name[:2] in ("Q4", "Q5") else wanted
        found = self._origin.kinds.get(name) if self._origin is not None else None
        if found is None:
            dtype = keys.dtype(self._source, self._tensors[name])
            return next(kind for kind, plain in PLAIN.items() if plain == dtype)
        if can_quantise(found) or self._unchanged(name, self._values(name)):
            return found
        logger.warning("%s changed, and %s cannot be written here: it is stored as q8_0.", name, found.name.lower())
        return Kind.Q8_0

    def reads(self, name: str) -> keys.Reads:
        """What gives a tensor as it is stored."""
        if self._origin is not None or name in self._rope:
            return [partial(self._stored, name)]

        def rows(read: Callable[[], np.ndarray]) -> np.ndarray:
            return quantised(read(), self.kinds[name], name)

        return [partial(rows, read) for read in keys.reads(self._table, self._source, self._tensors[name])]

    def _stored(self, name: str) -> np.ndarray:
        """A tensor; bytes of the file that it comes from, where it is unchanged and of one type."""
        values, kind = self._values(name), self.kinds[name]
        if self._origin is not None and kind == self._origin.kinds.get(name) and self._unchanged(name, values):
            return self._origin.stored(name)
        return quantised(values, kind, name)

    def _values(self, name: str) -> np.ndarray:
        values = self._rope.get(name)
        return keys.encoded(self._table, self._source, self._tensors[name]) if values is None else values

    def _unchanged(self, name: str, values: np.ndarray) -> bool:
        assert self._origin is not None
        # Divisors that are read only have to be near those that they are taken for.
        return name in self._rope or np.array_equal(values, self._origin.read_all(name))


def _general(weights: _Weights, told: Mapping[str, Any], name: str) -> dict[str, Any]:
    base = told.get("source")
    values = {
        "general.type": "model",
        "general.name": Path(base).name.removesuffix(ENDING) if isinstance(base, str) else name,
        "general.license": told.get("license"),
        "general.file_type": weights.file_type,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    return {name: value for name, value in values.items() if value is not None}


def _norms(source: WeightSource, kept_lu: np.ndarray) -> dict[str, list[float]]:
    """The norms of layers without heads, which have no tensor."""
    return {
        gguf_heads.NORM.format(layer=layer): source.read("attn_norm_ld", layer).astype(float).tolist()
        for layer in np.flatnonzero(~kept_lu.any(axis=1)).tolist()
    }


def _own(
    source: WeightSource, config: LlamaConfig, told: Mapping[str, Any], documents: Mapping[str, str]
) -> dict[str, str]:
    """What only this library reads."""
    values = {
        "headshare.version": version("headshare-jax"),
        gguf_settings.OWN_SETTINGS: json.dumps(config.to_json()),
        **{f"headshare.{Path(name).stem.removeprefix('headshare_')}": text for name, text in documents.items()},
    }
    base = told.get("source")
    if isinstance(base, str) and not huggingface.is_hub_id(base):
        # A folder's path is of no use to who loads the model, and tells where its maker keeps things.
        told = {**told, "source": Path(base).name}
    if told:
        values["headshare.provenance"] = json.dumps(told)
    if source.sharing is not None:
        values[gguf_settings.OWN_MAP] = source.sharing.to_json()
    return values


def _token_ids(config: LlamaConfig) -> dict[str, Any]:
    eos, turn = (*config.eos_token_ids, None, None)[:2]
    values = {"bos": config.bos_token_id, "eos": eos, "eot": turn, "padding": config.pad_token_id}
    return {f"tokenizer.ggml.{name}_token_id": value for name, value in values.items() if value is not None}


def _carried(tokenizer_from: "Path | PreTrainedTokenizerBase | None", config: LlamaConfig) -> dict[str, Stored]:
    """The tokenizer and what else a GGUF file has to say of a model in general."""
    if storage.is_name(tokenizer_from) and tokenizer_from.is_file():
        header = read_header(tokenizer_from)
        kept = [name for name in header.types if name.startswith(("general.", "tokenizer.")) and name not in _LAYOUT]
        return {name: (header.metadata[name], *header.types[name]) for name in kept}
    if storage.is_name(tokenizer_from):
        tokenizer_from = tokenizer.load(tokenizer_from) if tokenizer.is_in(tokenizer_from) else None
    if tokenizer_from is None:
        logger.warning("No tokenizer was found, so the GGUF file has none: programs can run it on token ids alone.")
        return {"tokenizer.ggml.model": _typed("no_vocab")}
    values = gguf_vocabulary.metadata(tokenizer_from, config)
    return {name: _typed(value) for name, value in values.items()}


def _describe(source: WeightSource, metadata: dict[str, Stored], dropped: bool) -> None:
    """Says in the file's name and description what became of the heads."""
    if source.sharing is None:
        return
    what = " (without the heads that are dropped)" if dropped else " (expanded)"
    summary = source.sharing.summary()
    if dropped and source.sharing.widths is not None:
        summary += "; the file holds the heads of slim units in full, with zeros for what is cut"
    if not dropped:
        summary += "; llama.cpp has no such layers, so the file holds every head, at full size"
        logger.warning("llama.cpp has no layers with heads like these: the GGUF file holds every head.")
    metadata["general.name"] = _typed(f"{metadata['general.name'][0]}".removesuffix(what) + what)
    metadata["general.description"] = _typed(f"{summary}.")


def _typed(value: Any) -> Stored:
    if isinstance(value, list):
        first = type(next(iter(value), ""))
        item = gguf.GGUFValueType.INT32 if first is int else _TYPES[first]
        return value, gguf.GGUFValueType.ARRAY, item
    fits = type(value) is not int or 0 <= value < 2**32
    return value, _TYPES[type(value)] if fits else gguf.GGUFValueType.INT64, None


def _write(
    path: Path, architecture: str, metadata: Mapping[str, Stored], weights: _Weights, notes: Written | None
) -> None:
    sizes = {}
    for name, shape in weights.shapes.items():
        block, block_bytes = gguf.GGML_QUANT_SIZES[weights.kinds[name]]
        sizes[name] = int(np.prod(shape)) // block * block_bytes
    with temporary_folder() as folder:
        head = _head(folder / "head", architecture, metadata, weights, sizes)
    padded = {name: _aligned(size) for name, size in sizes.items()}
    pieces.write(path, head.ljust(_aligned(len(head)), b"\0"), padded, weights.reads, notes)


def _aligned(size: int) -> int:
    return size + -size % _ALIGNMENT


def _head(
    path: Path, architecture: str, metadata: Mapping[str, Stored], weights: _Weights, sizes: Mapping[str, int]
) -> bytes:
    """What a file has before its tensors; the package writes it to a path."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, (value, kind, item) in metadata.items():
        # The package takes a list's type from its first item.
        if value != []:
            writer.add_key_value(name, value, kind, item)
    for name, shape in weights.shapes.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], weights.kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    return path.read_bytes()
