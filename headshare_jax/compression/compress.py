"""One call from a model to a smaller one."""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from headshare_jax import convert
from headshare_jax.calibration.own_text import context
from headshare_jax.calibration.text import OWN, is_own
from headshare_jax.compression.effort import Effort
from headshare_jax.compression.record import Compressed, fit_record
from headshare_jax.compression.texts import read as read_texts
from headshare_jax.convert import map_file, storage
from headshare_jax.convert.journal_folder import JournalFolder
from headshare_jax.errors import HeadshareError
from headshare_jax.evaluate.agreement import agreement
from headshare_jax.loading import AnyTokenizer, Text, Texts, weighted
from headshare_jax.methods import table
from headshare_jax.methods.scored import ScoredMethod
from headshare_jax.methods.table import METHODS
from headshare_jax.methods.work import Amount, Method, MethodSettings, Phase, Work, silent
from headshare_jax.model.llama import Llama
from headshare_jax.report.progress import course
from headshare_jax.resources import check_disk, check_memory, peak_memory
from headshare_jax.sharing.budget import attention_budget
from headshare_jax.sharing.ledger import ledger
from headshare_jax.sharing.map import SharingMap, shard_of_units
from headshare_jax.sharing.source import WeightSource
from headshare_jax.sharing.view import SharedView, cast
from headshare_jax.summary import sizes
from headshare_jax.typed import typed

logger = logging.getLogger(__name__)

# What may be done by a map that exists.
MAP_METHODS = ("refit", "direct")
# The method for each way to say how much is shared.
_DEFAULTS = {"ratio": "fitted", "budget": "plan", "model_budget": "plan", "map": "refit"}
# Beside a refitted model: what was fitted, and the errors before and after.
FIT_FILE = "headshare_fit.json"
_WINDOW = 512
# Called with what is being done, how much of it is, and the whole.
Progress = Callable[[str, int, int], None]


@typed
def compress(
    src: str | Path | WeightSource,
    dst: str | Path | None = None,
    *,
    ratio: float | None = None,
    budget: float | None = None,
    model_budget: float | None = None,
    map: SharingMap | str | Path | None = None,
    method: str | None = None,
    calibrate: Texts | None = None,
    calibrate_tokens: int | None = None,
    seq_len: int | None = None,
    own: float | None = None,
    evaluate: Text | bool = True,
    to: str = "native",
    dtype: str | None = None,
    quantize: str | None = None,
    tokenizer: AnyTokenizer | None = None,
    work: str | Path | None = None,
    mesh: Mesh | None = None,
    overwrite: bool = False,
    progress: bool | Progress = True,
    **settings: Any,
) -> Compressed:
    """Makes a model smaller: chooses what its heads share, fits it to a text, writes it, and measures what was written.

    A model on disk is never in memory as a whole, unless it is to write its own text.

    Args:
      src: native or Hugging Face folder, GGUF file, hub id, an opened checkpoint, or a model in memory.
      dst: folder to write, or for `gguf` the file; nothing is written without one.
      ratio: part of all units that become receivers or are dropped, in [0, 1).
      budget: instead of a ratio: part of the attention parameters (q, k, v and o weights) to keep, in (0, 1].
      model_budget: instead of a ratio: part of all the model's parameters to keep; only attention gives any up.
      map: instead of a ratio: a sharing map, or the file of one; nothing is matched.
      method: one of `methods.table.METHODS`; by default `fitted` for a ratio, `plan` for a budget, and for a map
        `refit`, or `direct` where it changes nothing, since receivers hold their donors' weights already.
      calibrate: text for the methods that need one, like that which the model is to be used on: as for
        `convert.text.open_corpus`, or token ids, int [tokens]; or several of these, each with its weight, as in
        `[("wiki.txt", 2), ("code.txt", 1)]`, whose windows take turns; "own", alone or as one of several, for one that
        the model writes (`own_text`), which alone serves less well.
      calibrate_tokens: tokens to use, from the start of the text; by default 49,152, or what a single shorter one has.
      seq_len: tokens in a window; by default 512, or what a shorter context has.
      own: part of the calibration text, in [0, 1), that the model is to write beside a single text: by default a
        quarter for `plan` and `slim`, whose models then do better on other kinds of text, and none for other methods
        or windows beyond the model's context.
      evaluate: text to measure both models on, likewise; True for what is left of the calibration text; False for none.
      to, quantize: format of the output, and type of a GGUF file's matrices, as for `save`.
      dtype: type of the output's parameters; by default the source's own, or bfloat16 where that is quantised and the
        format is not `gguf`.
      tokenizer: of the model, for texts and the output; by default what lies beside its weights.
      work: folder that keeps what is computed on the text, layer by layer, to go on after a stop.
      mesh: devices that run the text, over which windows and each layer's weights are cut; by default all of this
        machine.
      overwrite: replace an existing output.
      progress: True for a bar on standard error, False for none, or a function that is called with what is being done,
        the steps done and in all.
      settings: fields of `methods.work.MethodSettings`; those not given are left to the method.

    Returns:
      The record of what was done, with the model.

    Raises:
      HeadshareError: settings that do not go together or cannot be met, a text that is too short, an output that
        exists or cannot be written, or too little memory or disk.

    Examples:
      >>> done = hs.compress("my-llama", "my-llama-small", ratio=0.4, calibrate="text.txt", seq_len=64)
      >>> done.map.summary()
      "2 of 6 units use another unit's qkv weights"
      >>> done.path
      PosixPath('my-llama-small')
    """
    started = time.monotonic()
    try:
        of_method = MethodSettings(**settings)
    except TypeError as error:
        raise HeadshareError(f"compress has no such setting: {error}.") from error
    asked = {"ratio": ratio, "budget": budget, "model_budget": model_budget, "map": map}
    fits = {"calibrate": calibrate, "work": work, "calibrate_tokens": calibrate_tokens, "own": own}
    if isinstance(evaluate, bool):
        fits["seq_len"] = seq_len
    chosen = _checked(method, of_method, asked, fits)
    convert.check_output(
        dst,
        to,
        quantize=quantize,
        dtype=dtype,
        overwrite=overwrite,
        sources=(src, src if tokenizer is None else tokenizer),
    )
    path = convert.locate(src) if storage.is_name(src) else None
    source = convert.open_checkpoint(path) if path is not None else src
    assert not storage.is_name(source)
    tokenizer = path if tokenizer is None else tokenizer
    sharing, amount = _wanted(asked, source, of_method)
    if sharing is not None and (method is None or sharing.slim.any()):
        # As a plain export's own map: there is nothing to fit.
        there = SharedView(source, sharing).changes_nothing()
        if sharing.slim.any() and not there:
            raise HeadshareError(
                "The map has slim units, whose weights are made with it on a text, and this model's are not; use the "
                "method slim with a budget, or the plain export of the model that the map came with.",
                option="map",
            )
        if method is None and there:
            chosen, calibrate = METHODS["direct"], None
    _check_text(chosen, calibrate)
    seq_len = min(_WINDOW, context(source.config)) if seq_len is None else seq_len
    if own is None:
        own = chosen.own if seq_len <= context(source.config) else 0.0
    texts = read_texts(calibrate, evaluate, tokenizer, source.config, count=calibrate_tokens, seq_len=seq_len, own=own)
    written = convert.output_dtype(source, to, dtype)
    if dst is not None:
        convert.check_room(source, dst, to=to, dtype=written, quantize=quantize)
    effort = Effort(source.config, chosen, seq_len, texts.calibrated, texts.own, texts.measured, amount)
    check_memory(
        effort.memory,
        f"The method {chosen.name}",
        "close other programs, or use a smaller seq_len or a machine with more"
        + (", or own 0, so that the model, whole in memory, need write no text" if texts.own and own else ""),
    )
    check_disk(Path(tempfile.gettempdir()), effort.temporary, "The text's hidden states, in temporary files,")
    journals = None if work is None else _journals(work, dst)
    quality = None
    with nullcontext() if journals is None else journals.held(), _phases(progress, effort) as phase:
        if texts.own:
            with phase("writing text") as show:
                texts = texts.with_own(source, show)
        given = Work(source, of_method, texts.windows_wt, journals=journals, fits=journals, phase=phase, mesh=mesh)
        if amount is not None:
            made = chosen.make(given, amount)
        else:
            assert isinstance(chosen, ScoredMethod)
            assert sharing is not None
            made = chosen.apply(given, sharing)
        record = None if made.fit is None else fit_record(texts.calibration, made.fit)
        model = cast(made.model, written)
        found: WeightSource = model
        if dst is not None:
            with phase("writing") as show:
                convert.save(
                    model, dst, to=to, quantize=quantize, tokenizer_from=tokenizer, overwrite=overwrite, progress=show,
                    provenance=({} if path is None else {"source": str(src)})
                    | {"method": chosen.name, "calibration": texts.calibration and texts.calibration.to_json()},
                    documents={} if record is None else {FIT_FILE: json.dumps(record, indent=1)},
                )  # fmt: skip
            # What is measured is what lies there.
            found = convert.open_checkpoint(dst)
        if texts.measured_wt is not None:
            with phase("measuring") as show:
                quality = agreement(source, found, texts.measured_wt, mesh=mesh, progress=show)
    if isinstance(source, Llama):
        model = Llama.of(model, **source.settings)
    after = None if dst is None else storage.path(dst)
    return Compressed(
        model=model, map=made.map, ledger=ledger(found, path=after), sizes=sizes(source, path, found, after),
        fit=made.fit, calibration=texts.calibration, quality=quality, measured_on=texts.measured_on,
        overlap=texts.overlap, seconds=time.monotonic() - started, memory=peak_memory(), path=after,
    )  # fmt: skip


def _wanted(
    asked: Mapping[str, Any], source: WeightSource, settings: MethodSettings
) -> tuple[SharingMap | None, Amount | None]:
    """The map that was given, or else how much is to be shared."""
    given = asked["map"]
    if given is not None:
        return (given if isinstance(given, SharingMap) else map_file.read(storage.path(given))), None
    part = asked["model_budget"]
    amount = Amount(asked["ratio"], asked["budget"] if part is None else attention_budget(source.config, part))
    amount.check(source.config)
    if settings.within_shards is not None:
        shard_of_units(source.config.num_kv_heads, settings.within_shards)
    return None, amount


def _checked(name: str | None, settings: MethodSettings, asked: Mapping[str, Any], fits: Mapping[str, Any]) -> Method:
    """The method of a name, or the default; HeadshareError unless all that is asked for, and given, go together."""
    given = [option for option, value in asked.items() if value is not None]
    if len(given) != 1:
        raise HeadshareError(
            f"Give {'only ' if given else ''}one of ratio, budget or model_budget, to match and choose, or map, to "
            "use a map that exists.",
            option=tuple(asked),
        )
    method = table.find(_DEFAULTS[given[0]] if name is None else name, settings)
    for option, value in fits.items():
        if value is not None and not method.needs_text:
            users = ", ".join(other.name for other in METHODS.values() if other.needs_text)
            raise HeadshareError(
                f"The method {method.name} is not calibrated on a text, as others are ({users}); leave {option} out.",
                option=option,
            )
    texts = [] if fits["calibrate"] is None else weighted(fits["calibrate"])
    if fits["own"] is not None:
        if not 0 <= fits["own"] < 1:
            raise HeadshareError(f"own must be at least 0 and below 1, not {fits['own']}.", option="own")
        if len(texts) != 1 or is_own(texts[0][0]):
            raise HeadshareError(
                f'own says how much the model writes beside a single text; with others give "{OWN}" a weight instead.',
                option="own",
            )
    if given == ["ratio"]:
        method.check_ratio()
    if given == ["map"] and settings.given:
        setting = next(iter(settings.given))
        raise HeadshareError(f"A map has its pairs already; leave {setting} out.", option=setting)
    if given == ["map"] and method.name not in MAP_METHODS:
        raise HeadshareError(
            f"A map says who shares with whom, as the method {method.name} would; leave the map out, or use one of "
            f"the methods {' and '.join(MAP_METHODS)}.",
            option="map",
        )
    if given != ["map"] or name is not None:
        _check_text(method, fits["calibrate"])
    if method.name == "direct" and given != ["map"]:
        logger.warning(
            "direct fits nothing after it shares: with 30 % of its units shared so, SmolLM2-135M's perplexity is 26 "
            "times the dense model's; by the method fitted, 1.2 times."
        )
    return method


def _check_text(method: Method, calibrate: Texts | None) -> None:
    """Raises HeadshareError if a method has no text to be calibrated on."""
    if method.needs_text and calibrate is None:
        raise HeadshareError(
            f"The method {method.name} needs a text to be fitted to: give one like that which the model is to be used "
            f'on, or "{OWN}" for one that it writes itself; the method direct needs none, and ruins most models.',
            option=("calibrate", "method"),
        )


@contextmanager
def _phases(progress: bool | Progress, effort: Effort) -> Iterator[Phase]:
    """Phases as the caller wants to see them: each is called with its steps done and in all."""
    if progress is True:
        with course(effort.costs) as bar:
            yield lambda label: bar.phase(label, partial(effort.part, label))
    else:
        yield lambda label: nullcontext(partial(progress, label) if progress else silent)


def _journals(work: str | Path, dst: str | Path | None) -> JournalFolder:
    journals, folder = JournalFolder(work), storage.absolute(storage.path(work))
    if dst is not None and storage.is_within(folder, storage.absolute(storage.path(dst))):
        raise HeadshareError(f"The folder {work} lies in the output {dst}; choose another.", option="work")
    return journals
