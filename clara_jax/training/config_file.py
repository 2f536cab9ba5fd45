"""`--config FILE.py[:NAME]` with `--config.a.b=value` overrides, as a checked `RunConfig`.

The shape of a model is its base's: a configuration names only what it wants otherwise. What it
names and what makes another model than the base's is refused. `clara.fresh_model` is the shape
where no base is named (`pretrain`, and compiles ahead of time).
"""

import ast
import dataclasses
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from clara_jax import configs
from clara_jax.checkpoints import families, formats, native
from clara_jax.checkpoints.hub import local_directory
from clara_jax.checkpoints.workdir import is_checkpoint, read_config
from clara_jax.config import (
  ConfigError,
  ModelConfig,
  RunConfig,
  config_dict,
  field_meanings,
  from_config_dict,
)

# Fields of a model that no base says anything about.
RUN_ONLY_FIELDS = (
  "attention",
  "scan_unroll",
  "remat",
  "vocab_multiple",
  "logits_chunk",
  "base_quantization",
)
# Fields of a model in which a run may differ from its base, and a stage from the previous one.
FREE_FIELDS = ("dtype", "param_dtype", "initializer_range", "max_positions", *RUN_ONLY_FIELDS)


def load_config(path: str, overrides: Sequence[str] = (), allow: Sequence[str] = ()) -> RunConfig:
  """Runs the file's `get_config()` (or `get_config(NAME)`), applies the overrides, takes the
  model's shape from the base and checks every field.

  Args:
    path: FILE.py or FILE.py:NAME.
    overrides: `--config.a.b=value`.
    allow: unknown fields of the base's config.json that are accepted.

  Raises:
    ConfigError: no such file, an unknown field, a value of the wrong type or one that contradicts
      the base; by name.
  """
  return from_config_dict(RunConfig, _with_shape(_fields(path, overrides), allow))


def describe(
  path: str, overrides: Sequence[str] = (), allow: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
  """Every field of a run: {path: {value, default, meaning}}. Where no base is named, its shape is
  not known and said to be the base's.

  Args and errors: see `load_config`.
  """
  fields = _fields(path, overrides)
  clara = fields.get("clara")
  unknown = isinstance(clara, Mapping) and not (
    fields.get("base")
    or fields.get("init_from")
    or clara.get("fresh_model")
    or (clara.get("model") or {}).get("vocab_size")
  )
  if unknown:
    fields = {**fields, "clara": {**clara, "model": {**_ANY_SHAPE, **_named(clara)}}}
  values = _flat(dataclasses.asdict(from_config_dict(RunConfig, _with_shape(fields, allow))))
  defaults, meanings = _flat(config_dict().to_dict()), field_meanings()
  named = _named(clara) | (clara.get("fresh_model") or {}) if isinstance(clara, Mapping) else {}
  run_only = {
    field.name: field.default
    for field in dataclasses.fields(ModelConfig)
    if field.name in RUN_ONLY_FIELDS
  }
  for name in [name for name in values if name.startswith("clara.model.")]:
    field = name.removeprefix("clara.model.")
    if field in run_only:
      defaults[name] = run_only[field]
      continue
    if unknown and field not in named:
      values[name] = _OF_THE_BASE
    # Of the shape, what a configuration does not name is the base's.
    defaults[name] = _OF_THE_BASE if field in named else values[name]
  return {
    name: {"value": value, "default": defaults.get(name), "meaning": meanings.get(name, "")}
    for name, value in values.items()
  }


_ANY_SHAPE = {
  "vocab_size": 1,
  "width": 1,
  "num_layers": 1,
  "num_heads": 1,
  "num_kv_heads": 1,
  "head_dim": 128,
  "mlp_dim": 1,
}
_OF_THE_BASE = "the base's"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in values.items():
    if isinstance(value, Mapping) and value:
      flat |= _flat(value, f"{prefix}{name}.")
    else:
      flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
  return flat


def _fields(path: str, overrides: Sequence[str]) -> dict[str, Any]:
  """What the file and the overrides say."""
  file, colon, argument = path.partition(":")
  if not os.path.exists(file):
    built_in = {
      f.stem: f
      for f in pathlib.Path(configs.__file__).parent.glob("*.py")
      if not f.stem.startswith("_")
    }
    if file not in built_in:
      raise ConfigError(
        f"--config {file}: no such file, nor one of those that come with clara_jax: "
        f"{', '.join(sorted(built_in))}"
      )
    path = f"{built_in[file]}{colon}{argument}"
  for override in overrides:
    if not override.startswith("--config.") or "=" not in override:
      raise ConfigError(
        f"unrecognized argument {override}; overrides look like --config.train.steps=100"
      )
  # A field that the file leaves at its default may be overridden, too; ml_collections knows only
  # those that it names.
  named = _read(path, ())
  assignments = [o.removeprefix("--config.").partition("=") for o in overrides]
  known = [o for o, (name, _, _) in zip(overrides, assignments, strict=True) if _names(named, name)]
  fields = _read(path, known)
  for name, _, value in assignments:
    if not _names(named, name):
      *groups, last = name.split(".")
      at = fields
      for group in groups:
        at[group] = at.get(group) or {}
        at = at[group]
        if not isinstance(at, dict):
          raise ConfigError(f"--config.{name}: {group} is no group of fields")
      at[last] = _literal(value)
  return fields


def _with_shape(fields: dict[str, Any], allow: Sequence[str]) -> dict[str, Any]:
  """The fields with those of the base's model, and with directories in place of the hub's ids."""
  fields = dict(fields)
  for name in ("base", "init_from"):
    if isinstance(fields.get(name), str):
      fields[name] = local_directory(fields[name])
  source, clara = fields.get("init_from") or fields.get("base"), fields.get("clara")
  if not isinstance(clara, Mapping):
    return fields
  clara = dict(clara)
  fresh = clara.pop("fresh_model", None) or {}
  if not isinstance(source, str):
    shape = {**fresh, **_named(clara)}
    if "vocab_size" not in shape:
      raise ConfigError(
        "config.base: name the directory of a base model (--config.base=DIR); this configuration "
        "names no shape of its own"
      )
    return {**fields, "clara": {**clara, "model": shape}}
  model, padded = _model_of(source, fields.get("base"), fields.get("tokenizer"), allow)
  named = _named(clara)
  values = dataclasses.asdict(model)
  for name, value in named.items():
    if name in FREE_FIELDS or name not in values:  # an unknown field is refused with all the others
      values[name] = value
      continue
    # The number in config.json, which counts rows that no word has.
    if name == "vocab_size" and value == padded:
      continue
    candidate = from_config_dict(
      ModelConfig, {**dataclasses.asdict(model), name: value}, "clara.model"
    )
    if getattr(candidate, name) != getattr(model, name):
      raise ConfigError(
        f"clara.model.{name}={value!r}, but {source} has {getattr(model, name)!r}; leave it out: "
        f"the shape is the base's"
      )
  return {**fields, "clara": {**clara, "model": values}}


def _named(clara: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of the model that a configuration names."""
  return dict(clara.get("model") or {})


def _model_of(
  source: str, base: str | None, tokenizer: str | None, allow: Sequence[str]
) -> tuple[ModelConfig, int | None]:
  """(the model of a base or of the previous stage, the rows of its embedding where its config.json
  counts them)."""
  if is_checkpoint(source):
    return read_config(source)[0].clara.model, None
  if (
    os.path.exists(os.path.join(source, families.CONFIG_FILE))
    and families.read_json(source).get("model_type") in families.FAMILIES
  ):
    model = native.base_config(source, allow=allow, tokenizer=tokenizer)
    return model, families.read_json(source)["vocab_size"]
  return formats.open_checkpoint(source, base, allow=allow).config.model, None


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
  # config_flags looks for overrides there, whatever it is called with
  outer, sys.argv = sys.argv, arguments
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
