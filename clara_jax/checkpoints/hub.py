"""Models by their directory, by their id on the Hugging Face hub where its cache has them, or in a
bucket. Nothing is downloaded from the hub."""

import os
import re

import huggingface_hub
from huggingface_hub import constants

from clara_jax import buckets
from clara_jax.checkpoints.workdir import CheckpointError, is_checkpoint

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_directory(name: str, what: str = "directory") -> str:
  """The directory of a model: `name` itself, or the snapshot of the hub's model of that id.

  Args:
    name: a directory or an id.
    what: it should be, for the message.

  Raises:
    CheckpointError: there is neither.
  """
  name = os.fspath(name)
  if buckets.is_remote(name):
    return name if is_checkpoint(name) else buckets.local_copy(name)
  if os.path.exists(name):
    return name
  if not _ID.fullmatch(name):
    raise CheckpointError(f"{name}: no such {what}")
  try:
    return huggingface_hub.snapshot_download(name, local_files_only=True)
  except Exception:  # the library has many kinds for what is not there
    raise CheckpointError(
      f"{name}: no such {what} here, and no such model in the hub's cache "
      f"{constants.HF_HUB_CACHE}; if it is a "
      f"model of the hub, fetch it with: hf download {name}"
    ) from None
