"""The model card beside exported Hugging Face models."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny_cli_model
from support import sharing_by_hand, tiny_hf_model, tiny_model
from support_gguf import write_gguf

import headshare_jax as hs
from headshare_jax.convert import card

CALIBRATION = {"name": "text.txt", "digest": "text 1234abcd", "windows": [6, 512]}


def saved_card(folder: Path, model: Any, to: str, **settings: Any) -> Any:
    hs.save(model, folder, to=to, **settings)
    return huggingface_hub.ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("to", ["hf", "hf-compact"])
def test_card_of_a_shared_model(tmp_path: Path, to: str) -> None:
    dense = tiny_model()
    model = hs.share(dense, sharing_by_hand(dense, "qk", {2: 1, 5: 0}))
    provenance = {"source": "owner/my-llama", "method": "refit", "calibration": CALIBRATION}
    written = saved_card(tmp_path / "small", model, to, provenance=provenance, documents={"headshare_fit.json": "{}"})
    assert written.data.base_model == "owner/my-llama"
    assert written.data.library_name == "transformers"
    assert written.data.license is None
    sizes = hs.ledger(model)
    for words in (
        "2 of 6 units use another unit's qk weights",
        "6 windows of 512 tokens from the start of `text.txt` (text 1234abcd)",
        f"| all parameters | {sizes.dense:,} | {sizes.stored:,} |",
        f"| bytes | {sizes.dense_bytes:,} | {sizes.stored_bytes:,} |",
        "`headshare_fit.json`",
        'from_pretrained("small"',
        "headshare-jax 0.",
    ):
        assert words in written.text, words
    assert ("trust_remote_code" in written.text) == (to == "hf-compact")
    again = hs.load(tmp_path / "small")
    assert (again.sharing == model.sharing) == (to == "hf-compact")


def test_card_tells_only_what_is_known(tmp_path: Path) -> None:
    written = saved_card(tmp_path / "dense", tiny_model(), "hf")
    assert written.data.base_model is None
    assert written.data.license is None
    assert "shared" not in written.text
    # A local folder is no name on the hub.
    named = saved_card(tmp_path / "local", tiny_model(), "hf", provenance={"source": "a/local/folder"})
    assert named.data.base_model is None
    assert "`folder`" in named.text
    assert "a/local" not in named.text
    hs.save(tiny_model(), tmp_path / "native")
    assert not (tmp_path / "native" / "README.md").exists()


@pytest.mark.parametrize("to", ["hf", "hf-compact"])
def test_no_file_tells_where_its_maker_keeps_things(tmp_path: Path, to: str) -> None:
    dense = tiny_cli_model.saved_without_torch(tmp_path / "dense", hidden_size=32, intermediate_size=48)
    text = tmp_path / "text.txt"
    text.write_text("Some words to calibrate on. " * 40)
    amount: dict[str, Any] = {"calibrate_tokens": 640, "seq_len": 64, "progress": False}
    hs.compress(dense, tmp_path / "out", ratio=0.4, method="refit", calibrate=text, to=to, **amount)
    files = [path for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".md", ".py")]
    assert {"README.md", "config.json", "headshare_map.json", "headshare_fit.json"} <= {path.name for path in files}
    assert [path.name for path in files if str(tmp_path.parent) in path.read_text()] == []
    assert "`text.txt`" in (tmp_path / "out" / "README.md").read_text()


def test_data_sets_keep_their_names() -> None:
    for name in ("owner/texts", "owner/texts:en:train", "text.txt"):
        assert card.public_name(name) == name
    assert card.public_name("/home/me/text.txt") == card.public_name(r"C:\\Users\\me\\text.txt") == "text.txt"


def test_the_card_says_what_the_model_wrote_itself(tmp_path: Path) -> None:
    dense = tiny_model()
    model = hs.share(dense, sharing_by_hand(dense, "qkv", {2: 1}))
    own = {"name": "text that the model wrote", "digest": "sha256:5678", "windows": 2}
    texts = [{"name": "/texts/wiki.txt", "digest": "text 1234", "windows": 6}, own]
    mixed = {"name": "both", "digest": "sha256:9abc", "windows": [8, 512], "texts": texts}
    for number, (calibration, told) in enumerate(
        (
            (own | {"windows": [8, 512]}, "8 windows of 512 tokens that the model wrote itself (sha256:5678)."),
            (mixed, ": 6 from the start of `wiki.txt` (text 1234) and 2 that the model wrote itself (sha256:5678), in"),
        )
    ):
        assert told in saved_card(tmp_path / str(number), model, "hf", provenance={"calibration": calibration}).text


def test_garbled_provenance_is_left_out(tmp_path: Path) -> None:
    dense = tiny_model()
    model = hs.share(dense, sharing_by_hand(dense, "qkv", {2: 1}))
    for number, calibration in enumerate([3, {"name": "x"}, {"name": 1, "digest": 2, "windows": "6"}]):
        provenance = {"source": ["x"], "license": 5, "calibration": calibration}
        written = saved_card(tmp_path / str(number), model, "hf", provenance=provenance)
        assert "Calibrated" not in written.text
        assert written.data.license is None


def test_license_comes_from_the_source(tmp_path: Path) -> None:
    hs.save(tiny_model(), tmp_path / "base", to="hf")
    readme = tmp_path / "base" / "README.md"
    for text, license in (
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n", "apache-2.0"),
        ("No metadata at all.", None),
        ("---\nlicense: [1, 2\n---\n", None),
    ):
        readme.write_text(text)
        assert card.license_of(tmp_path / "base") == license
    named = write_gguf(tmp_path / "base.gguf", tiny_hf_model(), metadata={"general.license": "mit"})
    assert card.license_of(named) == "mit"
    readme.unlink()
    assert card.license_of(tmp_path / "base") is None
    readme.write_text("---\nlicense: mit\n---\n")
    hs.save(tiny_model(), tmp_path / "native", tokenizer_from=tmp_path / "base")
    provenance = hs.open_checkpoint(tmp_path / "native").provenance  # type: ignore[union-attr]
    written = saved_card(tmp_path / "hf", tiny_model(), "hf", provenance=provenance)
    assert written.data.license == "mit"
    # The source's own card describes the source, so it is not taken along.
    assert written.text.startswith("\n# hf")
