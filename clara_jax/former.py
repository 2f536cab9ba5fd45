"""Module paths of version 0.1, which keep working in 0.2 with a `DeprecationWarning`."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType

_ROOMS = {
  "interop": "checkpoints",
  "quickstart": "experiments.quickstart",
  "reproduction": "experiments.claims",
  "gradients": "experiments.laboratory",
}
_MODULES = {
  "interop.checkpoints": "checkpoints.formats",
  "interop.hf": "checkpoints.huggingface",
  "data.tokens": "data.prompt_tokenizer",
  "data.world": "experiments.world",
  "memory.compress": "inference.compress",
  "memory.forms": "memory.codecs",
  "memory.quantise": "memory.quantize",
  "synthesis.offline": "experiments.offline_backend",
  "synthesis.documents": "documents.pieces",
  "evaluation.benchmarks": "evaluation.evaluator",
  "evaluation.report": "evaluation.plots",
  "training.checkpoint": "checkpoints.workdir",
  "training.loop": "training.trainer",
  "training.paths": "training.stages.gradient_paths",
  "training.flops": "analysis.flops",
  "training.hlo": "analysis.hlo",
  "training.cost": "analysis.cost",
}
# Names in them that are called otherwise now.
_NAMES = {
  "data.tokens": {"Layout": "PromptTokenizer"},
  "interop.checkpoints": {"Opened": "LazyCheckpoint"},
  "memory.quantise": {"quantise": "quantize"},
}
_PACKAGE = "clara_jax."


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds a module of version 0.1 where it is now."""

  def find_spec(self, fullname, path=None, target=None):
    """See `importlib.abc.MetaPathFinder`."""
    if _target(fullname) is None:
      return None
    return importlib.machinery.ModuleSpec(fullname, self)

  def exec_module(self, module: ModuleType) -> None:
    """Puts the module of now in the place of the one that was asked for."""
    old = module.__name__
    new = _target(old)
    warnings.warn(f"{old} is {new} now", DeprecationWarning, stacklevel=2)
    target = importlib.import_module(new)
    for name, now in _NAMES.get(_former(old), {}).items():
      setattr(target, name, getattr(target, now))
    sys.modules[old] = target


def _former(fullname: str) -> str:
  """The path in version 0.1, also where its package has been found under its name of now."""
  rest = fullname.removeprefix(_PACKAGE)
  for old, new in _ROOMS.items():
    if rest.startswith(f"{new}.") and f"{old}.{rest[len(new) + 1 :]}" in _MODULES:
      return f"{old}.{rest[len(new) + 1 :]}"
  return rest


def _target(fullname: str) -> str | None:
  if not fullname.startswith(_PACKAGE):
    return None
  rest = _former(fullname)
  if rest in _MODULES:
    return _PACKAGE + _MODULES[rest]
  room, dot, module = rest.partition(".")
  return f"{_PACKAGE}{_ROOMS[room]}{dot}{module}" if room in _ROOMS else None
