"""Where files lie: folders of this machine, and buckets (`gs://`, `s3://`), by one kind of path.

Buckets have no folders of their own, no rename and no locks: only objects, that appear whole when their upload ends.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import numpy as np

from headshare_jax.convert import bucket_errors
from headshare_jax.errors import HeadshareError, TryAgain

if TYPE_CHECKING:
    from typing_extensions import TypeIs

# What opens a bucket's files, by scheme, and the extra of this package that installs it.
_OPENED_BY = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
# Of a bucket's file, pieces of this size are fetched side by side.
_PIECE_BYTES = 2**24
# A request that fails for the moment is sent again for about half a minute, as gcsfs does.
_RETRIES = {"max_retries": 5, "initial_delay": "1s", "max_delay": "16s"}


def path(name: str | Path) -> Path:
    """A path on this machine, or in a bucket for `gs://bucket/key` and `s3://bucket/key`.

    A path in a bucket is a `upath.UPath`, which has the methods of `pathlib.Path` that are used here.

    Raises:
      HeadshareError: another scheme, no bucket, or the package that opens it is not installed.
    """
    if not isinstance(name, str):
        return name
    if not _SCHEME.match(name):
        return Path(name)
    scheme, _, rest = name.partition("://")
    if scheme not in _OPENED_BY:
        raise HeadshareError(f"{name:.200} cannot be used: storage is a folder, gs:// or s3://, not {scheme:.20}://.")
    if not rest.partition("/")[0]:
        raise HeadshareError(f"{name:.200} names no bucket; write {scheme}://bucket/folder.")
    # What gcsfs has for zonal buckets looks for an account first.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    from upath import UPath

    try:
        return cast(Path, UPath(name.rstrip("/"), use_listings_cache=False, **_access(scheme)))
    except ImportError as error:
        package, extra = _OPENED_BY[scheme]
        raise HeadshareError(
            f"{scheme}:// needs the package {package}: pip install 'headshare-jax[{extra}]'."
        ) from error


def _access(scheme: str) -> dict[str, Any]:
    """How gcsfs or s3fs is let in, beyond what they find by themselves."""
    if scheme == "gs":
        return {"token": "anon"} if _is_anonymous() or "STORAGE_EMULATOR_HOST" in os.environ else {}
    return {"anon": True} if _is_anonymous() else {}


def _is_anonymous() -> bool:
    return os.environ.get(bucket_errors.ANONYMOUS, "") not in ("", "0")


def in_bucket(place: object) -> bool:
    """Whether a path is one in a bucket."""
    return getattr(place, "protocol", "") in _OPENED_BY


def version(file: Path) -> str:
    """What tells a file's content from others without reading it: its place, size and time, or a bucket's own tag."""
    if not in_bucket(file):
        stat = file.stat()
        return f"{file.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    return f"{file} {size(file)} {generation(file)}"


def is_bucket(place: Path) -> bool:
    """Whether a path is a whole bucket's."""
    return in_bucket(place) and "/" not in _place(place)


def is_name(value: object) -> "TypeIs[str | Path]":
    """Whether something is a text or a path, of either kind."""
    return isinstance(value, str | Path) or in_bucket(value)


def absolute(place: Path) -> Path:
    """A path that does not depend on the working directory, behind symbolic links."""
    return place if in_bucket(place) else place.resolve()


def is_within(inner: Path, outer: Path) -> bool:
    """Whether a path is another, or lies in it."""
    return in_bucket(inner) == in_bucket(outer) and f"{inner}/".startswith(f"{str(outer).rstrip('/')}/")


def kvstore(folder: Path) -> dict[str, Any]:
    """TensorStore's specification of a folder, as the kvstore of arrays."""
    if not in_bucket(folder):
        return {"driver": "file", "path": f"{folder.resolve()}/"}
    bucket, _, key = _place(folder).partition("/")
    spec: dict[str, Any] = {"bucket": bucket, "path": f"{key}/" if key else ""}
    if str(folder).startswith("gs:"):
        if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
            os.environ["TENSORSTORE_GCS_HTTP_URL"] = emulator if "://" in emulator else f"http://{emulator}"
            # Else it looks for an account.
            os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        return spec | {"driver": "gcs", "context": {"gcs_request_retries": _RETRIES}}
    spec |= {"driver": "s3", "context": {"s3_request_retries": _RETRIES}}
    if _is_anonymous():
        spec["aws_credentials"] = {"type": "anonymous"}
    elif "AWS_ACCESS_KEY_ID" in os.environ:
        # Else the library complains of every other place where it finds none.
        spec["aws_credentials"] = {"type": "environment"}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec["endpoint"] = endpoint
        if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
            spec["aws_region"] = region
    return spec


def files(folder: Path) -> dict[str, int]:
    """Every file in a folder and the folders in it: its path there, with slashes, and its size in bytes.

    Of a bucket they are listed, which takes one request for a thousand.
    """
    if not in_bucket(folder):
        found = sorted(entry for entry in folder.rglob("*") if entry.is_file())
        return {entry.relative_to(folder).as_posix(): entry.stat().st_size for entry in found}
    begin = f"{_place(folder)}/"
    with reached(folder):
        listed = _system(folder).find(begin, detail=True)
    return {name.removeprefix(begin): int(about["size"]) for name, about in sorted(listed.items()) if name != begin}


def read_range(file: Path, start: int, stop: int) -> bytes:
    """A file's bytes from `start` up to `stop`; fewer, if it ends before.

    Raises:
      OSError, HeadshareError: they cannot be read.
    """
    if in_bucket(file):
        starts = range(start, stop, _PIECE_BYTES)
        return _fetched(file, starts, [min(first + _PIECE_BYTES, stop) for first in starts])
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(stop - start)


def read_ranges(file: Path, starts: Sequence[int], size: int) -> bytes:
    """So many bytes of a bucket's file from each start on, fetched side by side; HeadshareError if they cannot be."""
    return _fetched(file, starts, [start + size for start in starts])


def _fetched(file: Path, starts: Sequence[int], stops: list[int]) -> bytes:
    with reached(file):
        parts = _system(file).cat_ranges([_place(file)] * len(starts), list(starts), stops, on_error="raise")
    return b"".join(parts)


def read_array(file: Path, start: int, size: int) -> np.ndarray:
    """So many bytes of a file from `start` on, uint8 [size].

    Raises:
      ValueError: it ends before.
      OSError, HeadshareError: they cannot be read.
    """
    if in_bucket(file):
        found = np.frombuffer(bytearray(read_range(file, start, start + size)), np.uint8)
    else:
        found = np.fromfile(file, np.uint8, size, offset=start)
    if len(found) != size:
        raise ValueError(f"it ends before byte {start + size:,}")
    return found


def is_file(place: Path) -> bool:
    """Whether there is a file; raises TryAgain if the bucket is not reached, where `Path.is_file` says no."""
    return _kind(place) == "file" if in_bucket(place) else place.is_file()


def is_folder(place: Path) -> bool:
    """Whether there is a folder; raises TryAgain if the bucket is not reached, where `Path.is_dir` says no."""
    return _kind(place) == "directory" if in_bucket(place) else place.is_dir()


def _kind(place: Path) -> str | None:
    """What is at a place in a bucket: `file` or `directory`; None if nothing can be seen there."""
    try:
        return str(_system(place).info(_place(place))["type"])
    except Exception as error:
        if isinstance(refused := refusal_at(error, place), TryAgain):
            raise refused from error
        return None


def size(file: Path) -> int:
    """A file's bytes."""
    if in_bucket(file):
        with reached(file):
            return int(_system(file).size(_place(file)))
    return file.stat().st_size


def make_folder(folder: Path) -> None:
    """Makes a folder, if it is not there, and those that it lies in; in a bucket there is nothing to make."""
    if not in_bucket(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove(folder: Path) -> None:
    """Removes a folder and all that is in it; in a bucket, also uploads to there that were never ended."""
    if not in_bucket(folder):
        shutil.rmtree(folder)
        return
    names = [f"{_place(folder)}/{name}" for name in files(folder)]
    with reached(folder), suppress(FileNotFoundError):
        if names:
            _system(folder).rm(names)
    end_uploads(folder)


def end_uploads(place: Path) -> None:
    """Ends uploads to a bucket's file or folder that were only begun; S3 has their parts paid for until then."""
    system, (bucket, _, key) = _system(place), _place(place).partition("/")
    if not hasattr(system, "call_s3"):
        return
    with reached(place):
        for begun in system.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key).get("Uploads", ()):
            if f"{begun['Key']}/".startswith(f"{key}/"):
                name, number = begun["Key"], begun["UploadId"]
                system.call_s3("abort_multipart_upload", Bucket=bucket, Key=name, UploadId=number)


def remove_file(file: Path) -> None:
    """Removes a file, if it is there."""
    if not in_bucket(file):
        file.unlink(missing_ok=True)
        return
    with reached(file), suppress(FileNotFoundError):
        _system(file).rm_file(_place(file))


def upload(local: Path, place: Path) -> None:
    """Puts a file into a bucket, where it appears whole, in place of what had its name."""
    with reached(place):
        _system(place).put_file(str(local), _place(place))


def download(place: Path, local: Path) -> None:
    """Fetches a bucket's file."""
    with reached(place):
        _system(place).get_file(_place(place), str(local))


def copy(source: Path, target: Path) -> None:
    """Copies a bucket's file in the bucket; its bytes do not pass through this machine."""
    with reached(target):
        _system(target).cp_file(_place(source), _place(target))


def join(parts: Sequence[Path], target: Path) -> None:
    """Makes a file of others in its bucket, all but the last of 5 MB or more; Google joins 32 at a time."""
    system, names = _system(target), [_place(part) for part in parts]
    most = len(names) if hasattr(system, "call_s3") else 31
    for start in range(0, len(names), most):
        with reached(target):
            system.merge(_place(target), [_place(target)] * (start > 0) + names[start : start + most])


def generation(file: Path) -> str | None:
    """What changes with every write of a bucket's file; None if there is none."""
    system = _system(file)
    with reached(file):
        try:
            about = system.info(_place(file))
        except FileNotFoundError:
            return None
    found = about.get("generation") or about.get("ETag")
    return None if found is None else str(found)


def write_if(file: Path, content: bytes, expected: str | None) -> str | None:
    """Writes a bucket's file if nobody has written it since it had a version, or if there is none for None.

    Returns:
      Its new version; None if it was not written.
    """
    system = _system(file)
    bucket, _, key = _place(file).partition("/")
    try:
        with reached(file):
            if hasattr(system, "call_s3"):
                condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
                return str(system.call_s3("put_object", Bucket=bucket, Key=key, Body=content, **condition)["ETag"])
            said = system.call(
                "POST", f"{system._location}/upload/storage/v1/b/{quote(bucket, '')}/o",
                uploadType="media", name=key, ifGenerationMatch=expected or "0", data=content, json_out=True,
            )  # fmt: skip
            return str(said["generation"])
    except OSError as error:
        code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
        if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "ConditionalRequestConflict", "412"):
            return None
        raise


def modified(file: Path) -> float:
    """When a bucket's file was written, in seconds of the storage's own clock."""
    with reached(file):
        return float(_system(file).modified(_place(file)).timestamp())


def _system(place: Path) -> Any:
    return cast(Any, place).fs


def _place(place: Path) -> str:
    """`bucket/key`."""
    return str(cast(Any, place).path).rstrip("/")


@contextmanager
def reached(place: Path) -> Iterator[None]:
    """Raises as HeadshareError that a bucket forbids something or is not there, as TryAgain that it was not reached."""
    try:
        yield
    except HeadshareError:
        raise
    except Exception as error:
        if said := refusal_at(error, place):
            raise said from error
        raise


def refusal_at(error: BaseException, place: Path, name: str | None = None) -> HeadshareError | None:
    """What an error at a place means, by which it is called or by a name; None also where that is in no bucket."""
    if not in_bucket(place):
        return None
    scheme, bucket = str(place).partition("://")[0], _place(place).partition("/")[0]
    return bucket_errors.refusal(error, name or str(place), f"{scheme}://{bucket}")
