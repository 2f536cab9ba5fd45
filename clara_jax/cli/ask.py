"""`clara ask`: retrieves documents and answers questions."""

import argparse
import dataclasses
from typing import Any

from clara_jax.cli import arguments, inputs

HELP = "Retrieves documents and answers questions from their memory tokens."


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  arguments.answerer(parser)
  arguments.several_processes(parser)
  parser.add_argument("questions", nargs="+", metavar="QUESTION")


def run(options: argparse.Namespace) -> dict[str, Any] | None:
  """Returns `answers`, each an `inference.answer.Answer`."""
  from clara_jax.config import ConfigError

  if any(not q.strip() for q in options.questions):
    raise ConfigError("QUESTION: a question is empty")
  answers = inputs.answerer(options).answer(options.questions)
  return inputs.main_only({"answers": [dataclasses.asdict(answer) for answer in answers]})


def show(report: dict[str, Any]) -> None:
  """Answers with their documents."""
  for answer in report["answers"]:
    print(f"\n{answer['question']}\n  {answer['answer']}")
    for document in answer["documents"]:
      cut = document["whole_tokens"] > document["tokens"]
      more = [document["place"]] if document["place"] else []
      if cut:
        more += [f"cut: {document['tokens']} of {document['whole_tokens']} tokens were read"]
      told = f"  ({'; '.join(more)})" if more else ""
      print(f"    {document['score']:.4f}  {document['id']}  {document['title']}{told}")
