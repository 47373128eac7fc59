"""Buckets on this machine for tests: a server of S3's (moto) and one of Google Cloud Storage's, once a session.

`python tests/buckets.py gs|s3 PORT BUCKET...` serves as a process of its own, which a test can kill.
"""

import logging
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import gcs_server
import pytest

BUCKET, FORBIDDEN = "bucket", "forbidden"
SCHEMES = ("gs", "s3")
_S3 = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class Server:
    """A server of buckets.

    Attributes:
      scheme: `gs` or `s3`.
      url: where it answers.
      variables: the environment by which programs find it.
      stop: ends it.
    """

    scheme: str
    url: str
    variables: dict[str, str]
    stop: Callable[[], None]


def start(scheme: str, port: int = 0) -> Server:
    """Serves the two buckets of tests from a thread of this process."""
    if scheme == "gs":
        server = gcs_server.Server(port)
        server.buckets |= {BUCKET: {}, FORBIDDEN: {}}
        server.forbidden.add(FORBIDDEN)
        server.start()
        return Server("gs", server.url, variables("gs", server.url), server.stop)
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    moto.start()
    url = "http://{}:{}".format(*moto.get_host_and_port())
    _make_bucket(url)
    return Server("s3", url, variables("s3", url), moto.stop)


def _make_bucket(url: str) -> None:
    import boto3

    s3 = boto3.client("s3", endpoint_url=url, region_name=_S3["AWS_DEFAULT_REGION"],
                      aws_access_key_id="test", aws_secret_access_key="test")  # fmt: skip
    s3.create_bucket(Bucket=BUCKET)


def variables(scheme: str, url: str) -> dict[str, str]:
    """The environment by which programs find a server."""
    return {"STORAGE_EMULATOR_HOST": url} if scheme == "gs" else {**_S3, "AWS_ENDPOINT_URL": url}


@contextmanager
def process(scheme: str, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], Server]]:
    """A server that is a process of its own, ended with the block if it was not before."""
    with subprocess.Popen(
        [sys.executable, __file__, scheme, str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            assert url, "the server did not begin"
            yield server, Server(scheme, url, variables(scheme, url), server.kill)
        finally:
            server.kill()


@pytest.fixture(scope="session")
def servers() -> Iterator[dict[str, Server]]:
    """Both servers, which this process and those that it starts find by their environment."""
    if os.environ.get("HEADSHARE_TESTS_WITHOUT_TORCH"):
        pytest.skip("the oldest releases are tested without buckets' packages")
    started = {scheme: start(scheme) for scheme in SCHEMES}
    with pytest.MonkeyPatch.context() as patch:
        for server in started.values():
            for name, value in server.variables.items():
                patch.setenv(name, value)
        yield started
    for server in started.values():
        server.stop()


@pytest.fixture(params=SCHEMES)
def bucket(request: pytest.FixtureRequest, servers: dict[str, Server]) -> str:
    """A folder of its own in a bucket, as `gs://bucket/...` and then as `s3://bucket/...`."""
    return f"{request.param}://{BUCKET}/{uuid.uuid4().hex[:8]}"


if __name__ == "__main__":
    print(start(sys.argv[1], int(sys.argv[2])).url, flush=True)
    while True:
        time.sleep(3600)
