"""`clara gradients`: gradient estimators side by side."""

import argparse
import itertools
from typing import Any

from clara_jax.cli import arguments, inputs

HELP = (
  "Gradient estimators: against the exact gradient, or in training, side by side; one page of all."
)
OUTPUTS = {"out": "folder", "workdir": "local"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  parser.add_argument("--out", required=True, metavar="DIR", help="results and DIR/gradients.html")
  parser.add_argument(
    "--estimators",
    nargs="+",
    metavar="E",
    help="NAME, NAME(argument=value, …) or FILE.py:FUNCTION; with "
    "temperature=…, final_temperature=… (annealed) or learned=True, too; default: all",
  )
  parser.add_argument(
    "--draws", type=arguments.positive, help="of an estimate; default 1000, with --checkpoint 32"
  )
  parser.add_argument(
    "--vary",
    nargs="*",
    metavar="WHAT",
    choices=("temperature", "spread", "k", "n", "correlation", "loss"),
    help="one at a time, of temperature, spread (of the scores), k, n, correlation (of memories), "
    "loss; "
    "default: all; with nothing behind it, none",
  )
  parser.add_argument(
    "--checkpoint",
    metavar="CKPT",
    help="the loss of its generator, on --rows, in place of synthetic losses",
  )
  parser.add_argument(
    "--base", metavar="DIR", help="the checkpoint's base, where its own record does not lead to it"
  )
  arguments.reading(parser, "of the computations")
  arguments.mesh(parser)
  parser.add_argument(
    "--rows", metavar="F", help="questions with candidates (the joint stage's rows)"
  )
  parser.add_argument("--limit", type=arguments.positive, default=16, help="rows of it; default 16")
  parser.add_argument(
    "--candidates",
    type=arguments.positive,
    default=6,
    help="N, the gold documents and others of each; default 6",
  )
  parser.add_argument(
    "--train",
    action="store_true",
    help="trains the joint stage on the generated world with each of them",
  )
  parser.add_argument("--seeds", type=arguments.positive, default=5, help="of --train; default 5")
  parser.add_argument(
    "--scale", type=float, default=1.0, help="factor on steps and test rows of --train; default 1"
  )
  parser.add_argument(
    "--workdir",
    metavar="DIR",
    help="of the trainings, also one of `clara reproduce`; default: OUT/trainings",
  )


def run(options: argparse.Namespace) -> dict[str, Any]:
  """Returns the files that were written."""
  from clara_jax.config import ConfigError
  from clara_jax.data import schemas
  from clara_jax.experiments.laboratory import laboratory
  from clara_jax.experiments.laboratory.audit import VARIED
  from clara_jax.experiments.laboratory.variants import AUDITED, TRAINED

  if (options.checkpoint is None) != (options.rows is None):
    raise ConfigError("--checkpoint and --rows: name both, or neither")
  if options.checkpoint and options.train:
    raise ConfigError(
      "--checkpoint and --train: name one of them; each adds its part to the page of --out"
    )
  names = options.estimators
  if options.draws is not None and options.draws < 2:
    raise ConfigError(f"--draws {options.draws}: expected 2 or more, for a variance")
  if options.train:
    return laboratory.run_compare(
      options.out, options.workdir, names or TRAINED, options.seeds, options.scale
    )
  if options.checkpoint:
    checkpoint = inputs.checkpoint(options, "compressor", "generator")
    rows = list(
      itertools.islice(
        (r for r in schemas.read_rows([options.rows]) if r.data_type == "qa"), options.limit
      )
    )
    return laboratory.run_generator(
      options.out,
      checkpoint,
      rows,
      names or AUDITED,
      options.candidates,
      options.draws or 32,
      source={"checkpoint": options.checkpoint, "file": options.rows},
    )
  return laboratory.run_audit(
    options.out,
    names or AUDITED,
    options.draws or 1000,
    VARIED if options.vary is None else options.vary,
  )
