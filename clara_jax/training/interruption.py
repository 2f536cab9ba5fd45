"""SIGTERM, Ctrl-C and preemptions: the run is asked to stop, and does so between two steps."""

import logging
import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)


class Signals:
  """Whether the run is asked to stop; several processes agree on the step. A second Ctrl-C stops at
  once, without saving.

  Attributes:
    interrupted: whether it was Ctrl-C.
  """

  def __init__(self):
    self.interrupted = self._received = False
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "Signals":
    if threading.current_thread() is threading.main_thread():
      # With several processes, the handler of SIGTERM is that of JAX's preemption service.
      for number in (signal.SIGINT, signal.SIGTERM)[: 1 if jax.process_count() > 1 else 2]:
        self._previous[number] = signal.signal(number, self._on_signal)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _on_signal(self, number: int, *_: object) -> None:
    if number == signal.SIGINT:
      if self.interrupted:
        raise KeyboardInterrupt
      self.interrupted = True
    self._received = True
    log.warning("%s: saving after this step", signal.Signals(number).name)
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)

  def received(self, step: int) -> bool:
    """Whether all processes stop after this step; call it once a step."""
    return (
      multihost_utils.reached_preemption_sync_point(step)
      if jax.process_count() > 1
      else self._received
    )
