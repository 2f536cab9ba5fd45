"""Any checkpoint that a user names -- ours, upstream's, a PEFT adapter, a Hugging Face model -- as
a model with its weights."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from clara_jax import sharding
from clara_jax.checkpoints import families, huggingface, lazy, native, peft, upstream
from clara_jax.checkpoints.hub import local_directory
from clara_jax.checkpoints.keymap import EMBEDDING, HEAD, KeyMapError
from clara_jax.checkpoints.workdir import is_checkpoint, read_config, read_record
from clara_jax.config import ROLES, ClaraConfig, ConfigError, MeshConfig
from clara_jax.data.prompt_tokenizer import PromptTokenizer
from clara_jax.data.tokenizer import has_tokenizer
from clara_jax.inference.checkpoint import Checkpoint, CheckpointError
from clara_jax.model import Clara

log = logging.getLogger(__name__)

SPECIAL = "special_tokens"


@dataclasses.dataclass
class LazyCheckpoint:
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
    tokenizer: a directory, a tokenizer in its place, or None.
    hf_files: a directory with the config.json, and perhaps the generation_config.json, that the
      base came with, or None.
    chat_template: takes the place of the tokenizer's.
  """

  directory: str
  kind: str
  config: ClaraConfig
  stage: str
  groups: dict[str, Any]
  plain_base: dict[str, Any] | None
  base: str | None
  base_sha256: str | None
  tokenizer: PreTrainedTokenizerFast | str | None
  hf_files: str | None
  chat_template: str | None = None

  @property
  def weights(self) -> dict[str, Any]:
    """The model's groups, the base with its special tokens included; leaves."""
    weights = {name: tree for name, tree in self.groups.items() if name != SPECIAL}
    if self.plain_base is not None:
      special = self.groups.get(SPECIAL) or huggingface.special_tokens(self.config)
      weights["base"] = huggingface.with_special_tokens(self.plain_base, special, self.config)
    return weights

  def prompt_tokenizer(self) -> PromptTokenizer:
    """Its tokenizer with the token layouts."""
    if self.tokenizer is None:
      raise CheckpointError(f"{self.directory}: brings no tokenizer")
    return PromptTokenizer(
      self.tokenizer,
      self.config,
      end_ids=families.end_ids(self.hf_files),
      chat_template=self.chat_template,
    )

  def check_base(self) -> str | None:
    """The hash of the base's content, after comparing it with the record.

    Raises:
      CheckpointError: the base is another one.
    """
    if self.plain_base is None:
      return None
    if jax.process_index() != 0:  # one host reads all of it, the others only their parts
      return self.base_sha256
    checksum = huggingface.base_hash(self.plain_base)
    if self.base_sha256 and checksum != self.base_sha256:
      raise CheckpointError(
        f"{self.directory}: was made for a base with sha256 {self.base_sha256[:16]}…, but "
        f"{self.base or self.directory} has {checksum[:16]}…: a wrong base"
      )
    return checksum


def open_checkpoint(
  directory: str,
  base: str | None = None,
  dtype: str | None = None,
  *,
  chat_template: str | None = None,
  allow: Sequence[str] = (),
) -> LazyCheckpoint:
  """Opens a checkpoint of any kind; reads configurations and headers only.

  Args:
    directory: the checkpoint, or the id of a model in the Hugging Face hub's cache.
    base: its base, where the checkpoint's own record does not lead to one.
    dtype: 'float32' or 'bfloat16' for computation and storage; by default the checkpoint's.
    chat_template: takes the place of the tokenizer's.
    allow: unknown fields of config.json and adapter_config.json that are accepted.

  Raises:
    CheckpointError, ConfigError, KeyMapError: naming the file, field or tensor.
  """
  directory, base = local_directory(directory, "checkpoint"), base and local_directory(base)
  folder = epath.Path(directory)
  if not folder.is_dir():
    gguf = (
      ": a GGUF file is converted first: clara convert FILE.gguf DIR --to clara"
      if str(directory).endswith(".gguf")
      else ""
    )
    raise CheckpointError(
      f"{directory}: {'not a directory' if folder.exists() else 'no such checkpoint'}{gguf}"
    )
  if is_checkpoint(directory):
    opened = _open_clara(directory, base, dtype, allow)
  elif upstream.is_upstream(directory):
    config, base, groups = upstream.read(directory, base, dtype, allow)
    tokenizer = directory if has_tokenizer(directory) else tokenizer_directory(base)
    plain = open_base(Clara(config), base, directory, allow, whole=True)[0]
    groups[SPECIAL] = {
      name: _in_type_of(plain[name], value, config, name) for name, value in groups[SPECIAL].items()
    }
    opened = LazyCheckpoint(
      directory,
      "upstream",
      config,
      upstream.stage_of(directory),
      groups,
      plain,
      base,
      None,
      tokenizer,
      native.hf_files(base),
    )
  elif peft.is_adapter(directory) or any(peft.is_adapter(str(folder / role)) for role in ROLES):
    opened = _open_peft(directory, base, dtype, allow)
  elif (folder / families.CONFIG_FILE).exists():
    model = Clara(
      ClaraConfig(families.model_config(directory, allow=allow, **families.with_dtype(dtype)))
    )
    tokenizer = directory if has_tokenizer(directory) else None
    opened = LazyCheckpoint(
      directory,
      "hf",
      model.config,
      "base",
      {},
      huggingface.read_base(model, directory),
      None,
      None,
      tokenizer,
      directory,
    )
  else:
    raise CheckpointError(
      f"{directory}: neither a clara_jax checkpoint (config.json with format='clara_jax'), nor an "
      f"upstream one "
      f"({upstream.ADAPTER_FILE}), nor a PEFT adapter, nor a Hugging Face model"
    )
  opened.chat_template = chat_template
  return opened


def _in_type_of(base: Any, value: np.ndarray, config: ClaraConfig, name: str) -> np.ndarray:
  """A whole vocabulary in the base's type where that loses nothing that is read: memory tokens have
  rows of their own elsewhere."""
  cast = value.astype(base.dtype)
  first, last = config.model.vocab_size, config.model.vocab_size + config.num_memory_tokens
  same = cast.astype(np.float32) == value.astype(np.float32)
  (same[first:last] if name == "embedding" else same[:, first:last])[:] = True
  return cast if same.all() else value


def _open_clara(
  directory: str, base: str | None, dtype: str | None, allow: Sequence[str]
) -> LazyCheckpoint:
  run, recorded = read_config(directory)
  record = read_record(directory)
  # How a training run lays its base out is no part of what it made.
  unpadded = {"vocab_multiple": 1, "logits_chunk": 0, "base_quantization": "none"}
  config = with_dtype(
    dataclasses.replace(run.clara, model=dataclasses.replace(run.clara.model, **unpadded)), dtype
  )
  model = Clara(config)
  groups = native.open_weights(directory)
  own = groups.pop("base", None)
  if own is None:
    base = base or recorded
    plain, special = open_base(model, base, directory, allow)
  else:
    plain, special = split_base(own, config, record["stage"])
    base = None
  if special and SPECIAL not in groups:
    groups[SPECIAL] = special
  tokenizer = os.path.join(directory, "tokenizer")
  return LazyCheckpoint(
    directory,
    "clara",
    config,
    record["stage"],
    groups,
    plain,
    base,
    record.get("base_sha256"),
    tokenizer if epath.Path(tokenizer).exists() else None,
    native.hf_files(base or directory),
  )


def _open_peft(
  directory: str, base: str | None, dtype: str | None, allow: Sequence[str]
) -> LazyCheckpoint:
  folder = epath.Path(directory)
  single = peft.is_adapter(directory)
  adapter_directories = (
    {None: directory}
    if single
    else {r: str(folder / r) for r in ROLES if peft.is_adapter(str(folder / r))}
  )
  groups: dict[str, Any] = {}
  config, first = None, None
  for role, where in adapter_directories.items():
    adapter = peft.read(where, allow)
    recorded, clara, special = peft.read_clara(where)
    if role and recorded and role != recorded:
      raise CheckpointError(f"{where}: is the role {recorded!r}, not {role!r}: swapped adapters")
    role = role or recorded or "generator"
    if base is None:
      base = _adapter_base(where, adapter.base)
    if config is None:
      first = adapter
      model = native.base_config(
        base, dtype, allow, None if is_checkpoint(base) else adapter.tokenizer
      )
      if clara:  # the vocabulary is that of the tokenizer with which it was trained
        model = dataclasses.replace(model, vocab_size=clara.model.vocab_size)
      config = (
        dataclasses.replace(clara, model=model, lora=adapter.lora)
        if clara
        else ClaraConfig(model, adapter.lora)
      )
    if adapter.lora != config.lora:
      raise ConfigError(
        f"{where}/{peft.CONFIG_FILE}: {adapter.lora}, but another role has {config.lora}"
      )
    if set(adapter.whole) != set(first.whole) or any(
      (adapter.whole[n] != first.whole[n]).any() for n in first.whole
    ):
      raise ConfigError(
        f"{where}: its embedding or head is not that of {first.directory}: roles share them"
      )
    groups[role] = adapter.leaves(Clara(config), role)
    for name, value in (special or {}).items():
      if name == "memory_embedding":
        groups[name] = value
      else:
        groups.setdefault(SPECIAL, {})[name] = value
  plain, fresh = open_base(Clara(config), base, directory, allow)
  if SPECIAL not in groups:
    groups[SPECIAL] = fresh or huggingface.special_tokens(config)
    groups["memory_embedding"] = groups[SPECIAL]["embedding"][-config.num_memory_tokens - 3 : -3]
  if first.whole:
    groups[SPECIAL] = _whole_vocabulary(first, groups[SPECIAL], config)
  tokenizer = first.tokenizer or tokenizer_directory(base)
  return LazyCheckpoint(
    directory, "peft", config, "joint", groups, plain, base, None, tokenizer, native.hf_files(base)
  )


def _adapter_base(where: str, named: str | None) -> str:
  """The base that an adapter names: a directory as it stands or from the adapter's, or a model of
  the hub."""
  near = os.path.normpath(os.path.join(where, named or ""))
  if named and not os.path.exists(named) and os.path.exists(near):
    return near
  try:
    return local_directory(named or "")
  except CheckpointError as error:
    raise CheckpointError(
      f"{where}: its base {named!r} is not a directory here; name one with --base ({error})"
    ) from None


def _whole_vocabulary(
  adapter: peft.Adapter, special: Mapping[str, Any], config: ClaraConfig
) -> dict[str, np.ndarray]:
  """The embedding and the head that an adapter brings, with the rows of CLaRa's tokens behind the
  tokenizer's words."""
  words, tied = config.model.vocab_size, config.model.tie_embeddings
  whole = adapter.whole
  where = f"{adapter.directory}/{peft.ADAPTER_FILE}"
  if tied and (set(whole) != {EMBEDDING, HEAD} or (whole[EMBEDDING] != whole[HEAD]).any()):
    raise KeyMapError(
      f"{where}: has {sorted(whole)}, but the base's head is its embedding: only both, and equal, "
      f"can be read"
    )
  tables = dict(special)
  for name, ours, axis in ((EMBEDDING, "embedding", 0), (HEAD, "head", 1)):
    if name not in whole or (tied and ours == "head"):
      continue
    value = whole[name]
    if value.ndim != 2 or value.shape[0] < words or value.shape[1] != config.model.width:
      raise KeyMapError(
        f"{where}: {name} has the shape {value.shape}, expected {(words, config.model.width)} by "
        f"tokenizer and base"
      )
    rows = lazy.read(special[ours])
    mine = (
      rows[-config.num_memory_tokens - 3 :]
      if axis == 0
      else rows[:, -config.num_memory_tokens - 3 :]
    )
    tables[ours] = np.concatenate(
      [value[:words] if axis == 0 else value[:words].T, mine.astype(value.dtype)], axis
    )
  return tables


def open_base(
  model: Clara, base: str | None, where: str, allow: Sequence[str] = (), whole: bool = False
) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """A base from a Hugging Face directory or a checkpoint of ours that holds one: (leaves without
  special tokens, these if it has them).

  Args:
    model: what is to be made of it.
    base: its directory.
    where: of whom, for messages.
    allow: unknown fields of config.json that are accepted.
    whole: the checkpoint brings a vocabulary of its own.

  Raises:
    CheckpointError: it is neither.
    ConfigError: its vocabulary is smaller than the configuration's.
  """
  if base is None:
    raise CheckpointError(f"{where}: names no base; give one with --base (or config.base)")
  if is_checkpoint(base):
    weights = native.open_weights(base)
    if "base" not in weights:
      raise CheckpointError(
        f"{base}: this checkpoint is no base; name the directory of a pretrain run or a Hugging "
        f"Face model"
      )
    return split_base(weights["base"], read_config(base)[0].clara, read_record(base)["stage"])
  if not (epath.Path(base) / families.CONFIG_FILE).exists():
    raise CheckpointError(f"{where}: its base {base} is not there; name one with --base")
  leaves = huggingface.read_base(model, base)
  rows = leaves["embedding"].shape[0]
  if not whole and rows < model.config.model.vocab_size:
    words = families.model_config(base, allow=allow).vocab_size
    if words < model.config.model.vocab_size:
      raise ConfigError(
        f"{base}: has {words} words, but the checkpoint was made for "
        f"{model.config.model.vocab_size}"
      )
  return leaves, None


def merged_base(opened: LazyCheckpoint, role: str | None) -> dict[str, Any]:
  """The plain base, or the base with special tokens, MEM rows and a role folded in."""
  if role is None:
    return opened.plain_base
  base = huggingface.merged(opened.weights["base"], opened.groups[role], opened.config.lora)
  embedding = base["embedding"]
  first, count = opened.config.model.vocab_size, opened.config.num_memory_tokens
  tail = embedding[(slice(first, embedding.shape[0]), slice(None))].copy()
  tail[:count] = lazy.read(opened.groups["memory_embedding"]).astype(tail.dtype)
  return {**base, "embedding": lazy.Rows(embedding, first, tail, 0)}


def load(
  directory: str,
  base: str | None = None,
  dtype: str | None = None,
  *,
  chat_template: str | None = None,
  allow: Sequence[str] = (),
  mesh: MeshConfig | Mesh | None = None,
) -> Checkpoint:
  """Reads a checkpoint of ours, of the released code or of PEFT, or a plain Hugging Face model.

  Args:
    directory, base, dtype, chat_template, allow: see `open_checkpoint`.
    mesh: the devices over which the weights are divided, each host reading its part only; None: the
      first device.

  Raises:
    CheckpointError, ConfigError, KeyMapError: naming the file, field or tensor; also where the mesh
      does not divide the model.
  """
  opened = open_checkpoint(directory, base, dtype, chat_template=chat_template, allow=allow)
  if opened.plain_base is not None:
    note_rounding(opened.plain_base, opened.config, opened.base or opened.directory)
  prompt_tokenizer = opened.prompt_tokenizer()
  base_sha256 = opened.check_base()
  # A plain model has none; whoever reads text alone needs none.
  if "memory_embedding" not in opened.groups:
    shape = (opened.config.num_memory_tokens, opened.config.model.width)
    opened.groups["memory_embedding"] = np.zeros(shape, np.float32)
  if isinstance(mesh, MeshConfig):
    mesh = sharding.make_mesh(mesh)
  model = Clara(prompt_tokenizer.config)
  if mesh is not None:
    model = _padded_vocabulary(model, mesh)
  weights = on_device(opened) if mesh is None else on_mesh(opened, model, mesh)
  return Checkpoint(model, prompt_tokenizer, weights, directory, opened.base, base_sha256, mesh)


def note_rounding(base: Mapping[str, Any], config: ClaraConfig, name: str) -> None:
  """Says that a base's weights are rounded to the compute dtype."""
  stored, compute_dtype = (
    huggingface.main_type(leaf for _, leaf in lazy.leaves(base)),
    config.model.param_dtype,
  )
  if compute_dtype == "bfloat16" and stored in ("float16", "float64"):
    log.warning(
      f"{name}: its weights are {stored} and are rounded to bfloat16; --dtype float32 keeps them"
    )


def on_device(opened: LazyCheckpoint) -> dict[str, Any]:
  """The weights of an opened checkpoint on the first device, in the types that the model wants.

  Raises:
    KeyMapError: a leaf has another shape than the model's.
  """
  arrays: dict[str, Any] = {}
  for _, have, want in _checked_leaves(opened):
    # Not bound to the device, so that a computation on a mesh may take them.
    arrays |= lazy.nest(
      {path: jnp.asarray(lazy.read(have[path]), want[path].dtype) for path in want}
    )
  return arrays


def on_mesh(opened: LazyCheckpoint, model: Clara, mesh: Mesh) -> dict[str, Any]:
  """The weights of an opened checkpoint, each leaf straight into its shards.

  Args:
    opened: the checkpoint.
    model: what they are for; its vocabulary may be padded over `tensor`.
    mesh: where they go.

  Raises:
    ConfigError: an axis does not divide over the mesh, by the parameter's name.
    KeyMapError: a leaf has another shape than the model's.
  """
  arrays: dict[str, Any] = {}
  for group, have, _ in _checked_leaves(opened):
    boxed = jax.eval_shape(lambda group=group: model.init_boxed(jax.random.key(0), (group,)))
    where = dict(lazy.leaves(sharding.tree_shardings(boxed, mesh)))
    like = dict(lazy.leaves(nn.meta.unbox(boxed)))
    arrays |= lazy.nest(
      {path: sharding.place(have[path], where[path], like[path]) for path in like}
    )
  return arrays


def _padded_vocabulary(model: Clara, mesh: Mesh) -> Clara:
  """The model with a vocabulary that divides over `tensor`."""
  sharding.check_heads(model.config.model, mesh)
  padded = dataclasses.replace(model.config.model, vocab_multiple=mesh.shape["tensor"])
  return dataclasses.replace(model, config=dataclasses.replace(model.config, model=padded))


def _checked_leaves(
  opened: LazyCheckpoint,
) -> Iterator[tuple[str, dict[tuple[str, ...], Any], dict[tuple[str, ...], Any]]]:
  """(group, its leaves by path, the shapes that the model wants)."""
  model, weights = Clara(opened.config), opened.weights
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tuple(weights)))
  for group, tree in weights.items():
    want = dict(lazy.leaves({group: shapes[group]}))
    have = dict(lazy.leaves({group: tree}))
    for path in {**want, **have}:
      a, b = (tuple(x[path].shape) if path in x else "none" for x in (want, have))
      if a != b:
        raise KeyMapError(f"{opened.directory}: {'/'.join(path)}: expected the shape {a}, got {b}")
    yield group, have, want


def tokenizer_directory(directory: str) -> str | None:
  """Where the tokenizer of a base, or a tokenizer, lies; None where there is none."""
  own = os.path.join(directory, "tokenizer") if is_checkpoint(directory) else directory
  return own if has_tokenizer(own) else None


def split_base(
  base: dict[str, Any], config: ClaraConfig, stage: str
) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """(a base of ours without special tokens, these). One that was trained here has them, a converted
  one (stage 'base') has none."""
  if stage == "base":
    return base, None
  first, last = config.model.vocab_size, config.vocab_size
  plain, special = dict(base), {}
  for name, axis in (("embedding", 0), ("head", 1)):
    if name in base:
      leaf = base[name]
      full = slice(None)
      special[name] = np.asarray(
        leaf[(slice(first, last), full) if axis == 0 else (full, slice(first, last))]
      )
      plain[name] = lazy.Rows(
        leaf, first, special[name][:0] if axis == 0 else special[name][:, :0], axis
      )
  return plain, special


def with_dtype(config: ClaraConfig, dtype: str | None) -> ClaraConfig:
  """The configuration with that compute and storage dtype, if there is one."""
  if dtype is None:
    return config
  return dataclasses.replace(
    config, model=dataclasses.replace(config.model, dtype=dtype, param_dtype=dtype)
  )
