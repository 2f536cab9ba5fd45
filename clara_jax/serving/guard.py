"""Who may ask, and for how long: host names, a token, deadlines of connections."""

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import ipaddress
import json
import re
import socket
from collections.abc import Sequence
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from clara_jax.config import ConfigError
from clara_jax.serving import openai
from clara_jax.serving.errors import RefusedError

OPEN = ("/", "/healthz")  # need no token: the page has nothing in it, and asks for one


def read_token(path: str) -> str:
  """The token in a file.

  Raises:
    ConfigError: it cannot be read, or is no token.
  """
  try:
    with open(path, encoding="utf-8-sig") as file:
      token = file.read().strip()
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"--token-file {path}: {getattr(error, 'strerror', None) or error}") from None
  if not token or not token.isascii() or not token.isprintable() or " " in token:
    raise ConfigError(
      f"--token-file {path}: expected one token of printable ASCII characters, got {len(token)} "
      f"characters"
    )
  return token


def check_origins(origins: Sequence[str]) -> tuple[str, ...]:
  """Origins as browsers write them.

  Raises:
    ConfigError: one is none, or would be everybody's.
  """
  for origin in origins:
    if not re.fullmatch(r"https?://[^/\s*]+", origin):
      raise ConfigError(
        f"--allowed-origin {origin}: expected an origin, such as https://example.com"
      )
  return tuple(origins)


@dataclasses.dataclass(frozen=True)
class Access:
  """Who may ask.

  A page of another site can make a browser send requests to this server under a name of its own
  (DNS rebinding). Addresses, localhost and this machine's names are therefore accepted, and no
  other name that is not listed.

  Attributes:
    hosts: more host names; `.example.com` is all below; `*` is every name.
    token: that requests must bring (`Authorization: Bearer …`), but for `OPEN`; None: none.
    origins: of pages that may ask from a browser (CORS).
  """

  hosts: tuple[str, ...] = ()
  token: str | None = None
  origins: tuple[str, ...] = ()

  def has_host(self, header: str) -> bool:
    """Whether the Host header of a request is a name of this server."""
    name = re.sub(r":\d*$", "", header.strip()).strip("[]").rstrip(".").lower()
    try:
      ipaddress.ip_address(name)
      return True
    except ValueError:
      pass
    known = {"localhost", socket.gethostname().lower(), *(h.lower() for h in self.hosts)}
    return (
      "*" in known or name in known or any(h.startswith(".") and name.endswith(h) for h in known)
    )

  def has_token(self, header: str) -> bool:
    """Whether the Authorization header of a request has the token; compared in constant time."""
    scheme, _, token = header.partition(" ")
    return (
      self.token is None
      or scheme.lower() == "bearer"
      and hmac.compare_digest(token.strip().encode(), self.token.encode())
    )


ANYBODY = Access()


class Guard:
  """ASGI middleware: refuses other hosts (421) and requests without the token (401); no response
  may be framed or sniffed."""

  def __init__(self, app: Any, access: Access):
    self._app, self._access = app, access

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
      return await self._app(scope, receive, send)
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}

    async def guarded(message):
      if message["type"] == "http.response.start":
        names = {name.lower() for name, _ in message.get("headers", ())}
        message = {
          **message,
          "headers": [
            *message.get("headers", ()),
            *((n, v) for n, v in _HEADERS if n not in names),
          ],
        }
      await send(message)

    if not self._access.has_host(headers.get(b"host", "")):
      host = headers.get(b"host", "none")[:100]
      return await _refuse(
        scope,
        guarded,
        421,
        f"the host {host!r} is not a name of this server; clara serve --allowed-host adds one",
      )
    preflight = self._access.origins and scope["method"] == "OPTIONS"  # asks, and gets nothing
    if (
      scope["path"] not in OPEN
      and not preflight
      and not self._access.has_token(headers.get(b"authorization", ""))
    ):
      return await _refuse(
        scope,
        guarded,
        401,
        "expected Authorization: Bearer with this server's token",
        [(b"www-authenticate", b"Bearer")],
      )
    return await self._app(scope, receive, guarded)


_HEADERS = (
  (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'"),
  (b"x-frame-options", b"DENY"),
  (b"x-content-type-options", b"nosniff"),
  (b"referrer-policy", b"no-referrer"),
)


async def _refuse(scope: Any, send: Any, status: int, text: str, headers: Any = ()) -> None:
  error: Any = text
  if scope["path"].startswith("/v1/"):
    error = openai.error_body(RefusedError(status, text))["error"]
  body = json.dumps({"error": error}).encode()
  await send(
    {
      "type": "http.response.start",
      "status": status,
      "headers": [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *headers,
      ],
    }
  )
  await send({"type": "http.response.body", "body": body})


def page_policy(page: str) -> str:
  """A Content-Security-Policy under which the scripts of a page run, and no other."""
  scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
  sums = " ".join(
    f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts
  )
  return (
    f"default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
    f"script-src {sums}; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
  )


class Protocol(H11Protocol):
  """A connection with deadlines. A client that has closed its half after a whole request still gets
  its answer."""

  read_seconds = 20.0  # for all of a request; also between two requests
  write_seconds = 30.0  # without the client taking anything of an answer
  most = 1000  # connections; more close those that have waited longest without a whole request

  def connection_made(self, transport: asyncio.Transport) -> None:
    super().connection_made(transport)
    self._since, self._unsent, self._unsent_since = self.loop.time(), 0, self.loop.time()
    self._timer = self.loop.call_later(1, self._tick)
    waiting = sorted((c for c in self.connections if not c.is_busy), key=lambda c: c._since)
    for connection in waiting[: max(0, len(self.connections) - self.most)]:
      connection.transport.abort()

  def connection_lost(self, exc: Exception | None) -> None:
    self._timer.cancel()
    super().connection_lost(exc)

  @property
  def is_busy(self) -> bool:
    """Whether a whole request is here that is not answered."""
    return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

  def on_response_complete(self) -> None:
    self._since = self.loop.time()  # the time for the next request begins
    super().on_response_complete()

  def _tick(self) -> None:
    now, unsent = self.loop.time(), self.transport.get_write_buffer_size()
    if self.is_busy:
      self._since = now
    if not unsent or unsent != self._unsent:
      self._unsent, self._unsent_since = unsent, now
    if now - self._since > self.read_seconds or now - self._unsent_since > self.write_seconds:
      self.transport.abort()
    else:
      self._timer = self.loop.call_later(1, self._tick)

  def eof_received(self) -> bool:
    if self.is_busy:
      self.cycle.keep_alive = False
      return True
    return False
