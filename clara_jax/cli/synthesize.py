"""`clara synthesize`: training rows from documents, written and checked by a language model."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import glob
import logging
import os
import shutil
import signal
import tempfile
from typing import TYPE_CHECKING, Any

from clara_jax.cli import arguments, inputs

if TYPE_CHECKING:
  from clara_jax.data.schemas import Row

log = logging.getLogger(__name__)

HELP = (
  "SCP or instruct data, written and checked by a language model; resumes where it was stopped."
)
OUTPUTS = {"out": "local"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  parser.add_argument("--out", required=True, metavar="DIR")
  parser.add_argument(
    "--documents",
    nargs="+",
    metavar="PATH",
    help="JSONL (.gz), text, a Wikipedia extract, Markdown, HTML, PDF, Office files (extra "
    "documents), or folders of these",
  )
  parser.add_argument(
    "--questions",
    metavar="F",
    help="instead: questions with documents (see evaluate); a teacher answers them",
  )
  parser.add_argument(
    "--endpoint",
    metavar="URL",
    help="an OpenAI-compatible server, up to /v1, its key in OPENAI_API_KEY; or "
    "'checkpoint': the base of --model; or 'offline': a stand-in that knows the quickstart's world",
  )
  parser.add_argument("--model", metavar="NAME", help="its name there")
  arguments.reading(parser, "of --endpoint checkpoint")
  arguments.mesh(parser)
  arguments.ray(parser, "--endpoint checkpoint: replies are made")
  parser.add_argument(
    "--prompts",
    metavar="DIR",
    help="templates and demonstrations that take the place of the package's own",
  )
  parser.add_argument(
    "--tokens",
    type=arguments.positive,
    default=256,
    help="of a document, with its title; longer ones are cut; default 256",
  )
  parser.add_argument("--tokenizer", metavar="DIR", help="that counts them; default: words")
  parser.add_argument("--rounds", type=arguments.positive, default=10, help="at most; default 10")
  parser.add_argument(
    "--in-flight", type=arguments.positive, default=64, help="requests at once, at most; default 64"
  )
  parser.add_argument(
    "--timeout", type=float, default=120.0, help="seconds that a request may take; default 120"
  )
  parser.add_argument("--temperature", type=float, default=0.7)
  parser.add_argument("--max-reply-tokens", type=arguments.positive, default=2048)
  parser.add_argument(
    "--no-json-schema", action="store_true", help="for servers without response_format"
  )
  parser.add_argument("--no-seed", action="store_true", help="for servers that refuse a seed")
  parser.add_argument("--max-requests", type=arguments.positive, help="budget of this start")
  parser.add_argument(
    "--max-tokens",
    type=arguments.positive,
    help="budget of this start: prompts and replies; what is in flight when it "
    "is spent comes on top",
  )
  parser.add_argument(
    "--price",
    type=float,
    nargs=2,
    default=(0.0, 0.0),
    metavar=("PROMPTS", "REPLIES"),
    help="of a million tokens; the report then has the cost",
  )
  parser.add_argument(
    "--records",
    action="store_true",
    help="also ArrayRecord, of all shards that are there, in DIR/records; alone, of what is there",
  )
  parser.add_argument(
    "--retry-rejected",
    nargs="?",
    const="",
    metavar="REASON",
    help="documents that were rejected are tried again, with other seeds; only those whose reason "
    "begins so",
  )
  parser.add_argument(
    "--shard", type=int, default=0, metavar="I", help="this worker's part of the corpus"
  )
  parser.add_argument(
    "--shards", type=arguments.positive, default=1, metavar="N", help="how many workers there are"
  )
  parser.add_argument(
    "--limit", type=arguments.positive, help="only the first documents or questions"
  )
  arguments.max_malformed(parser, "documents")
  parser.add_argument(
    "--report", action="store_true", help="writes DIR/report.html; alone, of what is there"
  )


def run(options: argparse.Namespace) -> dict[str, Any]:
  """Returns counts of the run; with --report and --records also theirs."""
  from clara_jax.config import ConfigError
  from clara_jax.data import records, schemas
  from clara_jax.synthesis import factory, pages

  report: dict[str, Any] = {}
  if options.documents and options.questions:
    raise ConfigError("--documents and --questions: name one of them")
  if options.documents or options.questions:
    # SIGTERM as Ctrl-C: requests are given up, rows and manifest are written.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
      report = dataclasses.asdict(asyncio.run(_produce(options)))
    except KeyboardInterrupt:
      log.warning(
        "synthesize: stopped; what was done is in %s; rerun the command to resume", options.out
      )
      raise
    finally:
      signal.signal(signal.SIGTERM, previous)
  elif not (options.report or options.records) or options.retry_rejected is not None:
    raise ConfigError("--documents or --questions: name one")
  if options.report:
    report |= pages.write(options.out)
  if options.records:
    kind = factory.settings(options.out)["kind"]
    paths = sorted(glob.glob(os.path.join(glob.escape(options.out), "rows-*.jsonl")))
    count = sum(1 for path in paths for _ in schemas.read_jsonl(path))
    if not count:
      raise ConfigError(f"--records: {options.out} has no accepted rows")
    directory = os.path.join(options.out, "records")
    # Takes the place of earlier ones when it is whole.
    with tempfile.TemporaryDirectory(prefix="records-", dir=options.out) as folder:
      fresh = os.path.join(folder, "records")
      built = records.build(
        kind, [path for path in paths if os.path.getsize(path)], fresh, min(32, count)
      )
      shutil.rmtree(directory, ignore_errors=True)
      os.replace(fresh, directory)
    report["records"] = dataclasses.asdict(
      dataclasses.replace(built, directory=built.directory.replace(fresh, directory))
    )
  return report


async def _produce(options: argparse.Namespace) -> Any:
  from clara_jax.config import ConfigError
  from clara_jax.documents import pieces as documents
  from clara_jax.synthesis import client, factory, rounds, templates

  if not options.endpoint or options.endpoint != "offline" and not options.model:
    raise ConfigError("--endpoint and --model: name both")
  for name in ("max_requests", "max_tokens"):
    if getattr(options, name) and options.endpoint in _HERE:
      raise ConfigError(
        f"--{name.replace('_', '-')}: budgets are for servers, not for --endpoint "
        f"{options.endpoint}"
      )
  if options.ray_workers and not options.ray:
    raise ConfigError("--ray-workers: is for --ray")
  if options.ray and options.endpoint not in _HERE:
    raise ConfigError("--ray: is for --endpoint checkpoint; requests to a server need no workers")
  if not all(0 <= price < float("inf") for price in options.price):
    raise ConfigError(
      f"--price {options.price[0]} {options.price[1]}: expected numbers of 0 or more"
    )
  if options.tokens < 16:
    raise ConfigError(f"--tokens {options.tokens}: expected 16 or more")
  texts = templates.Templates(options.prompts)
  if options.questions:
    rows = _questions(options.questions)[: options.limit]
    items, work = ((r.identifier, r) for r in rows), rounds.teacher
  else:
    count = documents.token_counter(options.tokenizer) if options.tokenizer else documents.words
    pieces = documents.Reading(
      options.documents, options.tokens, count, options.limit, options.max_malformed
    )
    items, work = ((p.id, p) for p in pieces), functools.partial(rounds.scp, rounds=options.rounds)
  settings = {
    "directory": options.out,
    "shard": factory.Shard(options.shard, options.shards),
    "sampling": factory.Sampling(options.temperature, options.max_reply_tokens),
    "at_once": options.in_flight + options.in_flight // 4,
    "price": tuple(options.price),
    "share": None if options.questions else lambda: pieces.share,
    "retry_rejected": options.retry_rejected,
    "record": {
      "model": options.model,
      "endpoint": options.endpoint,
      "kind": "instruct" if options.questions else "scp",
      "tokens": options.tokens,
      "tokens_by": documents.tokenizer_hash(options.tokenizer) if options.tokenizer else "words",
      "rounds": options.rounds,
      **({} if options.questions else {"pieces": documents.VERSION}),
    },
  }
  if options.ray:
    from clara_jax.synthesis.handed_out import HandedOut
    from clara_jax.workers import Pool

    with Pool(options.ray, make_replier, {"options": options}, options.ray_workers) as pool:
      return await factory.produce(items, work, HandedOut(pool), texts, **settings)
  if options.endpoint in _HERE:
    return await factory.produce(items, work, _backend_here(options), texts, **settings)
  key = os.environ.get("OPENAI_API_KEY", "").strip()
  endpoint = client.Endpoint(
    options.endpoint,
    options.model,
    key,
    options.in_flight,
    options.timeout,
    max_requests=options.max_requests,
    max_tokens=options.max_tokens,
    json_schema=not options.no_json_schema,
    seed=not options.no_seed,
  )
  async with client.Client(endpoint) as backend:
    return await factory.produce(items, work, backend, texts, **settings)


_HERE = ("offline", "checkpoint")  # endpoints that are no server


def _backend_here(options: argparse.Namespace) -> Any:
  if options.endpoint == "offline":
    from clara_jax.experiments.offline_backend import Offline
    from clara_jax.experiments.quickstart.recipe import Sizes
    from clara_jax.experiments.world import World

    return Offline(World(Sizes().world))
  from clara_jax.compilation import enable_compilation_cache
  from clara_jax.synthesis.own import OwnModel

  enable_compilation_cache()
  return OwnModel(inputs.load(options.model, None, options))


def make_replier(options: argparse.Namespace) -> Any:
  """What a worker makes, once, of the command's options."""
  from clara_jax.synthesis.handed_out import Replier

  return Replier(_backend_here(options))


def _questions(path: str) -> list[Row]:
  """Rows with names of their own that do not depend on where the file lies."""
  from clara_jax.data import schemas
  from clara_jax.evaluation import datasets

  rows = [
    dataclasses.replace(
      row, identifier=f"{os.path.basename(path)}{row.identifier.removeprefix(path)}"
    )
    if row.identifier.startswith(f"{path}:")
    else row
    for row in datasets.read(path)
  ]
  seen: set[str] = set()
  for row in rows:
    if row.identifier in seen:
      raise schemas.DataError(f"{path}: id {row.identifier!r} is a duplicate")
    if not row.documents:
      raise schemas.DataError(
        f"{path}: question {row.identifier!r} has no documents; clara candidates finds some"
      )
    seen.add(row.identifier)
  return rows
