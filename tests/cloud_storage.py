"""A Cloud Storage of the tests' own: buckets in memory behind the JSON API, with what an emulator
is chosen for here and the published ones lack: preconditions that hold, and faults on demand.

`Server.fault` is asked before each request; it answers None, or what goes wrong:

    "503"     an error that clients try again on
    "before"  the connection breaks, and nothing was done
    "after"   the request is done, and the connection breaks before its answer
    "half"    an answer that ends in its middle
"""

import base64
import datetime
import email.parser
import hashlib
import http.server
import json
import re
import sys
import threading
import urllib.parse
import zlib
from collections.abc import Callable
from typing import Any

import google_crc32c


class _Refused(Exception):
  def __init__(self, status: int, why: str):
    super().__init__(why)
    self.status = status


class Server:
  """Serves until `close`.

  Attributes:
    url: where.
    objects: content, metadata by (bucket, name).
    requests: (method, path) of all requests.
    fault: (method, path) to None or a fault, see above.
  """

  def __init__(self) -> None:
    self.objects: dict[tuple[str, str], tuple[bytes, dict[str, Any]]] = {}
    self.requests: list[tuple[str, str]] = []
    self.fault: Callable[[str, str], str | None] = lambda method, path: None
    self._generation = 1_700_000_000_000_000
    self._sessions: dict[str, dict[str, Any]] = {}
    self.lock = threading.RLock()
    handler = type("Handler", (_Handler,), {"storage": self})
    self._server = _Quiet(("127.0.0.1", 0), handler)
    self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  def close(self) -> None:
    self._server.shutdown()
    self._server.server_close()

  def put(
    self,
    bucket: str,
    name: str,
    content: bytes,
    query: dict[str, str],
    described: dict[str, Any] | None = None,
  ) -> dict[str, Any]:
    """Writes an object where its preconditions hold."""
    described = described or {}
    with self.lock:
      self.check(bucket, name, query)
      self._generation += 1
      now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
      metadata = {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{self._generation}",
        "name": name,
        "bucket": bucket,
        "generation": str(self._generation),
        "metageneration": "1",
        "contentType": described.get("contentType") or "application/octet-stream",
        **({"metadata": described["metadata"]} if described.get("metadata") else {}),
        "storageClass": "STANDARD",
        "size": str(len(content)),
        "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
        "crc32c": base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode(),
        "etag": f"{self._generation:x}",
        "timeCreated": now,
        "updated": now,
        "timeStorageClassUpdated": now,
      }
      self.objects[bucket, name] = content, metadata
      return metadata

  def check(self, bucket: str, name: str, query: dict[str, str]) -> None:
    """Refuses where a precondition does not hold."""
    there = self.objects.get((bucket, name))
    generation = there[1]["generation"] if there else "0"
    if query.get("ifGenerationMatch", generation) != generation:
      raise _Refused(412, "conditionNotMet")
    if query.get("ifGenerationNotMatch") == generation:
      raise _Refused(304 if there else 412, "conditionNotMet")

  def get(self, bucket: str, name: str, query: dict[str, str]) -> tuple[bytes, dict[str, Any]]:
    with self.lock:
      if (bucket, name) not in self.objects:
        raise _Refused(404, f"No such object: {bucket}/{name}")
      self.check(bucket, name, query)
      content, metadata = self.objects[bucket, name]
      if query.get("generation", metadata["generation"]) != metadata["generation"]:
        raise _Refused(404, "No such generation")
      return content, metadata

  def delete(self, bucket: str, name: str, query: dict[str, str]) -> None:
    with self.lock:
      self.get(bucket, name, query)
      del self.objects[bucket, name]

  def list(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    with self.lock:
      names = sorted(n for b, n in self.objects if b == bucket and n.startswith(prefix))
      names = [
        n
        for n in names
        if n >= query.get("startOffset", "") and n < query.get("endOffset", "\U0010ffff")
      ]
      items, prefixes = [], {}
      for name in names:
        rest = name[len(prefix) :]
        if delimiter and delimiter in rest:
          prefixes[prefix + rest.split(delimiter)[0] + delimiter] = True
        else:
          items.append(self.objects[bucket, name][1])
    size = int(query.get("maxResults", 1000))
    start = int(query.get("pageToken", 0))
    page = items[start : start + size]
    reply: dict[str, Any] = {"kind": "storage#objects", "items": page}
    if start == 0:
      reply["prefixes"] = list(prefixes)
    if start + size < len(items):
      reply["nextPageToken"] = str(start + size)
    return reply

  def begin(self, bucket: str, name: str, query: dict[str, str], described: Any) -> str:
    """A resumable upload."""
    with self.lock:
      number = str(len(self._sessions))
      self._sessions[number] = {
        "bucket": bucket,
        "name": name,
        "query": query,
        "described": described,
        "content": b"",
        "done": None,
      }
      return number

  def resume(self, number: str, content: bytes, span: str) -> tuple[int, dict[str, Any] | None]:
    """(bytes that are there, metadata once it is whole)."""
    with self.lock:
      session = self._sessions[number]
      if session["done"]:
        return len(session["content"]), session["done"]
      match = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", span or "")
      first = int(match[1]) if match and match[1] else len(session["content"])
      session["content"] = session["content"][:first] + content
      total = match[3] if match else str(len(session["content"]))
      if total != "*" and len(session["content"]) == int(total):
        session["done"] = self.put(
          session["bucket"],
          session["name"],
          session["content"],
          session["query"],
          session["described"],
        )
      return len(session["content"]), session["done"]


class _Quiet(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 128

  def handle_error(self, request: Any, client_address: Any) -> None:
    """A client that hangs up is no news."""
    if not isinstance(sys.exc_info()[1], (ConnectionError, ValueError)):
      super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  storage: Server

  def log_message(self, *_: Any) -> None:
    pass

  def _reply(
    self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, kind: str = ""
  ) -> None:
    if self._fault == "after":
      self.close_connection = True
      self.connection.close()
      return
    self.send_response(status)
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    self.send_header("Content-Type", kind or "application/json")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self._fault == "half" and len(body) > 1:
      self.wfile.write(body[: len(body) // 2])
      self.wfile.flush()
      self.close_connection = True
      self.connection.close()
    elif self.command != "HEAD":
      self.wfile.write(body)

  def _json(self, value: Any, status: int = 200) -> None:
    self._reply(status, json.dumps(value).encode())

  def _handle(self) -> None:
    length = self.headers.get("Content-Length")
    if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
      body = b""
      while size := int(self.rfile.readline().split(b";")[0], 16):
        body += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
    else:
      body = self.rfile.read(int(length or 0))
    if self.headers.get("Content-Encoding") == "gzip":
      body = zlib.decompress(body, 31)
    path = urllib.parse.urlsplit(self.path)
    self.storage.requests.append((self.command, self.path))
    self._fault = self.storage.fault(self.command, urllib.parse.unquote(self.path))
    if self._fault == "503":
      self._fault = None
      self._json({"error": {"code": 503, "message": "try again"}}, 503)
      return
    if self._fault == "before":
      self.close_connection = True
      self.connection.close()
      return
    query = dict(urllib.parse.parse_qsl(path.query))
    try:
      self._answer(path.path, query, body)
    except _Refused as error:
      self._json({"error": {"code": error.status, "message": str(error)}}, error.status)

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _handle

  def _answer(self, path: str, query: dict[str, str], body: bytes) -> None:
    storage = self.storage
    if path.startswith("/batch/"):
      self._batch(body)
    elif match := re.fullmatch(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o", path):
      self._upload(match[1], query, body)
    elif match := re.fullmatch(
      r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:copyTo|rewriteTo)/b/([^/]+)/o/([^/]+)", path
    ):
      from_bucket, from_name, bucket, name = map(urllib.parse.unquote, match.groups())
      content, metadata = storage.get(from_bucket, from_name, {})
      new = storage.put(bucket, name, content, query, metadata)
      size = str(len(content))
      self._json(
        {
          "kind": "storage#rewriteResponse",
          "done": True,
          "totalBytesRewritten": size,
          "objectSize": size,
          "resource": new,
        }
        if "rewriteTo" in path
        else new
      )
    elif match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)", path):
      bucket, source, target = map(urllib.parse.unquote, match.groups())
      with storage.lock:
        new = storage.put(bucket, target, *storage.get(bucket, source, {})[:1], query)
        storage.delete(bucket, source, {})
      self._json(new)
    elif match := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)", path):
      bucket, name = map(urllib.parse.unquote, match.groups())
      if self.command == "DELETE":
        storage.delete(bucket, name, query)
        self._reply(204)
        return
      content, metadata = storage.get(bucket, name, query)
      if self.command == "GET" and (query.get("alt") == "media" or path.startswith("/download")):
        self._media(content, metadata)
      else:
        self._json(metadata)
    elif match := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
      self._json(storage.list(match[1], query))
    elif match := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
      self._json({"kind": "storage#bucket", "name": match[1], "location": "TEST"})
    elif match := re.fullmatch(r"/storage/v1/b/([^/]+)/storageLayout", path):
      self._json({"kind": "storage#storageLayout", "bucket": match[1], "locationType": "region"})
    else:
      raise _Refused(404, path)

  def _media(self, content: bytes, metadata: dict[str, Any]) -> None:
    headers = {
      "x-goog-generation": metadata["generation"],
      "x-goog-hash": f"crc32c={metadata['crc32c']},md5={metadata['md5Hash']}",
      "Last-Modified": "Tue, 01 Dec 2026 00:00:00 GMT",
      "ETag": metadata["etag"],
    }
    span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
    if not span or not content and span[1] == "0":
      self._reply(200, content, headers, metadata["contentType"])
      return
    if span[1]:
      first = int(span[1])
      last = min(int(span[2]) if span[2] else len(content) - 1, len(content) - 1)
    else:
      first, last = max(0, len(content) - int(span[2])), len(content) - 1
    if first >= len(content):
      self._reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
      return
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    self._reply(206, content[first : last + 1], headers, metadata["contentType"])

  def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
    storage, kind = self.storage, query.get("uploadType")
    if "upload_id" in query:
      there, metadata = storage.resume(
        query["upload_id"], body, self.headers.get("Content-Range", "")
      )
      if metadata:
        self._json(metadata)
      else:
        self._reply(308, b"", {"Range": f"bytes=0-{there - 1}"} if there else {})
    elif kind == "resumable":
      described = json.loads(body or b"{}")
      number = storage.begin(bucket, query.get("name") or described["name"], query, described)
      address = f"{storage.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable"
      self._reply(200, b"", {"Location": f"{address}&upload_id={number}"})
    elif kind == "multipart":
      boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
      first, second = body.split(b"--" + boundary)[1:3]
      described = json.loads(first.partition(b"\r\n\r\n")[2] or first.partition(b"\n\n")[2])
      mark = b"\r\n\r\n" if b"\r\n\r\n" in second else b"\n\n"
      content = second.partition(mark)[2]
      content = content[: -2 if content.endswith(b"\r\n") else -1]
      name = query.get("name") or described["name"]
      self._json(storage.put(bucket, name, content, query, described))
    else:
      self._json(
        storage.put(
          bucket, query["name"], body, query, {"contentType": self.headers.get("Content-Type")}
        )
      )

  def _batch(self, body: bytes) -> None:
    boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1]
    replies = []
    for part in body.decode().split(f"--{boundary}")[1:-1]:
      _, _, inner = part.replace("\r\n", "\n").lstrip("\n").partition("\n\n")
      method, address = inner.split(" ")[:2]
      headers = email.parser.Parser().parsestr(part.replace("\r\n", "\n").lstrip("\n"))
      path = urllib.parse.urlsplit(address)
      match = re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)", path.path)
      status, text = "204 No Content", ""
      try:
        assert method == "DELETE", method
        self.storage.delete(
          *map(urllib.parse.unquote, match.groups()), dict(urllib.parse.parse_qsl(path.query))
        )
      except _Refused as error:
        status = f"{error.status} Refused"
        text = json.dumps({"error": {"code": error.status, "message": str(error)}})
      replies.append(
        f"--batch\r\nContent-Type: application/http\r\n"
        f"Content-ID: <response-{(headers.get('Content-ID') or '').strip('<>')}>\r\n\r\n"
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(text)}\r\n\r\n{text}\r\n"
      )
    self._reply(
      200, ("".join(replies) + "--batch--").encode(), kind="multipart/mixed; boundary=batch"
    )
