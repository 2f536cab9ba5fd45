"""Many requests at once to an OpenAI-compatible server (vLLM, SGLang, llama.cpp, a cloud).

How many are in flight adapts: it grows by one for every round of answers, and shrinks by a quarter when the server says 429 or does not
answer in time (additive increase, multiplicative decrease). What may pass is tried again, later each time.
"""

import asyncio
import contextlib
import dataclasses
import json
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from clara_jax.config import ConfigError


class RequestError(Exception):
  """A request that failed for good: refused, or tried too often."""


class ReplyError(RequestError):
  """The fault of one request, not of the server: it was refused, or its reply does not parse, nor does the repair."""


class BudgetError(Exception):
  """The next request would go beyond the budget."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """A server and how to treat it.

  Attributes:
    url: up to and without `/chat/completions`, as `http://localhost:8000/v1`.
    model: its name there.
    api_key: sent as a bearer token.
    in_flight: requests at once, at most.
    seconds: that a request may take.
    attempts: tries of a request.
    max_requests, max_tokens: budgets; tokens are those that the server counts. None: no limit.
    json_schema: whether the server is asked for JSON by schema (`response_format`); it is taken from the reply either way.
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

  def __post_init__(self):
    if not self.url.startswith(("http://", "https://")):
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
    retries: by reason: '429', '5xx', 'timeout', 'connection', 'reply'.
    prompt_tokens, completion_tokens: as the server counted.
    in_flight: the limit now.
  """

  requests: int = 0
  answered: int = 0
  retries: dict[str, int] = dataclasses.field(default_factory=dict)
  prompt_tokens: int = 0
  completion_tokens: int = 0
  in_flight: int = 0


class _Again(Exception):
  def __init__(self, reason: str, after: float = 0.0):
    super().__init__(reason)
    self.reason, self.after = reason, after


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
    self._shrunk = 0.0

  async def __aenter__(self) -> "Client":
    try:
      import aiohttp
    except ImportError:
      raise ConfigError("an endpoint needs aiohttp: pip install -e '.[synthesize]'") from None
    headers = {"Authorization": f"Bearer {self.endpoint.api_key}"} if self.endpoint.api_key else {}
    self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers,
                                          timeout=aiohttp.ClientTimeout(total=self.endpoint.seconds))
    self._errors = (aiohttp.ClientError, ConnectionError, json.JSONDecodeError, UnicodeDecodeError)
    return self

  async def __aexit__(self, *_: Any) -> None:
    await self._session.close()

  async def chat(self, messages: Sequence[Mapping[str, str]], *, schema: Mapping[str, Any] | None = None, name: str = "reply",
                 temperature: float = 0.0, max_tokens: int = 1024, seed: int | None = None) -> str:
    """The text of a reply.

    Args:
      messages: of the chat.
      schema: JSON schema of the reply, where the server takes one.
      name: of the schema.
      temperature, max_tokens, seed: sampling.

    Raises:
      RequestError: refused, or tried `attempts` times.
      BudgetError: there is none left for it.
    """
    body: dict[str, Any] = {"model": self.endpoint.model, "messages": list(messages), "temperature": temperature, "max_tokens": max_tokens}
    if seed is not None:
      body["seed"] = seed
    if schema is not None and self.endpoint.json_schema:
      body["response_format"] = {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}
    wait = 0.0
    for attempt in range(self.endpoint.attempts):
      await asyncio.sleep(wait)
      try:
        async with self._place():
          self._spend()
          text = await self._send(body)
        self.usage.answered += 1
        return text
      except _Again as problem:
        self.usage.retries[problem.reason] = self.usage.retries.get(problem.reason, 0) + 1
        wait = max(problem.after, min(30.0, self._backoff * 2**attempt) * (0.5 + self._random.random()))
        reason = problem.reason
    raise RequestError(f"{self.endpoint.url}: no answer in {self.endpoint.attempts} tries; the last one: {reason}")

  def _spend(self) -> None:
    endpoint, usage = self.endpoint, self.usage
    if endpoint.max_requests is not None and usage.requests >= endpoint.max_requests:
      raise BudgetError(f"max_requests={endpoint.max_requests} are spent")
    if endpoint.max_tokens is not None and usage.prompt_tokens + usage.completion_tokens >= endpoint.max_tokens:
      raise BudgetError(f"max_tokens={endpoint.max_tokens} are spent")
    usage.requests += 1

  async def _send(self, body: Mapping[str, Any]) -> str:
    try:
      async with self._session.post(f"{self.endpoint.url.rstrip('/')}/chat/completions", json=body) as response:
        if response.status == 429:
          self._shrink()
          raise _Again("429", _seconds(response.headers.get("Retry-After")))
        if response.status >= 500 or response.status == 408:
          raise _Again("5xx" if response.status >= 500 else "timeout")
        if response.status != 200:
          # 400, 413, 422: this request is at fault (too long, say), not the server.
          kind = ReplyError if response.status in (400, 413, 422) else RequestError
          raise kind(f"{self.endpoint.url}: {response.status}: {(await response.text())[:300]}")
        value = json.loads(await response.read())
    except TimeoutError:
      self._shrink()
      raise _Again("timeout") from None
    except self._errors as error:
      raise _Again("connection" if not isinstance(error, ValueError) else "reply") from None
    spent = value.get("usage") if isinstance(value, dict) else None
    for name in ("prompt_tokens", "completion_tokens"):
      count = spent.get(name) if isinstance(spent, dict) else None
      setattr(self.usage, name, getattr(self.usage, name) + (count if isinstance(count, int) else 0))
    try:
      text = value["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
      raise _Again(f"reply: {value['error']!r:.200}" if isinstance(value, dict) and "error" in value else "reply") from None
    if not isinstance(text, str):
      raise _Again("reply")
    text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair
    self._limit = min(float(self.endpoint.in_flight), self._limit + 1 / self._limit)
    self.usage.in_flight = int(self._limit)
    return text

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
    return min(60.0, float(text)) if text else 0.0
  except ValueError:  # a date
    return 0.0


async def ask_json(client: Client, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any], name: str, **sampling: Any) -> Any:
  """A reply by schema. What does not parse is sent back once with the problem, to be repaired.

  Raises:
    ReplyError: the repaired reply does not parse either.
    RequestError, BudgetError: as `Client.chat`.
  """
  text = await client.chat(messages, schema=schema, name=name, **sampling)
  try:
    return parse(text, schema)
  except ValueError as problem:
    again = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": (
        f"That is not the JSON that was asked for: {problem}. Reply with the corrected JSON object alone.")}]
    try:
      return parse(await client.chat(again, schema=schema, name=name, **sampling), schema)
    except ValueError as error:
      raise ReplyError(f"the reply {name!r} does not parse, nor does its repair: {error}") from None


def parse(text: str, schema: Mapping[str, Any]) -> Any:
  """The JSON object in a reply, checked: bare, in a code fence, or between other words.

  Args:
    text: the reply.
    schema: of the types object, array, string, boolean, integer and number, with properties (all required) and items.

  Raises:
    ValueError: there is none, or it is not by the schema; with the place.
  """
  start = text.find("{")
  if start < 0:
    raise ValueError("there is no JSON object")
  try:
    value, _ = json.JSONDecoder().raw_decode(text, start)
    json.dumps(value, ensure_ascii=False).encode()
  except json.JSONDecodeError as error:
    raise ValueError(f"not valid JSON: {error}") from None
  except (UnicodeEncodeError, RecursionError) as error:
    raise ValueError(f"no text that can be kept: {type(error).__name__}") from None
  _check(value, schema, "the reply")
  return value


_TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}


def _check(value: Any, schema: Mapping[str, Any], where: str) -> None:
  kind = schema["type"]
  if not isinstance(value, _TYPES[kind]) or kind in ("integer", "number") and isinstance(value, bool):
    raise ValueError(f"{where}: expected {kind}, got {type(value).__name__}")
  for name, inner in schema.get("properties", {}).items():
    if name not in value:
      raise ValueError(f"{where}: lacks {name!r}")
    _check(value[name], inner, f"{where}.{name}")
  if kind == "array":
    for i, item in enumerate(value):
      _check(item, schema["items"], f"{where}[{i}]")
