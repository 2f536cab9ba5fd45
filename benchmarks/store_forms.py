"""Bytes a document against recall and answers: the quickstart's corpus in every form of the store,
and searched in fewer dimensions.

    clara quickstart --workdir quickstart && python benchmarks/store_forms.py --workdir quickstart --scratch DIR

Questions about people never seen in training; the whole corpus of unseen documents is searched, K =
3 are read. Prints one JSON object.
"""  # noqa: E501

import argparse
import json
import os
import shutil

import numpy as np

from clara_jax.checkpoints import formats
from clara_jax.data import schemas
from clara_jax.evaluation.metrics import answer_scores
from clara_jax.experiments.quickstart.recipe import Sizes
from clara_jax.experiments.world import World
from clara_jax.inference.answer import Answerer, Question
from clara_jax.inference.compress import compress_corpus
from clara_jax.memory.quantize import quantize
from clara_jax.memory.store import MemoryStore
from clara_jax.retrieval import index as index_lib

FORMS = (("float32", None), ("bfloat16", None), ("int8", None), ("pq", 2), ("pq", 4), ("pq", 8))
DIMENSIONS = (192, 96, 48, 24)


def score(answerer: Answerer, rows: list[schemas.Row]) -> dict[str, float]:
  """Recall over the whole store, and exact match of the answers."""
  rankings, right = [], []
  for start in range(0, len(rows), 64):
    batch = rows[start : start + 64]
    texts = answerer.answer([r.questions[0] for r in batch])
    # Recall@5 needs more documents than the generator reads.
    listed = answerer.search([Question(r.questions[0], 5) for r in batch])
    rankings += [[d.id for d in documents] for documents in listed]
    right += [answer_scores(a.answer, r.answers)["em"] for a, r in zip(texts, batch, strict=True)]
  gold = [r.document_ids[r.gold[0]] for r in rows]
  return {
    "recall_at_1": float(np.mean([f[0] == g for f, g in zip(rankings, gold, strict=True)])),
    "recall_at_5": float(np.mean([g in f for f, g in zip(rankings, gold, strict=True)])),
    "answer_em": float(np.mean(right)),
  }


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", required=True, help="of clara quickstart")
  parser.add_argument("--scratch", required=True, metavar="DIR")
  parser.add_argument("--questions", type=int, default=1_000)
  options = parser.parse_args()
  scratch = os.path.join(options.scratch, "forms")
  shutil.rmtree(scratch, ignore_errors=True)
  world = World(Sizes().world)
  checkpoint = formats.load(os.path.join(options.workdir, "stages", "joint"))
  corpus = [schemas.Document(**d) for d in world.documents(True)]
  rows = [
    schemas.parse_row(r, f"row:{i}")
    for i, r in enumerate(world.question_rows(1, True, options.questions))
  ]
  whole = os.path.join(scratch, "float32")
  compress_corpus(checkpoint, corpus, whole, encoding="float32", progress=False)
  store = MemoryStore(whole)
  report = {
    "documents": len(store),
    "questions": len(rows),
    "memory_tokens": store.manifest.num_memory_tokens,
    "width": store.manifest.width,
    "forms": [],
    "projections": [],
  }

  def measure(opened, dimensions=None):
    index = index_lib.build(opened, "exact", dimensions)
    return score(Answerer(checkpoint, opened, index=index, max_new_tokens=4), rows)

  for form, sub_width in FORMS:
    opened = store
    if form != "float32":
      opened = quantize(
        store, os.path.join(scratch, f"{form}{sub_width or ''}"), form, sub_width or 0
      )
    report["forms"].append(
      {
        "form": form,
        "sub_width": sub_width,
        "bytes": opened.codec.nbytes,
        "bytes_on_disk": round(opened.nbytes() / len(opened), 1),
        **measure(opened),
      }
    )
  for dimensions in DIMENSIONS:
    report["projections"].append({"dimensions": dimensions, **measure(store, dimensions)})
  print(json.dumps(report, indent=2))


if __name__ == "__main__":
  main()
