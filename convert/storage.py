"""Where files lie: folders of this machine, and buckets (`gs://`, `s3://`), by one kind of path."""

import os
import re
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from headshare_jax.errors import HeadshareError

# What opens a bucket's files, by scheme, and the extra of this package that installs it.
_OPENED_BY = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


def path(name: str | Path) -> Path:
    """A path on this machine, or in a bucket for `gs://bucket/key` and `s3://bucket/key`.

    A path in a bucket is a `upath.UPath`, which has the methods of `pathlib.Path` that are used here.

    Raises:
      HeadshareError: another scheme, no bucket, or the package that opens it is not installed.
    """
    if isinstance(name, Path) or in_bucket(name):
        return cast(Path, name)
    if not _SCHEME.match(name):
        return Path(name)
    scheme, bucket = urlsplit(name)[:2]
    if scheme not in _OPENED_BY:
        raise HeadshareError(f"{name:.200} cannot be used: storage is a folder, gs:// or s3://, not {scheme}://.")
    if not bucket:
        raise HeadshareError(f"{name:.200} names no bucket; write {scheme}://bucket/folder.")
    from upath import UPath

    try:
        return cast(Path, UPath(name, use_listings_cache=False))
    except ImportError as error:
        package, extra = _OPENED_BY[scheme]
        raise HeadshareError(
            f"{scheme}:// needs the package {package}: pip install 'headshare-jax[{extra}]'."
        ) from error


def in_bucket(place: object) -> bool:
    """Whether a path is one in a bucket."""
    return getattr(place, "protocol", "") in _OPENED_BY


def version(file: Path) -> str:
    """What tells a file's content from others without reading it: its place, size and time, or a bucket's own tag."""
    if not in_bucket(file):
        stat = file.stat()
        return f"{file.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    about = cast(Any, file).fs.info(cast(Any, file).path)
    tag = next(about[name] for name in ("ETag", "etag", "generation") if name in about)
    return f"{file} {about['size']} {tag}"


def kvstore(folder: Path) -> dict[str, Any]:
    """TensorStore's specification of a folder, as the kvstore of arrays."""
    if not in_bucket(folder):
        return {"driver": "file", "path": f"{folder.resolve()}/"}
    scheme, bucket, key = urlsplit(str(folder))[:3]
    spec = {"driver": {"gs": "gcs", "s3": "s3"}[scheme], "bucket": bucket, "path": f"{key.strip('/')}/"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return spec | ({"endpoint": endpoint} if scheme == "s3" and endpoint else {})
