"""Native checkpoints that are damaged, edited, incomplete or forged are refused, and the place is named."""

import os
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz.mutate import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from support import sharing_by_hand, tiny_model
from support_native import forge, replace_array

import headshare_jax
from headshare_jax import HeadshareError, convert, parameters
from headshare_jax.convert import native_document
from headshare_jax.convert import tokenizer as tokenizers
from headshare_jax.convert.native_document import DOCUMENT, WEIGHTS
from headshare_jax.parameters import PROJECTIONS, index_name
from headshare_jax.sharing.source import assemble

WRITTEN = Path(__file__).parents[1] / "fixtures" / "written_by_0.1"
# Of each array a file like this: of one row, of all, of one of a few.
CHUNKS = ["gate_ldf/c/1/0/0", "q_pool_pdh/c/0/0/0", "embed_vd/c/1/0"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "shared"
    dense = tiny_model(attention_bias=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headshare_jax.convert.native_array.SHARD_BYTES", 30_000)
        patch.setattr("headshare_jax.sharing.source.TABLE_BYTES", 30_000)
        shared = headshare_jax.share(dense, sharing_by_hand(dense, "qkv", {2: 0, 4: 1, 5: 1}))
        tokenizer = WRITTEN / "dense"
        headshare_jax.save(shared, folder, tokenizer_from=tokenizer, documents={"headshare_fit.json": '{"a": 1}'})
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def read_all(folder: Path) -> None:
    source = headshare_jax.open_checkpoint(folder)
    for name in parameters.parameter_names(source.config):
        assemble(source, name)


def refused(folder: Path) -> str:
    """What is said of a folder that is refused as it is read; `verify` refuses it too."""
    with pytest.raises(HeadshareError):
        convert.verify(folder)
    with pytest.raises(HeadshareError) as caught:
        read_all(folder)
    return str(caught.value)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_all_of_a_sound_checkpoint_is_counted(pristine: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = convert.verify(pristine, progress=lambda done, total: seen.append((done, total)))
    assert found.checksums
    assert found.files == len(files(pristine))
    assert found.bytes == sum(path.stat().st_size for path in files(pristine))
    # Heads, biases, layers of the others, and what has no layers.
    assert found.chunks > 12 + 6 + 9
    assert seen[-1] == (len(seen), len(seen))
    read_all(pristine)


def test_every_flipped_bit_is_refused(folder: Path) -> None:
    rng = random.Random(0)
    places = files(folder)
    sizes = [path.stat().st_size for path in places]
    for _ in range(60):
        # As often in a small file as in a large one, and as often in one byte as in another.
        path = rng.choice(rng.choices(places, rng.choice([sizes, [1] * len(sizes)])))
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        assert refused(folder), path
        flip(path, bit)
    read_all(folder)


def test_a_damaged_chunk_is_named_as_it_is_read_and_others_are_read(folder: Path) -> None:
    flip(folder / WEIGHTS / "gate_ldf/c/1/0/0", 8 * 1000 + 3)
    source = headshare_jax.open_checkpoint(folder)
    source.read("gate_ldf", 0)
    with pytest.raises(HeadshareError, match=r"is damaged: row 1 of gate_ldf in weights/gate_ldf/c/1/0/0; copy or"):
        source.read("gate_ldf", 1)
    source.read("q_pool_pdh", 1, [0, 1])
    flip(folder / WEIGHTS / "q_pool_pdh/c/0/0/0", 8 * 4096 * 5)
    source.read("q_pool_pdh", 0, [0, 1])
    with pytest.raises(HeadshareError, match="row 5 of q_pool_pdh"):
        source.read("q_pool_pdh", 1, [3])


def test_exchanged_chunks_are_refused(folder: Path) -> None:
    one, other = (folder / WEIGHTS / f"gate_ldf/c/{row}/0/0" for row in (0, 2))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert "row 0 of gate_ldf in weights/gate_ldf/c/0/0/0" in refused(folder)


def test_exchanged_heads_within_a_file_are_refused(folder: Path) -> None:
    path = folder / WEIGHTS / "q_pool_pdh/c/0/0/0"
    content = path.read_bytes()
    path.write_bytes(content[4096:8192] + content[:4096] + content[8192:])
    assert "row 0 of q_pool_pdh in weights/q_pool_pdh/c/0/0/0; row 1 of q_pool_pdh" in refused(folder)


def test_exchanged_arrays_are_refused(folder: Path) -> None:
    one, other, aside = (folder / name for name in (f"{WEIGHTS}/gate_ldf", f"{WEIGHTS}/up_ldf", "aside"))
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    assert "row 0 of gate_ldf" in refused(folder)


def test_an_edited_tokenizer_is_refused_as_it_is_loaded_or_carried_along(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("a", "b", 1))
    with pytest.raises(HeadshareError, match=r"tokenizer_config.json is damaged or was edited"):
        tokenizers.load(folder)
    assert "tokenizer_config.json" in refused(folder)
    with pytest.raises(HeadshareError, match=r"tokenizer_config\.json"):
        headshare_jax.save(tiny_model(), folder.parent / "other", tokenizer_from=folder)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("cut", [0, 10, -1])
def test_truncated_files_are_refused_when_opened(folder: Path, chunk: str, cut: int) -> None:
    path = folder / WEIGHTS / chunk
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(HeadshareError, match=f"is damaged: weights/{chunk} has [0-9,]+ bytes instead of [0-9,]+; copy"):
        headshare_jax.open_checkpoint(folder)
    assert refused(folder)


@pytest.mark.parametrize("name", [*(f"{WEIGHTS}/{chunk}" for chunk in CHUNKS), "tokenizer.json", "headshare_fit.json"])
def test_missing_files_are_named_when_opened(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"is damaged: {name} is missing; copy or make it again" in refused(folder)


@pytest.mark.parametrize("name", [f"{WEIGHTS}/gate_ldf/c/3/0/0", f"{WEIGHTS}/.zarray", "chat_template.jinja"])
def test_files_that_do_not_belong_there_are_named_when_opened(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text("x")
    assert f"is damaged: {name} is one file too many" in refused(folder)


def test_other_files_may_lie_beside_the_weights(folder: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    read_all(folder)
    headshare_jax.save(headshare_jax.open_checkpoint(folder), tmp_path / "plain")
    shutil.copy(folder / "tokenizer.json", tmp_path / "plain")
    read_all(tmp_path / "plain")
    assert tokenizers.load(tmp_path / "plain")


def test_all_that_is_damaged_is_named(folder: Path) -> None:
    (folder / WEIGHTS / "down_lfd/c/0/0/0").unlink()
    (folder / "tokenizer.json").write_text("{}")
    for row in range(3):
        flip(folder / WEIGHTS / f"gate_ldf/c/{row}/0/0", 100)
    with pytest.raises(HeadshareError) as caught:
        convert.verify(folder)
    said = str(caught.value)
    for place in ("down_lfd/c/0/0/0 is missing", "tokenizer.json has 2 bytes", "gate_ldf/c/0/0/0", "gate_ldf/c/2/0/0"):
        assert place in said
    shutil.rmtree(folder / WEIGHTS / "embed_vd")
    for chunk in (folder / WEIGHTS).rglob("c/*/0/0"):
        chunk.unlink()
    with pytest.raises(HeadshareError, match=r"; and \d+ more; copy or make it again"):
        convert.verify(folder)


@pytest.mark.parametrize(
    "edit", [(b'"sharing"', b'"sharinG"'), (b"}\n", b"}\n\n"), (b"1e-05", b"1E-05"), (b"\n ", b"\n")]
)
def test_the_document_is_not_edited(folder: Path, edit: tuple[bytes, bytes]) -> None:
    path = folder / DOCUMENT
    before = path.read_bytes()
    path.write_bytes(before.replace(*edit, 1))
    assert path.read_bytes() != before
    assert "headshare.json is damaged or was edited (its checksum differs)" in refused(folder)
    assert "A map is edited in a file of its own" in refused(folder)


def test_a_checkpoint_without_its_document_is_said_to_be_partly_there(folder: Path) -> None:
    (folder / DOCUMENT).unlink()
    assert "has weights but no headshare.json: it was written or copied only in part" in refused(folder)


@pytest.mark.parametrize("name", ["dense", "shared"])
def test_checkpoints_of_version_1_are_read_with_a_word(name: str, caplog: pytest.LogCaptureFixture) -> None:
    read_all(WRITTEN / name)
    assert f"{name} was written without checksums" in caplog.text
    found = convert.verify(WRITTEN / name)
    assert not found.checksums
    assert found.chunks > 30


@pytest.mark.parametrize("name", ["dense-hf", "shared-compact"])
def test_other_checkpoints_are_read_whole(tmp_path: Path, name: str) -> None:
    found = convert.verify(WRITTEN / name)
    assert (found.files, found.checksums) == (1, False)
    assert found.chunks > 20
    folder = Path(shutil.copytree(WRITTEN / name, tmp_path / name))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(HeadshareError, match=r"model\.safetensors"):
        convert.verify(folder)


# Whatever has its checksums can still not fit together.


@pytest.mark.parametrize("name", ["gate_ldf", "v_pool_pdh", "o_index_ln"])
def test_a_missing_array_is_named(folder: Path, name: str) -> None:
    shutil.rmtree(folder / WEIGHTS / name)
    forge(folder, lambda document: None)
    assert f"has no readable array {name}; the copy is incomplete" in refused(folder)


@pytest.mark.parametrize("sums", ["", "0 1 2 3", None])
def test_checksums_that_do_not_fit_are_refused(folder: Path, sums: str | None) -> None:
    forge(folder, lambda document: document[native_document.SUMS].update({"gate_ldf": sums}))
    assert "gate_ldf" in refused(folder)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_tampered_index_is_refused(folder: Path, projection: str) -> None:
    name = index_name(projection)
    index = np.array(headshare_jax.open_checkpoint(folder).arrays[name].read())
    index[0, 0] = 1
    replace_array(folder, name, index)
    assert f"{name} in {folder} disagrees with the map" in refused(folder)


def test_a_map_for_other_arrays_is_refused(folder: Path) -> None:
    forge(folder, lambda document: document["sharing"]["receivers"].pop())
    assert "q_pool_pdh has shape [6, 64, 16] instead of [8, 64, 16]" in refused(folder)


def test_a_map_of_the_same_size_that_shares_others_is_refused(folder: Path) -> None:
    forge(folder, lambda document: document["sharing"]["receivers"][0].update({"donor": [0, 1]}))
    assert "q_index_ln in" in refused(folder)
    assert "disagrees with the map" in refused(folder)


def test_a_map_that_was_removed_is_missed(folder: Path) -> None:
    forge(folder, lambda document: document.update({"sharing": None}))
    assert "q_pool_pdh has shape [6, 64, 16] instead of [12, 64, 16]" in refused(folder)


def test_all_mismatches_are_told_at_once(folder: Path) -> None:
    replace_array(folder, "gate_ldf", np.zeros((3, 64, 95), np.float32))
    replace_array(folder, "final_norm_d", np.zeros(64, np.int32))
    replace_array(folder, "k_index_lk", np.zeros((3, 2), np.float32))
    message = refused(folder)
    for problem in (
        "gate_ldf has shape [3, 64, 95] instead of [3, 64, 96]",
        "final_norm_d holds int32 instead of float32 or bfloat16 or float16",
        "k_index_lk holds float32 instead of int32",
    ):
        assert problem in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not readable JSON"),
        ("{", "is not readable JSON"),
        ("[" * 100_000, "is not readable JSON"),
        ("[]", "is not a headshare-native document"),
        ("{}", "is not a headshare-native document"),
        ('{"format": "headshare-map", "version": 1}', "is not a headshare-native document"),
        ('{"format": "headshare-native", "version": 3}', "has version 3; this release reads versions 1 to 2"),
        ('{"format": "headshare-native", "version": true}', "has version True"),
        ('{"format": "headshare-native", "version": 2}', "is damaged or was edited"),
        ('{"format": "headshare-native", "version": 1}', "lacks or garbles a field"),
        ('{"format": "headshare-native", "version": 1, "config": [], "sharing": null}', "configuration"),
        (
            '{"format": "headshare-native", "version": 1, "config": {"vocab_size": "x"}, "sharing": null}',
            "configuration",
        ),
    ],
)
def test_other_documents_are_refused(folder: Path, text: str, reason: str) -> None:
    (folder / DOCUMENT).write_text(text)
    assert reason in refused(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_layers": 10**12},
        {"num_layers": 2},
        {"vocab_size": 2**70},
        {"head_dim": 8},
        {"num_heads": 8},
        {"novelty": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("sharing", [True, False])
def test_configurations_for_other_arrays_are_refused(folder: Path, fields: dict[str, Any], sharing: bool) -> None:
    forge(folder, lambda document: document["config"].update(fields))
    if not sharing:
        forge(folder, lambda document: document.update({"sharing": None}))
    assert refused(folder)


def test_a_map_in_the_document_is_not_trusted(folder: Path) -> None:
    forge(
        folder, lambda document: document["sharing"].update({"receivers": [{"layer": 9, "unit": 0, "donor": [0, 0]}]})
    )
    assert "names unit 9.0" in refused(folder)


def open_or_refuse(path: Path) -> None:
    """Reads a whole checkpoint; any error but HeadshareError comes through."""
    with suppress(HeadshareError):
        source = headshare_jax.open_checkpoint(path)
        for name in parameters.parameter_names(source.config):
            assemble(source, name)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", [DOCUMENT, f"{WEIGHTS}/gate_ldf/.zarray", f"{WEIGHTS}/q_index_ln/.zarray"])
def test_a_damaged_file_never_gives_another_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    """Of version 1, where no checksum comes first."""
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(WRITTEN / "shared", folder, copy_function=os.link)
    (folder / name).unlink()
    (folder / name).write_bytes(data.draw(damaged((WRITTEN / "shared" / name).read_bytes())))
    open_or_refuse(folder)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", [f"{WEIGHTS}/gate_ldf/zarr.json", f"{WEIGHTS}/q_index_ln/zarr.json"])
def test_damaged_metadata_that_has_its_checksum_never_gives_another_error(
    tmp_path_factory: pytest.TempPathFactory, pristine: Path, name: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(pristine, folder, copy_function=os.link)
    (folder / name).unlink()
    (folder / name).write_bytes(data.draw(damaged((pristine / name).read_bytes())))
    forge(folder, lambda document: None)
    open_or_refuse(folder)
