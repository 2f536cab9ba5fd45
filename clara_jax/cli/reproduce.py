"""`clara reproduce`: the paper's claims as experiments."""

import argparse
from typing import Any

from clara_jax.cli import arguments

HELP = "The paper's claims as experiments on a generated world; resumes where it was stopped."
OUTPUTS = {"workdir": "local"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  parser.add_argument("--workdir", default="reproduction", metavar="DIR")
  parser.add_argument(
    "--claims",
    nargs="+",
    metavar="LETTER",
    help="a SCP beats reconstruction and none; b all kinds of data beat each; c the MSE term; d "
    "joint beats generator "
    "only; e against labels; f a copied query reasoner; g ratios; h more or fewer documents; "
    "default: all",
  )
  parser.add_argument("--seeds", type=arguments.positive, default=3, help="default 3")
  parser.add_argument(
    "--scale",
    type=float,
    default=1.0,
    help="factor on steps and test rows; default 1: an hour on two cores",
  )


def run(options: argparse.Namespace) -> dict[str, Any]:
  """Returns `claims` with their verdicts."""
  from clara_jax.experiments import claims

  return claims.run(
    options.workdir, options.claims or tuple(claims.CLAIMS), options.seeds, options.scale
  )


def show(report: dict[str, Any]) -> None:
  """One line a claim."""
  for letter, claim in report["claims"].items():
    print(f"({letter}) {claim['says']}: {claim['verdict']}")
