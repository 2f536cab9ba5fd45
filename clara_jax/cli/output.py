"""Reports for a person, and what goes to which stream."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any


def show_fields(report: dict[str, Any]) -> None:
  """A report on standard output, one field a line."""
  for name, value in report.items():
    if isinstance(value, (list, dict)):
      print(f"{name:>24}  {json.dumps(value)}")
    else:
      print(f"{name:>24}  {value:.4f}" if isinstance(value, float) else f"{name:>24}  {value}")


def configure_logging() -> None:
  """clara_jax reports to standard error; the libraries below are kept from drowning it."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  for name in ("absl", "jax", "orbax"):
    logging.getLogger(name).setLevel(logging.ERROR)
  ours = logging.getLogger("clara_jax")
  if not any(isinstance(handler, _StandardError) for handler in ours.handlers):
    ours.addHandler(_StandardError())
    ours.setLevel(logging.INFO)
    ours.propagate = False


class _StandardError(logging.StreamHandler):
  """Messages as they are, on what standard error is at that moment."""

  def __init__(self):
    logging.Handler.__init__(self)

  @property
  def stream(self):
    """Standard error."""
    return sys.stderr


@contextlib.contextmanager
def reserved_standard_output(reserve: bool) -> Iterator[None]:
  """Keeps standard output for one JSON object: what libraries print there, also from C++, goes to
  standard error."""
  if not reserve:
    yield
    return
  sys.stdout.flush()
  out = os.dup(1)
  os.dup2(2, 1)
  try:
    yield
  finally:
    sys.stdout.flush()
    os.dup2(out, 1)
    os.close(out)
