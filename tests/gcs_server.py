"""A small server of Google Cloud Storage's JSON interface, in memory: as much of it as gcsfs and TensorStore use.

Unlike PyPI's `gcp-storage-emulator`, it keeps generations, so that conditional writes fail as they should, and answers
several requests at a time.
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

# Objects that a page of a listing has at most.
_PAGE = 1000


@dataclass
class Object:
    """What lies under a key."""

    content: bytes
    generation: int
    updated: float = field(default_factory=time.time)


class RefusedError(Exception):
    """An answer that is no success."""


class Server(ThreadingHTTPServer):
    """Buckets by name; of those in `forbidden` nothing may be read or written. While it is `broken`, it hangs up."""

    daemon_threads = True
    # Clients open many connections at a time.
    request_queue_size = 128

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.buckets: dict[str, dict[str, Object]] = {}
        self.forbidden: set[str] = set()
        self.broken = False
        self.uploads: dict[str, tuple[str, str, dict[str, str], bytearray]] = {}
        self.lock = threading.Lock()
        self.generations = iter(range(int(time.time() * 1e6), sys.maxsize))

    def start(self) -> None:
        """Answers from a thread of this process."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Answers no more."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that has heard enough."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def objects(self, bucket: str) -> dict[str, Object]:
        """What lies in a bucket."""
        if bucket in self.forbidden:
            raise RefusedError(403, f"no access to {bucket}")
        if bucket not in self.buckets:
            raise RefusedError(404, f"no bucket {bucket}")
        return self.buckets[bucket]

    def store(self, bucket: str, key: str, content: bytes, query: dict[str, str]) -> dict[str, Any]:
        """Writes an object, if it has the generation that the query asks for."""
        with self.lock:
            objects = self.objects(bucket)
            _check(objects.get(key), query)
            objects[key] = Object(content, next(self.generations))
            return self.metadata(bucket, key, objects[key])

    def metadata(self, bucket: str, key: str, stored: Object) -> dict[str, Any]:
        """What is told of an object."""
        updated = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(stored.updated))
        updated += f".{int(stored.updated % 1 * 1000):03}Z"
        return {
            "kind": "storage#object",
            "name": key,
            "bucket": bucket,
            "generation": str(stored.generation),
            "metageneration": "1",
            "size": str(len(stored.content)),
            "updated": updated,
            "timeCreated": updated,
            "md5Hash": base64.b64encode(hashlib.md5(stored.content).digest()).decode(),
        }


def _check(stored: Object | None, query: dict[str, str]) -> None:
    generation = 0 if stored is None else stored.generation
    if int(query.get("ifGenerationMatch", generation)) != generation:
        raise RefusedError(412, "another generation")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Answers are several small writes.
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        body = self._body()
        if self.server.broken:
            self.close_connection = True
            return
        try:
            self._route(parts.path, query, body)
        except RefusedError as refused:
            code, message = refused.args
            self._send(code, {"error": {"code": code, "message": message}})

    do_GET = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815 (names that the library calls)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, code: int, content: bytes | dict[str, Any], headers: dict[str, str] | None = None) -> None:
        is_json = isinstance(content, dict)
        data = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(code)
        self.send_header("Content-Type", "application/json" if is_json else "application/octet-stream")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _route(self, path: str, query: dict[str, str], body: bytes) -> None:
        if found := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", path):
            self._upload(unquote(found[1]), query, body)
        elif found := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)", path):
            self._copy(*map(unquote, found.groups()), query)
        elif found := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/compose", path):
            self._join(unquote(found[1]), unquote(found[2]), query, json.loads(body))
        elif found := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)", path):
            self._object(unquote(found[1]), unquote(found[2]), query)
        elif found := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
            self._list(unquote(found[1]), query)
        elif found := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
            self.server.objects(unquote(found[1]))
            self._send(200, {"kind": "storage#bucket", "name": unquote(found[1])})
        else:
            raise RefusedError(404, f"nothing at {path}")

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        kind = query.get("uploadType")
        if "upload_id" in query:
            self._go_on(query["upload_id"], body)
        elif kind == "resumable":
            key = query.get("name") or json.loads(body)["name"]
            self.server.objects(bucket)
            name = f"{len(self.server.uploads)}-{next(self.server.generations)}"
            self.server.uploads[name] = (bucket, key, query, bytearray())
            place = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={name}"
            self._send(200, {}, {"Location": place})
        elif kind == "multipart":
            boundary = b"--" + re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()  # type: ignore[index]
            _, about, rest = body.split(boundary, 2)
            content = rest.rpartition(b"\n" + boundary)[0]
            settings = json.loads(re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1])
            content = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
            self._send(200, self.server.store(bucket, settings["name"], content, query))
        else:
            self._send(200, self.server.store(bucket, query["name"], body, query))

    def _go_on(self, name: str, body: bytes) -> None:
        if name not in self.server.uploads:
            raise RefusedError(404, "no such upload")
        bucket, key, query, so_far = self.server.uploads[name]
        if self.command == "DELETE":
            del self.server.uploads[name]
            self._send(499, {})
            return
        so_far += body
        total = self.headers.get("Content-Range", "").rpartition("/")[2]
        if total == "*" or (total and len(so_far) < int(total)):
            self._send(308, b"", {"Range": f"bytes=0-{len(so_far) - 1}"} if so_far else {})
            return
        del self.server.uploads[name]
        self._send(200, self.server.store(bucket, key, bytes(so_far), query))

    def _copy(self, bucket: str, key: str, to_bucket: str, to_key: str, query: dict[str, str]) -> None:
        stored = self._stored(bucket, key)
        resource = self.server.store(to_bucket, to_key, stored.content, query)
        size = resource["size"]
        self._send(200, {"done": True, "objectSize": size, "totalBytesRewritten": size, "resource": resource})

    def _join(self, bucket: str, key: str, query: dict[str, str], said: dict[str, Any]) -> None:
        parts = [self._stored(bucket, part["name"]).content for part in said["sourceObjects"]]
        if not 0 < len(parts) <= 32:
            raise RefusedError(400, "not 1 to 32 objects")
        self._send(200, self.server.store(bucket, key, b"".join(parts), query))

    def _stored(self, bucket: str, key: str) -> Object:
        try:
            return self.server.objects(bucket)[key]
        except KeyError:
            raise RefusedError(404, f"no object {key}") from None

    def _object(self, bucket: str, key: str, query: dict[str, str]) -> None:
        if self.command == "DELETE":
            with self.server.lock:
                _check(self._stored(bucket, key), query)
                del self.server.objects(bucket)[key]
            self._send(204, b"")
            return
        stored = self._stored(bucket, key)
        _check(stored, query)
        if query.get("ifGenerationNotMatch") == str(stored.generation):
            self._send(304, b"")
        elif query.get("alt") == "media":
            self._content(stored)
        else:
            self._send(200, self.server.metadata(bucket, key, stored))

    def _content(self, stored: Object) -> None:
        headers = {"x-goog-generation": str(stored.generation), "ETag": str(stored.generation)}
        size = len(stored.content)
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if found is None:
            self._send(200, stored.content, headers)
            return
        first, last = found.groups()
        begin = int(first) if first else max(0, size - int(last))
        end = min(int(last) + 1, size) if first and last else size
        if begin >= size:
            raise RefusedError(416, "no such range")
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        self._send(206, stored.content[begin:end], headers)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        objects, prefix, delimiter = self.server.objects(bucket), query.get("prefix", ""), query.get("delimiter")
        items, prefixes, following = [], [], None
        first = max(query.get("startOffset", ""), query.get("pageToken", ""))
        for key in sorted(objects):
            if not key.startswith(prefix) or key < first or key >= query.get("endOffset", "\U0010ffff"):
                continue
            if len(items) + len(prefixes) >= min(int(query.get("maxResults", _PAGE)), _PAGE):
                following = key
                break
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folder = prefix + rest.partition(delimiter)[0] + delimiter
                if folder not in prefixes:
                    prefixes.append(folder)
            else:
                items.append(self.server.metadata(bucket, key, objects[key]))
        page = {"kind": "storage#objects", "items": items, "prefixes": prefixes}
        self._send(200, page | ({"nextPageToken": following} if following else {}))
