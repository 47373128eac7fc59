"""Only what this program wrote is replaced; everything else is refused, and named."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from support import saved_hf_model, sharing_by_hand, tiny_hf_model, tiny_model
from support_gguf import write_gguf

from headshare_jax import HeadshareError, save, share
from headshare_jax.compression.compress import FIT_FILE
from headshare_jax.convert.atomic import check_output
from headshare_jax.report.map import draw_map

FIXTURES = Path(__file__).parents[1] / "fixtures" / "written_by_0.1"
MODEL = tiny_model()
SHARED = share(MODEL, sharing_by_hand(MODEL, "qkv", {2: 0}), check_source=False)


def replaceable(path: Path) -> None:
    check_output(path, folder=path.is_dir(), overwrite=True)


def refused(path: Path) -> str:
    """What is said of an output that is not replaced."""
    with pytest.raises(HeadshareError) as error:
        replaceable(path)
    assert str(error.value).endswith("choose another name.")
    return str(error.value).replace(str(path), "OUT")


@pytest.mark.parametrize("to", ["native", "hf", "hf-compact", "gguf"])
@pytest.mark.parametrize("model", [MODEL, SHARED], ids=["dense", "shared"])
def test_our_models_are_replaced(tmp_path: Path, to: str, model: object) -> None:
    path = tmp_path / ("out.gguf" if to == "gguf" else "out")
    save(model, path, to=to, tokenizer_from=FIXTURES / "dense", documents={FIT_FILE: "{}"})  # type: ignore[arg-type]
    replaceable(path)


@pytest.mark.parametrize("name", ["dense", "dense-hf", "shared", "shared-hf", "shared-compact"])
def test_models_of_the_first_release_are_replaced(name: str) -> None:
    replaceable(FIXTURES / name)


def test_a_map_alone_tells_of_an_older_export(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "shared-hf", tmp_path / "out")
    (tmp_path / "out" / "README.md").unlink()
    replaceable(tmp_path / "out")


@pytest.mark.parametrize("name", ["dense", "shared-hf", "shared-compact"])
@pytest.mark.parametrize(
    "stray",
    ["thesis.tex", ".git/HEAD", "weights/a.tex", "weights/q_pool_pdh/a.txt", "empty/", "inner/config.json"],
)
def test_a_stray_file_is_named_and_kept(tmp_path: Path, name: str, stray: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(FIXTURES / name, out)
    if stray.endswith("/"):
        (out / stray).mkdir()
    else:
        (out / stray).parent.mkdir(parents=True, exist_ok=True)
        (out / stray).write_text("years of work")
    said = "The folder OUT is not replaced: beside a model it holds {}, which headshare did not write; move that, or"
    assert refused(out).startswith(said.format(stray.rstrip("/")))
    with pytest.raises(HeadshareError, match=re.escape(stray.rstrip("/"))):
        save(MODEL, out, overwrite=True)
    assert (out / stray).exists()


def test_what_others_wrote_is_kept(tmp_path: Path) -> None:
    theirs = saved_hf_model(tmp_path / "theirs")
    assert refused(theirs) == (
        "The folder OUT is not replaced: it holds config.json, generation_config.json and 1 more, and nothing tells "
        "that headshare wrote it; choose another name."
    )
    (theirs / "README.md").write_text("To be made smaller with headshare-jax one day.")
    assert "nothing tells that headshare wrote it" in refused(theirs)
    (theirs / "headshare.json").write_text('{"format": "another"}')
    assert "nothing tells that headshare wrote it" in refused(theirs)


@pytest.mark.parametrize(
    ("name", "what"),
    [("run", "a PostShare run"), ("sweep", "a sweep"), ("journal", "journals of finished layers")],
)
def test_what_is_gone_on_with_is_never_replaced(name: str, what: str) -> None:
    assert refused(FIXTURES / name) == f"The folder OUT is not replaced: it holds {what}; choose another name."


def test_a_demos_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(FIXTURES / "shared", out / "native")
    shutil.copytree(FIXTURES / "shared-hf", out / "hf")
    shutil.copy(FIXTURES / "maps" / "direct.json", out / "map.json")
    (out / "map.png").write_bytes(b"as the first release drew it")
    replaceable(out)
    (out / "native" / "thesis.tex").write_text("years of work")
    assert "beside a demo's models it holds native/thesis.tex, which headshare did not write" in refused(out)


def test_empty_folders_and_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.json").touch()
    replaceable(tmp_path / "folder")
    replaceable(tmp_path / "file.json")


OURS: dict[str, Callable[[Path], object]] = {
    "map.json": lambda path: shutil.copy(FIXTURES / "maps" / "direct.json", path),
    "scores.npz": lambda path: np.savez(path, **{name: np.zeros(2) for name in ("donor_layer", "donor_unit", "value")}),
    "functional.npz": lambda path: shutil.copy(FIXTURES / "scores" / "functional.npz", path),
    **{f"map.{ending}": lambda path: draw_map(SHARED.sharing).save(path) for ending in ("png", "svg", "pdf", "PNG")},
    "model.gguf": lambda path: save(MODEL, path, to="gguf"),
}
THEIRS: dict[str, Callable[[Path], object]] = {
    "packages.json": lambda path: path.write_text('{"format": "another"}'),
    "list.json": lambda path: path.write_text("[" * 10_000),
    "data.npz": lambda path: np.savez(path, value=np.zeros(2)),
    "broken.npz": lambda path: path.write_bytes(b"PK\3\4"),
    **{f"figure.{ending}": lambda path: Figure().savefig(path) for ending in ("png", "svg", "pdf")},
    "llama.gguf": lambda path: write_gguf(path, tiny_hf_model()),
    "broken.gguf": lambda path: path.write_bytes(b"GGUF"),
    "notes.txt": lambda path: path.write_text("years of work"),
}


@pytest.mark.parametrize("name", OURS)
def test_our_files_are_replaced(tmp_path: Path, name: str) -> None:
    OURS[name](tmp_path / name)
    replaceable(tmp_path / name)


@pytest.mark.parametrize("name", THEIRS)
def test_others_files_are_named_and_kept(tmp_path: Path, name: str) -> None:
    THEIRS[name](tmp_path / name)
    kinds = {".json": "a sharing map", ".npz": "match scores", ".gguf": "a model", ".txt": "an output"}
    what = kinds.get((tmp_path / name).suffix, "a picture")
    assert refused(tmp_path / name) == (
        f"The file OUT is not replaced: it is not {what} that headshare wrote; choose another name."
    )
