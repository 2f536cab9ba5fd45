"""CLaRa (arXiv 2511.18659) in JAX: retrieval and answers in one space of continuous memory tokens.

    checkpoint = clara_jax.load("runs/joint")
    memories = checkpoint.compress(["Ada Lovelace wrote about the Analytical Engine.", "Charles Babbage designed it."])
    scores = checkpoint.score(checkpoint.encode_query(["Who designed the engine?"]), memories)
    selected, indices = checkpoint.select(scores, memories, k=1)
    print(checkpoint.answer(["Who designed the engine?"], selected))

`Clara` has the same computations on arrays, as pure functions of the weights (`clara_jax/model.py`,
the file to read first). Everything here is imported when it is first used.
"""  # noqa: E501

import importlib
import sys
from typing import TYPE_CHECKING, Any

from clara_jax import former

if TYPE_CHECKING:
  from clara_jax.checkpoints.formats import load
  from clara_jax.config import (
    ClaraConfig,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    config_dict,
  )
  from clara_jax.data.schemas import parse_row, read_documents, read_rows
  from clara_jax.inference.answer import Answerer
  from clara_jax.inference.checkpoint import Checkpoint
  from clara_jax.inference.compress import compress_corpus
  from clara_jax.memory.store import MemoryStore
  from clara_jax.model import Clara
  from clara_jax.ops import estimators
  from clara_jax.retrieval.index import Index
  from clara_jax.training import stages
  from clara_jax.training.config_file import load_config
  from clara_jax.training.hooks import Hook
  from clara_jax.training.run import train
  from clara_jax.training.trainer import Trainer

__version__ = "0.2.0"

sys.meta_path.append(former.Finder())

_MODULE_OF = {
  "Answerer": "inference.answer",
  "Checkpoint": "inference.checkpoint",
  "Clara": "model",
  "Hook": "training.hooks",
  "Index": "retrieval.index",
  "MemoryStore": "memory.store",
  "Trainer": "training.trainer",
  "compress_corpus": "inference.compress",
  "load": "checkpoints.formats",
  "load_config": "training.config_file",
  "parse_row": "data.schemas",
  "read_documents": "data.schemas",
  "read_rows": "data.schemas",
  "train": "training.run",
  **dict.fromkeys(
    (
      "ClaraConfig",
      "DataConfig",
      "LoraConfig",
      "MeshConfig",
      "ModelConfig",
      "RunConfig",
      "TrainConfig",
      "config_dict",
    ),
    "config",
  ),
}
_MODULES = {"estimators": "ops.estimators", "stages": "training.stages"}

__all__ = [
  "Answerer",
  "Checkpoint",
  "Clara",
  "ClaraConfig",
  "DataConfig",
  "Hook",
  "Index",
  "LoraConfig",
  "MemoryStore",
  "MeshConfig",
  "ModelConfig",
  "RunConfig",
  "TrainConfig",
  "Trainer",
  "compress_corpus",
  "config_dict",
  "estimators",
  "load",
  "load_config",
  "parse_row",
  "read_documents",
  "read_rows",
  "stages",
  "train",
]


def __getattr__(name: str) -> Any:
  if name in _MODULES:
    value = importlib.import_module(f"clara_jax.{_MODULES[name]}")
  elif name in _MODULE_OF:
    value = getattr(importlib.import_module(f"clara_jax.{_MODULE_OF[name]}"), name)
  else:
    raise AttributeError(f"module 'clara_jax' has no attribute {name!r}")
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
