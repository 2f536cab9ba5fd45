"""Runs for tests that need more devices or more processes than the tests have; reports as one JSON
line.

    python -m clara_jax.testing.pod_worker JOB [COORDINATOR PROCESSES PROCESS]

JOB is JSON: {"stage": "scp", "rows": […], "data": {…}, "train": {…}, "runs": [{"mesh": {…},
"workdir": …, "stop_at": …, "log": …}]}.
"""

import collections
import contextlib
import dataclasses
import json
import os
import re
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import numpy as np

from clara_jax import distributed
from clara_jax.config import DataConfig, MeshConfig, RunConfig
from clara_jax.data import records
from clara_jax.testing import tiny
from clara_jax.training import trainer
from clara_jax.training.hooks import Hook
from clara_jax.training.program import Program


def run_config(job: dict, run: dict) -> RunConfig:
  """The configuration of one run of a job."""
  data = DataConfig(**{"rows": tuple(job["rows"]), **tiny.DATA, **job.get("data", {})})
  config = tiny.run_config(job["stage"], **{"log_every": 1, **job.get("train", {})})
  return dataclasses.replace(
    config, data=data, mesh=MeshConfig(**run.get("mesh", {})), clara=tiny.pod_config()
  )


def train(job: dict, run: dict) -> dict:
  """One run: its losses by step, row ids by step, where its parameters lie, which data files it
  opened."""
  config = run_config(job, run)
  sources = records.open_sources(config.data.rows, config.data.shards, config.data.max_malformed)
  losses, ids = {}, {}

  with contextlib.ExitStack() as stack:
    log = stack.enter_context(open(run["log"], "a", encoding="utf-8")) if "log" in run else None

    class Record(Hook):
      def after_step(self, trainer, row_ids):
        ids[trainer.step] = row_ids
        if log:
          log.write(json.dumps([trainer.step, row_ids]) + "\n")
          log.flush()

      def after_report(self, trainer, metrics):
        losses[trainer.step] = metrics["loss"]

    result = trainer.Trainer(
      config,
      tiny.prompt_tokenizer(),
      tiny.pod_weights(),
      sources=sources,
      workdir=run.get("workdir"),
      progress=False,
      stop_at=run.get("stop_at"),
      hooks=[Record()],
    ).run()
  trained = Program(config, 1).trained
  leaves = {
    f"{g}{jax.tree_util.keystr(path)}": leaf
    for g in (*trained, "base")
    for path, leaf in jax.tree_util.tree_leaves_with_path(result.weights[g])
  }
  opened = {
    os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
    for fd in os.listdir("/proc/self/fd")
    if os.path.exists(f"/proc/self/fd/{fd}")
  }
  digest = None
  if jax.process_count() == 1:
    digest = [
      float(np.abs(np.asarray(leaf, np.float64)).sum())
      for name, leaf in leaves.items()
      if not name.startswith("base")
    ]
  return {
    "losses": losses,
    "ids": ids,
    "stopped": result.stopped,
    "step": result.metrics["step"],
    "digest": digest,
    "metrics": result.metrics,
    "files": sorted(f for f in opened if "array_record" in f),
    "divided": {
      name: [list(leaf.shape), list(leaf.addressable_shards[0].data.shape)]
      for name, leaf in leaves.items()
    },
  }


def collectives(job: dict, run: dict) -> dict:
  """What the compiled step sends: {kind: count}, and the all-gathers whose result has the
  vocabulary's size as an axis."""
  program = Program(run_config(job, run), 10)
  with program.context():
    text = (
      program.step.lower(program.state_shapes(), program.frozen_shapes(), program.batch_shapes())
      .compile()
      .as_text()
    )
  kinds = re.compile(
    r"= (\S+|\(.*?\)) "
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
  )
  operations = [(kind, shape) for shape, kind in kinds.findall(text)]
  words = tiny.pod_config().model.table_size(tiny.pod_config().vocab_size)
  labels = program.batch_shapes().prompt.labels.shape[1]
  chunk = min(labels, tiny.pod_config().model.logits_chunk)
  logits = [
    shape
    for kind, shape in operations
    if kind == "all-gather" and re.search(rf"\b{chunk},{words}\]", shape)
  ]
  return {
    "counts": dict(sorted(collections.Counter(kind for kind, _ in operations).items())),
    "gathered_logits": logits,
  }


def main(job: dict, *who: str) -> None:
  """Does the job; see the module."""
  if who:
    distributed.initialize(who[0], int(who[1]), int(who[2]))
  action = {"train": train, "collectives": collectives}[job.get("action", "train")]
  print("REPORT" + json.dumps([action(job, run) for run in job["runs"]]), flush=True)


if __name__ == "__main__":
  main(json.loads(sys.argv[1]), *sys.argv[2:])
