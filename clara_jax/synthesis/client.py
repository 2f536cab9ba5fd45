"""Many requests at once to an OpenAI-compatible server (vLLM, SGLang, llama.cpp, a cloud).

How many are in flight adapts: it grows by one for every round of answers, and shrinks by a quarter
when the server says 429 or does not answer in time (additive increase, multiplicative decrease).
What may pass is tried again, later each time.

Servers differ in what they take. `DIALECTS` are the differences that a server names in its refusal,
and how a request is then written. Nothing is sent anywhere but to the endpoint: redirects are not
followed. What a server sends is bounded in bytes and in time.
"""

import asyncio
import contextlib
import dataclasses
import email.utils
import ipaddress
import json
import logging
import math
import random
import re
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from clara_jax.config import ConfigError
from clara_jax.errors import InputError
from clara_jax.io import parse_json
from clara_jax.synthesis.replies import ReplyTextError, parse, text_of

log = logging.getLogger(__name__)


class RequestError(InputError):
  """A request that failed for good: refused, or tried too often."""


class FatalError(RequestError):
  """No request will pass: an empty quota, say."""


class ReplyError(RequestError):
  """The fault of one request, not of the server: it was refused, or its reply does not parse, nor
  does the repair."""


class BudgetError(Exception):
  """The next request would go beyond the budget."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """A server and how to treat it.

  Attributes:
    url: up to and without `/chat/completions`, as `http://localhost:8000/v1`; a query
      (`?api-version=…`) goes to its end.
    model: its name there.
    api_key: sent as a bearer token, and as `api-key` where the URL has an `api-version` (Azure).
    in_flight: requests at once, at most.
    seconds: that a request may take.
    attempts: tries of a request.
    max_requests, max_tokens: budgets; tokens are those that the server counts, when it has
      answered, or a fourth of the bytes where it does not. None: no limit.
    json_schema: whether the server is asked for JSON by schema (`response_format`); it is taken
      from the reply either way.
    seed: whether requests have a seed.
  """

  url: str
  model: str
  api_key: str | None = None
  in_flight: int = 64
  seconds: float = 120.0
  attempts: int = 6
  max_requests: int | None = None
  max_tokens: int | None = None
  json_schema: bool = True
  seed: bool = True

  @property
  def target(self) -> str:
    """Where requests go."""
    parts = urllib.parse.urlsplit(self.url)
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return urllib.parse.urlunsplit(parts._replace(path=f"{path}/chat/completions", fragment=""))

  @property
  def headers(self) -> dict[str, str]:
    """With the key."""
    if not self.api_key:
      return {}
    azure = (
      {"api-key": self.api_key} if "api-version=" in urllib.parse.urlsplit(self.url).query else {}
    )
    return {"Authorization": f"Bearer {self.api_key}", **azure}

  @property
  def proxy(self) -> str | None:
    """Of the environment: HTTP_PROXY, HTTPS_PROXY, NO_PROXY; none for this machine."""
    parts = urllib.parse.urlsplit(self.url)
    with contextlib.suppress(ValueError):
      if parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname).is_loopback:
        return None
    return (
      None
      if urllib.request.proxy_bypass(parts.netloc)
      else urllib.request.getproxies().get(parts.scheme)
    )

  def __post_init__(self):
    if (
      not self.url.startswith(("http://", "https://"))
      or not urllib.parse.urlsplit(self.url).hostname
    ):
      raise ConfigError(f"--endpoint {self.url}: expected http://… or https://…, up to /v1")
    for name in ("in_flight", "attempts"):
      if getattr(self, name) < 1:
        raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
    if not self.seconds > 0:
      raise ConfigError(f"--timeout {self.seconds}: expected more than 0 seconds")
    if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
      raise ConfigError("OPENAI_API_KEY: holds a character that no key has (a line end?)")


@dataclasses.dataclass
class Usage:
  """What was spent.

  Attributes:
    requests: sent, tries again included.
    answered: with a reply that was used.
    retries: by reason: '429', '5xx', 'timeout', 'connection', 'reply', 'dialect'.
    prompt_tokens, completion_tokens: as the server counted.
    in_flight: the limit now.
  """

  requests: int = 0
  answered: int = 0
  retries: dict[str, int] = dataclasses.field(default_factory=dict)
  prompt_tokens: int = 0
  completion_tokens: int = 0
  in_flight: int = 0


REPLY_BYTES = 8 << 20  # of a reply, decompressed
LOADING_SECONDS = 900.0  # that a server may say 503 with Retry-After


def _without(body: dict[str, Any], name: str) -> dict[str, Any]:
  return {key: value for key, value in body.items() if key != name}


def _merged_system(body: dict[str, Any]) -> dict[str, Any]:
  first, second, *rest = body["messages"]
  return {
    **body,
    "messages": [{**second, "content": f"{first['content']}\n\n{second['content']}"}, *rest],
  }


# Name of the difference, what a refusal (400, 422) says of it, and how the request is written
# instead; None: it does not apply.
DIALECTS: dict[str, tuple[re.Pattern, Callable[[dict[str, Any]], dict[str, Any] | None]]] = {
  "max_completion_tokens": (
    re.compile(r"max_completion_tokens"),
    lambda b: (
      {**_without(b, "max_tokens"), "max_completion_tokens": b["max_tokens"]}
      if "max_tokens" in b
      else None
    ),
  ),
  "temperature of its own": (
    re.compile(r"temperature", re.IGNORECASE),
    lambda b: _without(b, "temperature") if "temperature" in b else None,
  ),
  "no system role": (
    re.compile(
      r"system (?:role|message|prompt)|role.{0,20}system|roles must alternate", re.IGNORECASE
    ),
    lambda b: (
      _merged_system(b) if len(b["messages"]) > 1 and b["messages"][0]["role"] == "system" else None
    ),
  ),
}
_REFUSES = re.compile(
  r"unsupported|not support|only .{0,60}(?:support|allow)|must alternate|not "
  r"(?:allowed|permitted)|\buse\b",
  re.IGNORECASE,
)
_QUOTA = re.compile(
  r"insufficient_quota|exceeded your current quota|billing|credit balance|out of credits",
  re.IGNORECASE,
)


class _Again(Exception):
  """What may pass: its kind for the count, what was said, how long to wait at least, and whether it
  counts as a try."""

  def __init__(self, reason: str, said: str = "", after: float = 0.0, counts: bool = True):
    super().__init__(reason)
    self.reason, self.said, self.after, self.counts = reason, said, after, counts


class Client:
  """Use it as `async with Client(endpoint) as client`.

  Args:
    endpoint: the server.
    seed: of the waiting times.
    backoff: seconds before the second try; doubles each time, at most 30.
  """

  def __init__(self, endpoint: Endpoint, seed: int = 0, backoff: float = 0.5):
    self.endpoint, self.usage = endpoint, Usage(in_flight=endpoint.in_flight)
    self._random, self._backoff = random.Random(seed), backoff
    self._limit, self._flying = float(endpoint.in_flight), 0
    self._free = asyncio.Condition()
    self._shrunk = self._not_before = 0.0
    self._dialects: list[str] = []

  async def __aenter__(self) -> "Client":
    if (proxy := self.endpoint.proxy) and not proxy.startswith(("http://", "https://")):
      raise ConfigError(
        f"{self.endpoint.url}: the environment names the proxy {proxy}; expected http://… or "
        f"https://…"
      )
    if proxy:
      log.info(
        f"{self.endpoint.url}: asked through the proxy {urllib.parse.urlsplit(proxy).hostname}"
      )
    try:
      import aiohttp
    except ImportError:
      raise ConfigError("an endpoint needs aiohttp: pip install 'clara_jax[synthesize]'") from None
    self._session = aiohttp.ClientSession(
      connector=aiohttp.TCPConnector(limit=0),
      headers={**self.endpoint.headers, "Accept-Encoding": "identity"},
      auto_decompress=False,
      timeout=aiohttp.ClientTimeout(total=self.endpoint.seconds),
    )
    self._errors = (aiohttp.ClientError, ConnectionError)
    return self

  async def __aexit__(self, *_: Any) -> None:
    await self._session.close()

  async def chat(
    self,
    messages: Sequence[Mapping[str, str]],
    *,
    schema: Mapping[str, Any] | None = None,
    name: str = "reply",
    temperature: float = 0.0,
    max_tokens: int = 1024,
    seed: int | None = None,
  ) -> str:
    """The text of a reply.

    Args:
      messages: of the chat.
      schema: JSON schema of the reply, where the server takes one.
      name: of the schema.
      temperature, max_tokens, seed: sampling.

    Raises:
      RequestError: refused, or tried `attempts` times. ReplyError: it is this request's fault.
        FatalError: no request will pass.
      BudgetError: there is none left for it.
    """
    body: dict[str, Any] = {
      "model": self.endpoint.model,
      "messages": list(messages),
      "temperature": temperature,
      "max_tokens": max_tokens,
    }
    if seed is not None and self.endpoint.seed:
      body["seed"] = seed
    if schema is not None and self.endpoint.json_schema:
      body["response_format"] = {
        "type": "json_schema",
        "json_schema": {"name": name, "schema": schema, "strict": True},
      }
    wait, attempt, dialects, began = 0.0, 0, list(self._dialects), time.monotonic()
    while attempt < self.endpoint.attempts:
      await asyncio.sleep(max(wait, self._not_before - time.monotonic()))
      try:
        async with self._place():
          self._spend()
          text = await self._send(body, dialects)
        self.usage.answered += 1
        for name in (d for d in dialects if d not in self._dialects):
          self._dialects.append(name)
          log.warning(f"{self.endpoint.url}: {name}; all requests are written so")
        return text
      except _Again as problem:
        attempt += problem.counts or time.monotonic() - began > LOADING_SECONDS
        self.usage.retries[problem.reason] = self.usage.retries.get(problem.reason, 0) + 1
        wait = max(
          problem.after,
          min(30.0, self._backoff * 2 ** (attempt - 1)) * (0.5 + self._random.random())
          if problem.counts
          else 0.0,
        )
        reason = f"{problem.reason}: {problem.said}" if problem.said else problem.reason
    raise RequestError(
      f"{self.endpoint.url}: no answer in {self.endpoint.attempts} tries; the last one: {reason}"
    )

  def _spend(self) -> None:
    endpoint, usage = self.endpoint, self.usage
    if endpoint.max_requests is not None and usage.requests >= endpoint.max_requests:
      raise BudgetError(f"max_requests={endpoint.max_requests} are spent")
    if (
      endpoint.max_tokens is not None
      and usage.prompt_tokens + usage.completion_tokens >= endpoint.max_tokens
    ):
      raise BudgetError(f"max_tokens={endpoint.max_tokens} are spent")
    usage.requests += 1

  async def _send(self, body: dict[str, Any], dialects: list[str]) -> str:
    for name in dialects:
      body = DIALECTS[name][1](body) or body
    endpoint = self.endpoint
    try:
      async with self._session.post(
        endpoint.target, json=body, allow_redirects=False, proxy=endpoint.proxy
      ) as response:
        status, headers = response.status, response.headers
        data = await self._read(response)
    except TimeoutError:
      self._shrink()
      raise _Again("timeout") from None
    except self._errors as error:
      raise _Again("connection", str(error) or type(error).__name__) from None
    if status != 200:
      self._refused(status, headers, data.decode("utf-8", "replace"), body, dialects)
    try:
      value = parse_json(data)
    except ValueError:
      raise _Again("reply", f"no JSON: {data[:100]!r}") from None
    choices = value.get("choices") if isinstance(value, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    self._count(value, body, len(data) if isinstance(choice, dict) else 0)
    if not isinstance(choice, dict):
      raise _Again(
        "reply",
        f"{value['error']!r:.200}"
        if isinstance(value, dict) and "error" in value
        else "no choices",
      )
    try:
      text = text_of(choice)
    except ReplyTextError as error:
      raise ReplyError(f"{endpoint.url}: {error}") from None
    self._limit = min(float(endpoint.in_flight), self._limit + 1 / self._limit)
    self.usage.in_flight = int(self._limit)
    return text

  async def _read(self, response: Any) -> bytes:
    """The body, no more than `REPLY_BYTES` of it."""
    coding = response.headers.get("Content-Encoding", "identity").lower()
    expand = zlib.decompressobj(47) if coding in ("gzip", "x-gzip", "deflate") else None
    data = bytearray()
    async for part in response.content.iter_chunked(1 << 16):
      try:
        data += part if expand is None else expand.decompress(part, REPLY_BYTES + 1 - len(data))
      except zlib.error as error:
        raise _Again("reply", f"a damaged {coding} body: {error}") from None
      if len(data) > REPLY_BYTES:
        raise ReplyError(f"{self.endpoint.url}: a reply of more than {REPLY_BYTES >> 20} MiB")
    return bytes(data)

  def _refused(
    self,
    status: int,
    headers: Mapping[str, str],
    said: str,
    body: dict[str, Any],
    dialects: list[str],
  ) -> None:
    """Raises what a status other than 200 means; a dialect that the refusal names is added to
    `dialects`."""
    url, said = self.endpoint.url, " ".join(said.split())
    after = _seconds(headers.get("Retry-After"))
    if status in (402, 429) and _QUOTA.search(said):
      raise FatalError(f"{url}: {status}: {said[:300]}")
    if status == 429:
      self._shrink()
      raise _Again("429", after=after)
    if status == 503 and after:
      if not self.usage.answered:  # it loads its model: all wait
        self._not_before = max(self._not_before, time.monotonic() + after)
      else:
        self._shrink()
      raise _Again("5xx", f"{status}: {said[:200]}", after, counts=self.usage.answered > 0)
    if status >= 500 or status == 408:
      raise _Again("5xx" if status >= 500 else "timeout", f"{status}: {said[:200]}")
    if 300 <= status < 400:
      raise FatalError(
        f"{url}: {status}: redirects to {headers.get('Location', 'nowhere')!r:.200}; nothing is "
        f"sent there; name it as the "
        "endpoint if it is meant"
      )
    if status in (400, 422):
      for name, (pattern, rewrite) in DIALECTS.items():
        if _REFUSES.search(said) and pattern.search(said) and rewrite(body) is not None:
          dialects.append(name)
          raise _Again("dialect", said[:200], counts=False)
    hints = [
      option
      for word, option in (
        ("response_format", "--no-json-schema"),
        ("json_schema", "--no-json-schema"),
        ("seed", "--no-seed"),
      )
      if word in said
    ]
    hint = f"; see {hints[0]}" if hints else ""
    if status in (404, 405) and not re.search(r"/v\d|api-version=", url):
      hint = f"; is it {url.rstrip('/')}/v1?"
    # 400, 413, 422: this request is at fault (too long, say), not the server.
    raise (ReplyError if status in (400, 413, 422) else RequestError)(
      f"{url}: {status}: {said[:300]}{hint}"
    )

  def _count(self, value: Any, body: Mapping[str, Any], received: int) -> None:
    """Adds what the server counts; where it does not, or not credibly, a fourth of the bytes of a
    reply that is one."""
    spent = value.get("usage") if isinstance(value, dict) else None
    for name, size in (
      ("prompt_tokens", len(json.dumps(body["messages"], ensure_ascii=False).encode())),
      ("completion_tokens", received),
    ):
      count = spent.get(name) if isinstance(spent, dict) else None
      if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 1 << 32:
        count = -(-size // 4) if received else 0
      setattr(self.usage, name, getattr(self.usage, name) + count)

  @contextlib.asynccontextmanager
  async def _place(self) -> AsyncIterator[None]:
    """Waits until there is room."""
    async with self._free:
      await self._free.wait_for(lambda: self._flying < int(self._limit))
      self._flying += 1
    try:
      yield
    finally:
      async with self._free:
        self._flying -= 1
        self._free.notify(1 + (self._flying + 1 < int(self._limit)))

  def _shrink(self) -> None:
    """Once for all requests that were in flight together."""
    now = time.monotonic()
    if now - self._shrunk > 1.0:
      self._shrunk = now
      self._limit = max(1.0, 0.75 * self._limit)
      self.usage.in_flight = int(self._limit)


def _seconds(text: str | None) -> float:
  try:
    seconds = float(text) if text else 0.0
  except ValueError:
    try:  # a date
      seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
      return 0.0
  return min(60.0, max(0.0, seconds)) if math.isfinite(seconds) else 0.0


async def ask_json(
  client: Client,
  messages: Sequence[Mapping[str, str]],
  schema: Mapping[str, Any],
  name: str,
  **sampling: Any,
) -> Any:
  """A reply by schema. What does not parse is sent back once with the problem, to be repaired.

  Raises:
    ReplyError: the repaired reply does not parse either.
    RequestError, BudgetError: as `Client.chat`.
  """
  text = await client.chat(messages, schema=schema, name=name, **sampling)
  try:
    return parse(text, schema)
  except ValueError as problem:
    again = [
      *messages,
      {"role": "assistant", "content": text},
      {
        "role": "user",
        "content": (
          f"That is not the JSON that was asked for: {problem}. Reply with the corrected JSON "
          f"object alone."
        ),
      },
    ]
    try:
      return parse(await client.chat(again, schema=schema, name=name, **sampling), schema)
    except ValueError as error:
      raise ReplyError(f"the reply {name!r} does not parse, nor does its repair: {error}") from None
