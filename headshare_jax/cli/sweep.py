"""`headshare sweep`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro
from rich.console import RenderableType
from rich.table import Table

from headshare_jax import convert
from headshare_jax.cli import kinds
from headshare_jax.cli.command import Command, Source
from headshare_jax.cli.sharing import Calibrate, CalibrateTokens, Even, MatchFunction, Seed, SeqLen, Tie, calibration
from headshare_jax.convert.atomic import check_place
from headshare_jax.errors import HeadshareError
from headshare_jax.loading import calibration_text, text_tokens, write_own
from headshare_jax.methods.table import METHODS, find
from headshare_jax.methods.work import Amount, Method, MethodSettings
from headshare_jax.report.progress import progress_with_text
from headshare_jax.resources import megabytes
from headshare_jax.sharing.tie import check_tie
from headshare_jax.slim.choose import EVEN
from headshare_jax.sweep.folder import COLUMNS, DATA, PAGE, TABLE
from headshare_jax.sweep.points import Measurements


@dataclass(frozen=True, kw_only=True)
class Sweep(Command):
    """Measure methods of sharing at several ratios against the dense model, and write a report as a web page.

    Example: headshare sweep my-llama --ratios 0.1,0.3 --calibrate train.txt --text test.txt -o report

    Attributes:
      output: Folder of the report.
      text: Text to measure perplexity on, other than --calibrate; as for eval.
      ratios: Sharing ratios, with commas between.
      budgets: Parts of the attention parameters to keep, with commas between.
      max_windows: Measure on the first windows of the text only.
      resume: Go on in a folder that exists, also with further methods and ratios.
    """

    needs: ClassVar = {"calibrate_tokens": ("calibrate",)}
    implied: ClassVar = {"even": EVEN}

    src: Source
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    text: kinds.TextName
    ratios: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NUMBER,...")] = ()
    budgets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NUMBER,...")] = ()
    methods: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="NAME,...", help=f"Methods, with commas between: {', '.join(METHODS)}; all by default."),
    ] = tuple(METHODS)
    calibrate: Calibrate = ()
    calibrate_tokens: CalibrateTokens = 12288
    seq_len: SeqLen = 512
    max_windows: kinds.Count | None = None
    match: MatchFunction = None
    seed: Seed = None
    tie: Tie = None
    even: Even = None
    resume: bool = False

    def run(self) -> dict[str, Any]:
        if self.output.exists() and not self.resume:
            raise HeadshareError(f"{self.output} exists already; choose another name, or go on there with --resume.")
        check_place(self.output, folder=True)
        chosen, amounts = self._checked_methods(), self._checked_amounts()
        pairs = [
            (method, amount) for method in chosen for amount in amounts if amount.ratio is None or not method.by_budget
        ]
        path = convert.locate(self.src)
        source = convert.open_checkpoint(path)
        if source.sharing is not None:
            raise HeadshareError(f"{self.src} already shares heads; a sweep begins with a dense model.")
        for amount in amounts:
            amount.check(source.config)
        held_out = text_tokens(self.text, path)
        fitted_to = calibration(self.calibrate)
        calibrated = None
        if fitted_to is not None:
            calibrated = calibration_text(fitted_to, path, self.calibrate_tokens, self.seq_len, source.config)
            calibrated = write_own(calibrated, source, self.seq_len)
        run = Measurements(
            self.output, source, calibrated, held_out, self._settings(),
            seq_len=self.seq_len, max_windows=self.max_windows,
        )  # fmt: skip
        with run.folder.held():
            with progress_with_text() as show:
                points = run.points(pairs, show)
            record = run.record(points, model=self.src, text=self.text)
            run.folder.write_results(record, run.scores(chosen))
        return {
            "output": str(self.output),
            "page": str(self.output / PAGE),
            "points": [{name: point.get(name) for name in (*COLUMNS, "amount", "reason")} for point in points],
            "overlap": record["overlap"],
            "protocol": record["protocol"],
        }

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        table = Table("method", "amount", "perplexity", "vs dense", "attention", "parameters", title="quality and size")
        dense = result["points"][0]
        for row in result["points"]:
            cells = ["none"]
            if row["perplexity"] is not None:
                attention = row["attention_bytes"] / dense["attention_bytes"]
                cells = [f"{row['perplexity']:.1f}", f"{row['relative']:.2f}x", f"{attention:.1%}"]
                cells.append(megabytes(row["bytes"]))
            table.add_row(row["method"], row["amount"], *cells)
        yield table
        for row in result["points"]:
            if row["perplexity"] is None:
                yield f"{row['method']}, {row['amount']}: {row['reason']}"
        yield f"text: {self.text}; {result['protocol']}"
        if result["overlap"] is not None:
            yield result["overlap"]["sentence"]
        yield f"written: {result['page']}; {DATA} and {TABLE} beside it"

    def _settings(self) -> MethodSettings:
        return MethodSettings(match=self.match, seed=self.seed, tie=self.tie, even=self.even)

    def _checked_methods(self) -> list[Method]:
        names = list(dict.fromkeys(",".join(self.methods).replace(" ", "").split(",")))
        chosen = [find(name) for name in names]
        for setting, value in self._settings().given.items():
            if setting == "tie":
                check_tie(value)
            if not any(setting in method.uses for method in chosen):
                raise HeadshareError(f"None of the methods {', '.join(names)} has a use for {setting}.", option=setting)
        budgeted = [method.name for method in chosen if method.by_budget]
        if budgeted and not self.budgets and self.methods != tuple(METHODS):
            raise HeadshareError(f"The method {budgeted[0]} needs a budget, not a ratio: give --budgets.")
        needy = [method.name for method in chosen if method.needs_text]
        if needy and not self.calibrate:
            raise HeadshareError(f"The methods {', '.join(needy)} need a text: --calibrate TEXT.")
        return chosen

    def _checked_amounts(self) -> list[Amount]:
        ratios, budgets = (_numbers(f"--{name}", getattr(self, name)) for name in ("ratios", "budgets"))
        if not ratios and not budgets:
            raise HeadshareError("A sweep needs --ratios or --budgets.")
        return [Amount(ratio=ratio) for ratio in ratios] + [Amount(budget=budget) for budget in budgets]


def _numbers(option: str, words: tuple[str, ...]) -> list[float]:
    """Numbers with commas between, ascending."""
    try:
        return sorted({float(word) for word in ",".join(words).replace(" ", "").split(",") if word})
    except ValueError as error:
        raise HeadshareError(f"{option} takes numbers with commas between, such as 0.1,0.3: {error}.") from error
