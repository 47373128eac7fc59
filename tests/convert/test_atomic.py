"""Outputs appear complete or not at all: refusals, errors midway, kills, full disks, and outputs over their sources."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from support import saved_hf_model, tiny_hf_model
from support_gguf import write_gguf

import headshare_jax
from headshare_jax import HeadshareError, parameters
from headshare_jax.convert import open_checkpoint, save
from headshare_jax.convert.atomic import check_output, new_directory, new_file
from headshare_jax.sharing.source import assemble


@pytest.fixture(params=["folder", "file"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which sort of output."""
    return str(request.param)


def write(kind: str, path: Path, text: str, fail: Exception | None = None, **settings: Any) -> None:
    """Writes one small output and then fails, if asked to."""
    if kind == "file":
        with new_file(path, **settings) as partial:
            partial.write_text(text)
            if fail:
                raise fail
    else:
        with new_directory(path, **settings) as folder:
            (folder / "text").write_text(text)
            if fail:
                raise fail


def content(path: Path) -> dict[str, bytes]:
    """Everything under a folder, by name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_an_output_appears_when_it_is_complete(tmp_path: Path, kind: str) -> None:
    write(kind, tmp_path / "out.txt", "new")
    assert list(content(tmp_path).values()) == [b"new"]


def test_what_a_killed_process_left_is_named_and_stays(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    left = tmp_path / (".out.abc.partial.txt" if kind == "file" else ".out.txt.abc.partial")
    left.mkdir()
    write(kind, tmp_path / "out.txt", "new")
    assert f"{left} was left by a process that was killed" in caplog.text
    assert left.is_dir()


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
        (folder / "old").mkdir()
        (folder / "old" / "text").write_text("old")
    write("folder", tmp_path / "out", "new", overwrite=True)
    assert content(tmp_path) == {"out/text": b"new"}


def test_a_new_folder_that_cannot_take_the_name_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("folder", tmp_path / "out", "old")
    rename = os.rename

    def refuse(one: Path, other: Path) -> None:
        if str(one).endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(one, other)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(HeadshareError, match="Input/output error; what was there before is unchanged"):
        write("folder", tmp_path / "out", "new", overwrite=True)
    assert content(tmp_path) == {"out/text": b"old"}


def test_overwriting_a_file(tmp_path: Path) -> None:
    write("file", tmp_path / "out.png", "old")
    write("file", tmp_path / "out.png", "new", overwrite=True)
    assert content(tmp_path) == {"out.png": b"new"}


@pytest.mark.parametrize("error", [RuntimeError("midway"), HeadshareError("midway"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("old", [True, False])
def test_an_error_midway_leaves_what_was_there(tmp_path: Path, kind: str, error: Any, old: bool) -> None:
    if old:
        write(kind, tmp_path / "out", "old")
    before = content(tmp_path)
    with pytest.raises(type(error)):
        write(kind, tmp_path / "out", "new", fail=error, overwrite=True)
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
    def refuse(**settings: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(
        HeadshareError, match=f"Cannot write {tmp_path}/out: {reason}.*; what was there before is unchanged"
    ):
        write(kind, tmp_path / "out", "new")


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path, kind: str) -> None:
    (tmp_path / "there").mkdir()
    write(kind, tmp_path / "there" / "out", "old")
    (tmp_path / "link").symlink_to(tmp_path / "there" / "out")
    write(kind, tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert set(content(tmp_path / "there").values()) == {b"new"}
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


@pytest.mark.parametrize("to", ["native", "hf"])
def test_a_checkpoint_can_replace_itself(tmp_path: Path, to: str) -> None:
    path = saved_hf_model(tmp_path / "model")
    (path / "tokenizer.json").write_text("{}")
    before = parameters_of(path)
    for format in (to, "hf", to):
        save(open_checkpoint(path), path, to=format, tokenizer_from=path, overwrite=True)
        assert parameters_of(path) == before
    assert (path / "tokenizer.json").read_text() == "{}"
    assert [folder.name for folder in tmp_path.iterdir()] == ["model"]


def test_a_checkpoint_that_cannot_be_read_to_its_end_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save(open_checkpoint(saved_hf_model(tmp_path / "hf")), path)
    source = open_checkpoint(path)
    (path / "weights" / "down_lfd" / "c" / "0" / "0" / "0").unlink()
    before = content(path)
    with pytest.raises(HeadshareError, match="down_lfd is incomplete or corrupt"):
        save(source, path, to="hf", overwrite=True)
    assert content(path) == before


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


# Kills and full disks, in processes of their own.


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_hf_model(tmp_path_factory.mktemp("source"))


def run(script: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


KILLED = """
    import os, signal, sys
    import headshare_jax
    from headshare_jax.convert.tensor_files import TensorCheckpoint

    source, output, to = sys.argv[1:]
    read = TensorCheckpoint.read

    def killed(self, name, layer=None, heads=None):
        if layer == 2 and name.startswith("up"):
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, name, layer, heads)

    TensorCheckpoint.read = killed
    headshare_jax.save(headshare_jax.open_checkpoint(source), output, to=to, overwrite=True)
"""


@pytest.mark.parametrize("to", ["native", "hf"])
@pytest.mark.parametrize("old", [True, False])
def test_a_kill_leaves_what_was_there(tmp_path: Path, source: Path, to: str, old: bool) -> None:
    if old:
        shutil.copytree(source, tmp_path / "out")
    assert run(KILLED, source, tmp_path / "out", to).returncode == -signal.SIGKILL
    if old:
        assert content(tmp_path / "out") == content(source)
    rest = [path.name for path in tmp_path.iterdir() if path.name != "out"]
    assert len(rest) == 1
    assert rest[0].startswith(".out.")
    assert rest[0].endswith(".partial")
    assert (tmp_path / "out").exists() == old


KILLED_BETWEEN = """
    import os, signal, sys
    from pathlib import Path
    from headshare_jax.convert.atomic import new_directory

    rename = os.rename

    def killed(one, other):
        rename(one, other)
        os.kill(os.getpid(), signal.SIGKILL)

    os.rename = killed
    with new_directory(Path(sys.argv[1]), overwrite=True) as folder:
        (folder / "text").write_text("new")
"""


def test_a_kill_between_the_two_renamings_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write("folder", tmp_path / "out", "old")
    assert run(KILLED_BETWEEN, tmp_path / "out").returncode == -signal.SIGKILL
    (old,), (new,) = tmp_path.glob(".out.*.old"), tmp_path.glob(".out.*.partial")
    assert (content(old), content(new)) == ({"text": b"old"}, {"text": b"new"})
    write("folder", tmp_path / "out", "newer")
    assert f"{old} is an output that a killed process was replacing; rename it to keep it" in caplog.text
    assert content(old) == {"text": b"old"}


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


@pytest.mark.parametrize("limit", [300, 10_000])
@pytest.mark.parametrize("to", ["native", "hf", "file"])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(
    tmp_path: Path, source: Path, to: str, limit: int
) -> None:
    output = tmp_path / "out"
    if to == "file":
        output.write_text("old")
    else:
        shutil.copytree(source, output)
    before = content(tmp_path)
    done = run(FULL, source, output, to, limit)
    assert done.stdout == f"Cannot write {output}: File too large; what was there before is unchanged.\n"
    assert done.stderr == ""
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
