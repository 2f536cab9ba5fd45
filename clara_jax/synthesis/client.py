"""Many requests at once to an OpenAI-compatible server (vLLM, SGLang, llama.cpp, a cloud).

How many are in flight adapts: it grows by one for every round of answers, and shrinks by a quarter when the server says 429 or does not
answer in time (additive increase, multiplicative decrease). What may pass is tried again, later each time.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import random
import re
import time
import urllib.parse
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
    max_requests, max_tokens: budgets; tokens are those that the server counts, when it has answered. None: no limit.
    json_schema: whether the server is asked for JSON by schema (`response_format`); it is taken from the reply either way.
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

  def __post_init__(self):
    if not self.url.startswith(("http://", "https://")) or not urllib.parse.urlsplit(self.url).hostname:
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
  """What may pass: its kind for the count, what was said, and how long to wait at least."""

  def __init__(self, reason: str, said: str = "", after: float = 0.0):
    super().__init__(reason)
    self.reason, self.said, self.after = reason, said, after


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
    if seed is not None and self.endpoint.seed:
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
        reason = f"{problem.reason}: {problem.said}" if problem.said else problem.reason
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
          raise _Again("429", after=_seconds(response.headers.get("Retry-After")))
        if response.status >= 500 or response.status == 408:
          said = f"{response.status}: {(await response.text())[:200]}"
          raise _Again("5xx" if response.status >= 500 else "timeout", said)
        if response.status != 200:
          # 400, 413, 422: this request is at fault (too long, say), not the server.
          kind = ReplyError if response.status in (400, 413, 422) else RequestError
          said = (await response.text())[:300]
          hints = [option for word, option in (("response_format", "--no-json-schema"), ("json_schema", "--no-json-schema"),
                                               ("seed", "--no-seed")) if word in said]
          raise kind(f"{self.endpoint.url}: {response.status}: {said}" + (f"; see {hints[0]}" if hints else ""))
        value = json.loads(data := await response.read())
    except TimeoutError:
      self._shrink()
      raise _Again("timeout") from None
    except self._errors as error:
      if isinstance(error, ValueError):
        raise _Again("reply", f"no JSON: {data[:100]!r}") from None
      raise _Again("connection", str(error) or type(error).__name__) from None
    spent = value.get("usage") if isinstance(value, dict) else None
    for name in ("prompt_tokens", "completion_tokens"):
      count = spent.get(name) if isinstance(spent, dict) else None
      setattr(self.usage, name, getattr(self.usage, name) + (count if isinstance(count, int) else 0))
    try:
      text = value["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
      raise _Again("reply", f"{value['error']!r:.200}" if isinstance(value, dict) and "error" in value else "no choices") from None
    if not isinstance(text, str):
      is_cut = value["choices"][0].get("finish_reason") == "length"
      raise _Again("reply", "it was cut before its text began: more --max-reply-tokens" if is_cut else "it has no text")
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
    text: the reply; what a model thinks aloud (<think>…</think>) is passed over.
    schema: of the types object, array, string, boolean, integer and number, with properties (all required) and items.

  Raises:
    ValueError: there is none, or it is not by the schema; with the place.
  """
  text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
  problem = "there is no JSON object"
  for number, start in enumerate(match.start() for match in itertools.islice(re.finditer(r"\{", text), 50)):
    try:
      value, _ = json.JSONDecoder().raw_decode(text, start)
      json.dumps(value, ensure_ascii=False).encode()
      _check(value, schema, "the reply")
      return value
    except json.JSONDecodeError as error:
      found = f"not valid JSON: {error}"
    except (UnicodeEncodeError, RecursionError) as error:
      found = f"no text that can be kept: {type(error).__name__}"
    except ValueError as error:
      found = str(error)
    problem = problem if number else found
  raise ValueError(problem)


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
