"""Recall of published retrievers among the candidates of test rows: what the joint stage is held
against.

    python examples/smollm2/retrievers.py --rows rows/squad.jsonl --model all-MiniLM-L6-v2

Prints one JSON object: recall@1 and recall@5 of BM25 (over each row's candidates) and of a
sentence-transformers model, with intervals, over rows that have gold documents.
"""

import argparse
import dataclasses
import json

import numpy as np

from clara_jax.data import schemas
from clara_jax.evaluation import sentence_encoder, statistics
from clara_jax.evaluation.candidates import Bm25
from clara_jax.retrieval.base import unit_vectors


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rows", required=True, metavar="F")
  parser.add_argument(
    "--model",
    metavar="NAME",
    help="a sentence-transformers model: its directory, or an id in the hub's cache",
  )
  options = parser.parse_args()
  rows = [row for row in schemas.read_rows([options.rows]) if row.gold]
  recalls = {
    "bm25": recall(rows, [Bm25(r.documents).search(r.questions, len(r.documents))[0] for r in rows])
  }
  if options.model:
    encode = sentence_encoder.load(options.model)
    texts = list(dict.fromkeys(d for row in rows for d in row.documents))
    place = {text: i for i, text in enumerate(texts)}
    documents, questions = (
      unit_vectors(encode(texts, "document")),
      unit_vectors(encode([r.questions[0] for r in rows], "question")),
    )
    order = [
      np.argsort(-documents[[place[d] for d in r.documents]] @ q, kind="stable")
      for r, q in zip(rows, questions, strict=True)
    ]
    recalls["dense"] = recall(rows, order)
  print(json.dumps({"rows": len(rows), **recalls}, indent=2))


def recall(rows: list[schemas.Row], ranked: list[np.ndarray]) -> dict[str, dict]:
  """Mean share of a row's gold documents among the first ones."""
  return {
    f"recall_at_{k}": dataclasses.asdict(
      statistics.mean(
        [
          len(set(order[:k].tolist()) & set(r.gold)) / len(r.gold)
          for r, order in zip(rows, ranked, strict=True)
        ]
      )
    )
    for k in (1, 5)
  }


if __name__ == "__main__":
  main()
