"""Means that add up exactly over micro-batches, batches and hosts; the screen and the metrics file."""

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Mean:
  """A weighted mean, kept as its two sums."""

  total: jax.Array
  count: jax.Array

  @classmethod
  def of(cls, values: jax.Array, weights: jax.Array | None = None) -> "Mean":
    """Mean of values, weighted; shapes broadcast."""
    values = jnp.asarray(values, jnp.float32)
    weights = jnp.ones_like(values) if weights is None else jnp.broadcast_to(weights, values.shape).astype(jnp.float32)
    return cls((values * weights).sum(), weights.sum())

  def __add__(self, other: "Mean") -> "Mean":
    return Mean(self.total + other.total, self.count + other.count)

  @property
  def value(self) -> jax.Array:
    """The mean; 0 where nothing was counted."""
    return self.total / jnp.maximum(self.count, 1e-9)


Metrics = dict[str, Mean]


def add(a: Metrics | None, b: Metrics) -> Metrics:
  """Sums metrics by name."""
  return b if a is None else {name: a[name] + b[name] for name in b}


def values(metrics: Metrics) -> dict[str, float]:
  """Host numbers; metrics that counted nothing are left out."""
  host = jax.device_get(metrics)
  return {name: float(m.total / m.count) for name, m in host.items() if m.count > 0}


class Reporter:
  """Metrics to a JSONL file and one readable line to the screen.

  Args:
    path: the file; lines are appended. None writes no file.
    stage: name shown in front.
    steps: length of the run, for the time left.
    progress: whether lines go to standard error.
  """

  def __init__(self, path: Any, stage: str, steps: int, progress: bool = True):
    self._file = path.open("a") if path is not None else None
    self._stage, self._steps, self._progress = stage, steps, progress
    self._start = time.monotonic()
    self._first_step: int | None = None

  def write(self, step: int, numbers: Mapping[str, float], kind: str = "train") -> None:
    """One line: `step`, `kind` ('train' or 'eval') and the numbers."""
    if self._first_step is None:
      self._first_step, self._start = step, time.monotonic()
    if self._file:
      self._file.write(json.dumps({"step": step, "kind": kind, **numbers}) + "\n")
      self._file.flush()
    if self._progress:
      shown = "  ".join(f"{name} {_short(number)}" for name, number in numbers.items())
      print(f"{self._stage:>11} {step:>6}/{self._steps}  {kind}  {shown}{self._left(step)}", file=sys.stderr, flush=True)

  def _left(self, step: int) -> str:
    done = step - (self._first_step or 0)
    if done <= 0 or step >= self._steps:
      return ""
    seconds = int((time.monotonic() - self._start) / done * (self._steps - step))
    return f"  left {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

  def close(self) -> None:
    if self._file:
      self._file.close()


def _short(number: float) -> str:
  if number and (abs(number) < 1e-3 or abs(number) >= 1e5):
    return f"{number:.2e}"
  return f"{number:.4g}"
