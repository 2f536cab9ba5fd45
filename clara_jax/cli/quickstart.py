"""`clara quickstart`: the whole system on a generated corpus."""

import argparse
from typing import Any

HELP = "The whole system on a generated corpus: train, compress, index, answer."
OUTPUTS = {"workdir": "local"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  parser.add_argument("--workdir", default="quickstart", metavar="DIR")
  parser.add_argument(
    "--from-scratch",
    action="store_true",
    help="train everything here, instead of from the shipped result",
  )
  parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> dict[str, Any]:
  """Returns the quickstart's report."""
  from clara_jax.experiments import quickstart

  return quickstart.run(options.workdir, from_scratch=options.from_scratch, seed=options.seed)


def show(report: dict[str, Any]) -> None:
  """Nothing: the run has logged everything already."""
