"""One call from a model to a smaller one, and the record of what was done."""

import html
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from headshare_jax import convert
from headshare_jax.convert import map_file
from headshare_jax.convert.journal_folder import JournalFolder
from headshare_jax.errors import HeadshareError
from headshare_jax.evaluate.perplexity import Perplexity, perplexity
from headshare_jax.fit import methods
from headshare_jax.fit.methods import METHODS, Amount, Method, MethodSettings, Scoring
from headshare_jax.fit.refit import RefitReport
from headshare_jax.loading import AnyTokenizer, CalibrationText, Text, calibration_text, text_tokens
from headshare_jax.model.llama import Llama
from headshare_jax.report.progress import progress as progress_bar
from headshare_jax.sharing.budget import attention_budget
from headshare_jax.sharing.ledger import Ledger, ledger, megabytes
from headshare_jax.sharing.map import SharingMap, shard_of_units
from headshare_jax.sharing.source import WeightSource

# What may be done by a map that exists.
MAP_METHODS = ("direct", "refit")
# Beside a refitted model: what was fitted, and the errors before and after.
FIT_FILE = "headshare_fit.json"
# Called with what is being done, how much of it is, and the whole.
Progress = Callable[[str, int, int], None]
Phase = AbstractContextManager[Callable[[int, int], None]]


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
      path: the folder or file that was written, if one was.
    """

    model: WeightSource
    map: SharingMap
    sizes: Ledger
    fit: RefitReport | None = None
    calibration: CalibrationText | None = None
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
    ratio: float | None = None,
    budget: float | None = None,
    model_budget: float | None = None,
    map: SharingMap | str | Path | None = None,
    method: str = "direct",
    calibrate: Text | None = None,
    calibrate_tokens: int = 12288,
    seq_len: int = 512,
    evaluate: Text | None = None,
    to: str = "native",
    quantize: str | None = None,
    tokenizer: AnyTokenizer | None = None,
    work: str | Path | None = None,
    overwrite: bool = False,
    progress: bool | Progress = True,
    **settings: Any,
) -> Compressed:
    """Makes a model smaller: chooses what its heads share, fits it to the text, and writes it.

    A model on disk is never in memory as a whole, unless its perplexity is asked for.

    Args:
      src: native or Hugging Face folder, GGUF file, hub id, an opened checkpoint, or a model in memory.
      dst: folder to write, or for `gguf` the file; nothing is written without one.
      ratio: part of all units that become receivers or are dropped, in [0, 1).
      budget: instead of a ratio: part of the attention parameters (q, k, v and o weights) to keep, in (0, 1].
      model_budget: instead of a ratio: part of all the model's parameters to keep; only attention gives any up.
      map: instead of a ratio: a sharing map, or the file of one; nothing is matched.
      method: one of `fit.methods.METHODS`.
      calibrate: text for the methods that need one: as for `convert.text.open_corpus`, or token ids, int [tokens].
      calibrate_tokens, seq_len: tokens of that text to use, from its start, and tokens in a window.
      evaluate: text to measure perplexity on, before and after, likewise; windows of `seq_len` without overlap.
      to, quantize: format of the output, and type of a GGUF file's matrices, as for `save`.
      tokenizer: of the model, for texts and the output; by default what lies beside its weights.
      work: folder that keeps what is computed on the text, layer by layer, to go on after a stop.
      overwrite: replace an existing output.
      progress: True for a bar on standard error, False for none, or a function that is called with what is being done,
        the steps done and in all.
      settings: fields of `fit.methods.MethodSettings`; those not given are left to the method.

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
        of_method = MethodSettings(**settings)
    except TypeError as error:
        raise HeadshareError(f"compress has no such setting: {error}.") from error
    asked = {"ratio": ratio, "budget": budget, "model_budget": model_budget, "map": map}
    chosen = _checked(method, of_method, asked, has_text=calibrate is not None, has_journals=work is not None)
    convert.check_output(dst, to, quantize=quantize, overwrite=overwrite)
    path = convert.locate(src) if isinstance(src, (str, Path)) else None
    source = convert.open_checkpoint(path) if path is not None else src
    assert not isinstance(source, (str, Path))
    tokenizer = path if tokenizer is None else tokenizer
    calibration = windows_wt = held_out = before = after = None
    if calibrate is not None:
        calibration = calibration_text(calibrate, tokenizer, calibrate_tokens, seq_len, source.config.vocab_size)
        windows_wt = calibration.windows_wt
    if evaluate is not None:
        held_out = text_tokens(evaluate, tokenizer)
    journals = None if work is None else _journals(work, dst)
    step = partial(_phase, progress)
    if map is not None:
        sharing = map if isinstance(map, SharingMap) else map_file.read(Path(map))
    else:
        kept = budget if model_budget is None else attention_budget(source.config, model_budget)
        amount = Amount(ratio, kept)
        methods.check_amount(amount, source.config)
        if of_method.within_shards is not None:
            shard_of_units(source.config.num_kv_heads, of_method.within_shards)
        with step("matching") as show:
            scores = chosen.scores(Scoring(source, of_method, windows_wt, journals, show))
        sharing = methods.choose(chosen, scores, amount, source.config, of_method)
    with step("refitting" if chosen.refits else "sharing") as show:
        model, report = methods.apply(
            chosen, source, sharing, windows_wt, check_source=map is not None, journals=journals, progress=show
        )
    sizes = ledger(model)
    if held_out is not None:
        before = _measured(source, held_out, seq_len, step("perplexity before"))
        after = _measured(model, held_out, seq_len, step("perplexity after"))
    if isinstance(source, Llama):
        model = Llama.of(model, **source.settings)
    done = Compressed(model, sharing, sizes, report, calibration, before, after)
    if dst is None:
        return done
    convert.save(
        model, dst, to=to, quantize=quantize, tokenizer_from=tokenizer, overwrite=overwrite,
        provenance=({} if path is None else {"source": str(src)})
        | {"method": method, "calibration": None if calibration is None else calibration.to_json()},
        documents={} if done.record is None else {FIT_FILE: json.dumps(done.record, indent=1)},
    )  # fmt: skip
    return replace(done, path=Path(dst), sizes=ledger(model, path=Path(dst)))


def _checked(
    name: str, settings: MethodSettings, asked: dict[str, Any], *, has_text: bool, has_journals: bool
) -> Method:
    """The method of a name; HeadshareError unless all that is asked for, and what else is given, go together."""
    given = [option for option, value in asked.items() if value is not None]
    if len(given) != 1:
        raise HeadshareError(
            f"Give {'only ' if given else ''}one of ratio, budget or model_budget, to match and choose, or map, to "
            "use a map that exists.",
            option=tuple(asked),
        )
    method = methods.find(name, settings)
    if method.needs_text != has_text:
        what = "needs a text to calibrate on" if method.needs_text else "needs no text; leave calibrate out"
        raise HeadshareError(f"The method {name} {what}.", option="calibrate")
    if given == ["map"] and settings.given:
        setting = next(iter(settings.given))
        raise HeadshareError(f"A map has its pairs already; leave {setting} out.", option=setting)
    if given == ["map"] and name not in MAP_METHODS:
        raise HeadshareError(
            f"A map says who shares with whom, as the method {name} would; leave the map out, or use one of "
            f"the methods {' and '.join(MAP_METHODS)}.",
            option="map",
        )
    if has_journals and not method.needs_text:
        users = ", ".join(other.name for other in METHODS.values() if other.needs_text)
        raise HeadshareError(
            f"The method {name} keeps nothing to go on from, as those do that compute on a text ({users}); "
            "leave work out.",
            option="work",
        )
    return method


def _phase(progress: bool | Progress, label: str) -> Phase:
    """A phase's progress as the caller wants it: the function to call with the steps done and in all."""
    if progress is True:
        return progress_bar(label)
    return nullcontext(partial(progress, label) if progress else lambda done, total: None)


def _journals(work: str | Path, dst: str | Path | None) -> JournalFolder:
    journals, folder = JournalFolder(work), Path(work).resolve()
    if dst is not None and Path(dst).resolve() in (folder, *folder.parents):
        raise HeadshareError(f"The folder {work} lies in the output {dst}; choose another.", option="work")
    return journals


def _measured(source: WeightSource, tokens: np.ndarray, seq_len: int, phase: Phase) -> Perplexity:
    with phase as show:
        return perplexity(Llama.of(source), tokens, seq_len=seq_len, progress=show)
