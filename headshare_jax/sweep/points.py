"""The points of a sweep: what every method makes of the model at every amount, against the dense model."""

import importlib.metadata
import json
import math
import platform
import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from headshare_jax import convert
from headshare_jax.calibration.text import OWN, CalibrationText
from headshare_jax.calibration.windows import tokens_digest
from headshare_jax.convert.card import OWN_TEXT
from headshare_jax.errors import HeadshareError, Unmet
from headshare_jax.evaluate.perplexity import perplexity
from headshare_jax.methods.table import METHODS
from headshare_jax.methods.work import Amount, Method, MethodSettings, Step, Work
from headshare_jax.model.llama import Llama
from headshare_jax.report.progress import Show
from headshare_jax.sharing.finite import NotFinite
from headshare_jax.sharing.ledger import ledger
from headshare_jax.sharing.scores import MatchResult
from headshare_jax.sharing.source import fingerprint
from headshare_jax.sweep.folder import SweepFolder

_PACKAGES = ("headshare-jax", "jax", "flax", "numpy", "matplotlib")

Tell = Callable[[str], None]


class Measurements:
    """Measures the points that the sweep's folder does not hold yet.

    Args:
      folder: of the sweep; made if it does not exist.
      source: the dense model.
      calibration: the text for methods that need one.
      held_out: int [tokens], the text that perplexity is measured on, in windows of `seq_len`, at most `max_windows`.
      settings: what the methods are told.

    Raises:
      HeadshareError: the folder holds another sweep, none at all, or a damaged one.
    """

    def __init__(
        self,
        folder: Path,
        source: convert.Checkpoint,
        calibration: CalibrationText | None,
        held_out: np.ndarray,
        settings: MethodSettings,
        *,
        seq_len: int,
        max_windows: int | None = None,
    ):
        self.source, self.calibration, self.held_out, self.settings = source, calibration, held_out, settings
        self.held_out_windows: dict[str, Any] = {"seq_len": seq_len, "max_windows": max_windows}
        self.windows_wt = None if calibration is None else calibration.windows_wt
        self.identity: dict[str, Any] = {
            "model": fingerprint(source),
            "calibration text": None if self.windows_wt is None else tokens_digest(self.windows_wt),
            "held-out text": tokens_digest(held_out),
            "settings": {
                # Names and values of the first release, so that its sweeps go on.
                **{"match": settings.match, "seed": settings.seed or 0, "tie": settings.shared_tie},
                **{"chains": settings.chains, "shards": settings.within_shards},
                **({} if settings.even is None else {"even": settings.even}),
                **self.held_out_windows,
                "release": importlib.metadata.version("headshare-jax"),
            },
        }
        self.folder = SweepFolder(folder, self.identity)
        self._scores: dict[str, MatchResult] = {}

    def points(self, pairs: Sequence[tuple[Method, Amount]], show: Show) -> list[dict[str, Any]]:
        """The dense model's point, then one for every method and amount, as plain data.

        Raises:
          HeadshareError: the dense model's perplexity is not finite.
        """
        total = len(pairs) + 1
        dense = self.folder.point(
            "dense", lambda: self._measured(Llama.of(self.source), _told(show, 0, total, "dense"))
        )
        if dense["perplexity"] is None:
            raise HeadshareError("The dense model's perplexity is not finite on this text; check model and text.")
        points = [dense | {"method": "dense", "ratio": 0.0, "budget": None, "amount": "all"}]
        for done, (method, amount) in enumerate(pairs, 1):
            name = f"{method.name}-{amount}".replace(" ", "-")
            point = self.folder.point(name, partial(self._point, method, amount, _told(show, done, total, name)))
            points.append(point | {"method": method.name, **asdict(amount), "amount": _label(amount)})
            show(done + 1, total, "")
        for point in points:
            point["relative"] = None if point["perplexity"] is None else point["perplexity"] / dense["perplexity"]
        return points

    def record(self, points: list[dict[str, Any]], *, model: str, text: str) -> dict[str, Any]:
        """All there is to know of the sweep, but for the scores, as plain data.

        Args:
          points: of this sweep.
          model, text: what the model and the text are called.
        """
        return {
            "format": "headshare-sweep",
            "version": 1,
            "model": {"name": _name(model), "source": model} | self.source.config.to_json(),
            "units": self.source.config.num_units,
            "fingerprint": self.identity["model"],
            "text": {"name": text, "sha256": self.identity["held-out text"]},
            "calibration": None if self.calibration is None else self.calibration.to_json(),
            "settings": self.identity["settings"],
            "overlap": self._overlap(),
            "protocol": points[0]["protocol"],
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
            | {"python": platform.python_version()},
            "methods": {name: METHODS[name].summary for name in METHODS if name in {p["method"] for p in points}},
            "points": [points[0], *(point | {"command": self._command(point, model)} for point in points[1:])],
        }

    def _overlap(self) -> dict[str, Any] | None:
        """What of the held-out text was in the calibration text."""
        if self.calibration is None:
            return None
        found = self.calibration.overlap(self.held_out, **self.held_out_windows)
        return asdict(found) | {"sentence": found.sentence("the text that methods were calibrated on")}

    def _command(self, point: dict[str, Any], model: str) -> str:
        """What makes the model of a point."""
        method, amount = METHODS[point["method"]], "ratio" if point["budget"] is None else "budget"
        options = [("method", method.name), (amount, f"{point[amount]:g}")]
        options += [(name, str(value)) for name, value in self.settings.given.items() if name in method.uses]
        if method.needs_text and self.calibration is not None:
            windows, seq_len = self.calibration.windows_wt.shape
            several = len(self.calibration.parts) > 1
            if method.own and not several:
                options.append(("own", "0"))
            for part in self.calibration.parts:
                name = OWN if part.name == OWN_TEXT else part.name
                options.append(("calibrate", f"{part.weight:.15g}@{name}" if several else name))
            options += [("calibrate-tokens", str(windows * seq_len)), ("seq-len", str(seq_len))]
        output = f"{_name(model).removesuffix('.gguf')}-{method.name}-{point[amount]:g}"
        words = [word for name, value in options for word in (f"--{name}", value)]
        return shlex.join(["headshare", "share", model, output, *words])

    def scores(self, chosen: Sequence[Method]) -> list[MatchResult]:
        """The scores of those methods that make any; some have theirs in common."""
        work = self._work(lambda text: None)
        return [scores for method in chosen if (scores := method.scored(work)) is not None]

    def _work(self, tell: Tell) -> Work:
        """What a method is given. A fit serves one point, which is kept itself."""
        return Work(
            self.source, self.settings, self.windows_wt, journals=self.folder.journals, kept=self._kept,
            phase=lambda label: nullcontext(_counted(tell, label)),
        )  # fmt: skip

    def _kept(self, name: str, score: Callable[[], MatchResult]) -> MatchResult:
        if name not in self._scores:
            self._scores[name] = self.folder.scores(name, score)
        return self._scores[name]

    def _point(self, method: Method, amount: Amount, tell: Tell) -> dict[str, Any]:
        try:
            made = method.make(self._work(tell), amount)
            measured = self._measured(Llama.of(made.model), tell)
        except (NotFinite, Unmet) as error:
            return {"perplexity": None, "reason": str(error)}
        return measured | {
            "map": json.loads(made.map.to_json()),
            "fit": None if made.fit is None else asdict(made.fit),
        }

    def _measured(self, model: Llama, tell: Tell) -> dict[str, Any]:
        result = perplexity(model, self.held_out, **self.held_out_windows, progress=_counted(tell, "perplexity"))
        sizes = ledger(model)
        return {
            "perplexity": result.token_perplexity,
            "reason": None if math.isfinite(result.token_perplexity) else "not finite",
            "protocol": result.protocol,
            "receivers": 0 if model.sharing is None else len(model.sharing.receivers),
            "dropped": 0 if model.sharing is None else int(model.sharing.dropped.sum()),
            "slim": 0 if model.sharing is None else int(model.sharing.slim.sum()),
            "units": model.config.num_units,
            "parameters": sizes.stored,
            "bytes": sizes.stored_bytes,
            "attention_bytes": sum(row.stored * row.bytes_per_parameter for row in sizes.rows if row.part in "qkvo"),
            "ledger": sizes.to_json(),
        }


def _name(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]


def _label(amount: Amount) -> str:
    """An amount as a person reads it."""
    if amount.budget is None:
        return f"{100 * (amount.ratio or 0.0):g} % of units"
    return f"{100 * amount.budget:g} % of attention kept"


def _told(show: Show, done: int, total: int, name: str) -> Tell:
    return lambda text: show(done, total, f"{name}: {text}")


def _counted(tell: Tell, label: str) -> Step:
    return lambda done, total: tell(f"{label} {done}/{total}")
