"""`--config FILE.py[:NAME]` with `--config.a.b=value` overrides, as a checked `RunConfig`."""

import ast
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from clara_jax.config import ConfigError, RunConfig, from_config_dict


def load(path: str, overrides: Sequence[str] = ()) -> RunConfig:
  """Runs the file's `get_config()` (or `get_config(NAME)`), applies the overrides and checks every field.

  Raises:
    ConfigError: no such file, an unknown field, a value of the wrong type; by name.
  """
  file = path.split(":", 1)[0]
  if not os.path.exists(file):
    raise ConfigError(f"--config {file}: no such file")
  # Of no fixed type, so that ml_collections knows nothing of them.
  names = ("--config.estimator=", "--config.estimator_args.")
  given = [o.removeprefix("--config.").partition("=") for o in overrides if o.startswith(names)]
  overrides = [o for o in overrides if not o.startswith(names)]
  for override in overrides:
    if not override.startswith("--config."):
      raise ConfigError(f"unrecognized argument {override}; overrides look like --config.train.steps=100")
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
  arguments = ["clara", f"--config={path}", *overrides]
  outer, sys.argv = sys.argv, arguments  # config_flags looks for overrides there, whatever it is called with
  try:
    values(arguments)
    config = values.config
  except flags.Error as error:
    raise ConfigError(f"--config: {error}") from None
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ConfigError(f"{path}: {error}") from None
  finally:
    sys.argv = outer
  fields = config.to_dict()
  for name, _, value in given:
    group, dot, argument = name.partition(".")
    if dot:
      fields[group] = {**(fields.get(group) or {}), argument: _literal(value)}
    else:
      fields[group] = value or None
  return from_config_dict(RunConfig, fields)


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text
