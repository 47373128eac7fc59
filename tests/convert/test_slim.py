"""Formats of slim models: small in native, written out elsewhere, refused where a format has no place for them."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_cli_model
from support import sharing_by_hand, slim_sharing, tiny_model

import headshare_jax as hs
from headshare_jax import Llama, SharingMap, cli, parameters, share, unshare
from headshare_jax.convert import MAP_FILE, map_file
from headshare_jax.sharing.view import SharedView


def same_weights(one: hs.WeightSource, other: hs.WeightSource) -> None:
    assert one.config == other.config
    layered = parameters.layered_names(one.config)
    for name in parameters.parameter_names(one.config):
        for layer in range(one.config.num_layers) if name in layered else (None,):
            np.testing.assert_array_equal(one.read(name, layer), other.read(name, layer), err_msg=name)


def slim_model(*, drops: bool = True) -> Llama:
    dense = tiny_model()
    sharing = slim_sharing(dense)
    if drops:
        whole = sharing_by_hand(dense, "qkv", {}, [5])
        sharing = SharingMap(whole.donor, whole.score, 2, widths=sharing.widths)
    return share(dense, sharing)


def test_a_plain_export_has_zeros_and_its_map_makes_it_small_again(tmp_path: Path) -> None:
    slim = slim_model()
    hs.save(slim, tmp_path / "plain", to="hf")
    plain = hs.open_checkpoint(tmp_path / "plain")
    assert plain.sharing is None
    same_weights(plain, unshare(slim))
    sharing = map_file.read(tmp_path / "plain" / MAP_FILE)
    assert sharing == slim.sharing
    again = Llama.of(SharedView(plain, sharing))
    for name in parameters.parameter_names(slim.config):
        np.testing.assert_array_equal(again.array(name), slim.array(name))
    assert f"\n{slim.sharing.summary()} (a unit" in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize("drops", [True, False])
def test_gguf_holds_slim_units_in_full(tmp_path: Path, drops: bool) -> None:
    slim = slim_model(drops=drops)
    hs.save(slim, tmp_path / "model.gguf", to="gguf")
    found = hs.open_checkpoint(tmp_path / "model.gguf")
    same_weights(found, unshare(slim))
    assert found.sharing is None or (found.sharing.widths is None and found.sharing.dropped.sum() == 1)
    assert (found.sharing is not None) == drops


def test_inspect_shows_widths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slim = slim_model()
    assert slim.sharing is not None
    assert slim.sharing.widths is not None
    hs.save(slim, tmp_path / "slim")
    assert cli.run(["inspect", str(tmp_path / "slim"), "--pairs", "--check"]) == 0
    shown = capsys.readouterr().out
    assert f"Map: {slim.sharing.summary()}, chosen by" in shown
    rank, pairs = slim.sharing.widths.rank[0, 1], slim.sharing.widths.pairs[0, 1].sum()
    assert f"{rank} of 16 values, {pairs} of 8 pairs" in shown
    assert cli.run(["inspect", str(tmp_path / "slim"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["map"]["slim"][0]["rank"] == rank
    assert told["ledger"]["nominal_saving"] == told["ledger"]["actual_saving"]


def test_a_plain_export_is_made_slim_again_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = tiny_model(vocab_size=len(tiny_cli_model.ALPHABET))
    slim = share(dense, slim_sharing(dense))
    assert slim.sharing is not None
    hs.save(slim, tmp_path / "plain", to="hf")
    tiny_cli_model.with_tokenizer(tmp_path / "plain")
    (tmp_path / "map.json").write_text(slim.sharing.to_json())

    def shared(name: str, *more: str) -> int:
        with_map = ["share", str(tmp_path / "plain"), str(tmp_path / name), "--map", str(tmp_path / "map.json")]
        return cli.run([*with_map, "--no-eval", *more])

    assert shared("out") == 0
    assert hs.open_checkpoint(tmp_path / "out").sharing == slim.sharing
    same_weights(hs.load(tmp_path / "out"), slim)
    assert shared("compact", "--to", "hf-compact") == 0
    same_weights(hs.load(tmp_path / "compact"), slim)
    wrong = json.loads(slim.sharing.to_json())
    wrong["slim"][0]["rank"] = 0
    (tmp_path / "map.json").write_text(json.dumps(wrong))
    capsys.readouterr()
    assert shared("other") == 2
    assert "or drop the unit instead" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
