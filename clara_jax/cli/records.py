"""`clara records`: JSONL rows as ArrayRecord files."""

import argparse
from typing import Any

from clara_jax.cli import arguments

HELP = "JSONL rows as ArrayRecord files, which runs on many hosts read at random."
OUTPUTS = {"out": "folder"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  parser.add_argument(
    "--kind",
    choices=("scp", "instruct", "joint"),
    required=True,
    help="joint: for contrastive, too",
  )
  parser.add_argument("--rows", nargs="+", required=True, metavar="F", help="JSONL (.gz)")
  parser.add_argument(
    "--out", required=True, metavar="DIR", help="the dataset goes to DIR/KIND/VERSION"
  )
  parser.add_argument(
    "--files",
    type=arguments.positive,
    default=32,
    help="default 32; as many as data.shards of the runs, or more",
  )
  arguments.max_malformed(parser, "rows")


def run(options: argparse.Namespace) -> Any:
  """Returns `data.records.RecordsReport`."""
  from clara_jax.data import records

  return records.build(
    options.kind, options.rows, options.out, options.files, options.max_malformed
  )
