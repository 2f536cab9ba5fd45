"""Many documents at once through their rounds: resumable, in shards, with rows, rejects and a
manifest at the end."""

import asyncio
import collections
import dataclasses
import datetime
import hashlib
import itertools
import json
import logging
import os
import pathlib
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from clara_jax import io
from clara_jax.config import ConfigError
from clara_jax.data.schemas import Document, Row
from clara_jax.synthesis import journal as journal_lib
from clara_jax.synthesis.client import BudgetError, FatalError, RequestError, Usage, ask_json
from clara_jax.synthesis.journal import Journal
from clara_jax.synthesis.rounds import SCHEMAS, Ask, Outcome
from clara_jax.synthesis.templates import Templates

log = logging.getLogger(__name__)

FAILURES = 20  # requests that fail for good in a row: the server is not there


class Backend(Protocol):
  """What replies: `client.Client`, `offline.Offline`, `own.OwnModel`."""

  usage: Usage

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
    """The text of a reply."""


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How replies are drawn; the seed of each request comes from its content."""

  temperature: float = 0.7
  max_tokens: int = 2048

  def __post_init__(self):
    if not 0 <= self.temperature < float("inf"):
      raise ConfigError(f"--temperature {self.temperature}: expected 0 or more")


@dataclasses.dataclass(frozen=True)
class Shard:
  """Which part of a corpus this worker does: items whose id has a hash that is `index` modulo
  `count`, wherever they stand."""

  index: int = 0
  count: int = 1

  def __post_init__(self):
    if not 0 <= self.index < self.count:
      raise ConfigError(f"--shard {self.index}: expected 0 to {self.count - 1}")

  def has(self, name: str) -> bool:
    """Whether an item is of this part."""
    return (
      int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest())
      % self.count
      == self.index
    )

  def path(self, directory: str, name: str, suffix: str) -> str:
    """A file of this shard."""
    return os.path.join(directory, f"{name}-{self.index:05d}-of-{self.count:05d}.{suffix}")


class CachedBackend:
  """A backend for one document: replies that it had before are not asked for again."""

  def __init__(
    self, backend: Backend, journal: Journal, document: str, spent: Callable[[], Sequence[int]]
  ):
    self._backend, self._journal, self._document, self._spent = backend, journal, document, spent
    self._replies, self._tries = journal.replies(document), journal.tries(document)
    self.step = ""

  async def chat(self, messages, *, seed=None, **options):
    key = hashlib.blake2b(
      json.dumps([self.step, self._tries, messages]).encode(), digest_size=8
    ).hexdigest()
    if (text := self._replies.pop(key, None)) is None:
      text = await self._backend.chat(messages, seed=int(key[:7], 16), **options)
      self._journal.reply(self._document, key, text, self._spent())
    return text


def asker(backend: Any, templates: Templates, sampling: Sampling) -> Ask:
  """The `Ask` of a document; `backend` may have an attribute `step`, which tells repeated requests
  apart."""

  async def ask(
    template: str, schema: str, attempt: int, values: Mapping[str, Any]
  ) -> dict[str, Any]:
    backend.step = f"{template} {values.get('round', 0)} {attempt}"
    return await ask_json(
      backend,
      templates.messages(template, **values),
      SCHEMAS[schema],
      schema,
      temperature=sampling.temperature,
      max_tokens=sampling.max_tokens,
    )

  return ask


@dataclasses.dataclass
class FactoryReport:
  """What a shard has come to.

  Attributes:
    accepted, rejected: documents.
    open: documents that this start began and did not end; the next one does them.
    rows: written.
    rounds: of the finished documents, the most of any part, on average.
    requests, tokens, cost: of all starts: requests with tries again, tokens of prompts and replies,
      `cost` by their prices.
    requests_a_document: on average.
    seconds: of this start; read: documents of this start with usable replies.
    reasons: rejected documents by reason; refused: by the checks, within the rounds.
    stopped: why this start ended early; problem: the last request that failed for good.
  """

  accepted: int = 0
  rejected: int = 0
  open: int = 0
  rows: int = 0
  rounds: float = 0.0
  requests: int = 0
  requests_a_document: float = 0.0
  tokens: int = 0
  cost: float = 0.0
  seconds: float = 0.0
  read: int = 0
  reasons: dict[str, int] = dataclasses.field(default_factory=dict)
  refused: dict[str, int] = dataclasses.field(default_factory=dict)
  stopped: str | None = None
  problem: str | None = None


async def produce(
  items: Iterable[tuple[str, Any]],
  work: Callable[[Any, Ask], Awaitable[Outcome]],
  backend: Backend,
  templates: Templates,
  directory: str,
  *,
  shard: Shard = Shard(),
  sampling: Sampling = Sampling(),
  at_once: int = 80,
  record: Mapping[str, Any] | None = None,
  price: tuple[float, float] = (0.0, 0.0),
  share: Callable[[], float] | None = None,
  retry_rejected: str | None = None,
  progress: bool = True,
) -> FactoryReport:
  """Works on every item that is not finished and writes DIR/rows-…, rejected-… and manifest-….

  Args:
    items: (id, what `work` takes, a `Document` or a `Row`); ids are unique.
    work: `rounds.scp` or `rounds.teacher`.
    backend: what replies.
    templates, sampling: the prompts.
    directory: DIR; a second start with the same one goes on.
    shard: which of the items.
    at_once: items that are open at a time.
    record: what else the manifest tells (model, endpoint) and later starts must agree in, but for
      the endpoint.
    price: of a million tokens of prompts and of replies.
    share: of the items that were handed out, for the time left.
    retry_rejected: items that were rejected with a reason that begins so are open again, with other
      seeds ('' is all).
    progress: whether progress is logged.

  Raises:
    ConfigError: the directory has items made by other prompts, model or sampling.
    DataError: an item says something else than when it was done.
    RequestError: the server fails all the time, or some requests failed for good; what was done is
      kept.
  """
  try:
    os.makedirs(directory, exist_ok=True)
  except (FileExistsError, NotADirectoryError):
    raise ConfigError(f"--out {directory}: is a file, expected a directory") from None
  made_by = {
    "prompts_sha256": templates.sha256,
    "temperature": sampling.temperature,
    "max_tokens": sampling.max_tokens,
    **(record or {}),
  }
  endpoint = made_by.pop("endpoint", None)  # a server may move
  _same_shards(directory, shard)
  _same_settings(shard.path(directory, "settings", "json"), made_by)
  journal = Journal(shard.path(directory, "journal", "jsonl"))
  production = _Production(journal, work, backend, templates, sampling)
  waiting = production.open_items(items, shard, retry_rejected)
  report = production.report
  progress_log = asyncio.create_task(production.log_progress(share)) if progress else None
  try:
    async with asyncio.TaskGroup() as group:
      for _ in range(at_once):
        group.create_task(production.work_on(waiting))
  except ExceptionGroup as problems:
    raise problems.exceptions[0] from None
  finally:
    if progress_log:
      progress_log.cancel()
    production.close(price)
    _write(journal, directory, shard, report, {**made_by, "endpoint": endpoint}, backend.usage)
    journal.close()
  if report.problem:
    why = report.stopped or f"{report.open} documents are left open"
    raise RequestError(
      f"{why}; the last problem: {report.problem}; what was done is kept; rerun the command to "
      f"resume"
    )
  return report


class _Production:
  """One start of a shard: its workers share the items, the journal and the report."""

  def __init__(
    self,
    journal: Journal,
    work: Callable[[Any, Ask], Awaitable[Outcome]],
    backend: Backend,
    templates: Templates,
    sampling: Sampling,
  ):
    self._journal, self._work, self._backend = journal, work, backend
    self._templates, self._sampling = templates, sampling
    self._start, self._done_before = time.monotonic(), journal.done
    self._failures = 0  # requests in a row that failed for good
    self._unread: list[tuple[str, Any, Outcome]] = []  # in a row without a usable reply
    self._usage = [0, 0, 0]  # that the journal has
    self.report = FactoryReport()

  def open_items(
    self, items: Iterable[tuple[str, Any]], shard: Shard, retry_rejected: str | None
  ) -> Iterator[tuple[str, Any]]:
    """The shard's items that are not finished, or were rejected for the reason named."""
    journal = self._journal
    again = (
      set()
      if retry_rejected is None
      else {
        name
        for name, outcome in journal_lib.outcomes(journal.path)
        if (outcome["reason"] or "").startswith(retry_rejected) and outcome["reason"]
      }
    )
    for name, item in items:
      if not shard.has(name):
        continue
      if name in again and journal.is_done(name, _said(item)):
        again.remove(name)
        journal.withdraw(name)
      if not journal.is_done(name, _said(item)):
        yield name, item

  async def work_on(self, waiting: Iterator[tuple[str, Any]]) -> None:
    """A worker: one item after the other, until there is none or the start is stopped."""
    report = self.report
    for name, item in waiting:
      if report.stopped:
        return
      report.open += 1
      cached = CachedBackend(self._backend, self._journal, name, self._spent)
      try:
        outcome = await self._work(item, asker(cached, self._templates, self._sampling))
      except BudgetError as error:
        report.stopped = str(error)
      except RequestError as error:
        self._fail(error)
      else:
        self._take(name, item, outcome)

  def _fail(self, error: RequestError) -> None:
    self._failures += 1
    self.report.problem = str(error)
    if isinstance(error, FatalError):
      self.report.stopped = "no request will pass"
    elif self._failures >= FAILURES:
      self.report.stopped = f"{FAILURES} requests in a row failed"

  def _take(self, name: str, item: Any, outcome: Outcome) -> None:
    self._failures = 0
    if outcome.unread:  # the document's fault, or the server's? The next ones tell
      self._unread.append((name, item, outcome))
      if len(self._unread) >= FAILURES:
        self.report.stopped = f"{FAILURES} documents in a row got no usable reply"
        self.report.problem = outcome.reason
      return
    self.report.read += 1
    self._finish_unread()
    self._finish(name, item, outcome)

  def _finish_unread(self) -> None:
    for unread in self._unread:
      self._finish(*unread)
    self._unread.clear()

  def _finish(self, name: str, item: Any, outcome: Outcome) -> None:
    self._journal.finish(name, _said(item), vars(outcome))
    self.report.open -= 1

  def _spent(self) -> list[int]:
    """Since the last call: requests, tokens of prompts, tokens of replies."""
    usage, before = self._backend.usage, self._usage
    self._usage = [usage.requests, usage.prompt_tokens, usage.completion_tokens]
    return [a - b for a, b in zip(self._usage, before, strict=True)]

  async def log_progress(self, share: Callable[[], float] | None) -> None:
    """Every ten seconds, until it is cancelled."""
    first = share() if share else 0.0
    usage = self._backend.usage
    while True:
      await asyncio.sleep(10)
      done, seconds = self._journal.done - self._done_before, time.monotonic() - self._start
      left = ""
      if share and 1 > (now := share()) > first:  # at 1, the last ones are at work
        left = f", left {datetime.timedelta(seconds=round(seconds * (1 - now) / (now - first)))}"
      log.info(
        f"synthesize: {self._journal.done} documents, {done / seconds:.1f}/s; {usage.requests} "
        f"requests, {usage.requests / seconds:.0f}/s, at most {usage.in_flight} in flight; "
        f"retries {usage.retries}{left}"
      )

  def close(self, price: tuple[float, float]) -> None:
    """Decides on the unread documents and counts what all starts have spent."""
    report, journal = self.report, self._journal
    if report.read and not report.stopped:  # a server that can be read
      self._finish_unread()
    elif self._unread:
      report.problem = report.problem or self._unread[-1][-1].reason
      for name, *_ in self._unread:  # the replies that could not be used are not taken again
        journal.ask_anew(name)
    journal.spend(self._spent())
    report.requests, prompts, replies = journal.spent
    report.tokens, report.seconds = prompts + replies, round(time.monotonic() - self._start, 2)
    report.cost = round((price[0] * prompts + price[1] * replies) / 1e6, 4)
    report.requests_a_document = round(report.requests / max(1, journal.done), 2)


def _said(item: Document | Row) -> str:
  return repr(
    (item.title, item.text) if isinstance(item, Document) else (item.questions, item.documents)
  )


def _same_shards(directory: str, shard: Shard) -> None:
  others = [
    p.name
    for p in pathlib.Path(directory).glob("journal-*.jsonl")
    if not p.name.endswith(f"-of-{shard.count:05d}.jsonl")
  ]
  if others:
    raise ConfigError(
      f"{directory}: has {others[0]}, work that was divided otherwise than by --shards "
      f"{shard.count}; name another --out"
    )


def _same_settings(path: str, made_by: Mapping[str, Any]) -> None:
  """Of all shards."""
  for file in sorted(pathlib.Path(path).parent.glob("settings-*.json")):
    if (values := _settings(file)) != made_by:
      names = [k for k in sorted({*values, *made_by}) if values.get(k) != made_by.get(k)]
      changed = [f"{k}: {values.get(k)} there, {made_by.get(k)} now" for k in names]
      raise ConfigError(
        f"{file}: was made with other settings ({'; '.join(changed)}); name another --out"
      )
  if not os.path.exists(path):
    io.write(pathlib.Path(path), json.dumps(made_by, indent=2))


def _settings(path: pathlib.Path) -> dict[str, Any]:
  try:
    return io.parse_json(path.read_bytes())
  except ValueError:
    raise ConfigError(
      f"{path}: is damaged; the shard's journal is whole, give this file the settings of another "
      f"shard or of the manifest"
    ) from None


def _write(
  journal: Journal,
  directory: str,
  shard: Shard,
  report: FactoryReport,
  made_by: Mapping[str, Any],
  usage: Usage,
) -> None:
  """Rows, rejects and manifest from the journal, each file whole or not at all."""
  reasons: collections.Counter = collections.Counter()
  refused: collections.Counter = collections.Counter()
  rounds = pairs = 0
  with (
    io.rewriting(shard.path(directory, "rows", "jsonl")) as rows,
    io.rewriting(shard.path(directory, "rejected", "jsonl")) as rejects,
  ):
    for document, outcome in journal_lib.outcomes(journal.path):
      refused.update(outcome["refused"])
      rounds += outcome["rounds"]
      if outcome["reason"]:
        report.rejected += 1
        reasons[outcome["reason"]] += 1
        rejects.write(
          io.json_line({"id": document, "reason": outcome["reason"], "rounds": outcome["rounds"]})
        )
        continue
      report.accepted += 1
      for row in outcome["rows"]:
        report.rows += 1
        pairs += len(row["question"]) if isinstance(row["question"], list) else 0
        rows.write(io.json_line(row))
  done = report.accepted + report.rejected
  report.rounds = round(rounds / max(1, done), 2)
  report.reasons, report.refused = dict(reasons.most_common()), dict(refused.most_common())
  manifest = {
    "settings": made_by,
    **dataclasses.asdict(report),
    "pairs_a_document": round(pairs / max(1, report.accepted), 2),
    "usage_of_the_last_start": dataclasses.asdict(usage),
    "shard": shard.index,
    "shards": shard.count,
  }
  io.write(pathlib.Path(shard.path(directory, "manifest", "json")), json.dumps(manifest, indent=2))


def settings(directory: str) -> dict[str, Any]:
  """What the rows of a directory were made by.

  Raises:
    ConfigError: nothing was made.
  """
  for path in sorted(pathlib.Path(directory).glob("settings-*.json")):
    return _settings(path)
  raise ConfigError(f"{directory}: nothing was synthesized here")


def outcomes(directory: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """(document, outcome) of all shards.

  Raises:
    ConfigError: there is no journal.
  """
  paths = sorted(pathlib.Path(directory).glob("journal-*.jsonl"))
  if not paths:
    raise ConfigError(f"{directory}: nothing was synthesized here")
  return itertools.chain.from_iterable(journal_lib.outcomes(str(p)) for p in paths)
