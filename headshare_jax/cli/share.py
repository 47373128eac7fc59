"""`headshare share`."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import RenderableType
from rich.table import Table

from headshare_jax import convert, methods, pictures
from headshare_jax.budget import attention_budget
from headshare_jax.cli.command import Command, Destination, Overwrite, Source, progress
from headshare_jax.cli.inspect import ledger_data, ledger_table
from headshare_jax.cli.match import Seed
from headshare_jax.cli.sharing import (
    Calibrate,
    CalibrateTokens,
    CalibrationText,
    Chains,
    MatchFunction,
    SeqLen,
    Tie,
    calibration_text,
)
from headshare_jax.convert import map_file
from headshare_jax.convert.atomic import check_output, new_file
from headshare_jax.convert.journal_folder import JournalFolder
from headshare_jax.errors import HeadshareError
from headshare_jax.ledger import NOT_SAVED, ledger
from headshare_jax.methods import METHODS, Amount, Method, MethodSettings
from headshare_jax.refit import RefitReport
from headshare_jax.sharing import SharingMap, shard_of_units

# What may be done by a map that exists.
MAP_METHODS = ("direct", "refit")
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
    budget: Annotated[
        float | None,
        tyro.conf.arg(help="Instead of a ratio: the part of the attention parameters to keep, in (0, 1]."),
    ] = None
    model_budget: Annotated[
        float | None,
        tyro.conf.arg(
            help="Instead of a ratio: the part of the model's parameters to keep; only attention gives any up."
        ),
    ] = None
    map: Annotated[Path | None, tyro.conf.arg(help="Use this sharing map instead of matching.")] = None
    method: Annotated[
        str,
        tyro.conf.arg(help="; ".join(f"{method.name}: {method.summary}" for method in METHODS.values()) + "."),
    ] = "direct"
    calibrate: Calibrate = None
    calibrate_tokens: CalibrateTokens = 12288
    seq_len: SeqLen = 512
    match: MatchFunction = None
    seed: Seed = 0
    tie: Tie = "qkv"
    chains: Chains = None
    within_shards: Annotated[
        int | None,
        tyro.conf.arg(
            help="Choose donors in their receivers' shard only: so many chips share out the heads of a layer evenly."
        ),
    ] = None
    to: Annotated[str, tyro.conf.arg(help="Format of the output: native, hf or hf-compact.")] = "native"
    work: Annotated[
        Path | None,
        tyro.conf.arg(
            help="Keep what is computed on the text in this folder, layer by layer, to go on from there after a stop, "
            "and to match no second time for another ratio, budget or method."
        ),
    ] = None
    save_map: Annotated[Path | None, tyro.conf.arg(help="Where to write the sharing map (.json) besides.")] = None
    plot: Annotated[Path | None, tyro.conf.arg(help="Where to draw who shares with whom (.png, .svg or .pdf).")] = None
    overwrite: Overwrite = False

    def run(self) -> dict[str, Any]:
        check_output(Path(self.dst), folder=True, overwrite=self.overwrite)
        for output in filter(None, (self.save_map, self.plot)):
            check_output(output, folder=False, overwrite=self.overwrite)
        if self.plot is not None:
            pictures.check_name(self.plot)
        given = [choice for choice in (self.ratio, self.budget, self.model_budget, self.map) if choice is not None]
        if len(given) != 1:
            raise HeadshareError(
                f"Give {'only ' if given else ''}one of --ratio, --budget or --model-budget, to match and choose, or "
                "--map, to use a map that exists."
            )
        settings = MethodSettings(self.match, self.seed, self.tie, self.chains, self.within_shards)
        method = self._checked_method(settings)
        journals = self._journals(method)
        path = convert.locate(self.src)
        source = convert.open_checkpoint(path)
        calibration = None
        if self.calibrate is not None:
            calibration = calibration_text(path, source, self.calibrate, self.calibrate_tokens, self.seq_len)
        windows_wt = None if calibration is None else calibration.windows_wt
        sharing = self._map(source, windows_wt, method, settings, journals)
        with progress("refitting" if method.refits else "sharing") as step:
            model, report = methods.apply(method, source, sharing, windows_wt, journals=journals, progress=step)
        convert.save(
            model,
            self.dst,
            to=self.to,
            tokenizer_from=path,
            overwrite=self.overwrite,
            provenance={"source": self.src, "method": self.method, "calibration": _told(calibration)},
            documents={} if report is None else {FIT_FILE: json.dumps(self._record(report), indent=1)},
        )
        self._write_extras(sharing)
        return {
            "output": self.dst,
            "format": self.to,
            "summary": sharing.summary(),
            "receivers": len(sharing.receivers),
            "dropped": int(sharing.dropped.sum()),
            "units": sharing.donor.size,
            "ratio": sharing.ratio,
            "budget": sharing.budget,
            "tie": sharing.tie,
            "method": sharing.method,
            "match": sharing.match,
            "fit": None if report is None else self._record(report),
            "ledger": ledger_data(ledger(model, path=Path(self.dst))),
        }

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        yield f"{result['output']}: {result['summary']}"
        if result["fit"] is not None:
            yield fit_table(result["fit"])
        yield ledger_table(result["ledger"])
        yield NOT_SAVED
        if self.to == "hf":
            yield "A plain LLaMA checkpoint holds every head, also those that share: on disk it is at its full size."

    def _checked_method(self, settings: MethodSettings) -> Method:
        method = methods.find(self.method, settings)
        if method.needs_text != (self.calibrate is not None):
            raise HeadshareError(
                f"The method {self.method} "
                + ("needs a text: --calibrate TEXT." if method.needs_text else "needs no text; leave out --calibrate.")
            )
        if self.map is not None and self.within_shards is not None:
            raise HeadshareError("A map has its donors already; leave out --within-shards, or let it choose them.")
        if self.map is not None and self.method not in MAP_METHODS:
            raise HeadshareError(
                f"A map says who shares with whom, as the method {self.method} would; leave out --map, or use one of "
                f"the methods {' and '.join(MAP_METHODS)}."
            )
        return method

    def _journals(self, method: Method) -> JournalFolder | None:
        if self.work is None:
            return None
        if not method.needs_text:
            users = ", ".join(other.name for other in METHODS.values() if other.needs_text)
            raise HeadshareError(
                f"The method {self.method} has no use for --work, which keeps what others ({users}) compute on a text; "
                "leave it out."
            )
        journals = JournalFolder(self.work)
        work, output = self.work.resolve(), Path(self.dst).resolve()
        if output in (work, *work.parents):
            raise HeadshareError(f"The folder {self.work} lies in the output {self.dst}; choose another for --work.")
        return journals

    def _record(self, report: RefitReport) -> dict[str, Any]:
        return {"calibrate": self.calibrate, **asdict(report)}

    def _map(
        self,
        source: convert.Checkpoint,
        windows_wt: np.ndarray | None,
        method: Method,
        settings: MethodSettings,
        journals: JournalFolder | None,
    ) -> SharingMap:
        if self.map is not None:
            return map_file.read(self.map)
        budget = self.budget if self.model_budget is None else attention_budget(source.config, self.model_budget)
        amount = Amount(ratio=self.ratio, budget=budget)
        methods.check_amount(amount, source.config)
        if self.within_shards is not None:
            shard_of_units(source.config.num_kv_heads, self.within_shards)
        with progress("matching") as step:
            scores = method.scores(source, windows_wt, settings, step, journals)
        return methods.choose(method, scores, amount, source.config, settings)

    def _write_extras(self, sharing: SharingMap) -> None:
        if self.save_map is not None:
            with new_file(self.save_map, overwrite=self.overwrite) as path:
                path.write_text(sharing.to_json())
        if self.plot is not None:
            with new_file(self.plot, overwrite=self.overwrite) as path:
                pictures.draw_map(sharing, path)


def _told(calibration: CalibrationText | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    windows = list(calibration.windows_wt.shape)
    return {"name": calibration.name, "digest": calibration.digest, "windows": windows}


def fit_table(record: dict[str, Any]) -> Table:
    """Errors of every layer that was fitted, before and after."""
    title = f"distance from the dense model, {record['windows']} x {record['seq_len']} tokens of {record['calibrate']}"
    table = Table("layer", "block", "rows fitted", "before", "after", "held out: before", "after", title=title)
    for fit in record["blocks"]:
        errors = [fit[name] for name in ("error_before", "error_after", "held_out_before", "held_out_after")]
        rows = f"{fit['fitted_rows']} of {fit['rows']}"
        table.add_row(str(fit["layer"]), fit["block"], rows, *(f"{error:.3f}" for error in errors))
    return table
