"""Models by their directory, or by their id on the Hugging Face hub where its cache has them.
Nothing is downloaded."""

import os
import re

import huggingface_hub
from huggingface_hub import constants

from clara_jax.checkpoints.workdir import CheckpointError

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
  if "://" in name or os.path.exists(name):
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
