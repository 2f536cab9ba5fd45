"""Every gradient estimator among many candidates: time and memory of the selection and its
gradient.

    python benchmarks/estimators.py [--candidates 100000] [--k 5] [--width 512]
"""

import argparse
import json
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from clara_jax.ops import estimators


def measure(name: str, n: int, k: int, width: int, runs: int) -> dict[str, float]:
  """Of one row: milliseconds (median), compiled temporaries beyond arguments and results, seconds
  of compiling."""
  estimator = estimators.get(name)
  keys = jax.random.split(jax.random.key(0), 3)
  scores = 0.1 * jax.random.normal(keys[0], (1, n))
  memories = jax.random.normal(keys[1], (1, n, width))
  cotangent = jax.random.normal(keys[2], (1, k, width))

  def objective(scores, memories, key):
    choice = estimator(scores, k, 0.02, key)
    log_prob = 0.0 if choice.log_prob is None else choice.log_prob.sum()
    return (choice.rows(memories) * cotangent).sum() + log_prob

  start = time.perf_counter()
  compiled = jax.jit(jax.value_and_grad(objective)).lower(scores, memories, keys[0]).compile()
  compiling = time.perf_counter() - start
  seconds = []
  for key in jax.random.split(keys[0], runs + 1):
    start = time.perf_counter()
    _, gradient = jax.block_until_ready(compiled(scores, memories, key))
    seconds.append(time.perf_counter() - start)
  if not bool(jnp.isfinite(gradient).all()):
    raise SystemExit(f"{name}: the gradient is not finite")
  return {
    "milliseconds": round(1000 * statistics.median(seconds[1:]), 1),
    "temporaries_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
    "compile_seconds": round(compiling, 1),
  }


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--candidates", type=int, default=100_000)
  parser.add_argument("--k", type=int, default=5)
  parser.add_argument("--width", type=int, default=512, help="M · D")
  parser.add_argument("--runs", type=int, default=5)
  options = parser.parse_args()
  measurements = {}
  for name in estimators.REGISTRY:
    measurements[name] = measure(name, options.candidates, options.k, options.width, options.runs)
    print(name, measurements[name], file=sys.stderr, flush=True)
  print(
    json.dumps(
      {
        "cores": os.cpu_count(),
        "device": str(jax.devices()[0]),
        **vars(options),
        "estimators": measurements,
      },
      indent=2,
    )
  )


if __name__ == "__main__":
  main()
