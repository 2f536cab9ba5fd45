"""Means that add up exactly over micro-batches, batches and hosts; the metrics file, TensorBoard
and the screen; the run's clock."""

import contextlib
import importlib.util
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from clara_jax import buckets, io

log = logging.getLogger(__name__)


@struct.dataclass
class Mean:
  """A weighted mean, kept as its two sums."""

  total: jax.Array
  count: jax.Array

  @classmethod
  def of(cls, values: jax.Array, weights: jax.Array | None = None) -> "Mean":
    """Mean of values, weighted; shapes broadcast."""
    values = jnp.asarray(values, jnp.float32)
    weights = (
      jnp.ones_like(values)
      if weights is None
      else jnp.broadcast_to(weights, values.shape).astype(jnp.float32)
    )
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
  """Metrics to a JSONL file, to TensorBoard where tensorboardX is installed, and one readable line
  to the screen.

  Args:
    directory: of the run; lines are appended to DIRECTORY/metrics.jsonl, scalars go to
      DIRECTORY/tensorboard. None writes no file.
    stage: name shown in front.
    steps: length of the run, for the time left.
    progress: whether progress is logged.
  """

  def __init__(self, directory: Any, stage: str, steps: int, progress: bool = True):
    self._file: Any = None
    if directory is not None:
      file = directory / "metrics.jsonl"
      if buckets.is_remote(file):
        self._file = buckets.Appended(file)
      else:
        if file.exists():
          io.cut_back(str(file))  # a line that a kill has cut
        self._file = file.open("a")
    self._mirrored = contextlib.ExitStack()
    self._board = None
    if directory is not None and importlib.util.find_spec("tensorboardX"):
      import tensorboardX

      board = buckets.mirrored(os.fspath(directory / "tensorboard"))
      self._board = tensorboardX.SummaryWriter(self._mirrored.enter_context(board))
    self._stage, self._steps, self._progress = stage, steps, progress
    self._start = time.monotonic()
    self._first_step: int | None = None

  def write(self, step: int, numbers: Mapping[str, float], kind: str = "train") -> None:
    """One line: `step`, `kind` ('train' or 'eval'), the time (Unix, seconds) and the numbers."""
    if self._first_step is None:
      self._first_step, self._start = step, time.monotonic()
    if self._file:
      self._file.write(
        json.dumps({"step": step, "kind": kind, "time": round(time.time(), 3), **numbers}) + "\n"
      )
      self._file.flush()
    if self._board:
      for name, number in numbers.items():
        self._board.add_scalar(f"{kind}/{name}", number, step)
    if self._progress:
      shown = "  ".join(f"{name} {_short(number)}" for name, number in numbers.items())
      log.info(f"{self._stage:>11} {step:>6}/{self._steps}  {kind}  {shown}{self._left(step)}")

  def _left(self, step: int) -> str:
    done = step - (self._first_step or 0)
    if done <= 0 or step >= self._steps:
      return ""
    seconds = int((time.monotonic() - self._start) / done * (self._steps - step))
    return f"  left {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

  def close(self) -> None:
    if self._file:
      self._file.close()
    if self._board:
      self._board.close()
    self._mirrored.close()


class Stopwatch:
  """Where the time of a run goes.

  `productive` is the time of steps whose results were kept, over all starts of the run; compiling,
  evaluating, saving, restoring and steps that were lost with a machine are not in it. Goodput is
  its share of the time since the run was first started.

  Args:
    first_start: Unix time, seconds.
    productive: seconds, from the checkpoint that the run goes on from.
  """

  def __init__(self, first_start: float, productive: float = 0.0):
    self._first_start, self.productive = first_start, productive
    self._since, self._lost, self._waited = time.monotonic(), 0.0, 0.0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Time in which the devices may wait for input."""
    start = time.monotonic()
    yield
    self._waited += time.monotonic() - start

  @contextlib.contextmanager
  def unproductive(self) -> Iterator[None]:
    """Time that trains nothing."""
    start = time.monotonic()
    yield
    self.discount(time.monotonic() - start)

  def discount(self, seconds: float) -> None:
    """Counts seconds that were not productive."""
    self._lost += seconds

  @property
  def elapsed(self) -> float:
    """Seconds since the last report."""
    return time.monotonic() - self._since

  def report(
    self, rows: int, tokens: int, model_flops: float, peak_flops: float | None
  ) -> dict[str, float]:
    """Rates since the last report: samples, tokens, model FLOPs utilization where the peak is
    known, the share of time spent waiting for input, and the goodput."""
    elapsed = self.elapsed
    worked = max(elapsed - self._lost, 1e-9)
    self.productive += worked
    numbers = {
      "samples_per_second": rows / worked,
      "tokens_per_second": tokens / worked,
      "input_wait": self._waited / worked,
      "goodput": self.productive / max(time.time() - self._first_start, worked),
    }
    if peak_flops:
      numbers["mfu"] = model_flops / worked / peak_flops
    self._since, self._lost, self._waited = time.monotonic(), 0.0, 0.0
    return numbers


def _short(number: float) -> str:
  if number and (abs(number) < 1e-3 or abs(number) >= 1e5):
    return f"{number:.2e}"
  return f"{number:.4g}"
