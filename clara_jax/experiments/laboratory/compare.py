"""Trainings side by side: the joint stage on the generated world, the same seeds and data, one
estimator each."""

import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from clara_jax.experiments.claims.claims import same_sizes
from clara_jax.experiments.claims.experiments import Experiments, ExperimentSizes
from clara_jax.experiments.laboratory.variants import Variant

REFERENCE = "algorithm1"


def compare(
  workdir: str,
  variants: Sequence[Variant],
  seeds: int = 5,
  scale: float = 1.0,
  sizes: ExperimentSizes | None = None,
) -> dict[str, Any]:
  """Trains every variant with every seed. What WORKDIR has, of an earlier start or of `clara
  reproduce`, is not done again.

  Args:
    workdir: of the trainings.
    variants: what is compared, 'algorithm1' with them as what the others are held against.
    seeds: how many.
    scale: factor on steps and test rows.
    sizes: other ones are for tests.

  Returns:
    For each variant its results by seed (final recall, answers, curve, milliseconds a step, what
    the gradient was made of), and whether the interval of its mean recall@1 is above or below that
    of `algorithm1`.

  Raises:
    ConfigError: WORKDIR has trainings of other sizes.
  """
  sizes = (sizes or ExperimentSizes()).scaled(scale)
  same_sizes(workdir, sizes)
  start = time.monotonic()
  results: dict[str, list[dict[str, Any]]] = {v.name: [] for v in variants}
  for seed in range(seeds):
    experiments = Experiments(workdir, seed, sizes)
    for variant in variants:
      name = "estimator_" + re.sub(r"[^\w.=]+", "-", variant.name).strip("-")
      results[variant.name].append(
        experiments.estimated(name, variant.estimator, variant.temperature, **variant.train)
      )
  finals = {name: [r["recall_at_1"] for r in records] for name, records in results.items()}
  return {
    "seeds": seeds,
    "steps": sizes.joint,
    "test_rows": sizes.test_rows,
    "seconds": round(time.monotonic() - start),
    "training_seconds": round(sum(r["seconds"] for records in results.values() for r in records)),
    "results": results,
    "against_algorithm1": {
      name: verdict(values, finals[REFERENCE])
      for name, values in finals.items()
      if REFERENCE in finals and name != REFERENCE
    },
  }


def interval(values: Sequence[float]) -> tuple[float, float, float]:
  """Mean, and the ends of its 95 % interval over seeds (Student's t)."""
  mean = float(np.mean(values))
  if len(values) < 2:
    return mean, mean, mean
  from scipy import stats  # half a second

  half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
  return mean, mean - half, mean + half


def verdict(values: Sequence[float], reference: Sequence[float]) -> str:
  """Whether the intervals of two means are apart, and which way."""
  (_, low, high), (_, reference_low, reference_high) = interval(values), interval(reference)
  if len(values) < 2:
    return "one seed"
  return "better" if low > reference_high else "worse" if high < reference_low else "not told apart"
