"""How the cost of a step grows: with the length of documents, the compression ratio, the
candidates, the batch, the depth.

    python benchmarks/growth.py --out docs/growth.svg

Synthetic batches of full length through the real step (`training/program.py`); width 128, 4 layers
unless the depth varies. Prints one JSON object and draws it.
"""

import argparse
import json
import statistics
import sys
import time

import jax
import numpy as np

from clara_jax.batch import Tokens
from clara_jax.config import (
  ClaraConfig,
  DataConfig,
  LoraConfig,
  ModelConfig,
  RunConfig,
  TrainConfig,
)
from clara_jax.training.program import Program

REPEATS = 5


def measure(
  stage: str,
  *,
  length: int = 256,
  ratio: int = 16,
  candidates: int = 20,
  batch: int = 4,
  layers: int = 4,
  from_store: bool = False,
) -> dict[str, float]:
  """Seconds of a step, and of its compilation."""
  model = ModelConfig(
    vocab_size=2048,
    width=128,
    num_layers=layers,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=352,
    tie_embeddings=False,
    dtype="float32",
    param_dtype="float32",
    remat="full",
    attention="grouped",
  )
  clara = ClaraConfig(
    model,
    LoraConfig(rank=16, alpha=32.0, dropout=0.0),
    doc_max_length=length,
    compression_rate=ratio,
    query_max_length=32,
    decoder_max_length=64 + 5 * (length // ratio + 1),
    top_k=5,
  )
  data = DataConfig(
    batch_size=batch, candidates=candidates, bucket=16, store="given" if from_store else None
  )
  program = Program(
    RunConfig(clara, data, TrainConfig(stage=stage, schedule="constant", warmup_fraction=0.0)), 1000
  )
  rng = np.random.default_rng(0)

  def array(x):
    if x.dtype == np.int32:
      return rng.integers(0, 2000, x.shape).astype(np.int32)
    return (
      rng.normal(size=x.shape).astype(x.dtype)
      if x.dtype == np.float32
      else np.arange(x.shape[1])[None].repeat(x.shape[0], 0) == 0
    )

  shapes = program.batch_shapes()
  filled_batch = jax.tree.map(array, shapes)

  def full(tokens):
    return Tokens(tokens.ids, np.full_like(tokens.lengths, tokens.ids.shape[-1]))

  prompt, slots = filled_batch.prompt, 5 * clara.num_memory_tokens
  prompt.tokens.ids[:, :slots] = clara.model.vocab_size + np.arange(slots) % clara.num_memory_tokens
  answers = 16  # label positions, as a short answer has
  prompt = prompt.replace(
    tokens=full(prompt.tokens),
    labels=prompt.labels[:, :answers],
    label_weights=np.ones_like(prompt.label_weights[:, :answers]),
    label_positions=np.full_like(prompt.label_positions[:, :answers], slots + 8)
    + np.arange(answers, dtype=np.int32),
  )
  filled_batch = filled_batch.replace(
    prompt=prompt,
    documents=filled_batch.documents and full(filled_batch.documents),
    question=filled_batch.question and full(filled_batch.question),
    valid=np.ones(batch, np.float32),
  )
  with program.context():
    key = jax.random.key(0)
    weights = program.place_weights(jax.jit(program.model.init)(key))
    state = program.initial_state({g: weights.pop(g) for g in program.trained})
    placed = jax.device_put(filled_batch, program.batch_sharding)
    start = time.perf_counter()
    step = program.step.lower(state, weights, placed).compile()
    compiled = time.perf_counter() - start
    state, _ = jax.block_until_ready(step(state, weights, placed))
    seconds = []
    for _ in range(REPEATS):
      start = time.perf_counter()
      state, metrics = step(state, weights, placed)
      jax.block_until_ready(metrics)
      seconds.append(time.perf_counter() - start)
  return {"seconds": statistics.median(seconds), "compile_seconds": compiled}


KINDS = {
  "instruct": ("instruct", False),
  "joint, compressed in the step": ("joint", False),
  "joint, from the store": ("joint", True),
}
# What varies, its values, and what keeps M = 16 memory tokens where it should not vary.
SWEEPS = {
  "tokens of a document (M = 16)": ("length", (64, 128, 256, 512, 1024), KINDS),
  "compression ratio (256 tokens)": ("ratio", (4, 8, 16, 32, 64, 128), KINDS),
  "candidates": ("candidates", (5, 20, 100, 300, 1000), ("joint, from the store",)),
  "batch": ("batch", (2, 4, 8, 16), KINDS),
  "layers": ("layers", (2, 4, 8, 16, 32), ("instruct", "joint, from the store")),
}


def draw(report: dict, path: str) -> None:
  """Steps' seconds over each sweep, and compile time over depth."""
  import matplotlib

  matplotlib.use("svg")
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
  colors = dict(zip(KINDS, ("C0", "C1", "C2"), strict=True))
  for axis, (title, sweep) in zip(axes.flat, report.items(), strict=False):
    for name, points in sweep.items():
      axis.plot(
        [p["value"] for p in points],
        [1e3 * p["seconds"] for p in points],
        marker="o",
        label=name,
        color=colors[name],
      )
    axis.set(
      title=f"a step over {title}", xlabel=title, ylabel="milliseconds", xscale="log", yscale="log"
    )
    axis.set_xticks(
      [p["value"] for p in next(iter(sweep.values()))],
      [str(p["value"]) for p in next(iter(sweep.values()))],
    )
    axis.minorticks_off()
    axis.set_ylim(10, 10_000)
    axis.set_yticks([10, 100, 1_000, 10_000], ["10", "100", "1,000", "10,000"])
    axis.grid(alpha=0.3)
  axes[0, 0].legend()
  last = axes.flat[-1]
  for name, points in report["layers"].items():
    last.plot(
      [p["value"] for p in points],
      [p["compile_seconds"] for p in points],
      marker="o",
      label=name,
      color=colors[name],
    )
  last.set(title="compile time over layers", xlabel="layers", ylabel="seconds", ylim=(0, None))
  last.legend()
  last.grid(alpha=0.3)
  figure.savefig(path, metadata={"Date": None})


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", metavar="F.svg", help="the drawing")
  options = parser.parse_args()
  report: dict = {}
  for title, (field, values, kinds) in SWEEPS.items():
    report[title] = {}
    for kind in kinds:
      stage, from_store = KINDS[kind]
      points = []
      for value in values:
        more = {"ratio": value // 16} if field == "length" else {}
        points.append(
          {"value": value, **measure(stage, from_store=from_store, **{field: value}, **more)}
        )
        print(title, kind, points[-1], file=sys.stderr, flush=True)
      report[title][kind] = points
  if options.out:
    draw(report, options.out)
  print(json.dumps(report, indent=2))


if __name__ == "__main__":
  main()
