"""Outputs appear complete or not at all: refusals, errors midway, full disks, and outputs over their sources."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from support import saved_hf_model, sharing_by_hand, tiny_hf_model, tiny_model
from support_gguf import write_gguf

import headshare_jax
from headshare_jax import HeadshareError, load, parameters
from headshare_jax.convert import open_checkpoint, save
from headshare_jax.convert.atomic import check_output, new_directory, new_file
from headshare_jax.sharing.source import assemble
from headshare_jax.sharing.view import SharedView, cast


@pytest.fixture(params=["folder", "file"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which sort of output."""
    return str(request.param)


def made(kind: str, text: str) -> bytes:
    """The content of a small output, such as this program writes."""
    return json.dumps({"format": "headshare-map" if kind == "file" else "headshare-native", "": text}).encode()


def write(kind: str, path: Path, text: str, fail: Exception | None = None, **settings: Any) -> None:
    """Writes one small output, a folder with one file or a map, and then fails, if asked to."""
    with (new_file if kind == "file" else new_directory)(path, **settings) as partial:
        (partial if kind == "file" else partial / "headshare.json").write_bytes(made(kind, text))
        if fail:
            raise fail


def content(path: Path) -> dict[str, bytes]:
    """Everything under a folder, by name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_an_output_appears_when_it_is_complete(tmp_path: Path, kind: str) -> None:
    write(kind, tmp_path / "out.txt", "new")
    assert list(content(tmp_path).values()) == [made(kind, "new")]


def test_an_output_that_exists_is_refused(tmp_path: Path, kind: str) -> None:
    write(kind, tmp_path / "out.txt", "old")
    before = content(tmp_path)
    with pytest.raises(HeadshareError, match="exists already; choose another name, or overwrite it") as caught:
        write(kind, tmp_path / "out.txt", "new")
    assert caught.value.options == ("overwrite",)
    with pytest.raises(HeadshareError, match="exists already"):
        check_output(tmp_path / "out.txt", folder=kind == "folder", overwrite=False)
    assert content(tmp_path) == before


def test_overwriting_replaces_all_of_the_old(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out") as folder:
        (folder / "headshare.json").write_bytes(made("folder", "old"))
        (folder / "tokenizer.json").write_text("old")
    write("folder", tmp_path / "out", "new", overwrite=True)
    assert content(tmp_path) == {"out/headshare.json": made("folder", "new")}


def test_a_new_folder_that_cannot_take_the_name_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("folder", tmp_path / "out", "old")
    rename = os.rename

    def refuse(one: Path, other: Path) -> None:
        if str(one).endswith(".partial") and Path(other).name == "out":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(one, other)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(HeadshareError, match="Input/output error; what was there before is unchanged"):
        write("folder", tmp_path / "out", "new", overwrite=True)
    assert content(tmp_path) == {"out/headshare.json": made("folder", "old")}


def test_overwriting_a_file(tmp_path: Path) -> None:
    write("file", tmp_path / "out.json", "old")
    write("file", tmp_path / "out.json", "new", overwrite=True)
    assert content(tmp_path) == {"out.json": made("file", "new")}


@pytest.mark.parametrize("error", [RuntimeError("midway"), HeadshareError("midway"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("old", [True, False])
def test_an_error_midway_leaves_what_was_there(tmp_path: Path, kind: str, error: Any, old: bool) -> None:
    if old:
        write(kind, tmp_path / "out.json", "old")
    before = content(tmp_path)
    with pytest.raises(type(error)):
        write(kind, tmp_path / "out.json", "new", fail=error, overwrite=True)
    assert content(tmp_path) == before


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path, kind: str) -> None:
    writer = new_file if kind == "file" else new_directory
    with pytest.raises(HeadshareError, match="exists already"), writer(tmp_path / "out"):
        write(kind, tmp_path / "out", "meanwhile")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_missing_parent_folder_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(
        HeadshareError, match=f"The folder {tmp_path}/no for the output does not exist; create it first"
    ):
        write(kind, tmp_path / "no" / "out", "new")


def test_a_folder_that_is_read_only_is_named(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(HeadshareError, match=f"The folder {tmp_path} cannot be written to"):
        write(kind, tmp_path / "out", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_parent_folder(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HeadshareError, match="does not exist"):
        write(kind, tmp_path / "file" / "out", "new")


def test_folders_and_files_do_not_replace_one_another(tmp_path: Path) -> None:
    write("file", tmp_path / "file", "old")
    write("folder", tmp_path / "folder", "old")
    before = content(tmp_path)
    with pytest.raises(HeadshareError, match="is a file, not a folder"):
        write("folder", tmp_path / "file", "new", overwrite=True)
    with pytest.raises(HeadshareError, match="is a folder, not a file"):
        write("file", tmp_path / "folder", "new", overwrite=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "x" * 250])
def test_names_that_no_file_can_have(tmp_path: Path, kind: str, name: str) -> None:
    with pytest.raises(HeadshareError, match=r"cannot be used|Cannot write"):
        write(kind, tmp_path / name, "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.EACCES, "Permission denied"), (errno.ENOSPC, "the disk is full"), (errno.EROFS, "Read-only")],
)
def test_the_reason_of_the_system_is_told(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    def refuse(*args: Any, **settings: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(
        HeadshareError, match=f"Cannot write {tmp_path}/out: {reason}.*; what was there before is unchanged"
    ):
        write(kind, tmp_path / "out", "new")


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path, kind: str) -> None:
    (tmp_path / "there").mkdir()
    write(kind, tmp_path / "there" / "out.json", "old")
    (tmp_path / "link").symlink_to(tmp_path / "there" / "out.json")
    write(kind, tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert set(content(tmp_path / "there").values()) == {made(kind, "new")}
    assert len(list((tmp_path / "there").iterdir())) == 1


@pytest.mark.parametrize("place", [".", "..", "inner/.."])
def test_the_working_folder_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "work" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(HeadshareError, match="so it is not replaced; choose another name"):
        write("folder", Path(place), "new", overwrite=True)


def test_the_home_folder_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / "me").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    for place in ("home", "home/me"):
        with pytest.raises(HeadshareError, match="so it is not replaced"):
            write("folder", tmp_path / place, "new", overwrite=True)


# Outputs that touch their sources.


def parameters_of(path: Path) -> dict[str, bytes]:
    source = open_checkpoint(path)
    return {name: assemble(source, name).tobytes() for name in parameters.parameter_names(source.config)}


@pytest.mark.parametrize("to", ["native", "hf-compact", "gguf"])
def test_a_checkpoint_does_not_replace_itself_nor_what_lies_in_it(tmp_path: Path, to: str) -> None:
    path = tmp_path / ("model.gguf" if to == "gguf" else "model")
    save(tiny_model(), path, to=to)
    before = content(tmp_path)
    source = open_checkpoint(path)
    sharing = sharing_by_hand(load(path), "qkv", {2: 0})
    for view in (source, SharedView(source, sharing, check_source=False), cast(source, "bfloat16")):
        with pytest.raises(HeadshareError, match=f"{path} is what the model is read from; choose another name"):
            save(view, path, to=to, overwrite=True)
    if to != "gguf":
        write("folder", path / "inner", "ours")
        with pytest.raises(HeadshareError, match=f"{path}/inner is part of {path}, which is read"):
            save(source, path / "inner", overwrite=True)
        shutil.rmtree(path / "inner")
    assert content(tmp_path) == before


def test_a_checkpoint_that_cannot_be_read_to_its_end_replaces_none(tmp_path: Path) -> None:
    path, old = tmp_path / "model", tmp_path / "old"
    for output in (path, old):
        save(tiny_model(), output)
    source = open_checkpoint(path)
    (path / "weights" / "down_lfd" / "c" / "0" / "0" / "0").unlink()
    before = content(tmp_path)
    with pytest.raises(HeadshareError, match="down_lfd is incomplete or corrupt"):
        save(source, old, to="hf", overwrite=True)
    assert content(tmp_path) == before


def test_an_output_inside_its_source(tmp_path: Path) -> None:
    path = saved_hf_model(tmp_path / "model")
    before = parameters_of(path)
    save(open_checkpoint(path), path / "native")
    assert parameters_of(path / "native") == parameters_of(path) == before


def test_an_output_around_its_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    gguf = write_gguf(tmp_path / "models" / "model.gguf", tiny_hf_model())
    folder = saved_hf_model(tmp_path / "models" / "hf")
    before = content(tmp_path)
    for path in (gguf, folder):
        with pytest.raises(HeadshareError, match=f"{path}, so it is not replaced; choose another name"):
            save(open_checkpoint(path), tmp_path / "models", overwrite=True)
        with pytest.raises(HeadshareError, match=f"{path}, so it is not replaced; choose another name"):
            save(headshare_jax.load(path), tmp_path / "models", tokenizer_from=path, overwrite=True)
    assert content(tmp_path) == before


# Full disks, in processes of their own.


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    save(tiny_model(), path, to="hf")
    return path


def run(script: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


FULL = """
    import resource, sys
    from pathlib import Path
    import headshare_jax
    from headshare_jax.convert.atomic import new_file

    source, output, to, limit = sys.argv[1:]
    checkpoint = headshare_jax.open_checkpoint(source)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    try:
        if to == "file":
            with new_file(Path(output), overwrite=True) as partial:
                partial.write_bytes(bytes(100_000))
        else:
            headshare_jax.save(checkpoint, output, to=to, overwrite=True)
    except headshare_jax.HeadshareError as error:
        print(error)
"""


@pytest.mark.parametrize(("to", "limit"), [("native", 300), ("native", 10_000), ("hf", 10_000), ("file", 300)])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(
    tmp_path: Path, source: Path, to: str, limit: int
) -> None:
    output = tmp_path / "out.json"
    if to == "file":
        output.write_bytes(made("file", "old"))
    else:
        shutil.copytree(source, output)
    before = content(tmp_path)
    done = run(FULL, source, output, to, limit)
    assert done.stdout == f"Cannot write {output}: File too large; what was there before is unchanged.\n"
    assert done.stderr == ""
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
