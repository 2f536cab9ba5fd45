"""`clara convert`: any checkpoint to any format."""

import argparse
from typing import Any

from clara_jax.cli import arguments, inputs

HELP = "Any checkpoint to any format, tensor by tensor."


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  parser.add_argument(
    "source",
    metavar="SRC",
    help="a checkpoint of ours, of the released code, of PEFT, a Hugging Face model (a directory, "
    "or an id in the hub's "
    "cache), or a GGUF file",
  )
  parser.add_argument("destination", metavar="DST", help="a directory that is not there yet")
  parser.add_argument("--to", required=True, choices=("clara", "upstream", "peft", "hf"))
  parser.add_argument(
    "--role", help="for peft: only this role; for hf: the role that is merged into the model"
  )
  parser.add_argument(
    "--base", metavar="DIR", help="the source's base, where its own record does not lead to it"
  )
  arguments.reading(parser, "the base's weights are written in it; default: their own")
  parser.add_argument(
    "--verify",
    action="store_true",
    help="reload what was written and compare; writes DST/parity.json",
  )


def run(options: argparse.Namespace) -> Any:
  """Returns `checkpoints.convert.ConvertReport`."""
  from clara_jax.checkpoints import convert

  return convert.convert(
    options.source,
    options.destination,
    options.to,
    role=options.role,
    base=options.base,
    dtype=options.dtype,
    chat_template=inputs.chat_template(options),
    allow=options.allow_config,
    verify=options.verify,
  )
