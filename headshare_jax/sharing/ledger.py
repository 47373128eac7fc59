"""What a model stores, and what sharing saves of it, in parameters and bytes."""

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from headshare_jax.parameters import PARAMETERS, PROJECTIONS, parameter_names, slice_shape
from headshare_jax.sharing.source import WeightSource, path_of, stored_shape

NOT_SAVED = (
    "A unit that shares has keys, values and products of its own: sharing saves weights only. What is dropped, or cut "
    "of a slim unit, has no key/value cache and no FLOPs, but for padding, where this library generates or PyTorch "
    "runs hf-compact; llama.cpp leaves dropped units out, too."
)


@dataclass(frozen=True)
class LedgerRow:
    """One part of the model.

    Attributes:
      part: `q`, `k`, `v`, `o`, or the rest of the model: `embedding`, `mlp`, `norms`, `head`.
      dense: parameters without sharing.
      stored: parameters that are stored.
      bytes_per_parameter: of its stored type.
    """

    part: str
    dense: int
    stored: int
    bytes_per_parameter: int


@dataclass(frozen=True)
class Ledger:
    """Sizes of a model.

    Attributes:
      rows: every part of the model.
      nominal_saving: parameters that the map says are saved: what receivers share, all of dropped units, and what is
        cut of slim ones.
      live_bytes: bytes of the parameter arrays on the devices; None for a checkpoint on disk.
      disk_bytes: bytes of the checkpoint's files; None for a model in memory.
    """

    rows: tuple[LedgerRow, ...]
    nominal_saving: int
    live_bytes: int | None = None
    disk_bytes: int | None = None

    @property
    def dense(self) -> int:
        """Parameters without sharing."""
        return sum(row.dense for row in self.rows)

    @property
    def stored(self) -> int:
        """Parameters that are stored."""
        return sum(row.stored for row in self.rows)

    @property
    def attention_dense(self) -> int:
        """Parameters of the q, k, v and o projections without sharing."""
        return sum(row.dense for row in self.rows if row.part in PROJECTIONS)

    @property
    def attention_stored(self) -> int:
        """Parameters of the q, k, v and o projections that are stored."""
        return sum(row.stored for row in self.rows if row.part in PROJECTIONS)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored parameters."""
        return sum(row.stored * row.bytes_per_parameter for row in self.rows)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all parameters without sharing."""
        return sum(row.dense * row.bytes_per_parameter for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """The rows and the sums, as plain data."""
        sums = ("dense", "stored", "dense_bytes", "stored_bytes", "attention_dense", "attention_stored")
        return asdict(self) | {name: getattr(self, name) for name in sums} | {"actual_saving": self.dense - self.stored}


def ledger(source: WeightSource, *, path: Path | None = None) -> Ledger:
    """Counts what a model or a checkpoint stores.

    Args:
      source: a model (its real arrays are counted) or an opened checkpoint.
      path: the checkpoint's file or folder, whose size to add; of a run's, only the files of the model's arrays count.

    Examples:
      >>> sizes = hs.ledger(shared)
      >>> sizes.attention_stored / sizes.attention_dense
      0.7777777777777778
    """
    config, sharing = source.config, source.sharing
    counts: dict[str, list[int]] = {}
    saving = 0
    for name in parameter_names(config):
        part, pool = PARAMETERS[name].part, PARAMETERS[name].pool
        row = counts.setdefault(part, [0, 0, source.dtype(name).itemsize])
        row[0] += prod(stored_shape(config, name))
        row[1] += prod(stored_shape(config, name, sharing))
        if sharing is not None and pool is not None:
            of_unit = prod(slice_shape(config, name)) // config.num_kv_heads
            saving += int(np.count_nonzero(sharing.tied(pool) | sharing.dropped)) * of_unit
            if sharing.widths is not None:
                saving += int(np.count_nonzero(~sharing.widths.kept(pool))) * (of_unit // config.head_dim)
    return Ledger(
        rows=tuple(LedgerRow(part, *row) for part, row in counts.items()),
        nominal_saving=saving,
        live_bytes=getattr(source, "nbytes", None),
        disk_bytes=None if path is None else disk_bytes(source, path),
    )


def described(source: WeightSource) -> str:
    """A model or a checkpoint in a line: its name, if it has one, its sizes, its type, and what its map shares."""
    config, sharing, path = source.config, source.sharing, path_of(source)
    names = parameter_names(config)
    types = " and ".join(dict.fromkeys(str(source.dtype(name)) for name in names))
    query_heads = "" if config.heads_per_unit == 1 else f"{config.num_heads} query and "
    kind = "heads" if config.heads_per_unit == 1 else "key/value heads"
    parts = [
        path.name if path is not None else config.family,
        f"{config.num_layers} layers",
        f"width {config.hidden_size}",
        f"{query_heads}{config.num_kv_heads} {kind} of {config.head_dim}",
        f"{short(sum(prod(stored_shape(config, name, sharing)) for name in names))} parameters",
        types,
    ]
    if sharing is not None:
        counts = {"shared": len(sharing.receivers), "dropped": int(sharing.dropped.sum())}
        counts["slim"] = int(sharing.slim.sum())
        told = " and ".join(f"{count} {what}" for what, count in counts.items() if count) or "none shared"
        parts.append(f"of {config.num_units} units {told}")
    return ", ".join(parts)


def short(count: int) -> str:
    """A number of parameters, such as `134.5 M`."""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if count >= unit:
            return f"{count / unit:,.{2 if name == 'B' else 1}f} {name}"
    return f"{count:,}"


def disk_bytes(source: WeightSource, path: Path) -> int:
    """Bytes of the files that hold a model: all at a path, unless the source names its own, as a run's checkpoint."""
    return sum(map(_bytes_at, getattr(source, "places", [path])))


def _bytes_at(path: Path) -> int:
    bucket: Any = path
    if hasattr(bucket, "fs"):  # which lists what is there
        return int(bucket.fs.du(bucket.path))
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
