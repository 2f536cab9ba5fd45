"""Any checkpoint that a user names -- ours, upstream's, a PEFT adapter, a Hugging Face model -- as a model with its weights."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from clara_jax.config import ROLES, ClaraConfig, ConfigError
from clara_jax.data.tokens import Layout
from clara_jax.interop import families, hf, lazy, native, peft, upstream
from clara_jax.interop.keymap import KeyMapError
from clara_jax.model import Clara
from clara_jax.training.checkpoint import CheckpointError, is_checkpoint, read_config, read_record

SPECIAL = "special_tokens"


@dataclasses.dataclass
class Opened:
  """A checkpoint whose tensors are read when they are indexed (`lazy.py`).

  Attributes:
    directory: where it is.
    kind: 'clara', 'upstream', 'peft' or 'hf'.
    config: the method's configuration; for 'hf' only `config.model` means something.
    stage: what it was trained in; 'base' for a model without roles.
    groups: the roles, 'memory_embedding' and 'special_tokens' that it brings.
    plain_base: the base without special tokens, None where it is not to be found.
    base: the base's path; None where the checkpoint holds it.
    base_sha256: what the checkpoint says of its base's content, if it does.
    tokenizer: a directory, or None.
  """

  directory: str
  kind: str
  config: ClaraConfig
  stage: str
  groups: dict[str, Any]
  plain_base: dict[str, Any] | None
  base: str | None
  base_sha256: str | None
  tokenizer: str | None

  @property
  def weights(self) -> dict[str, Any]:
    """The model's groups, the base with its special tokens included; leaves."""
    weights = {name: tree for name, tree in self.groups.items() if name != SPECIAL}
    if self.plain_base is not None:
      special = self.groups.get(SPECIAL) or hf.special_tokens(self.config)
      weights["base"] = hf.with_special_tokens(self.plain_base, special, self.config)
    return weights

  def layout(self) -> Layout:
    """Its tokenizer with the token layouts."""
    if self.tokenizer is None:
      raise CheckpointError(f"{self.directory}: brings no tokenizer")
    return Layout(self.tokenizer, self.config)

  def check_base(self) -> str | None:
    """The hash of the base's content, after comparing it with the record.

    Raises:
      CheckpointError: the base is another one.
    """
    if self.plain_base is None:
      return None
    if jax.process_index() != 0:  # one host reads all of it, the others only their parts
      return self.base_sha256
    found = hf.base_hash(self.plain_base)
    if self.base_sha256 and found != self.base_sha256:
      raise CheckpointError(f"{self.directory}: was made for a base with sha256 {self.base_sha256[:16]}…, but "
                            f"{self.base or self.directory} has {found[:16]}…: a wrong base")
    return found


@dataclasses.dataclass
class Checkpoint:
  """A checkpoint in memory.

  Attributes:
    directory: where it came from.
    model: the computations, in the checkpoint's configuration.
    weights: all groups, the base included.
    layout: tokenizer and token layouts.
    base: the base's path, None where the checkpoint is one.
    base_sha256: hash of the base's tensors.
  """

  directory: str
  model: Clara
  weights: dict[str, Any]
  layout: Layout
  base: str | None
  base_sha256: str | None

  def require(self, *groups: str) -> None:
    """Refuses a checkpoint that lacks a role.

    Raises:
      CheckpointError: naming the role and what there is.
    """
    require(self.directory, self.weights, *groups)


def require(directory: str, weights: dict[str, Any], *groups: str) -> None:
  """Refuses weights that lack a role.

  Raises:
    CheckpointError: naming the role and what there is.
  """
  for group in groups:
    if group not in weights:
      raise CheckpointError(f"{directory}: has no {group.replace('_', ' ')}; its roles are "
                            f"{[r for r in ROLES if r in weights] or 'none'}")


def open_checkpoint(directory: str, base: str | None = None, dtype: str | None = None) -> Opened:
  """Opens a checkpoint of any kind; reads configurations and headers only.

  Args:
    directory: the checkpoint.
    base: its base, where the checkpoint's own record does not lead to one.
    dtype: 'float32' or 'bfloat16' for computation and storage; by default the checkpoint's.

  Raises:
    CheckpointError, ConfigError, KeyMapError: naming the file, field or tensor.
  """
  folder = epath.Path(directory)
  if not folder.exists():
    raise CheckpointError(f"{directory}: no such checkpoint")
  if is_checkpoint(directory):
    return _open_clara(directory, base, dtype)
  if upstream.is_upstream(directory):
    config, base = upstream.read_config(directory, base, dtype)
    model = Clara(config)
    tokenizer = directory if (folder / "tokenizer.json").exists() else base
    return Opened(directory, "upstream", config, upstream.stage_of(directory), upstream.read_weights(model, directory),
                  open_base(model, base, directory)[0], base, None, tokenizer)
  if peft.is_adapter(directory) or any(peft.is_adapter(str(folder / role)) for role in ROLES):
    return _open_peft(directory, base, dtype)
  if (folder / "config.json").exists():
    model = Clara(ClaraConfig(families.model_config(directory, **families.with_dtype(dtype))))
    return Opened(directory, "hf", model.config, "base", {}, hf.read_base(model, directory), None, None, directory)
  raise CheckpointError(f"{directory}: neither a clara_jax checkpoint (config.json with format='clara_jax'), nor an upstream one "
                        f"({upstream.ADAPTER_FILE}), nor a PEFT adapter, nor a Hugging Face model")


def _open_clara(directory: str, base: str | None, dtype: str | None) -> Opened:
  run, recorded = read_config(directory)
  record = read_record(directory)
  # How a training run lays its base out is no part of what it made.
  layout = {"vocab_multiple": 1, "logits_chunk": 0, "base_quantization": "none"}
  config = with_dtype(dataclasses.replace(run.clara, model=dataclasses.replace(run.clara.model, **layout)), dtype)
  model = Clara(config)
  groups = native.open_weights(directory)
  own = groups.pop("base", None)
  if own is None:
    base = base or recorded
    plain, special = open_base(model, base, directory)
  else:
    plain, special = split_base(own, config)
    base = None
  if special and SPECIAL not in groups:
    groups[SPECIAL] = special
  tokenizer = os.path.join(directory, "tokenizer")
  return Opened(directory, "clara", config, record["stage"], groups, plain, base, record.get("base_sha256"),
                tokenizer if epath.Path(tokenizer).exists() else None)


def _open_peft(directory: str, base: str | None, dtype: str | None) -> Opened:
  folder = epath.Path(directory)
  single = peft.is_adapter(directory)
  found = {None: directory} if single else {r: str(folder / r) for r in ROLES if peft.is_adapter(str(folder / r))}
  groups: dict[str, Any] = {}
  config = None
  for role, where in found.items():
    lora, named = peft.read_lora(where)
    recorded, clara, special = peft.read_clara(where)
    if role and recorded and role != recorded:
      raise CheckpointError(f"{where}: is the role {recorded!r}, not {role!r}: swapped adapters")
    role = role or recorded or "generator"
    if base is None and named:
      base = next((p for p in (named, os.path.normpath(os.path.join(where, named))) if epath.Path(p).exists()), None)
    if base is None:
      raise CheckpointError(f"{where}: its base {named!r} is not a directory here; name one with --base")
    if config is None:
      model_config = native.base_config(base, dtype)
      config = dataclasses.replace(clara, model=model_config, lora=lora) if clara else ClaraConfig(model_config, lora)
    if lora != config.lora:
      raise ConfigError(f"{where}/{peft.CONFIG_FILE}: {lora}, but another role has {config.lora}")
    groups[role] = peft.read_role(Clara(config), where, role)
    for name, value in (special or {}).items():
      if name == "memory_embedding":
        groups[name] = value
      else:
        groups.setdefault(SPECIAL, {})[name] = value
  plain, fresh = open_base(Clara(config), base, directory)
  if SPECIAL not in groups:
    groups[SPECIAL] = fresh or hf.special_tokens(config)
    groups["memory_embedding"] = groups[SPECIAL]["embedding"][:config.num_memory_tokens]
  return Opened(directory, "peft", config, "joint", groups, plain, base, None, tokenizer_directory(base))


def open_base(model: Clara, base: str | None, where: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """A base from a Hugging Face directory or a checkpoint of ours that holds one: (leaves without special tokens, these if it has them).

  Raises:
    CheckpointError: it is neither.
    ConfigError: its vocabulary is smaller than the configuration's.
  """
  if base is None:
    raise CheckpointError(f"{where}: names no base; give one with --base (or config.base)")
  if is_checkpoint(base):
    weights = native.open_weights(base)
    if "base" not in weights:
      raise CheckpointError(f"{base}: this checkpoint is no base; name the directory of a pretrain run or a Hugging Face model")
    return split_base(weights["base"], read_config(base)[0].clara)
  if not (epath.Path(base) / "config.json").exists():
    raise CheckpointError(f"{where}: its base {base} is not there; name one with --base")
  on_disk = families.model_config(base, **families.with_dtype(model.config.model.param_dtype)).vocab_size
  if on_disk < model.config.model.vocab_size:
    raise ConfigError(f"{base}: vocab_size={on_disk}, but the checkpoint was made for {model.config.model.vocab_size}")
  return hf.read_base(model, base), None


def merged_base(opened: Opened, role: str | None) -> dict[str, Any]:
  """The plain base, or the base with special tokens, MEM rows and a role folded in."""
  if role is None:
    return opened.plain_base
  base = hf.merged(opened.weights["base"], opened.groups[role], opened.config.lora)
  embedding = base["embedding"]
  first, count = opened.config.model.vocab_size, opened.config.num_memory_tokens
  tail = embedding[(slice(first, embedding.shape[0]), slice(None))].copy()
  tail[:count] = lazy.read(opened.groups["memory_embedding"]).astype(tail.dtype)
  return {**base, "embedding": lazy.Rows(embedding, first, tail, 0)}


def load(directory: str, base: str | None = None, dtype: str | None = None) -> Checkpoint:
  """Reads a checkpoint of ours, of the released code or of PEFT onto the first device.

  Args:
    directory: the checkpoint.
    base: its base, where the checkpoint's own record does not lead to one.
    dtype: 'float32' or 'bfloat16' for computation and storage; by default the checkpoint's.

  Raises:
    CheckpointError, ConfigError, KeyMapError: naming the file, field or tensor.
  """
  opened = open_checkpoint(directory, base, dtype)
  found = opened.check_base()
  return Checkpoint(directory, Clara(opened.config), on_device(opened), opened.layout(), opened.base, found)


def on_device(opened: Opened) -> dict[str, Any]:
  """The weights of an opened checkpoint on the first device, in the types that the model wants.

  Raises:
    KeyMapError: a leaf has another shape than the model's.
  """
  model = Clara(opened.config)
  weights = opened.weights
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tuple(weights)))
  made: dict[str, Any] = {}
  for group, tree in weights.items():
    want = dict(lazy.leaves({group: shapes[group]}))
    have = dict(lazy.leaves({group: tree}))
    for path in {**want, **have}:
      a, b = (tuple(x[path].shape) if path in x else "none" for x in (want, have))
      if a != b:
        raise KeyMapError(f"{opened.directory}: {'/'.join(path)}: expected the shape {a}, got {b}")
    # Not bound to the device, so that a computation on a mesh may take them.
    made |= lazy.nest({path: jnp.asarray(lazy.read(have[path]), want[path].dtype) for path in want})
  return made


def tokenizer_directory(directory: str) -> str:
  """Where the tokenizer of a checkpoint, a Hugging Face model or a tokenizer directory lies."""
  own = os.path.join(directory, "tokenizer")
  return own if is_checkpoint(directory) else directory


def split_base(base: dict[str, Any], config: ClaraConfig) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """(a base of ours without special tokens, these). One that was trained here has them with it, a converted one has none."""
  first, last = config.model.vocab_size, config.vocab_size
  if base["embedding"].shape[0] == first:
    return base, None
  plain, special = dict(base), {}
  for name, axis in (("embedding", 0), ("head", 1)):
    if name in base:
      leaf = base[name]
      full = slice(None)
      special[name] = np.asarray(leaf[(slice(first, last), full) if axis == 0 else (full, slice(first, last))])
      plain[name] = lazy.Rows(leaf, first, special[name][:0] if axis == 0 else special[name][:, :0], axis)
  return plain, special


def with_dtype(config: ClaraConfig, dtype: str | None) -> ClaraConfig:
  """The configuration with that type of computation and storage, if there is one."""
  if dtype is None:
    return config
  return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype, param_dtype=dtype))
