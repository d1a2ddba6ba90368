"""Google Cloud Storage in memory: the part of its JSON API that gcsfs, google-cloud-storage and
tensorstore use on small objects.

Objects appear whole, with a generation that grows; a folder is what a listing makes of slashes.
"""

import base64
import contextlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import google_crc32c


class Bucket:
    """Objects by name: generation and content. failing: status that every request on `fails_at` is
    answered with, if any.
    """

    def __init__(self, name: str):
        self.name, self.failing, self.fails_at = name, 0, ""
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.uploads: dict[
            str, tuple[dict[str, str], bytearray]
        ] = {}  # resumable uploads in progress: the query that began them, content
        self._lock = threading.Lock()
        self._generation = 1_700_000_000_000_000

    def __getitem__(self, name: str) -> bytes:
        return self.objects[name][1]

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in list(self.objects) if name.startswith(prefix))

    def put(self, name: str, content: bytes, match: str | None = None) -> int:
        """Returns the new generation, or 0 if the object's is not `match`."""
        with self._lock:
            if match is not None and self.objects.get(name, (0,))[0] != int(match):
                return 0
            self._generation += 1
            self.objects[name] = (self._generation, bytes(content))
            return self._generation

    def delete(self, name: str) -> bool:
        with self._lock:
            return self.objects.pop(name, None) is not None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, method: str) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.bucket.failing and self.bucket.fails_at in urllib.parse.unquote(self.path):
            self._json(
                {"error": {"code": self.bucket.failing, "message": "made to fail"}},
                self.bucket.failing,
            )
            return
        upload, _, path = url.path.rpartition("/storage/v1/b/")
        bucket, *rest = path.split("/", 2)
        if not path or bucket != self.bucket.name:
            self._json({"error": {"code": 404, "message": f"no bucket {bucket}"}}, 404)
        elif upload == "/upload" and method == "POST":
            self._insert(query)
        elif not rest and method == "GET":
            self._json({"kind": "storage#bucket", "name": bucket, "id": bucket})
        elif rest == ["o"] and method == "GET":
            self._list(query)
        elif found := re.fullmatch("([^/]+)/(moveTo/o|rewriteTo/b/[^/]+/o)/([^/]+)", rest[-1]):
            source, kind, target = map(urllib.parse.unquote, found.groups())
            self._copy(source, target, move=kind.startswith("move"))
        elif method == "DELETE":
            gone = self.bucket.delete(urllib.parse.unquote(rest[-1]))
            self._send(204 if gone else 404)
        else:
            self._get(
                urllib.parse.unquote(rest[-1]),
                query,
                media="/download" in upload or query.get("alt") == "media",
            )

    def _insert(self, query: dict[str, str]) -> None:
        if "upload_id" in query:
            begun, received = self.bucket.uploads[query["upload_id"]]
            received += self.body
            if self.headers["Content-Range"].endswith("/*"):
                self._send(308, headers={"Range": f"bytes=0-{len(received) - 1}"})
                return
            query, name, content = begun, begun["name"], bytes(received)
        elif query["uploadType"] == "resumable":
            upload_id = str(len(self.bucket.uploads))
            self.bucket.uploads[upload_id] = (query, bytearray())
            where = f"http://{self.headers['Host']}/upload/storage/v1/b/{self.bucket.name}/o?upload_id={upload_id}"
            self._send(200, headers={"Location": where})
            return
        elif query["uploadType"] == "multipart":  # metadata, then content
            kind = self.headers["Content-Type"]
            boundary = b"--" + re.search('boundary="?([^";]+)', kind)[1].encode()
            _, metadata, content, _ = re.split(rb"(?:\r?\n)?" + re.escape(boundary), self.body)
            name = json.loads(re.split(rb"\r?\n\r?\n", metadata, maxsplit=1)[1])["name"]
            content = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
        else:
            assert query["uploadType"] == "media", query
            name, content = query["name"], self.body
        if generation := self.bucket.put(name, content, query.get("ifGenerationMatch")):
            self._json(self._metadata(name, generation, content))
        else:
            self._json({"error": {"code": 412, "message": "of another generation"}}, 412)

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names: list[str] = []
        prefixes: list[str] = []
        for name in self.bucket.names(prefix):
            if name < query.get("startOffset", "") or (
                "endOffset" in query and name >= query["endOffset"]
            ):
                continue
            head, found, _ = (
                name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            )
            if not found:
                names.append(name)
            elif (folder := prefix + head + found) not in prefixes:
                prefixes.append(folder)
        items = [
            self._metadata(name, *found)
            for name in names
            if (found := self.bucket.objects.get(name))
        ]
        self._json({"kind": "storage#objects", "items": items, "prefixes": prefixes})  # on one page

    def _copy(self, source: str, target: str, *, move: bool) -> None:
        if not (found := self.bucket.objects.get(source)):
            self._send(404)
            return
        resource = self._metadata(target, self.bucket.put(target, found[1]), found[1])
        if move:
            self.bucket.delete(source)
            self._json(resource)
        else:
            self._json({"kind": "storage#rewriteResponse", "done": True, "resource": resource})

    def _get(self, name: str, query: dict[str, str], *, media: bool) -> None:
        generation, content = self.bucket.objects.get(name, (0, b""))
        if not generation or query.get("generation", str(generation)) != str(generation):
            self._json({"error": {"code": 404, "message": f"No such object: {name}"}}, 404)
        elif not media:
            self._json(self._metadata(name, generation, content))
        elif query.get("ifGenerationNotMatch") == str(generation):
            self._send(304)
        else:
            headers = {
                "x-goog-generation": str(generation),
                "x-goog-stored-content-length": str(len(content)),
            }
            headers["x-goog-hash"] = f"crc32c={_crc32c(content)}"
            if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                first, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
                if first > last:
                    self._json({"error": {"code": 416, "message": "not satisfiable"}}, 416)
                    return
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                self._send(206, content[first : last + 1], headers)
            else:
                self._send(200, content, headers)

    def _metadata(self, name: str, generation: int, content: bytes) -> dict[str, str]:
        return {
            "kind": "storage#object",
            "id": f"{self.bucket.name}/{name}/{generation}",
            "name": name,
            "bucket": self.bucket.name,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "crc32c": _crc32c(content),
            "updated": "2025-01-01T00:00:00.000Z",
            "timeCreated": "2025-01-01T00:00:00.000Z",
        }

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, content: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        with contextlib.suppress(
            ConnectionError
        ):  # gcsfs asks two ways at a time, and hangs up on the slower
            self.end_headers()
            self.wfile.write(content)


def _crc32c(content: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(content).digest()).decode()


@contextlib.contextmanager
def serve(name: str) -> Iterator[tuple[Bucket, str]]:
    """An empty bucket, and the address of its server while inside."""
    bucket = Bucket(name)
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield bucket, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
