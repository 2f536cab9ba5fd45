"""Dense retrievers as people publish them: sentence-transformers models (extra `dense`)."""

import json
import os
from collections.abc import Callable, Sequence

import numpy as np

from clara_jax.checkpoints.hub import local_directory
from clara_jax.checkpoints.workdir import CheckpointError
from clara_jax.config import ConfigError

Encode = Callable[[Sequence[str], str], np.ndarray]


def load(name: str) -> Encode:
  """An encoder (`candidates.Dense`) of a sentence-transformers model; its prompts for questions and
  documents are its own.

  Args:
    name: a directory, or an id in the hub's cache.

  Raises:
    ConfigError: it is no such model, or sentence-transformers is missing.
  """
  try:
    directory = local_directory(name, "directory of a sentence-transformers model")
  except CheckpointError as error:
    raise ConfigError(
      f"--retriever {error}; expected bm25, MODULE:FUNCTION, or such a model"
    ) from None
  try:
    with open(os.path.join(directory, "modules.json"), encoding="utf-8") as file:
      json.load(file)
  except (
    FileNotFoundError
  ):  # without it, sentence-transformers would take the mean of any model's states
    raise ConfigError(
      f"--retriever {name}: has no modules.json, which says how a sentence-transformers model pools"
    ) from None
  except (OSError, ValueError) as error:
    raise ConfigError(f"--retriever {os.path.join(directory, 'modules.json')}: {error}") from None
  try:
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging
  except ImportError:
    raise ConfigError(
      f"--retriever {name}: dense models need sentence-transformers: pip install 'clara_jax[dense]'"
    ) from None
  logging.disable_progress_bar()
  try:
    model = SentenceTransformer(directory, local_files_only=True)
  except Exception as error:  # whatever its modules raise on files that are not what they say
    raise ConfigError(
      f"--retriever {name}: not readable as a sentence-transformers model: {error}"
    ) from None

  def encode(texts: Sequence[str], kind: str) -> np.ndarray:
    """[n, d] float32."""
    encoder = model.encode_query if kind == "question" else model.encode_document
    return np.asarray(
      encoder(list(texts), show_progress_bar=False, convert_to_numpy=True), np.float32
    )

  return encode
