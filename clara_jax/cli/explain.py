"""`clara explain`: why answers came out."""

import argparse
import dataclasses
from typing import Any

from clara_jax.cli import arguments, inputs

HELP = "Why answers came out: lens words, attention, what each document did for the answer."
OUTPUTS = {"report": "file"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  arguments.checkpoint(parser)
  arguments.memory_tokens(parser)
  arguments.rows(parser)
  parser.add_argument(
    "--top",
    type=arguments.positive,
    default=50,
    help="words of the lens for each memory token; default 50",
  )
  parser.add_argument("--report", metavar="F.html", help="writes a page")


def run(options: argparse.Namespace) -> dict[str, Any]:
  """Returns `rows`, each an `evaluation.explain.Explanation`."""
  from clara_jax.evaluation import plots
  from clara_jax.evaluation.explain import Explainer
  from clara_jax.reports import html

  inputs.check_output_file("--report", options.report)
  checkpoint = inputs.checkpoint(options, "compressor", "query_reasoner", "generator")
  explainer = Explainer(checkpoint, options.max_new_tokens, options.top)
  explanations = [explainer.explain(row) for row in inputs.rows(options, checkpoint, "joint")]
  if options.report:
    html.write(
      options.report,
      html.page(
        f"{options.checkpoint} on {options.rows}",
        f"{len(explanations)} questions, explained.",
        [("Questions", plots.LENS_LEGEND + html.joined(map(plots.explained, explanations)))],
      ),
    )
  return {"rows": [dataclasses.asdict(e) for e in explanations]}


def show(report: dict[str, Any]) -> None:
  """Answers with what each document did for them."""
  for row in report["rows"]:
    print(f"\n{row['question']}\n  {row['prediction']}  (wanted: {' | '.join(row['answers'])})")
    print("  memory tokens say: " + ", ".join(w["word"] for w in row["lens"][:15]))
    for document in row["documents"]:
      print(
        f"    {'gold ' if document['is_gold'] else '     '}attention {document['attention']:.0%}  "
        f"gain {document['gain']:+.2f} nats  "
        f"{' '.join(document['text'].split())[:90]}"
      )
