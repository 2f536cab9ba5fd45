"""What options name, opened: checkpoints, rows, answerers. Imports nothing heavy before it is
called."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from clara_jax.data.schemas import Row
  from clara_jax.inference.answer import Answerer
  from clara_jax.inference.checkpoint import Checkpoint

log = logging.getLogger(__name__)


def checkpoint(options: argparse.Namespace, *roles: str) -> Checkpoint:
  """`opened_here`, by several processes together where the options say so.

  Raises:
    ConfigError: not all of the options that this takes are named.
  """
  from clara_jax.config import ConfigError

  if getattr(options, "distributed", False) or getattr(options, "coordinator", None):
    if options.mesh is None:
      raise ConfigError("several processes: name --mesh, over which they divide the checkpoint")
    join_processes(options)
  elif named := [n for n in ("process", "processes") if getattr(options, n, None) is not None]:
    raise ConfigError(f"--{named[0]}: several processes need --coordinator, too")
  return opened_here(options, *roles)


def opened_here(options: argparse.Namespace, *roles: str) -> Checkpoint:
  """--checkpoint with the roles that it must have, for --memory-tokens where the command has
  that."""
  from clara_jax.compilation import enable_compilation_cache

  enable_compilation_cache()
  loaded = load(options.checkpoint, options.base, options)
  loaded.require(*roles)
  return first(loaded, options)


def load(directory: str, base: str | None, options: argparse.Namespace) -> Checkpoint:
  """A checkpoint, as --dtype, --chat-template, --allow-config and --mesh want it."""
  from clara_jax.checkpoints import formats

  return formats.load(
    directory,
    base,
    options.dtype,
    chat_template=chat_template(options),
    allow=options.allow_config,
    mesh=options.mesh,
  )


def join_processes(options: argparse.Namespace) -> None:
  """--distributed, --coordinator, --processes, --process; one process reports for all that hold a
  checkpoint together."""
  from clara_jax import distributed

  distributed.initialize(options.coordinator, options.processes, options.process)
  own = ("process", "run", "json")
  distributed.agree("options", {k: v for k, v in vars(options).items() if k not in own})
  if options.mesh is not None and not distributed.is_main():
    logging.getLogger("clara_jax").setLevel(logging.WARNING)


def main_only(report: Any) -> Any:
  """The report on the first process, None on the others."""
  from clara_jax import distributed

  return report if distributed.is_main() else None


def copy_outputs(options: argparse.Namespace, *names: str) -> None:
  """On every process but the first, the outputs that these options name become copies of its own:
  what was done before is read by all, and written by one."""
  from clara_jax import distributed

  if not distributed.is_main():
    private = tempfile.mkdtemp(prefix="clara-")
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    for name in names:
      if path := getattr(options, name):
        own = os.path.join(private, name)
        if os.path.isdir(path):
          shutil.copytree(path, own)
        elif os.path.exists(path):
          shutil.copyfile(path, own)
        setattr(options, name, own)
  distributed.barrier("outputs")


@contextlib.contextmanager
def outputs(options: argparse.Namespace, kinds: Mapping[str, str]) -> Iterator[None]:
  """Options that name what is written, where that is gs://…: a copy on this machine's disk while
  the command runs.

  Args:
    options: get the copies' paths.
    kinds: by option: 'file' or 'folder', which go on with what is there, or 'local', which a
      bucket cannot be.

  Raises:
    ConfigError: such an option.
  """
  from clara_jax import buckets

  with contextlib.ExitStack() as copies:
    for name, kind in kinds.items():
      path = getattr(options, name)
      if path is None or not buckets.is_remote(path):
        continue
      if kind == "local":
        from clara_jax.config import ConfigError

        raise ConfigError(f"{path}: has to be on a disk; copy it to the bucket when it is whole")
      copy = copies.enter_context(buckets.mirrored(path, is_file=kind == "file"))
      setattr(options, name, copy)
    yield


def first(loaded: Checkpoint, options: argparse.Namespace) -> Checkpoint:
  """The checkpoint for --memory-tokens; a number that it was not trained for is noted."""
  m, config = getattr(options, "memory_tokens", None), loaded.model.config
  truncated = loaded.first(m)
  if m and m not in (config.nested_memory or (config.num_memory_tokens,)):
    trained = (
      " or ".join(map(str, config.nested_memory)) or f"{config.num_memory_tokens}, all at once"
    )
    log.warning("note: --memory-tokens %d: %s was trained to read %s", m, loaded.directory, trained)
  return truncated


def chat_template(options: argparse.Namespace) -> str | None:
  """The text of --chat-template FILE."""
  if options.chat_template is None:
    return None
  from clara_jax.config import ConfigError

  try:
    with open(options.chat_template, encoding="utf-8-sig") as file:
      return file.read()
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(
      f"--chat-template {options.chat_template}: {getattr(error, 'strerror', None) or error}"
    ) from None


def answerer(options: argparse.Namespace) -> Answerer:
  """An answerer over --store."""
  from clara_jax.inference.answer import Answerer
  from clara_jax.memory.store import MemoryStore

  store = MemoryStore(options.store, memory_tokens=options.memory_tokens)
  # The store says how many are read.
  loaded = checkpoint(options, "compressor", "query_reasoner", "generator").first(None)
  return Answerer(
    loaded,
    store,
    top_k=options.top_k,
    max_new_tokens=options.max_new_tokens,
    expand=options.expand,
    merge=options.merge,
  )


def rows(options: argparse.Namespace, loaded: Checkpoint, *settings: str) -> list[Row]:
  """The first rows of --rows that can be answered in all settings."""
  from clara_jax.data import schemas
  from clara_jax.evaluation import datasets, evaluator
  from clara_jax.evaluation.settings import SETTINGS

  malformed = schemas.Malformed(options.max_malformed)
  usable: list[Row] = []
  for place, row in enumerate(datasets.read(options.rows, malformed)):
    if len(usable) == options.limit:
      break
    try:
      for name in settings:
        evaluator.check(row, SETTINGS[name], loaded.model.config.top_k, loaded.prompt_tokenizer)
      usable.append(row)
    except schemas.DataError as error:
      malformed.add(str(error), place)
  if not usable:
    raise schemas.DataError(f"{options.rows}: no row can be answered")
  return usable


def check_output_file(option: str, path: str | None) -> None:
  """Refuses what cannot be written before any work is done."""
  from clara_jax.config import ConfigError

  if path and os.path.isdir(path):
    raise ConfigError(f"{option} {path}: is a directory, expected the name of a file")
