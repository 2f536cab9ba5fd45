"""`clara convert`: any checkpoint to any format, tensor by tensor.

The destination is written beside its name and renamed at the end: a conversion that fails leaves
nothing there.
"""

import contextlib
import dataclasses
import logging
import math
import os
import resource
import shutil
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from clara_jax import buckets
from clara_jax.checkpoints import formats, gguf, huggingface, lazy, native, peft, upstream
from clara_jax.checkpoints import verify as verify_lib
from clara_jax.checkpoints.formats import SPECIAL, LazyCheckpoint, merged_base
from clara_jax.checkpoints.keymap import EMBEDDING, HEAD
from clara_jax.checkpoints.workdir import CheckpointError, write_config
from clara_jax.config import ROLES, RunConfig, TrainConfig
from clara_jax.data.tokenizer import load_tokenizer
from clara_jax.inference.checkpoint import require

log = logging.getLogger(__name__)

FORMATS = ("clara", "upstream", "peft", "hf")
# What a Hugging Face tokenizer may consist of, Mistral's own files included.
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "tokenizer.model",
  "tokenizer.model.v1",
  "tokenizer.model.v2",
  "tokenizer.model.v3",
  "tekken.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "chat_template.json",
  "additional_chat_templates",
)


@dataclasses.dataclass(frozen=True)
class ConvertReport:
  """parameters: written; peak_rss_bytes: of this process; verify: see `verify.py`, None where it
  was not asked for."""

  source: str
  to: str
  parameters: int
  seconds: float
  peak_rss_bytes: int
  verify: dict[str, Any] | None = None


def convert(
  source: str,
  destination: str,
  to: str,
  *,
  role: str | None = None,
  base: str | None = None,
  dtype: str | None = None,
  chat_template: str | None = None,
  allow: Sequence[str] = (),
  verify: bool = False,
) -> ConvertReport:
  """Converts a checkpoint.

  Args:
    source: a checkpoint of any kind (`formats.open_checkpoint`), or a GGUF file.
    destination: a directory that does not exist or is empty.
    to: 'clara'; 'upstream' (the released code's); 'peft' (one role, or a folder for each); 'hf' (a
      plain model: the base, with a role merged into it if one is named).
    role: for 'peft' and 'hf'.
    base: the source's base, where its own record does not lead to one.
    dtype: the base's weights are written in it; by default in their own.
    chat_template: takes the place of the tokenizer's.
    allow: unknown fields of config.json and adapter_config.json that are accepted.
    verify: compare what was written with what was read, and write parity.json beside it.

  Raises:
    CheckpointError, ConfigError, KeyMapError: naming the file, field or tensor. The destination is
      then as it was.
  """
  start = time.monotonic()
  if to not in FORMATS:
    raise CheckpointError(f"--to {to!r}: expected one of {list(FORMATS)}")
  final = buckets.absolute(destination)
  if buckets.is_remote(destination):
    if buckets.Objects(destination).listed():
      raise CheckpointError(f"{destination}: already exists; choose another destination")
  with contextlib.ExitStack() as stack:
    destination = stack.enter_context(buckets.written(destination))
    target = epath.Path(destination)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
      raise CheckpointError(f"{destination}: already exists; choose another destination")
    opened = (
      stack.enter_context(gguf.opened(source))
      if gguf.is_gguf(source)
      else formats.open_checkpoint(source, base, dtype, chat_template=chat_template, allow=allow)
    )
    opened.chat_template = chat_template
    if role is not None:
      if role not in ROLES:
        raise CheckpointError(f"--role {role!r}: expected one of {list(ROLES)}")
      require(source, opened.groups, role)
    if to in ("upstream", "peft"):
      require(
        source,
        opened.groups,
        *([role] if role else [] if set(ROLES) & set(opened.groups) else ["compressor"]),
      )
    opened.base_sha256 = (
      opened.check_base()
      if opened.base is not None and (to == "clara" or opened.base_sha256)
      else None
    )
    if dtype and opened.plain_base is not None:
      opened.plain_base = lazy.nest(
        {path: lazy.Cast(leaf, dtype) for path, leaf in lazy.leaves(opened.plain_base)}
      )
    unfinished = epath.Path(f"{os.path.normpath(destination)}.unfinished")
    if unfinished.exists():
      shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    try:
      parameters = _WRITERS[to](opened, str(unfinished), final, role)
      report = None
      if verify:
        report = verify_lib.verify(opened, str(unfinished), to, role)
      if target.exists():
        target.rmdir()
      os.rename(unfinished, target)
    except BaseException:
      shutil.rmtree(unfinished, ignore_errors=True)
      raise
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return ConvertReport(
    opened.kind, to, parameters, round(time.monotonic() - start, 2), peak, report
  )


class _Progress:
  """A line on standard error every ten seconds."""

  def __init__(self, tree: Any):
    self._total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for _, leaf in lazy.leaves(tree))
    self._done, self._last = 0, time.monotonic()

  def __call__(self, count: int) -> None:
    self._done += count
    if time.monotonic() - self._last > 10:
      self._last = time.monotonic()
      log.info(f"convert: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB")


def _count(tree: Any) -> int:
  return sum(math.prod(leaf.shape) for _, leaf in lazy.leaves(tree))


def _tokenizer(opened: LazyCheckpoint) -> Any:
  """The tokenizer with CLaRa's tokens, None where there is none."""
  return None if opened.tokenizer is None else opened.prompt_tokenizer().tokenizer


def _copy_tokenizer(opened: LazyCheckpoint, directory: str) -> None:
  """The files of a plain model's tokenizer as they are; another chat template takes the place of
  theirs."""
  if opened.tokenizer is None:
    log.warning(f"convert: {opened.directory} brings no tokenizer")
    return
  os.makedirs(directory, exist_ok=True)
  if opened.chat_template is None:
    huggingface.copy_files(opened.tokenizer, directory, TOKENIZER_FILES)
  else:
    tokenizer = load_tokenizer(opened.tokenizer)
    tokenizer.chat_template = opened.chat_template
    tokenizer.save_pretrained(directory)


def _to_clara(opened: LazyCheckpoint, directory: str, final: str, role: str | None) -> int:
  del role
  groups = dict(opened.groups)
  base_sha256 = opened.base_sha256
  # A model on its own becomes a base of ours; a source with a base goes on naming it.
  if opened.base is None:
    groups["base"] = opened.plain_base
    base_sha256 = native.write_weights(
      directory, groups, hashed="base", on_written=_Progress(groups)
    )
    if opened.hf_files:
      huggingface.keep_files(opened.hf_files, os.path.join(directory, native.HF_FOLDER))
  else:
    native.write_weights(directory, groups)
  tokenizer = os.path.join(directory, "tokenizer")
  clara = opened.config
  if not opened.groups:
    _copy_tokenizer(opened, tokenizer)
  elif opened.tokenizer is not None:
    prompt_tokenizer = opened.prompt_tokenizer()
    prompt_tokenizer.tokenizer.save_pretrained(tokenizer)
    clara = prompt_tokenizer.config
  config = RunConfig(
    clara,
    train=TrainConfig(stage="pretrain" if opened.stage == "base" else opened.stage),
    base=buckets.absolute(opened.base) if opened.base else None,
  )
  source = {
    "format": opened.kind,
    "name": os.path.basename(os.path.normpath(opened.directory)),
    "jax": jax.__version__,
  }
  write_config(directory, config, base_sha256, source, opened.stage, relative_to=final)
  return _count(groups)


def _to_upstream(opened: LazyCheckpoint, directory: str, final: str, role: str | None) -> int:
  del role
  base = opened.weights["base"]
  named = buckets.relative(opened.base or opened.directory, os.path.dirname(final))
  upstream.write(
    directory, opened.config, opened.groups, base, named, opened.stage, _tokenizer(opened)
  )
  return _count({r: opened.groups[r] for r in ROLES if r in opened.groups}) + _count(
    {name: base[name] for name in ("embedding", "head") if name in base}
  )


def _to_peft(opened: LazyCheckpoint, directory: str, final: str, role: str | None) -> int:
  special = {
    **(opened.groups.get(SPECIAL) or huggingface.special_tokens(opened.config)),
    "memory_embedding": opened.groups["memory_embedding"],
  }
  roles = [role] if role else [r for r in ROLES if r in opened.groups]
  tokenizer, whole = _tokenizer(opened), _own_vocabulary(opened)
  for name in roles:
    where = directory if role else os.path.join(directory, name)
    os.makedirs(where, exist_ok=True)
    base = buckets.relative(
      opened.base or opened.directory, final if role else os.path.join(final, name)
    )
    peft.write(where, name, opened.config, opened.groups[name], special, base, whole, tokenizer)
  return _count({name: opened.groups[name] for name in roles})


def _own_vocabulary(opened: LazyCheckpoint) -> dict[str, np.ndarray]:
  """Embedding and head where the checkpoint brings others than the base's, in the base's shapes, by
  their Hugging Face names."""
  words, special = opened.config.model.vocab_size, opened.groups.get(SPECIAL) or {}
  tables: dict[str, np.ndarray] = {}
  for name, ours, axis in ((EMBEDDING, "embedding", 0), (HEAD, "head", 1)):
    if ours not in special or special[ours].shape[axis] < words:
      continue
    base, mine = (
      np.moveaxis(lazy.read(leaf), axis, 0) for leaf in (opened.plain_base[ours], special[ours])
    )
    count = min(words, len(base))
    if (base[:count].astype(np.float32) != mine[:count].astype(np.float32)).any():
      tables[name] = np.concatenate([mine[:count], base[count:].astype(mine.dtype)])
  if tables and opened.config.model.tie_embeddings:
    tables[HEAD] = tables[EMBEDDING]
  return tables


def _to_hf(opened: LazyCheckpoint, directory: str, final: str, role: str | None) -> int:
  del final
  base = merged_base(opened, role)
  metadata = {"clara_role": role} if role else {}
  huggingface.write_model(
    directory,
    base,
    opened.config.model,
    _tokenizer(opened) if role else None,
    metadata,
    opened.hf_files,
    _Progress(base),
  )
  if role is None:
    _copy_tokenizer(opened, directory)
  return _count(base)


_WRITERS = {"clara": _to_clara, "upstream": _to_upstream, "peft": _to_peft, "hf": _to_hf}
