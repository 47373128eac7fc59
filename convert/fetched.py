"""Files of buckets that have to lie on this machine to be read: fetched into the cache once."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headshare_jax.convert import storage
from headshare_jax.convert.cache import local_cache
from headshare_jax.convert.partial import recover, take_place, temporary_folder, unfinished
from headshare_jax.errors import HeadshareError
from headshare_jax.resources import check_disk

# No file that is read beside weights, such as a tokenizer's, is larger; the largest known have 40 MB.
_MOST_BYTES = 2**27
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx")


def local(file: Path) -> Path:
    """A file, or its copy in this machine's cache, which is fetched again when the bucket's file is another.

    Raises:
      TryAgain: the bucket was not reached.
      HeadshareError: there is no such file, or no room for it.
    """
    if not storage.in_bucket(file):
        return file
    key = hashlib.sha256(storage.version(file).encode()).hexdigest()[:32]
    folder = local_cache() / "fetched" / key
    if not (folder / file.name).is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HeadshareError(f"The cache {folder.parent} cannot be made: {error.strerror}.") from error
        check_disk(folder.parent, storage.size(file), f"A copy of {file}")
        recover(folder)
        with unfinished(folder, folder=True) as partial:
            storage.download(file, partial / file.name)
            take_place(partial, folder)
    return folder / file.name


@contextmanager
def small_files(folder: Path) -> Iterator[Path]:
    """A folder, or for one in a bucket a temporary copy of the files that lie beside its weights."""
    if not storage.in_bucket(folder):
        yield folder
        return
    with temporary_folder() as copy:
        for name, size in storage.files(folder).items():
            if "/" not in name and size <= _MOST_BYTES and not name.endswith(_WEIGHTS):
                storage.download(folder / name, copy / name)
        yield copy


@contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """A folder to write to, or for one in a bucket a temporary one, whose files are put there at the end."""
    if not storage.in_bucket(folder):
        yield folder
        return
    with temporary_folder() as copy:
        yield copy
        for name in storage.files(copy):
            storage.upload(copy / name, folder / name)
