"""Inference on meshes of eight devices, for test_inference_mesh.py; reports as one JSON line.

    python -m tests.mesh_worker JOB [COORDINATOR PROCESSES PROCESS]

JOB is JSON: {"folder": with a checkpoint, documents and rows, "meshes": {name: sizes or null}}.
"""

import dataclasses
import json
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import numpy as np

import clara_jax
from clara_jax import distributed, sharding
from clara_jax.analysis import hlo
from clara_jax.batch import Tokens
from clara_jax.cli.arguments import mesh_sizes
from clara_jax.data import schemas
from clara_jax.evaluation import evaluator
from clara_jax.inference.compress import compress_corpus
from clara_jax.inference.generate import Greedy
from clara_jax.memory.store import MemoryStore
from clara_jax.retrieval import index


def run(folder: str, name: str, sizes: str | None, questions: list[str]) -> dict:
  """Documents, answers and scores on one mesh."""
  mesh = None if sizes is None else mesh_sizes(sizes)
  checkpoint = clara_jax.load(f"{folder}/joint", mesh=mesh)
  store = f"{folder}/store-{name}"
  documents = list(schemas.read_documents(f"{folder}/documents.jsonl"))
  compress_corpus(checkpoint, documents, store, bucket=64, batch_size=16, progress=False)
  memory_store = MemoryStore(store)
  answerer = clara_jax.Answerer(
    checkpoint, memory_store, index=index.build(memory_store, "exact"), max_new_tokens=6
  )
  rows = schemas.read_rows([f"{folder}/rows.jsonl"])
  evaluation = evaluator.evaluate(
    checkpoint, rows, "joint", batch_size=8, max_new_tokens=6, progress=False
  )
  batches = [answerer.answer(questions[:count]) for count in (1, len(questions))]
  return {
    "ids": [d.id for d in memory_store.documents()],
    "memories": memory_store.memories().astype(np.float32).tolist(),
    "answers": [[dataclasses.asdict(a) for a in answers] for answers in batches],
    "predictions": [
      {k: p[k] for k in ("prediction", "scores", "ranked")} for p in evaluation.predictions
    ],
    "shards": {
      jax.tree_util.keystr(path): [leaf.shape, leaf.addressable_shards[0].data.shape]
      for path, leaf in jax.tree_util.tree_leaves_with_path(checkpoint.weights)
    },
    "collectives": collectives(checkpoint) if mesh else {},
  }


def collectives(checkpoint: clara_jax.Checkpoint) -> dict[str, int]:
  """What the program of a batch of eight answers sends."""
  model = checkpoint.model
  config = model.config
  greedy = Greedy(model, 4, (2,), 0)
  prompt = Tokens(np.zeros((8, 64), np.int32), np.full(8, 64, np.int32))
  memories = np.zeros((8, config.top_k, config.num_memory_tokens, config.model.width), np.float32)
  with sharding.context(checkpoint.mesh):
    compiled = jax.jit(greedy.__call__).lower(checkpoint.weights, prompt, memories).compile()
  return hlo.analyze(compiled.as_text()).collectives


def main(job: dict, *who: str) -> None:
  """Runs the job."""
  if who:
    distributed.initialize(who[0], int(who[1]), int(who[2]))
  rows = schemas.read_rows([f"{job['folder']}/rows.jsonl"])
  questions = [row.questions[0] for row in rows[:3]]
  report = {n: run(job["folder"], n, m, questions) for n, m in job["meshes"].items()}
  print("REPORT" + json.dumps(report), flush=True)


if __name__ == "__main__":
  main(json.loads(sys.argv[1]), *sys.argv[2:])
