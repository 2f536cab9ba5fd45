"""`clara serve`: answers over HTTP."""

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

from clara_jax.cli import arguments, inputs

HELP = "Answers over HTTP, with a page to ask on."


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  arguments.answerer(parser)
  arguments.several_processes(parser)
  parser.add_argument("--host", default="127.0.0.1", help="default: this machine only")
  parser.add_argument("--port", type=int, default=5004, help="default 5004")
  parser.add_argument(
    "--allowed-host",
    action="append",
    default=[],
    metavar="NAME",
    help="a name under which the server may be asked, besides addresses, localhost and this "
    "machine's; .example.com: all "
    "below it; *: any; any number of times",
  )
  parser.add_argument(
    "--token-file",
    metavar="F",
    help="requests must bring the token in this file, as Authorization: Bearer",
  )
  parser.add_argument(
    "--max-batch", type=arguments.positive, default=32, help="questions in a batch; default 32"
  )
  parser.add_argument(
    "--max-wait-ms",
    type=float,
    default=4.0,
    help="how long the first question of a pass waits for others; default 4",
  )
  parser.add_argument(
    "--max-waiting",
    type=arguments.positive,
    default=512,
    help="requests that may wait, more are refused (429); default 512",
  )
  parser.add_argument(
    "--name", default="clara", help="of the model, for /v1 and `model`; default clara"
  )
  parser.add_argument(
    "--model",
    nargs=3,
    action="append",
    default=[],
    metavar=("NAME", "CKPT", "STORE"),
    help="one more model, which requests choose by its name; CKPT may be the same; any number of "
    "times",
  )
  parser.add_argument(
    "--follow",
    type=float,
    default=2.0,
    metavar="SECONDS",
    help="between two looks whether a store has changed; 0: never; default 2",
  )
  parser.add_argument(
    "--allow-upload",
    action="store_true",
    help="whoever may ask may also add documents to the store, on the page and by POST /documents",
  )
  parser.add_argument(
    "--examples", metavar="F", help="questions that the page offers, one a line; 6 at most"
  )
  parser.add_argument(
    "--doubt-below",
    type=float,
    default=0.0,
    metavar="SCORE",
    help="of the best document, below which the page says that an answer may be a guess",
  )
  parser.add_argument(
    "--allowed-origin",
    action="append",
    default=[],
    metavar="ORIGIN",
    help="pages of this origin (https://example.com) may ask from a browser (CORS); any number of "
    "times",
  )
  parser.add_argument(
    "--timeout", type=float, default=60.0, help="seconds that a request may take; default 60"
  )


def run(options: argparse.Namespace) -> None:
  """Returns nothing: it serves until it is stopped. Of several processes the first one serves, and
  all compute."""
  from clara_jax import distributed
  from clara_jax.config import ConfigError
  from clara_jax.serving import guard, together

  access = guard.Access(
    tuple(options.allowed_host),
    guard.read_token(options.token_file) if options.token_file else None,
    guard.check_origins(options.allowed_origin),
  )
  options.examples = _examples(options.examples) if options.examples else []
  names = [options.name, *(name for name, _, _ in options.model)]
  if len(set(names)) < len(names) or not all(names):
    raise ConfigError(f"--name, --model: {names}: expected a name of its own for each")
  if not (options.distributed or options.coordinator):
    _serve(lambda tell: _answerers(options, tell), options, access)
    return
  if options.model:
    raise ConfigError("--model: several processes serve one model")
  answerer = inputs.answerer(options)
  if not distributed.is_main():
    together.follow(answerer)
    return
  leader = together.Leader(answerer)
  with contextlib.closing(leader):
    _serve(lambda tell: {options.name: leader}, options, access)


def _answerers(options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
  """The models by name; those of one checkpoint share its weights."""
  from clara_jax.inference.answer import Answerer
  from clara_jax.memory.store import MemoryStore

  checkpoints: dict[str, Any] = {}
  answerers = {}
  main = (options.name, options.checkpoint, options.store)
  for name, directory, folder in (main, *options.model):
    tell(f"opening {folder}")
    store = MemoryStore(folder, memory_tokens=options.memory_tokens)
    if directory not in checkpoints:
      tell(f"reading {directory}")
      options.checkpoint = directory
      loaded = inputs.checkpoint(options, "compressor", "query_reasoner", "generator")
      checkpoints[directory] = loaded.first(None)
    tell(f"opening the index of {folder}")
    answerers[name] = Answerer(
      checkpoints[directory],
      store,
      top_k=options.top_k,
      max_new_tokens=options.max_new_tokens,
      expand=options.expand,
      merge=options.merge,
    )
  return answerers


def _examples(path: str) -> list[str]:
  from clara_jax.data import schemas

  with schemas.open_text(path) as file:
    return [line.strip() for line in file if line.strip()][:6]


def _serve(make: Any, options: argparse.Namespace, access: Any) -> None:
  from clara_jax.serving import server

  server.run(
    make,
    options.host,
    options.port,
    server.Limits(
      batch=options.max_batch,
      wait_ms=options.max_wait_ms,
      waiting=options.max_waiting,
      seconds=options.timeout,
      doubt_below=options.doubt_below,
      upload=options.allow_upload,
    ),
    access,
    options.follow,
    options.examples,
  )
