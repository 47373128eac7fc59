"""One call from a model to a smaller one, and the record of what was done."""

import html
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headshare_jax import convert
from headshare_jax.convert import map_file
from headshare_jax.convert.atomic import check_output
from headshare_jax.convert.journal_folder import JournalFolder
from headshare_jax.errors import HeadshareError
from headshare_jax.evaluate.perplexity import Perplexity, perplexity
from headshare_jax.fit import methods
from headshare_jax.fit.methods import METHODS, Amount, Method, MethodSettings, Scoring
from headshare_jax.fit.refit import RefitReport
from headshare_jax.loading import CalibrationText, calibration_text, text_tokens
from headshare_jax.model.llama import Llama
from headshare_jax.report.progress import progress as progress_bar
from headshare_jax.sharing.budget import attention_budget
from headshare_jax.sharing.ledger import Ledger, ledger, megabytes
from headshare_jax.sharing.map import SharingMap, shard_of_units
from headshare_jax.sharing.source import WeightSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What may be done by a map that exists.
MAP_METHODS = ("direct", "refit")
# Beside a refitted model: what was fitted, and the errors before and after.
FIT_FILE = "headshare_fit.json"
# Called with what is being done, how much of it is, and the whole.
Progress = Callable[[str, int, int], None]
Step = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class CompressSettings:
    """How to compress a model: exactly one of `ratio`, `budget`, `model_budget` and `map`, and a method.

    Attributes:
      ratio: part of all units that become receivers or are dropped, in [0, 1).
      budget: part of the attention parameters (q, k, v and o weights) to keep, in (0, 1].
      model_budget: part of all the model's parameters to keep; only attention gives any up.
      map: a sharing map, or the file of one, instead of matching.
      method: one of `fit.methods.METHODS`.
      calibrate_tokens, seq_len: tokens of the calibration text to use, from its start, and tokens in a window.
      match, seed, tie, chains, within_shards: as of `fit.methods.MethodSettings`; None leaves them to the method.
    """

    ratio: float | None = None
    budget: float | None = None
    model_budget: float | None = None
    map: SharingMap | str | Path | None = None
    method: str = "direct"
    calibrate_tokens: int = 12288
    seq_len: int = 512
    match: str | None = None
    seed: int | None = None
    tie: str | None = None
    chains: str | None = None
    within_shards: int | None = None

    @property
    def of_method(self) -> MethodSettings:
        """What the method is told."""
        return MethodSettings(self.match, self.seed, self.tie, self.chains, self.within_shards)

    def checked(self, *, has_text: bool, has_journals: bool) -> Method:
        """The method; raises HeadshareError unless the settings, and what else is given, go together."""
        given = [name for name in ("ratio", "budget", "model_budget", "map") if getattr(self, name) is not None]
        if len(given) != 1:
            raise HeadshareError(
                f"Give {'only ' if given else ''}one of ratio, budget or model_budget, to match and choose, or map, to "
                "use a map that exists.",
                option=("ratio", "budget", "model_budget", "map"),
            )
        method = methods.find(self.method, self.of_method)
        if method.needs_text != has_text:
            what = "needs a text to calibrate on" if method.needs_text else "needs no text; leave calibrate out"
            raise HeadshareError(f"The method {self.method} {what}.", option="calibrate")
        if self.map is not None and self.of_method.given:
            setting = next(iter(self.of_method.given))
            raise HeadshareError(f"A map has its pairs already; leave {setting} out.", option=setting)
        if self.map is not None and self.method not in MAP_METHODS:
            raise HeadshareError(
                f"A map says who shares with whom, as the method {self.method} would; leave the map out, or use one of "
                f"the methods {' and '.join(MAP_METHODS)}.",
                option="map",
            )
        if has_journals and not method.needs_text:
            users = ", ".join(other.name for other in METHODS.values() if other.needs_text)
            raise HeadshareError(
                f"The method {self.method} keeps nothing to go on from, as those do that compute on a text ({users}); "
                "leave work out.",
                option="work",
            )
        return method


@dataclass(frozen=True)
class Compressed:
    """What `compress` did; shows itself as text, and as a table with the map's picture in a notebook.

    Attributes:
      model: the compressed model: a `Llama` if one was given, else a view of the source, of which `Llama.of` makes one.
      map: who shares with whom, and who is dropped.
      sizes: what the model stores, and what it stored before.
      fit: what the refit did, if the method refits.
      calibration: the text that the method was calibrated on.
      before: perplexity of the dense model, if a text to measure on was given.
      after: perplexity of the compressed model, likewise.
      path: the folder that was written, if one was.
    """

    model: WeightSource
    map: SharingMap
    sizes: Ledger
    fit: RefitReport | None = None
    calibration: CalibrationText | None = field(default=None, repr=False)
    before: Perplexity | None = None
    after: Perplexity | None = None
    path: Path | None = None

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """Lines of the record: what, dense, compressed."""
        sizes = self.sizes
        rows = [
            ("attention parameters", f"{sizes.attention_dense:,}", f"{sizes.attention_stored:,}"),
            ("parameters", f"{sizes.dense:,}", f"{sizes.stored:,}"),
            ("bytes of parameters", megabytes(sizes.dense_bytes), megabytes(sizes.stored_bytes)),
        ]
        if self.before is not None and self.after is not None:
            dense, shared = (f"{measured.token_perplexity:.3f}" for measured in (self.before, self.after))
            rows.append(("perplexity", dense, shared))
        return rows

    @property
    def record(self) -> dict[str, Any] | None:
        """The record of the fit as plain data; None if nothing was fitted."""
        if self.fit is None or self.calibration is None:
            return None
        return {"calibrate": self.calibration.name, **asdict(self.fit)}

    def __repr__(self) -> str:
        width = max(len(what) for what, _, _ in self.rows)
        lines = [f"{self.map.method}: {self.map.summary()}"]
        lines += [f"  {what:<{width}}  {before} -> {after}" for what, before, after in self.rows]
        return "\n".join(lines + ([f"  written to {self.path}"] if self.path else []))

    def _repr_html_(self) -> str:
        # Matplotlib takes a while to import.
        from headshare_jax.report.map import map_svg

        cells = "".join(
            f"<tr><td>{what}</td><td>{before}</td><td>{after}</td></tr>" for what, before, after in self.rows
        )
        title = html.escape(f"{self.map.method}: {self.map.summary()}")
        return (
            f"<p>{title}</p><table><tr><th></th><th>dense</th><th>compressed</th></tr>{cells}</table>"
            f"{map_svg(self.map)}"
        )


def compress(
    src: str | Path | WeightSource,
    dst: str | Path | None = None,
    *,
    calibrate: str | Path | np.ndarray | None = None,
    evaluate: str | Path | np.ndarray | None = None,
    to: str = "native",
    tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
    work: str | Path | None = None,
    overwrite: bool = False,
    progress: bool | Progress = True,
    **settings: Any,
) -> Compressed:
    """Makes a model smaller: chooses what its heads share, fits it to the text, and writes it.

    A model on disk is never in memory as a whole, unless its perplexity is asked for.

    Args:
      src: native or Hugging Face folder, GGUF file, hub id, an opened checkpoint, or a model in memory.
      dst: folder to write; nothing is written without one.
      calibrate: text for the methods that need one: as for `convert.text.open_corpus`, or token ids, int [tokens].
      evaluate: text to measure perplexity on, before and after, likewise; windows of `seq_len` without overlap.
      to: format of the output, as for `save`.
      tokenizer: of the model, for texts and the output; by default what lies beside its weights.
      work: folder that keeps what is computed on the text, layer by layer, to go on after a stop.
      overwrite: replace an existing output.
      progress: True for a bar on standard error, False for none, or a function that is called with what is being done,
        the steps done and in all.
      settings: fields of `CompressSettings`.

    Returns:
      The record of what was done, with the model.

    Raises:
      HeadshareError: settings that do not go together or cannot be met, a text that is too short, or an output that
        exists or cannot be written.

    Examples:
      >>> done = hs.compress("my-llama", "my-llama-small", ratio=0.4, method="fitted",
      ...                    calibrate="text.txt", calibrate_tokens=768, seq_len=64)
      >>> done.map.summary()
      "2 of 6 units use another unit's qkv weights"
      >>> done.path
      PosixPath('my-llama-small')
    """
    try:
        wanted = CompressSettings(**settings)
    except TypeError as error:
        raise HeadshareError(f"compress has no such setting: {error}.") from error
    method = wanted.checked(has_text=calibrate is not None, has_journals=work is not None)
    if dst is not None:
        check_output(Path(dst), folder=True, overwrite=overwrite)
    path = convert.locate(src) if isinstance(src, (str, Path)) else None
    source = convert.open_checkpoint(path) if path is not None else src
    assert not isinstance(source, (str, Path))
    tokenizer = path if tokenizer is None else tokenizer
    calibration = held_out = None
    if calibrate is not None:
        count, vocab_size = wanted.calibrate_tokens, source.config.vocab_size
        calibration = calibration_text(calibrate, tokenizer, count, wanted.seq_len, vocab_size)
    if evaluate is not None:
        held_out = text_tokens(evaluate, tokenizer)
    journals = None if work is None else _journals(work, dst)
    step = partial(_phase, progress)
    sharing = _chosen(source, wanted, method, calibration, journals, step)
    with step("refitting" if method.refits else "sharing") as told:
        model, report = methods.apply(
            method, source, sharing, None if calibration is None else calibration.windows_wt,
            check_source=wanted.map is not None, journals=journals, progress=told,
        )  # fmt: skip
    done = Compressed(model, sharing, ledger(model), report, calibration)
    if held_out is not None:
        done = replace(done, before=_measured(source, held_out, wanted.seq_len, step, "perplexity before"))
        done = replace(done, after=_measured(model, held_out, wanted.seq_len, step, "perplexity after"))
    if isinstance(source, Llama):
        done = replace(done, model=Llama.of(model, **source.settings))
    if dst is None:
        return done
    convert.save(
        model, dst, to=to, tokenizer_from=tokenizer, overwrite=overwrite,
        provenance=_provenance(src, wanted.method, calibration),
        documents={} if done.record is None else {FIT_FILE: json.dumps(done.record, indent=1)},
    )  # fmt: skip
    return replace(done, path=Path(dst), sizes=ledger(model, path=Path(dst)))


def _phase(progress: bool | Progress, label: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """A phase's progress as the caller wants it: the function to call with the steps done and in all."""
    if progress is True:
        return progress_bar(label)
    return nullcontext(partial(progress, label) if progress else lambda done, total: None)


def _chosen(
    source: WeightSource,
    wanted: CompressSettings,
    method: Method,
    calibration: CalibrationText | None,
    journals: JournalFolder | None,
    step: Step,
) -> SharingMap:
    """The map that is given, or that the method makes."""
    if wanted.map is not None:
        return wanted.map if isinstance(wanted.map, SharingMap) else map_file.read(Path(wanted.map))
    config, settings = source.config, wanted.of_method
    budget = wanted.budget if wanted.model_budget is None else attention_budget(config, wanted.model_budget)
    amount = Amount(ratio=wanted.ratio, budget=budget)
    methods.check_amount(amount, config)
    if wanted.within_shards is not None:
        shard_of_units(config.num_kv_heads, wanted.within_shards)
    windows_wt = None if calibration is None else calibration.windows_wt
    with step("matching") as told:
        scores = method.scores(Scoring(source, settings, windows_wt, journals, told))
    return methods.choose(method, scores, amount, config, settings)


def _journals(work: str | Path, dst: str | Path | None) -> JournalFolder:
    journals, folder = JournalFolder(work), Path(work).resolve()
    if dst is not None and Path(dst).resolve() in (folder, *folder.parents):
        raise HeadshareError(f"The folder {work} lies in the output {dst}; choose another.", option="work")
    return journals


def _measured(source: WeightSource, tokens: np.ndarray, seq_len: int, step: Step, label: str) -> Perplexity:
    with step(label) as told:
        return perplexity(Llama.of(source), tokens, seq_len=seq_len, progress=told)


def _provenance(src: Any, method: str, calibration: CalibrationText | None) -> dict[str, Any]:
    told = {"source": str(src)} if isinstance(src, (str, Path)) else {}
    if calibration is None:
        return {**told, "method": method, "calibration": None}
    windows = list(calibration.windows_wt.shape)
    text = {"name": calibration.name, "digest": calibration.digest, "windows": windows}
    return {**told, "method": method, "calibration": text}
