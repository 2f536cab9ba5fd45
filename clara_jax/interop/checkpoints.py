"""Any checkpoint that a user names -- ours, upstream's, a Hugging Face base -- as a model with its weights."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from clara_jax.config import ROLES, ClaraConfig
from clara_jax.data.tokens import Layout
from clara_jax.interop import hf, upstream
from clara_jax.model import Clara
from clara_jax.training.checkpoint import Checkpointer, CheckpointError, is_checkpoint, read_config


@dataclasses.dataclass
class Checkpoint:
  """A checkpoint in memory.

  Attributes:
    directory: where it came from.
    model: the computations, in the checkpoint's configuration.
    weights: all groups, the base included.
    layout: tokenizer and token layouts.
    base: the base's path, None where the checkpoint is one.
  """

  directory: str
  model: Clara
  weights: dict[str, Any]
  layout: Layout
  base: str | None

  def require(self, *groups: str) -> None:
    """Refuses a checkpoint that lacks a role.

    Raises:
      CheckpointError: naming the role and what there is.
    """
    for group in groups:
      if group not in self.weights:
        raise CheckpointError(f"{self.directory}: has no {group.replace('_', ' ')}; its roles are "
                              f"{[r for r in ROLES if r in self.weights] or 'none'}")


def load(directory: str, base: str | None = None, dtype: str | None = None) -> Checkpoint:
  """Reads a checkpoint of ours or of the released code.

  Args:
    directory: the checkpoint.
    base: its base, where the checkpoint's own record does not lead to one.
    dtype: 'float32' or 'bfloat16' for computation and storage; by default the checkpoint's.

  Raises:
    CheckpointError, ConfigError, KeyMapError: naming the file, field or tensor.
  """
  if not epath.Path(directory).exists():
    raise CheckpointError(f"{directory}: no such checkpoint")
  if upstream.is_upstream(directory):
    config, base = upstream.read_config(directory, base, dtype)
    model = Clara(config)
    weights = upstream.read_weights(model, directory, base)
    tokenizer = directory if (epath.Path(directory) / "tokenizer.json").exists() else base
    return Checkpoint(directory, model, _on_device(weights), Layout(str(tokenizer), config), base)
  if not is_checkpoint(directory):
    raise CheckpointError(f"{directory}: neither a clara_jax checkpoint (config.json with format='clara_jax') nor an upstream one "
                          f"({upstream.ADAPTER_FILE})")
  run, recorded = read_config(directory)
  config = _with_dtype(run.clara, dtype)
  model = Clara(config)
  checkpointer = Checkpointer(directory, read_only=True)
  weights = checkpointer.weights()
  checkpointer.close()
  base = base or recorded
  if "base" not in weights:
    weights["base"] = load_base(model, base, directory)
  if dtype:
    weights["base"] = jax.tree.map(lambda x: x.astype(dtype), weights["base"])
  layout = Layout(tokenizer_directory(directory), config)
  return Checkpoint(directory, model, _on_device(weights), layout, base)


def load_base(model: Clara, base: str | None, where: str, seed: int = 0) -> Any:
  """The group 'base' from a Hugging Face directory or a `pretrain` run.

  Raises:
    CheckpointError: it is neither.
  """
  if base is None:
    raise CheckpointError(f"{where}: names no base; give one with --base (or config.base)")
  if is_checkpoint(base):
    checkpointer = Checkpointer(base, read_only=True)
    weights = checkpointer.weights()
    checkpointer.close()
    if "base" not in weights:
      raise CheckpointError(f"{base}: this checkpoint is no base; name the directory of a pretrain run or a Hugging Face model")
    return weights["base"]
  if not (epath.Path(base) / "config.json").exists():
    raise CheckpointError(f"{where}: its base {base} is not there; name one with --base")
  hf.check_vocabulary(model.config, base)
  return hf.read_base(model, base, jax.random.key(seed))


def tokenizer_directory(directory: str) -> str:
  """Where the tokenizer of a checkpoint, a Hugging Face model or a tokenizer directory lies."""
  own = os.path.join(directory, "tokenizer")
  return own if is_checkpoint(directory) else directory


def _with_dtype(config: ClaraConfig, dtype: str | None) -> ClaraConfig:
  if dtype is None:
    return config
  return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype, param_dtype=dtype))


def _on_device(weights: dict[str, Any]) -> dict[str, Any]:
  return jax.tree.map(jnp.asarray, weights)
