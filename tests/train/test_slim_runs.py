"""PostShare of slim models: a tied stage trains what is stored and nothing else; what is cut stays cut."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from postshare_run import ALIGN, TIED, final_weights, losses, recipe
from support import slim_sharing

import headshare_jax as hs
from headshare_jax import cli
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import PARAMETERS, parameter_names
from headshare_jax.plan.footprint import footprint
from headshare_jax.train import loop


@pytest.fixture(scope="module")
def start(workplace: Path) -> Path:
    """A slim model that was made of the workplace's."""
    dense = hs.load(workplace / "model")
    sharing = replace(slim_sharing(dense), source=hs.fingerprint(dense))
    hs.save(hs.share(dense, sharing), workplace / "slim")
    return workplace / "slim"


def run(workplace: Path, start: Path, folder: Path, **how: Any) -> None:
    stage = TIED | {"distill_weight": 0.5}
    loop.run(recipe(workplace, stages=[stage], sharing={"start": str(start)}), folder, **how)


def test_a_slim_model_trains_and_stays_slim(workplace: Path, start: Path, tmp_path: Path) -> None:
    run(workplace, start, tmp_path / "whole")
    before, after = hs.load(start), hs.load(tmp_path / "whole" / "final")
    assert after.sharing == before.sharing
    assert after.sharing is not None
    for name in parameter_names(after.config):
        assert after.array(name).shape == before.array(name).shape
        assert not np.array_equal(after.array(name), before.array(name)), name
        projection = PARAMETERS[name].pool
        if projection is not None:
            cut = after.sharing.pool_index(projection) == len(after.sharing.stored_slots(projection))
            for layer in range(after.config.num_layers):
                heads = np.moveaxis(after.read(name, layer), PARAMETERS[name].axes.index("h"), 1)
                assert not heads.reshape(-1, *heads.shape[2:])[cut[layer]].any()
    # What was stopped goes on to the same, and a checkpoint is converted to what the run ends with.
    stop = lambda line: os.kill(os.getpid(), signal.SIGTERM) if line["step"] == 2 else None  # noqa: E731
    run(workplace, start, tmp_path / "parts", report=stop)
    assert not (tmp_path / "parts" / "final").exists()
    run(workplace, start, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name, value in final_weights(tmp_path / "whole").items():
        np.testing.assert_array_equal(final_weights(tmp_path / "parts")[name], value)
    assert cli.run(["convert", str(tmp_path / "whole"), str(tmp_path / "out"), "--to", "native"]) == 0
    converted = hs.load(tmp_path / "out")
    assert converted.sharing == after.sharing
    for name in parameter_names(after.config):
        np.testing.assert_array_equal(converted.array(name), after.array(name))


def test_slim_maps_that_no_run_can_use_are_refused(workplace: Path, start: Path, tmp_path: Path) -> None:
    sharing = hs.open_checkpoint(start).sharing
    assert sharing is not None
    (tmp_path / "map.json").write_text(sharing.to_json())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"sharing": {"map": str(tmp_path / "map.json")}}, "slim units, but says only how much .* as sharing.start"),
    ]
    for changes, message in wrong:
        for use in (lambda changed: loop.run(changed, tmp_path / "run"), footprint):
            with pytest.raises(HeadshareError, match=message):
                use(recipe(workplace, **changes))
    with pytest.raises(HeadshareError, match="the first stage is align"):
        recipe(workplace, stages=[ALIGN, TIED], sharing={"start": str(start)})
    assert not (tmp_path / "run").exists()
