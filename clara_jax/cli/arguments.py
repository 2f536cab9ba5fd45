"""Options that several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from clara_jax.config import MeshConfig


def positive(text: str) -> int:
  """A number of 1 or more."""
  if (value := int(text)) < 1:
    raise argparse.ArgumentTypeError(f"{value}: expected 1 or more")
  return value


def reading(parser: argparse.ArgumentParser, dtype: str) -> None:
  """How a base or checkpoint is read."""
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=dtype)
  parser.add_argument(
    "--chat-template",
    metavar="FILE",
    help="a Jinja template that takes the place of the tokenizer's",
  )
  parser.add_argument(
    "--allow-config",
    action="append",
    default=[],
    metavar="FIELD",
    help="an unknown field of config.json or adapter_config.json that changes nothing; any number "
    "of times",
  )


def checkpoint(parser: argparse.ArgumentParser) -> None:
  """A checkpoint of any kind."""
  parser.add_argument(
    "--checkpoint",
    required=True,
    metavar="CKPT",
    help="of clara train or convert, of the released code, or of PEFT; a plain Hugging Face model "
    "where no role is needed",
  )
  parser.add_argument(
    "--base",
    metavar="DIR",
    help="the base model, where the checkpoint's own record does not lead to it",
  )
  reading(parser, "compute dtype; default: the checkpoint's")
  mesh(parser)


def mesh(parser: argparse.ArgumentParser) -> None:
  """Over which devices a checkpoint is divided."""
  parser.add_argument(
    "--mesh",
    type=mesh_sizes,
    metavar="SIZES",
    help="divides the weights over the devices: tensor=8 (one question is answered sooner), fsdp=8 "
    "or data=2,fsdp=4 (more at a time), or a preset of training: host, pod, slices; default: the "
    "first device, for compress data over all",
  )


def mesh_sizes(text: str) -> MeshConfig:
  """The value of --mesh: a preset, sizes, or both."""
  from clara_jax.config import ConfigError, MeshConfig, from_config_dict

  fields: dict[str, str | int] = {}
  for part in text.split(","):
    name, equals, size = part.strip().partition("=")
    if (name if equals else "preset") in fields:
      raise argparse.ArgumentTypeError(f"{part}: named twice")
    try:
      fields |= {name: int(size)} if equals else {"preset": name}
    except ValueError:
      raise argparse.ArgumentTypeError(f"{part}: expected a whole number of devices") from None
  try:
    return from_config_dict(MeshConfig, fields, "mesh")
  except ConfigError as error:
    raise argparse.ArgumentTypeError(str(error)) from None


def not_negative(text: str) -> int:
  """A number of 0 or more."""
  if (value := int(text)) < 0:
    raise argparse.ArgumentTypeError(f"{value}: expected 0 or more")
  return value


def expand(parser: argparse.ArgumentParser) -> None:
  """How many documents are read as text."""
  parser.add_argument(
    "--expand",
    type=not_negative,
    default=0,
    metavar="n",
    help="reads the n best documents as text beside the memory tokens of the others; the generator "
    "has to be trained to (data.expand); default 0",
  )


def memory_tokens(
  parser: argparse.ArgumentParser,
  text: str = "writes, scores and reads the first m memory tokens of a document",
) -> None:
  """How many memory tokens are used."""
  parser.add_argument("--memory-tokens", type=positive, metavar="m", help=f"{text}; default: all")


def max_malformed(parser: argparse.ArgumentParser, what: str) -> None:
  """How much bad input is skipped."""
  parser.add_argument(
    "--max-malformed",
    type=int,
    default=0,
    metavar="N",
    help=f"bad {what} that are skipped and reported; default 0",
  )


def several_processes(parser: argparse.ArgumentParser) -> None:
  """How this process finds the others (`inputs.join_processes`)."""
  parser.add_argument(
    "--distributed",
    action="store_true",
    help="one of several processes, found by JAX (Cloud TPU, GKE, SLURM)",
  )
  parser.add_argument(
    "--coordinator",
    metavar="HOST:PORT",
    help="by hand: where process 0 is (compress needs it with --mesh only)",
  )
  parser.add_argument("--processes", type=int, metavar="N", help="by hand: how many there are")
  parser.add_argument("--process", type=int, metavar="I", help="by hand: which one this is, from 0")


def ray(parser: argparse.ArgumentParser, what: str) -> None:
  """Workers that come and go (`workers.Pool`)."""
  parser.add_argument(
    "--ray",
    metavar="ADDRESS",
    help=f"{what} by workers of a Ray cluster: 'auto', HOST:PORT or ray://…; 'local' starts one "
    "here",
  )
  parser.add_argument(
    "--ray-workers",
    type=positive,
    metavar="N",
    help="how many; default: one for each accelerator of the cluster",
  )


def answerer(parser: argparse.ArgumentParser) -> None:
  """What answers questions over a store (`inputs.answerer`)."""
  checkpoint(parser)
  parser.add_argument("--store", required=True, metavar="DIR")
  memory_tokens(
    parser,
    "reads the first m memory tokens of each document (clara index says how many are searched with)",  # noqa: E501
  )
  parser.add_argument(
    "--top-k", type=positive, help="documents given to the generator; default: the checkpoint's"
  )
  expand(parser)
  parser.add_argument(
    "--merge",
    action="store_true",
    help="merge the generator into a copy of the base: faster, for a second base's memory",
  )
  parser.add_argument(
    "--max-new-tokens", type=positive, default=64, help="of the longest answer; default 64"
  )


def rows(parser: argparse.ArgumentParser) -> None:
  """Questions with documents, to be answered."""
  parser.add_argument(
    "--rows",
    required=True,
    metavar="F",
    help="questions with documents: JSONL, or the published files of SQuAD, HotpotQA, 2Wiki, "
    "MuSiQue, PubMedQA, NQ",
  )
  parser.add_argument("--limit", type=positive, help="only the first rows")
  max_malformed(parser, "rows")
  parser.add_argument(
    "--max-new-tokens", type=positive, default=64, help="of the longest answer; default 64"
  )
