"""`clara paraphrase`: documents written again from their memory tokens."""

import argparse
import itertools
from typing import Any

from clara_jax.cli import arguments, inputs

HELP = (
  "Documents written again from their memory tokens: what these keep (ROUGE, entities, BERTScore)."
)
OUTPUTS = {"predictions": "file"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  arguments.checkpoint(parser)
  arguments.memory_tokens(parser)
  parser.add_argument("--documents", required=True, metavar="F", help="JSONL (.gz): id, text")
  parser.add_argument("--limit", type=arguments.positive, help="only the first documents")
  arguments.max_malformed(parser, "documents")
  parser.add_argument(
    "--batch-size", type=arguments.positive, default=16, help="documents in a batch; default 16"
  )
  parser.add_argument(
    "--max-new-tokens",
    type=arguments.positive,
    default=256,
    help="of the longest paraphrase; default 256",
  )
  parser.add_argument(
    "--bertscore",
    metavar="MODEL[:LAYER]",
    help="also BERTScore with this Hugging Face model (extra bertscore)",
  )
  parser.add_argument("--predictions", metavar="F", help="writes one JSON a document")


def run(options: argparse.Namespace) -> dict[str, Any]:
  """Returns the scores."""
  from clara_jax.data import schemas
  from clara_jax.evaluation import fidelity

  inputs.check_output_file("--predictions", options.predictions)
  checkpoint = inputs.checkpoint(options, "compressor", "generator")
  documents = list(
    itertools.islice(
      schemas.read_documents(options.documents, schemas.Malformed(options.max_malformed)),
      options.limit,
    )
  )
  result = fidelity.paraphrase(
    checkpoint,
    documents,
    batch_size=options.batch_size,
    max_new_tokens=options.max_new_tokens,
    bert_model=options.bertscore,
  )
  if options.predictions:
    schemas.write_rows(result.predictions, options.predictions)
  return result.scores
