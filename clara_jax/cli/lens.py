"""`clara lens`: the logit lens of questions."""

import argparse
from typing import Any

from clara_jax.cli import arguments, inputs

HELP = "The words that a question's memory tokens stand for (logit lens)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  arguments.checkpoint(parser)
  arguments.memory_tokens(parser)
  parser.add_argument(
    "--top", type=arguments.positive, default=20, help="words for each memory token, merged"
  )
  parser.add_argument("questions", nargs="+", metavar="QUESTION")


def run(options: argparse.Namespace) -> dict[str, Any]:
  """Returns `queries`: each a question with its words and their logits."""
  from clara_jax.evaluation import logit_lens

  checkpoint = inputs.checkpoint(options, "query_reasoner")
  return {"queries": logit_lens.queries(checkpoint, options.questions, options.top)}


def show(report: dict[str, Any]) -> None:
  """Words with their logits."""
  for query in report["queries"]:
    print(
      f"\n{query['question']}\n  "
      + "  ".join(f"{token} ({logit:.1f})" for token, logit in query["tokens"])
    )
