"""`--config FILE.py[:NAME]` with `--config.a.b=value` overrides, as a checked `RunConfig`."""

import ast
import os
import sys
from collections.abc import Mapping, Sequence
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
  for override in overrides:
    if not override.startswith("--config.") or "=" not in override:
      raise ConfigError(f"unrecognized argument {override}; overrides look like --config.train.steps=100")
  # A field that the file leaves at its default may be overridden, too; ml_collections knows only those that it names.
  named = _read(path, ())
  given = [o.removeprefix("--config.").partition("=") for o in overrides]
  known = [o for o, (name, _, _) in zip(overrides, given, strict=True) if _names(named, name)]
  fields = _read(path, known)
  for name, _, value in given:
    if not _names(named, name):
      *groups, last = name.split(".")
      at = fields
      for group in groups:
        at[group] = at.get(group) or {}
        at = at[group]
        if not isinstance(at, dict):
          raise ConfigError(f"--config.{name}: {group} is no group of fields")
      at[last] = _literal(value)
  return from_config_dict(RunConfig, fields)


def _names(fields: Mapping[str, Any], name: str) -> bool:
  for part in name.split("."):
    if not isinstance(fields, Mapping) or part not in fields:
      return False
    fields = fields[part]
  return True


def _read(path: str, overrides: Sequence[str]) -> dict[str, Any]:
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
  return config.to_dict()


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text
