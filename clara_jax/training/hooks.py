"""What happens beside training: own reports, early stops of experiments, profiles."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
  from clara_jax.training.trainer import Trainer

PROFILED_STEPS = 5


class Hook:
  """Called by the `Trainer` on every process; override what is needed. `trainer.step` counts the
  steps that are done."""

  def after_step(self, trainer: Trainer, row_ids: Sequence[str]) -> None:
    """A step was taken; nothing has waited for the devices.

    Args:
      trainer: at work.
      row_ids: of the rows that this process gave to the step.
    """

  def after_report(self, trainer: Trainer, metrics: dict[str, float]) -> None:
    """Means over the steps since the last report were computed."""

  def after_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
    """The evaluation rows were run."""


class ProfileOnRequest(Hook):
  """`touch DIR/profile` traces the next steps into DIR/profiles (for TensorBoard or XProf).

  Args:
    folder: DIR, an `epath.Path`.
  """

  def __init__(self, folder: Any):
    self._folder, self._request = folder, folder / "profile"
    self._until: int | None = None
    self._checked = 0.0

  def after_step(self, trainer: Trainer, row_ids: Sequence[str]) -> None:
    """Starts or ends a trace; looks for a request every few seconds."""
    if self._until is not None:
      if trainer.step >= self._until:
        jax.block_until_ready(trainer.state)
        jax.profiler.stop_trace()
        self._until = None
      return
    if time.monotonic() - self._checked < 5:
      return
    self._checked = time.monotonic()
    if self._request.exists():
      self._request.unlink()
      jax.profiler.start_trace(str(self._folder / "profiles" / f"step-{trainer.step}"))
      self._until = trainer.step + PROFILED_STEPS
