"""`headshare sweep`."""

import csv
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import RenderableType
from rich.table import Table

from headshare_jax import convert
from headshare_jax.calibration.windows import tokens_digest
from headshare_jax.cli.command import Command, Source, plain
from headshare_jax.cli.inspect import ledger_data
from headshare_jax.cli.sharing import (
    Calibrate,
    CalibrateTokens,
    MatchFunction,
    Seed,
    SeqLen,
    Tie,
)
from headshare_jax.cli.sweep_folder import SweepFolder
from headshare_jax.convert.atomic import check_output
from headshare_jax.errors import HeadshareError
from headshare_jax.evaluate.perplexity import Perplexity, perplexity
from headshare_jax.fit import methods
from headshare_jax.fit.methods import METHODS, Amount, Method, MethodSettings
from headshare_jax.loading import CalibrationText, calibration_text, text_tokens
from headshare_jax.model.llama import Llama
from headshare_jax.report import page as report
from headshare_jax.report.progress import progress_with_text
from headshare_jax.sharing.ledger import ledger, megabytes
from headshare_jax.sharing.map import check_tie
from headshare_jax.sharing.scores import MatchResult
from headshare_jax.sharing.source import fingerprint

PAGE, DATA, TABLE = "index.html", "sweep.json", "points.csv"
_COLUMNS = (
    "method", "ratio", "budget", "receivers", "dropped", "units", "perplexity", "relative",
    "parameters", "attention_bytes", "bytes",
)  # fmt: skip
_PACKAGES = ("headshare-jax", "jax", "flax", "numpy", "matplotlib")

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Sweep(Command):
    """Measure methods of sharing at several ratios against the dense model, and write a report as a web page.

    Example: headshare sweep my-llama --ratios 0.1,0.3 --calibrate train.txt --text test.txt -o report
    """

    src: Source
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",), help="Folder of the report.")]
    text: Annotated[str, tyro.conf.arg(help="Text to measure perplexity on, which no method sees; as for eval.")]
    ratios: Annotated[tuple[str, ...], tyro.conf.arg(help="Sharing ratios, with commas between.")] = ()
    budgets: Annotated[
        tuple[str, ...], tyro.conf.arg(help="Parts of the attention parameters to keep, with commas between.")
    ] = ()
    methods: Annotated[
        tuple[str, ...], tyro.conf.arg(help=f"Methods, with commas between: {', '.join(METHODS)}; all by default.")
    ] = tuple(METHODS)
    calibrate: Calibrate = None
    calibrate_tokens: CalibrateTokens = 12288
    seq_len: SeqLen = 512
    max_windows: Annotated[int | None, tyro.conf.arg(help="Measure on the first windows of the text only.")] = None
    match: MatchFunction = None
    seed: Seed = None
    tie: Tie = None
    resume: Annotated[
        bool, tyro.conf.arg(help="Go on in a folder that exists, also with further methods and ratios.")
    ] = False

    def run(self) -> dict[str, Any]:
        if self.output.exists() and not self.resume:
            raise HeadshareError(f"{self.output} exists already; choose another name, or go on there with --resume.")
        check_output(self.output, folder=True, overwrite=self.resume)
        chosen, amounts = self._checked_methods(), self._checked_amounts()
        path = convert.locate(self.src)
        source = convert.open_checkpoint(path)
        if source.sharing is not None:
            raise HeadshareError(f"{self.src} already shares heads; a sweep begins with a dense model.")
        for amount in amounts:
            methods.check_amount(amount, source.config)
        calibration = None
        if self.calibrate is not None:
            calibration = calibration_text(
                self.calibrate, path, self.calibrate_tokens, self.seq_len, source.config.vocab_size
            )
        run = _Run(self, source, calibration, text_tokens(self.text, path))
        points = run.points([(method, amount) for method in chosen for amount in amounts])
        record = self._record(run, points)
        with run.folder.result(DATA) as file:
            file.write_text(json.dumps(plain(record), indent=1, allow_nan=False) + "\n")
        with run.folder.result(TABLE) as file:
            _write_csv(points, file)
        with run.folder.result(PAGE) as file:
            file.write_text(report.page(plain(record), [run.scored(method) for method in chosen]))
        return {"output": str(self.output), "page": str(self.output / PAGE), "points": [_row(p) for p in points]} | {
            "protocol": record["protocol"]
        }

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        table = Table("method", "amount", "perplexity", "vs dense", "attention", "parameters", title="quality and size")
        dense = result["points"][0]
        for row in result["points"]:
            if row["perplexity"] is None:
                table.add_row(row["method"], row["amount"], "none")
                continue
            table.add_row(
                row["method"],
                row["amount"],
                f"{row['perplexity']:.1f}",
                f"{row['relative']:.2f}x",
                f"{row['attention_bytes'] / dense['attention_bytes']:.1%}",
                megabytes(row["bytes"]),
            )
        yield table
        for row in result["points"]:
            if row["perplexity"] is None:
                yield f"{row['method']}, {row['amount']}: {row['reason']}"
        yield f"text: {self.text}; {result['protocol']}"
        yield f"written: {result['page']}; {DATA} and {TABLE} beside it"

    def _settings(self) -> MethodSettings:
        return MethodSettings(match=self.match, seed=self.seed, tie=self.tie)

    def _checked_methods(self) -> list[Method]:
        names = list(dict.fromkeys(",".join(self.methods).replace(" ", "").split(",")))
        chosen = [methods.find(name) for name in names]
        for setting, value in self._settings().given.items():
            if setting == "tie":
                check_tie(value)
            if not any(setting in method.uses for method in chosen):
                raise HeadshareError(f"None of the methods {', '.join(names)} has a use for {setting}.", option=setting)
        needy = [method.name for method in chosen if method.needs_text]
        if needy and self.calibrate is None:
            raise HeadshareError(f"The methods {', '.join(needy)} need a text: --calibrate TEXT.")
        return chosen

    def _checked_amounts(self) -> list[Amount]:
        ratios, budgets = (_numbers(f"--{name}", getattr(self, name)) for name in ("ratios", "budgets"))
        if not ratios and not budgets:
            raise HeadshareError("A sweep needs --ratios or --budgets.")
        return [Amount(ratio=ratio) for ratio in ratios] + [Amount(budget=budget) for budget in budgets]

    def _record(self, run: "_Run", points: list[dict[str, Any]]) -> dict[str, Any]:
        """All there is to know of the sweep, but for the scores, as plain data."""
        dense = points[0]
        for point in points:
            point["relative"] = None if point["perplexity"] is None else point["perplexity"] / dense["perplexity"]
        calibration = run.calibration
        return {
            "format": "headshare-sweep",
            "version": 1,
            "model": {"name": self.src.rstrip("/").rpartition("/")[2], "source": self.src}
            | run.source.config.to_json(),
            "units": run.source.config.num_units,
            "fingerprint": run.identity["model"],
            "text": {"name": self.text, "sha256": run.identity["held-out text"]},
            "calibration": None
            if calibration is None
            else {"name": calibration.name, "digest": calibration.digest, "windows": calibration.windows_wt.shape},
            "settings": run.identity["settings"],
            "protocol": dense["protocol"],
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
            | {"python": platform.python_version()},
            "methods": {name: METHODS[name].summary for name in METHODS if name in {p["method"] for p in points}},
            "points": points,
        }


class _Run:
    """Measures the points that the sweep's folder does not hold yet, and keeps each as soon as it is there."""

    def __init__(
        self, sweep: Sweep, source: convert.Checkpoint, calibration: CalibrationText | None, held_out: np.ndarray
    ):
        self.source, self.calibration, self.held_out = source, calibration, held_out
        self.seq_len, self.max_windows = sweep.seq_len, sweep.max_windows
        self.settings = sweep._settings()
        self.windows_wt = None if calibration is None else calibration.windows_wt
        self.identity = {
            "model": fingerprint(source),
            "calibration text": None if self.windows_wt is None else tokens_digest(self.windows_wt),
            "held-out text": tokens_digest(held_out),
            "settings": {
                **asdict(self.settings),
                "seed": self.settings.seed or 0,
                "tie": self.settings.shared_tie,
                "seq_len": sweep.seq_len,
                "max_windows": sweep.max_windows,
                "release": importlib.metadata.version("headshare-jax"),
            },
        }
        self.folder = SweepFolder(sweep.output, self.identity)
        self._scores: dict[str, MatchResult] = {}

    def points(self, pairs: list[tuple[Method, Amount]]) -> list[dict[str, Any]]:
        """The dense model's point, then one for every method and amount."""
        total = len(pairs) + 1
        with progress_with_text() as show:
            tell = partial(_told, show, 0, total, "dense")
            points = [self._kept("dense", lambda: self._measured(Llama.of(self.source), tell))]
            points[0] |= {"method": "dense", "ratio": 0.0, "budget": None, "amount": "all"}
            if points[0]["perplexity"] is None:
                raise HeadshareError("The dense model's perplexity is not finite on this text; check model and text.")
            for done, (method, amount) in enumerate(pairs, 1):
                name = f"{method.name}-{amount}".replace(" ", "-")
                tell = partial(_told, show, done, total, name)
                point = self._kept(name, partial(self._point, method, amount, tell))
                points.append(point | {"method": method.name, **asdict(amount), "amount": _label(amount)})
                show(done + 1, total, "")
        return points

    def _kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        point = self.folder.point(name)
        if point is None:
            point = plain(make())
            self.folder.keep_point(name, point)
        return point

    def _point(self, method: Method, amount: Amount, tell: Tell) -> dict[str, Any]:
        scores = self.scored(method, tell)
        try:
            sharing = methods.choose(method, scores, amount, self.source.config, self.settings)
        except HeadshareError as error:
            return {"perplexity": None, "reason": str(error)}
        model, fit = methods.apply(
            method, self.source, sharing, self.windows_wt, check_source=False, progress=_counted(tell, "sharing")
        )
        return self._measured(Llama.of(model), tell) | {
            "map": json.loads(sharing.to_json()),
            "fit": None if fit is None else asdict(fit),
        }

    def scored(self, method: Method, tell: Tell = lambda text: None) -> MatchResult:
        """The scores of a method, which it may have in common with others."""
        name = method.scores.__name__
        if name not in self._scores:
            scores = self.folder.scores(name)
            if scores is None:
                scores = method.scores(
                    self.source, self.windows_wt, self.settings, _counted(tell, "matching"), self.folder.journals
                )
                self.folder.keep_scores(name, scores)
            self._scores[name] = scores
        return self._scores[name]

    def _measured(self, model: Llama, tell: Tell) -> dict[str, Any]:
        result: Perplexity = perplexity(
            model,
            self.held_out,
            seq_len=self.seq_len,
            max_windows=self.max_windows,
            progress=_counted(tell, "perplexity"),
        )
        sizes = ledger_data(ledger(model))
        rows = sizes["rows"]
        return {
            "perplexity": result.token_perplexity,
            "reason": None if math.isfinite(result.token_perplexity) else "not finite",
            "protocol": result.protocol,
            "receivers": 0 if model.sharing is None else len(model.sharing.receivers),
            "dropped": 0 if model.sharing is None else int(model.sharing.dropped.sum()),
            "units": model.config.num_units,
            "parameters": sizes["stored"],
            "bytes": sizes["stored_bytes"],
            "attention_bytes": sum(row["stored"] * row["bytes_per_parameter"] for row in rows if row["part"] in "qkvo"),
            "ledger": sizes,
        }


def _numbers(option: str, words: tuple[str, ...]) -> list[float]:
    """Numbers with commas between, ascending."""
    try:
        return sorted({float(word) for word in ",".join(words).replace(" ", "").split(",") if word})
    except ValueError as error:
        raise HeadshareError(f"{option} takes numbers with commas between, such as 0.1,0.3: {error}.") from error


def _label(amount: Amount) -> str:
    """An amount as a person reads it."""
    if amount.budget is None:
        return f"{100 * (amount.ratio or 0.0):g} % of units"
    return f"{100 * amount.budget:g} % of attention kept"


def _told(show: Callable[[int, int, str], None], done: int, total: int, name: str, text: str) -> None:
    show(done, total, f"{name}: {text}")


def _counted(tell: Tell, label: str) -> methods.Progress:
    return lambda done, total: tell(f"{label} {done}/{total}")


def _row(point: dict[str, Any]) -> dict[str, Any]:
    """A point without its map, fit and ledger."""
    return {name: point.get(name) for name in (*_COLUMNS, "amount", "reason")}


def _write_csv(points: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(points)
