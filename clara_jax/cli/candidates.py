"""`clara candidates`: a first-stage retriever."""

import argparse
import os
from typing import Any

from clara_jax.cli import arguments, inputs

HELP = "A first-stage retriever finds documents for questions."
OUTPUTS = {"out": "file"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  parser.add_argument(
    "--questions", required=True, metavar="F", help="what evaluate reads, with or without documents"
  )
  parser.add_argument(
    "--corpus",
    metavar="F",
    help="JSONL: id, text, title; default: the questions' own documents, all together",
  )
  parser.add_argument("--out", required=True, metavar="F", help="JSONL rows")
  parser.add_argument(
    "--count", type=arguments.positive, default=20, help="documents a question; default 20"
  )
  parser.add_argument(
    "--setting",
    choices=("normal", "oracle"),
    default="normal",
    help="oracle: the gold documents are always among them",
  )
  parser.add_argument(
    "--retriever",
    default="bm25",
    metavar="NAME",
    help="bm25 (default); a sentence-transformers model (extra dense): its directory, or an id in "
    "the hub's cache; "
    "MODULE:FUNCTION: an encoder of your own",
  )
  parser.add_argument("--seed", type=int, default=0, help="of the order of oracle rows")
  arguments.max_malformed(parser, "rows, and documents of the corpus,")


def run(options: argparse.Namespace) -> Any:
  """Returns `evaluation.candidates.CandidatesReport`."""
  from clara_jax import io
  from clara_jax.config import ConfigError
  from clara_jax.data import schemas
  from clara_jax.evaluation import candidates, datasets

  if os.path.abspath(options.out) == os.path.abspath(options.questions):
    raise ConfigError(f"--out {options.out}: is the file of the questions")
  inputs.check_output_file("--out", options.out)
  malformed = schemas.Malformed(options.max_malformed)
  rows = datasets.read(options.questions, malformed)
  corpus = (
    list(schemas.read_documents(options.corpus, malformed))
    if options.corpus
    else candidates.own_corpus(rows)
  )
  written = candidates.make(
    rows, corpus, options.count, options.setting, options.retriever, options.seed
  )
  os.makedirs(os.path.dirname(os.path.abspath(options.out)), exist_ok=True)
  report = None
  with io.rewriting(options.out, compress=options.out.endswith(".gz")) as file:
    for row in written:
      if isinstance(row, dict):
        file.write(io.json_line(row))
      else:
        report = row
  return report
