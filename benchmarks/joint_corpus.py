"""The joint stage over a whole store: does recall over all documents rise without labels when
training retrieves from all of them?

    clara quickstart --workdir quickstart
    JAX_NUM_CPU_DEVICES=8 python benchmarks/joint_corpus.py --workdir quickstart --scratch DIR

2,000 documents, divided over all devices; each step retrieves the 20 nearest of all and reads the
best 3. No label is used but for the recall that is reported. Prints one JSON object.
"""

import argparse
import dataclasses
import json
import os
import shutil
import time

import jax

from clara_jax.checkpoints import formats
from clara_jax.cli.output import configure_logging
from clara_jax.config import DataConfig, RunConfig, TrainConfig
from clara_jax.data import schemas
from clara_jax.experiments.quickstart.recipe import CANDIDATES, Sizes
from clara_jax.experiments.world import World
from clara_jax.inference.compress import compress_corpus
from clara_jax.memory.store import MemoryStore
from clara_jax.training import trainer


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", required=True, help="of clara quickstart")
  parser.add_argument("--scratch", required=True, metavar="DIR")
  parser.add_argument("--documents", type=int, default=2_000)
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  configure_logging()
  corpus_store = os.path.join(options.scratch, "corpus")
  shutil.rmtree(corpus_store, ignore_errors=True)
  world = World(Sizes().world)
  checkpoint = formats.load(os.path.join(options.workdir, "stages", "instruct"))
  corpus = [schemas.Document(**d) for d in world.documents(False)[: options.documents]]
  compress_corpus(checkpoint, corpus, corpus_store, progress=False)
  store = MemoryStore(corpus_store)
  rows = [schemas.parse_row(r, f"joint:{i}") for i, r in enumerate(world.question_rows(1))]
  rows = [r for r in rows if r.document_ids[r.gold[0]] in store]
  # Their questions are not trained on; their documents are in the store as all are.
  held_out = rows[::10][:320]
  rows = [r for r in rows if r not in held_out]
  data = DataConfig(
    batch_size=32,
    eval_batch_size=64,
    candidates=CANDIDATES,
    bucket=32,
    store=corpus_store,
    retrieve="store",
  )
  train = TrainConfig(
    stage="joint",
    steps=options.steps,
    learning_rate=2e-3,
    learning_rate_factors={"generator": 0.1},
    eval_every=50,
    log_every=50,
    seed=options.seed,
    fresh_query_reasoner=True,
  )
  start = time.monotonic()
  config = RunConfig(dataclasses.replace(checkpoint.model.config), data, train)
  result = trainer.Trainer(
    config, checkpoint.prompt_tokenizer, checkpoint.weights, rows, held_out, memories=store.lookup()
  ).run()
  curve = [
    {
      "step": step,
      **{k: round(v, 4) for k, v in numbers.items() if k.startswith(("recall", "answers"))},
    }
    for step, numbers in result.evaluations
  ]
  print(
    json.dumps(
      {
        "documents": len(store),
        "devices": jax.device_count(),
        "questions": len(rows),
        "held_out": len(held_out),
        "recall_at_1": [curve[0]["recall_at_1"], curve[-1]["recall_at_1"]],
        "seconds": time.monotonic() - start,
        "curve": curve,
      },
      indent=2,
    )
  )


if __name__ == "__main__":
  main()
