"""Buckets: models, texts and outputs in them are as in folders; what is broken off is cleared away, and said."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import aiohttp
import buckets
import numpy as np
import pytest
import support
import tiny_cli_model
from buckets import FORBIDDEN, SCHEMES, Server

import headshare_jax as hs
from headshare_jax import HeadshareError, cli, convert, parameters
from headshare_jax.convert import bucket_outputs, leases, storage
from headshare_jax.convert.atomic import new_directory, new_file
from headshare_jax.convert.journal_folder import JournalFolder
from headshare_jax.convert.locks import held
from headshare_jax.convert.text import open_corpus, read
from headshare_jax.errors import TryAgain
from headshare_jax.sharing.source import assemble

TEXT = "The quick brown fox jumps over the lazy dog. " * 30


@pytest.fixture
def folder(bucket: str) -> Path:
    return storage.path(bucket)


@pytest.fixture
def void_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are void as soon as they are looked at."""
    monkeypatch.setattr(leases, "SECONDS", -1.0)


def names(folder: Path) -> list[str]:
    return list(storage.files(folder))


def same(one: hs.WeightSource, other: hs.WeightSource) -> bool:
    return all(
        np.array_equal(assemble(one, name), assemble(other, name)) for name in parameters.parameter_names(one.config)
    )


@pytest.mark.parametrize("to", ["native", "hf", "hf-compact"])
def test_a_model_comes_back_as_it_was(bucket: str, to: str) -> None:
    model = support.tiny_model()
    shared = hs.share(model, support.mixed_sharing(model))
    hs.save(shared if to != "hf" else model, f"{bucket}/model", to=to)
    found = hs.open_checkpoint(f"{bucket}/model")
    assert same(found, shared if to != "hf" else model)
    assert convert.verify(f"{bucket}/model").bytes > 0
    assert not [name for name in names(storage.path(bucket)) if name.startswith(".")]


def test_of_some_heads_in_a_bucket_no_other_bytes_are_read(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hs.save(support.tiny_model(), f"{bucket}/model", to="hf")
    source = hs.open_checkpoint(f"{bucket}/model")
    asked: list[int] = []
    read_range = storage.read_range

    def counted(file: Path, start: int, stop: int) -> bytes:
        asked.append(stop - start)
        return read_range(file, start, stop)

    monkeypatch.setattr(storage, "read_range", counted)
    part = source.read("q_pool_pdh", 1, [1, 2])
    assert asked == [part.nbytes]


def test_all_of_a_command_in_buckets(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there = storage.path(bucket)
    for file in tiny_cli_model.saved_without_torch(tmp_path / "hf").iterdir():
        (there / "hf" / file.name).write_bytes(file.read_bytes())
    (there / "text.txt").write_text(TEXT)
    share = ["share", f"{bucket}/hf", f"{bucket}/small", "--ratio", "0.4", "--method", "fitted", "--seq-len", "32"]
    share += ["--calibrate", f"{bucket}/text.txt", "--work", f"{bucket}/work", "--save-map", f"{bucket}/map.json"]
    assert cli.run([*share, "--no-eval"]) == 0, capsys.readouterr().err
    local = ["share", str(tmp_path / "hf"), str(tmp_path / "small"), "--no-eval", "--map", f"{bucket}/map.json"]
    assert cli.run([*local, "--method", "refit", "--seq-len", "32", "--calibrate", f"{bucket}/text.txt"]) == 0
    assert same(hs.open_checkpoint(f"{bucket}/small"), hs.open_checkpoint(tmp_path / "small"))
    assert cli.run(["convert", f"{bucket}/small", f"{bucket}/small.gguf", "--to", "gguf"]) == 0
    assert cli.run(["generate", f"{bucket}/small.gguf", "The fox", "--max-new-tokens", "2"]) == 0
    assert cli.run(["convert", f"{bucket}/small.gguf", f"{bucket}/again", "--to", "hf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["output"] == f"{bucket}/again"
    assert cli.run(["share", *local[1:2], f"{bucket}/small", "--ratio", "0.4", *tiny_cli_model.DIRECT]) == 2
    assert "exists already; choose another name, or overwrite it (--overwrite)" in capsys.readouterr().err
    assert cli.run(["inspect", f"{bucket}/small", "--check"]) == 0


def test_what_is_not_reached_is_not_taken_for_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("there")
    assert storage.is_file(folder / "file")
    assert storage.is_folder(folder)
    assert not storage.is_file(folder / "other")

    def broken(*args: object, **options: object) -> None:
        raise aiohttp.ServerDisconnectedError

    monkeypatch.setattr(folder.fs, "info", broken)  # type: ignore[attr-defined]
    for looks in (storage.is_file, storage.is_folder):
        with pytest.raises(TryAgain, match=rf"^{folder} was not reached \(Server disconnected\); try again"):
            looks(folder)


def broken_off(path: Path, monkeypatch: pytest.MonkeyPatch, *, at: str = "") -> None:
    """Writes a folder and is cut off from the bucket before its end, or where it calls a function of `storage`."""

    def cut_off(*args: object) -> None:
        raise TryAgain("cut off")

    def begun() -> None:
        with new_directory(path, overwrite=True) as partial:
            (partial / "new").write_text("new")
            (partial / "config.json").write_text("new")
            if not at:
                cut_off()

    with monkeypatch.context() as broken:
        if at:
            broken.setattr(storage, at, cut_off)
        with pytest.raises(TryAgain, match="cut off"):
            begun()


def test_an_output_is_there_until_another_is_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = support.tiny_model(), support.tiny_model(seed=1)
    hs.save(old, folder / "model")
    before = names(folder)
    broken_off(folder / "model", monkeypatch)
    assert same(hs.open_checkpoint(folder / "model"), old)
    monkeypatch.setattr(leases, "SECONDS", -1.0)
    hs.save(new, folder / "model", overwrite=True)
    assert names(folder) == before
    assert same(hs.open_checkpoint(folder / "model"), new)
    assert f"{folder}/.model.new is removed, which a killed process had left unfinished." in caplog.text


def test_what_a_killed_process_left_is_cleared_away_and_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "model"
    broken_off(path, monkeypatch)
    assert names(folder) == [".model.partial", "model/config.json", "model/new"]
    with pytest.raises(TryAgain, match=r"at work in .* wait until it has ended"), new_directory(path, overwrite=True):
        pass
    monkeypatch.setattr(leases, "SECONDS", -1.0)
    with caplog.at_level(logging.WARNING), new_directory(path) as partial:
        (partial / "config.json").write_text("whole")
    assert f"{path} is removed, which a killed process had left unfinished." in caplog.text
    assert names(folder) == ["model/config.json"]


def test_a_whole_folder_is_put_in_place_though_its_process_was_killed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, void_at_once: None
) -> None:
    path = folder / "model"
    with new_directory(path) as partial:
        (partial / "old").write_text("old")
        (partial / "headshare_map.json").write_text('{"format": "headshare-map"}')
        (partial / "config.json").write_text("old")
    storage.remove_file(path / "old")
    broken_off(path, monkeypatch, at="copy")
    assert not (path / "config.json").exists()
    bucket_outputs.recover(path)
    assert f"{path} is whole: a process was killed as it put it in place." in caplog.text
    assert names(folder) == ["model/config.json", "model/new"]
    assert (path / "config.json").read_text() == "new"


def test_uploads_that_were_never_ended_are_ended(servers: dict[str, Server], void_at_once: None) -> None:
    path = storage.path("s3://bucket/uploads/model")
    system = path.fs  # type: ignore[attr-defined]
    system.call_s3("create_multipart_upload", Bucket="bucket", Key="uploads/model/weights")
    other = system.call_s3("create_multipart_upload", Bucket="bucket", Key="uploads/model2")["UploadId"]
    with leases.Lease(bucket_outputs.lease_of(path)) as lease:
        lease.tell(folder="model", whole=False)
        lease.leave()
    bucket_outputs.recover(path)
    left = system.call_s3("list_multipart_uploads", Bucket="bucket").get("Uploads", ())
    assert [each["UploadId"] for each in left] == [other]


def test_a_folder_is_held_by_one_process_until_it_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with held(folder):
        with pytest.raises(TryAgain, match="goes on 120 seconds after that"), held(folder):
            pass
        assert names(folder) == [".headshare.lock"]
    assert names(folder) == []
    ended: list[int] = []
    monkeypatch.setattr(leases.os, "_exit", ended.append)
    with leases.Lease(folder / ".headshare.lock") as lost:
        monkeypatch.setattr(leases, "SECONDS", -1.0)
        with held(folder):
            assert "was left by process" in caplog.text
            lost.tell(anything=1)
        lost.leave()
    # Whoever has lost it writes nothing more.
    assert ended == [75]


def test_of_two_that_write_at_once_one_succeeds(folder: Path) -> None:
    file = folder / "lock"
    first = storage.write_if(file, b"first", None)
    assert first is not None
    assert storage.write_if(file, b"second", None) is None
    second = storage.write_if(file, b"second", first)
    assert second is not None
    assert storage.write_if(file, b"third", first) is None
    assert file.read_bytes() == b"second"
    assert storage.generation(file) == second


def test_a_file_appears_whole_or_not_at_all(folder: Path) -> None:
    def half() -> None:
        with new_file(folder / "map.json") as partial:
            partial.write_text("half")
            raise OSError("no more")

    with pytest.raises(HeadshareError, match="no more"):
        half()
    assert names(folder) == []


def test_journals_are_kept_in_a_bucket(folder: Path) -> None:
    journals = JournalFolder(folder / "work")
    with journals.held():
        journal = journals.of("fit", {"seed": 1})
        journal.write("layer 0", {"a": np.arange(3, dtype=np.int32)})
    found = JournalFolder(folder / "work").of("fit", {"seed": 1}).read("layer 0")
    assert found is not None
    assert np.array_equal(found["a"], [0, 1, 2])


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_texts_are_read_from_a_bucket(folder: Path, tmp_path: Path, suffix: str) -> None:
    text = tmp_path / f"text{suffix}"
    if suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": ["one", "two"]}), text)
    else:
        text.write_text("one\n\ntwo" if suffix == ".txt" else '{"text": "one"}\n{"text": "two"}\n')
    storage.upload(text, folder / text.name)
    assert read(str(folder / text.name)) == "one\n\ntwo"
    assert open_corpus(str(folder / text.name)).digest() == open_corpus(str(text)).digest()


@pytest.mark.parametrize("arguments", [
    ["inspect", "{}/model"],
    ["share", "{}/model", "out", "--ratio", "0.3", *tiny_cli_model.DIRECT],
    ["convert", "preset", "{}/model", "--to", "hf"],
    ["match", "preset", "-o", "{}/scores.npz"],
    ["share", "preset", "out", "--map", "{}/map.json"],
    ["eval", "preset", "--text", "{}/text.txt"],
])  # fmt: skip
@pytest.mark.parametrize("place", ["ftp://bucket", "https://host", "gs://", "s3:///key"])
def test_what_is_no_bucket_is_refused_by_name(
    place: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([argument.format(place) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert (
        "names no bucket" in said if place[:2] in ("gs", "s3") else "storage is a folder, gs:// or s3://, not" in said
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["missing-bucket", FORBIDDEN])
def test_a_bucket_that_is_missing_or_forbids_it_is_told_in_a_sentence(
    scheme: str, name: str, servers: dict[str, Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if (scheme, name) == ("s3", FORBIDDEN):
        pytest.skip("moto forbids nothing")
    model = tmp_path / "model"
    hs.save(support.tiny_model(), model)
    for arguments in (
        ["inspect", f"{scheme}://{name}/model"],
        ["convert", str(model), f"{scheme}://{name}/out", "--to", "hf"],
    ):
        assert cli.run(arguments) == 2
        said = capsys.readouterr().err
        assert re.fullmatch(rf"headshare: [^\n]*{scheme}://{name}[^\n]*\n", said)


# Writes or reads a model, and has the server killed halfway.
_BREAKS = """
import os, signal, sys
from headshare_jax import cli
from headshare_jax.convert import huggingface, safetensors_files
def killing(function):
    def killed(*args, **settings):
        if server:
            os.kill(server.pop(), signal.SIGKILL)
        return function(*args, **settings)
    return killed
server = [int(sys.argv[1])]
huggingface.write_settings = killing(huggingface.write_settings)
safetensors_files.SafetensorsReader.read = killing(safetensors_files.SafetensorsReader.read)
sys.exit(cli.run(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reads", [False, True])
def test_a_network_that_breaks_is_told_in_a_sentence(scheme: str, reads: bool, tmp_path: Path) -> None:
    with buckets.process(scheme) as (server, found):
        there, model, out = f"{scheme}://bucket/model", str(tmp_path / "model"), str(tmp_path / "out")
        hs.save(support.tiny_model(), model, to="hf")
        variables = {**os.environ, **found.variables}
        command = [sys.executable, "-m", "headshare_jax", "convert", model, there, "--to", "hf"]
        subprocess.run(command, env=variables, check=True, capture_output=True)
        command = ["convert", there, out] if reads else ["convert", model, f"{there}2"]
        done = subprocess.run(
            [sys.executable, "-c", _BREAKS, str(server.pid), *command, "--to", "hf"],
            env=variables, text=True, capture_output=True, check=False,
        )  # fmt: skip
    assert done.returncode == 75
    said = [line for line in done.stderr.splitlines() if line.startswith("headshare: ")]
    assert len(said) == 1
    assert re.search(rf"{scheme}://bucket/model.* was not reached .*; try again when the network", said[0])
    assert "Traceback" not in done.stderr
    assert not Path(out).exists()
