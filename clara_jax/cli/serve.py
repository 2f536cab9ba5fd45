"""`clara serve`: answers over HTTP."""

import argparse
import contextlib
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
    "--timeout", type=float, default=60.0, help="seconds that a request may take; default 60"
  )


def run(options: argparse.Namespace) -> None:
  """Returns nothing: it serves until it is stopped. Of several processes the first one serves, and
  all compute."""
  from clara_jax import distributed
  from clara_jax.serving import guard, together

  access = guard.Access(
    tuple(options.allowed_host),
    guard.read_token(options.token_file) if options.token_file else None,
  )
  answerer = inputs.answerer(options)
  if not distributed.is_main():
    together.follow(answerer)
    return
  with contextlib.ExitStack() as stack:
    if distributed.several():
      answerer = together.Leader(answerer)
      stack.callback(answerer.close)
    _serve(answerer, options, access)


def _serve(answerer: Any, options: argparse.Namespace, access: Any) -> None:
  from clara_jax.serving import server

  server.run(
    answerer,
    options.host,
    options.port,
    server.Limits(
      batch=options.max_batch,
      wait_ms=options.max_wait_ms,
      waiting=options.max_waiting,
      seconds=options.timeout,
    ),
    access,
  )
