"""Objects in files of the user: `FILE.py:NAME`."""

import hashlib
import importlib.util
import pathlib
import sys
from typing import Any

from clara_jax.config import ConfigError


def from_file(name: str, field: str) -> Any:
  """The object NAME of `FILE.py:NAME`; None where `name` has not that form.

  Args:
    name: FILE.py:NAME.
    field: of the configuration, for messages.

  Raises:
    ConfigError: there is no such file or object, or the file fails.
  """
  path, _, attribute = name.rpartition(":")
  if not path.endswith(".py"):
    return None
  file = pathlib.Path(path)
  if not file.is_file():
    raise ConfigError(f"{field}={name!r}: no file {path}")
  unique = f"{file.stem}_{hashlib.blake2b(str(file.resolve()).encode(), digest_size=4).hexdigest()}"
  spec = importlib.util.spec_from_file_location(unique, file)
  module = importlib.util.module_from_spec(spec)
  sys.modules[unique] = module  # as dataclasses want it
  sys.path.insert(0, str(file.resolve().parent))  # as `python file.py` has it
  try:
    spec.loader.exec_module(module)
  except (
    Exception,
    SystemExit,
  ) as error:  # the user's code: whatever it is, it is named with its file
    del sys.modules[unique]
    raise ConfigError(f"{field}={name!r}: {path} fails: {type(error).__name__}: {error}") from error
  finally:
    sys.path.remove(str(file.resolve().parent))
  if not hasattr(module, attribute):
    raise ConfigError(f"{field}={name!r}: {path} has no {attribute!r}")
  return getattr(module, attribute)
