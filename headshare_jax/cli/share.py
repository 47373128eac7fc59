"""`headshare share`."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import RenderableType
from rich.table import Table

from headshare_jax import convert, pictures
from headshare_jax.calibration import calibration_windows
from headshare_jax.cli.command import Command, Destination, Overwrite, Source, progress, say
from headshare_jax.cli.inspect import ledger_data, ledger_table
from headshare_jax.cli.match import MatchFunction, Seed, matched
from headshare_jax.convert import map_file, text, tokenizer
from headshare_jax.convert.atomic import check_output, new_file
from headshare_jax.errors import HeadshareError
from headshare_jax.functional import match_functional
from headshare_jax.ledger import NOT_SAVED, ledger
from headshare_jax.modeling import Llama
from headshare_jax.refit import RefitReport, refit
from headshare_jax.selection import receiver_count, sharing_map
from headshare_jax.sharing import SharingMap
from headshare_jax.transform import share

METHODS = ("direct", "refit", "fitted")
# Beside a refitted model: what was fitted, and the errors before and after.
FIT_FILE = "headshare_fit.json"


@dataclass(frozen=True, kw_only=True)
class Share(Command):
    """Let the most similar heads share weights, without training.

    Example: headshare share SmolLM2-135M.gguf smollm2-shared --ratio 0.3
    """

    src: Source
    dst: Destination
    ratio: Annotated[
        float | None, tyro.conf.arg(help="Sharing ratio in [0, 1): the part of all units that become receivers.")
    ] = None
    map: Annotated[Path | None, tyro.conf.arg(help="Use this sharing map instead of matching.")] = None
    method: Annotated[
        str,
        tyro.conf.arg(
            help="direct: the paper's DirectShare; refit: then fit output weights to the dense model (--calibrate); "
            "fitted: choose donors too by what they compute on that text."
        ),
    ] = "direct"
    calibrate: Annotated[
        str | None,
        tyro.conf.arg(
            help="Text to fit on: text, JSONL or parquet file, or data set name[:config[:split]]; of its train split."
        ),
    ] = None
    calibrate_tokens: Annotated[int, tyro.conf.arg(help="Tokens of that text to use, from its start.")] = 12288
    seq_len: Annotated[int, tyro.conf.arg(help="Tokens in a window of that text.")] = 512
    match: MatchFunction = "qk"
    seed: Seed = 0
    tie: Annotated[str, tyro.conf.arg(help="Projections to share: some of q, k, v, o, in that order.")] = "qkv"
    chains: Annotated[
        str | None,
        tyro.conf.arg(
            help="resolve (by default): a donor that receives is replaced by its root; forbid (fitted): no donor "
            "receives."
        ),
    ] = None
    to: Annotated[str, tyro.conf.arg(help="Format of the output: native, hf or hf-compact.")] = "native"
    save_map: Annotated[Path | None, tyro.conf.arg(help="Where to write the sharing map (.json) besides.")] = None
    plot: Annotated[Path | None, tyro.conf.arg(help="Where to draw who shares with whom (.png, .svg or .pdf).")] = None
    overwrite: Overwrite = False

    def run(self) -> dict[str, Any]:
        for output in filter(None, (Path(self.dst), self.save_map, self.plot)):
            check_output(output, overwrite=self.overwrite)
        if self.plot is not None:
            pictures.check_name(self.plot)
        if (self.ratio is None) == (self.map is None):
            raise HeadshareError("Give either --ratio, to match and choose, or --map, to use a map that exists.")
        self._check_method()
        path = convert.locate(self.src)
        source = convert.open_checkpoint(path)
        windows_wt = None if self.calibrate is None else self._windows(path, source)
        sharing = self._map(source, windows_wt)
        say("sharing")
        model = share(convert.load(source), sharing)
        report = None
        if windows_wt is not None:
            model, report = self._refit(source, model, windows_wt)
        convert.save(
            model,
            self.dst,
            to=self.to,
            tokenizer_from=path,
            overwrite=self.overwrite,
            provenance={"source": self.src, "method": self.method},
            documents={} if report is None else {FIT_FILE: json.dumps(self._record(report), indent=1)},
        )
        self._write_extras(sharing)
        return {
            "output": self.dst,
            "format": self.to,
            "receivers": len(sharing.receivers),
            "units": sharing.donor.size,
            "ratio": sharing.ratio,
            "tie": sharing.tie,
            "method": sharing.method,
            "match": sharing.match,
            "fit": None if report is None else self._record(report),
            "ledger": ledger_data(ledger(model, path=Path(self.dst))),
        }

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        yield (
            f"{result['output']}: {result['receivers']} of {result['units']} units use another unit's "
            f"{result['tie']} weights"
        )
        if result["fit"] is not None:
            yield fit_table(result["fit"])
        yield ledger_table(result["ledger"])
        yield NOT_SAVED
        if self.to == "hf":
            yield "A plain LLaMA checkpoint holds every head, also those that share: on disk it is at its full size."

    def _check_method(self) -> None:
        if self.method not in METHODS:
            raise HeadshareError(f"The method must be one of {', '.join(METHODS)}, not {self.method!r}.")
        if (self.method == "direct") != (self.calibrate is None):
            raise HeadshareError(
                f"The method {self.method} "
                + ("needs no text; leave out --calibrate." if self.calibrate else "needs a text: --calibrate TEXT.")
            )
        if self.method == "fitted" and (self.map is not None or self.match != "qk"):
            raise HeadshareError(
                "The method fitted chooses donors by what they compute; leave out --match, or use --method refit."
            )

    def _windows(self, path: Path, source: convert.Checkpoint) -> np.ndarray:
        assert self.calibrate is not None
        if self.seq_len < 2:
            raise HeadshareError(f"seq_len must be at least 2, not {self.seq_len}.")
        words = tokenizer.load(path)
        tokens: list[int] = []
        for piece in text.open_corpus(self.calibrate).pieces():
            tokens += words(piece.text, verbose=False).input_ids
            if len(tokens) >= self.calibrate_tokens:
                break
        count = self.calibrate_tokens // self.seq_len
        return calibration_windows(tokens, count, self.seq_len, source.config.vocab_size)

    def _refit(self, source: convert.Checkpoint, model: Llama, windows_wt: np.ndarray) -> tuple[Llama, RefitReport]:
        with progress("refitting") as step:
            return refit(source, model, windows_wt, progress=step)

    def _record(self, report: RefitReport) -> dict[str, Any]:
        return {"calibrate": self.calibrate, **asdict(report)}

    def _map(self, source: convert.Checkpoint, windows_wt: np.ndarray | None) -> SharingMap:
        if self.map is not None:
            return map_file.read(self.map)
        assert self.ratio is not None
        if not 0 <= self.ratio < 1:
            raise HeadshareError(f"The sharing ratio must be at least 0 and below 1, not {self.ratio}.")
        units = source.config.num_units
        if not receiver_count(self.ratio, units):
            raise HeadshareError(
                f"A ratio of {self.ratio} makes none of {units} units a receiver; give at least "
                f"{math.ceil(1e4 / units) / 1e4}, which makes one."
            )
        if self.method == "fitted":
            assert windows_wt is not None
            with progress("matching by function") as step:
                scores = match_functional(source, windows_wt, progress=step)
        else:
            scores = matched(source, self.match, self.seed)
        chains = self.chains or ("forbid" if self.method == "fitted" else "resolve")
        return replace(sharing_map(scores, self.ratio, chains=chains, tie=self.tie), method=self.method)

    def _write_extras(self, sharing: SharingMap) -> None:
        if self.save_map is not None:
            with new_file(self.save_map, overwrite=self.overwrite) as path:
                path.write_text(sharing.to_json())
        if self.plot is not None:
            with new_file(self.plot, overwrite=self.overwrite) as path:
                pictures.draw_map(sharing, path)


def fit_table(record: dict[str, Any]) -> Table:
    """Errors of every layer that was fitted, before and after."""
    title = f"distance from the dense model, {record['windows']} x {record['seq_len']} tokens of {record['calibrate']}"
    table = Table("layer", "block", "rows fitted", "before", "after", "held out: before", "after", title=title)
    for fit in record["blocks"]:
        errors = [fit[name] for name in ("error_before", "error_after", "held_out_before", "held_out_after")]
        rows = f"{fit['fitted_rows']} of {fit['rows']}"
        table.add_row(str(fit["layer"]), fit["block"], rows, *(f"{error:.3f}" for error in errors))
    return table
