"""`clara loss`: a stage's loss on rows."""

import argparse
from typing import Any

from clara_jax.cli import arguments, inputs

HELP = "A stage's loss on rows, without update or dropout."


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  arguments.checkpoint(parser)
  arguments.memory_tokens(parser)
  parser.add_argument(
    "--stage",
    required=True,
    metavar="STAGE",
    help="scp, instruct, joint, contrastive, or FILE.py:STAGE",
  )
  parser.add_argument("--rows", required=True, metavar="F")
  parser.add_argument("--batch-size", type=arguments.positive, default=16)


def run(options: argparse.Namespace) -> dict[str, Any]:
  """Returns loss, mse, total and, where the stage selects documents, `rows`."""
  from clara_jax.data import schemas
  from clara_jax.evaluation import evaluator
  from clara_jax.training import stages

  checkpoint = inputs.checkpoint(options, *stages.get(options.stage).roles)
  return evaluator.stage_loss(
    checkpoint, options.stage, schemas.read_rows([options.rows]), options.batch_size
  )
