"""How sure a mean is, and whether two sets of predictions differ."""

import dataclasses
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2_000


@dataclasses.dataclass(frozen=True)
class BootstrapMean:
  """A mean with its bootstrap interval (percentile, 95 %) over n rows."""

  mean: float
  low: float
  high: float
  n: int


def mean(values: Sequence[float], seed: int = 0) -> BootstrapMean:
  """The mean of rows' scores, with its interval."""
  data = np.asarray(values, np.float64)
  if len(data) < 2 or (data == data[0]).all():
    return BootstrapMean(float(data.mean()), float(data.mean()), float(data.mean()), len(data))
  from scipy import stats  # half a second

  interval = stats.bootstrap(
    (data,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=seed, batch=100
  ).confidence_interval
  return BootstrapMean(float(data.mean()), float(interval.low), float(interval.high), len(data))


@dataclasses.dataclass(frozen=True)
class Difference:
  """Mean of b - a over the same rows, its bootstrap interval (95 %), and how likely one so large is
  where neither is better (two-sided sign-flipping permutation test)."""

  mean: float
  low: float
  high: float
  p: float
  n: int


def compare(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Difference:
  """Scores of two systems on the same rows, in the same order."""
  difference = mean(np.asarray(b, np.float64) - np.asarray(a, np.float64), seed)
  if difference.low == difference.high == difference.mean == 0:
    return Difference(0.0, 0.0, 0.0, 1.0, difference.n)
  flipped = (
    np.random.default_rng(seed).choice([-1.0, 1.0], (RESAMPLES, difference.n))
    @ (np.asarray(b, np.float64) - a)
    / difference.n
  )
  p = (1 + (np.abs(flipped) >= abs(difference.mean) - 1e-12).sum()) / (RESAMPLES + 1)
  return Difference(difference.mean, difference.low, difference.high, float(p), difference.n)
