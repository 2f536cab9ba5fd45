"""A checkpoint in memory: the method on texts."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clara_jax import sharding
from clara_jax.config import ROLES, ConfigError
from clara_jax.data.pipeline import pad_tokens
from clara_jax.data.prompt_tokenizer import PromptTokenizer
from clara_jax.errors import InputError
from clara_jax.inference.generate import make_generate
from clara_jax.model import Clara

# Texts are padded to multiples of these: few shapes, few compilations.
_TEXT_BUCKET, _PROMPT_BUCKET = 32, 128


class CheckpointError(InputError):
  """A directory is not a checkpoint, or not the one that is wanted."""


@dataclasses.dataclass
class Checkpoint:
  """A model, its weights and its tokenizer.

  `model` has the computations on arrays, as pure functions of `weights`; the methods here are the
  same on texts. Shapes: Q questions, N documents, M memory tokens of width D, K selected documents.

  Attributes:
    model: the computations, in the checkpoint's configuration.
    prompt_tokenizer: tokenizer and token layouts.
    weights: all groups, the base included.
    directory: where it came from.
    base: the base's path, None where the checkpoint is one.
    base_sha256: hash of the base's tensors.
    mesh: where the weights lie; None for one device.
  """

  model: Clara
  prompt_tokenizer: PromptTokenizer
  weights: dict[str, Any]
  directory: str = ""
  base: str | None = None
  base_sha256: str | None = None
  mesh: Mesh | None = None

  @property
  def layout(self) -> PromptTokenizer:
    """What `prompt_tokenizer` was called in version 0.1."""
    warnings.warn("layout is prompt_tokenizer now", DeprecationWarning, stacklevel=2)
    return self.prompt_tokenizer

  def jit(self, function: Callable, **options: Any) -> Callable:
    """`jax.jit` of a function of the weights, on the mesh where they lie (`sharding.jit`)."""
    return sharding.jit(function, self.mesh, **options)

  def require(self, *groups: str) -> None:
    """Refuses a checkpoint that lacks a role.

    Raises:
      CheckpointError: naming the role and those that it has.
    """
    require(self.directory, self.weights, *groups)

  def first(self, m: int | None) -> "Checkpoint":
    """The same, writing, scoring and reading the first m memory tokens of a document (None: all).

    Raises:
      ConfigError: m is not 1 to M.
    """
    return dataclasses.replace(
      self, model=self.model.first(m), prompt_tokenizer=self.prompt_tokenizer.first(m)
    )

  def compress(self, documents: Sequence[str]) -> jax.Array:
    """Memory tokens of documents: N texts -> [N, M, D]. Longer ones than `doc_max_length` are
    cut."""
    self.require("compressor")
    return self._encode(self._compress, self.prompt_tokenizer.documents(_texts(documents)))

  def encode_query(self, questions: Sequence[str]) -> jax.Array:
    """Memory tokens of questions, in the documents' space: Q texts -> [Q, M, D]."""
    self.require("query_reasoner")
    return self._encode(
      self._encode_query, [self.prompt_tokenizer.query(q) for q in _texts(questions)]
    )

  def score(self, query: jax.Array, memories: jax.Array) -> jax.Array:
    """Cosines: query [Q, M, D], memories [N, M, D] for all questions or [Q, N, M, D] -> [Q, N]."""
    return self.model.score(query, self._for_each(query, memories))

  def select(
    self, scores: jax.Array, memories: jax.Array, k: int | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """The K best documents of each question, in order of score: scores [Q, N], memories [N, M, D]
    or [Q, N, M, D] -> (their memory tokens [Q, K, M, D], their indices [Q, K]).

    Raises:
      ConfigError: K is more than N.
    """
    if (k or self.model.config.top_k) > scores.shape[-1]:
      raise ConfigError(f"k={k or self.model.config.top_k}: there are {scores.shape[-1]} documents")
    return self.model.select(scores, self._for_each(scores, memories), k)

  def answer(
    self, questions: Sequence[str], selected: jax.Array, max_new_tokens: int = 64
  ) -> list[str]:
    """Answers from memory tokens: Q questions, selected [Q, K, M, D] -> Q texts, decoded greedily.

    Raises:
      DataError: a question does not fit the prompt.
    """
    self.require("generator")
    tokenizer = self.prompt_tokenizer
    prompts = [
      tokenizer.answer_prompt(q, selected.shape[1], where=f"question {q!r:.60}").ids
      for q in _texts(questions)
    ]
    ids = self._generate(max_new_tokens)(
      self.weights, pad_tokens(prompts, tokenizer.pad_id, _PROMPT_BUCKET), selected
    )
    return [tokenizer.text(row) for row in jax.device_get(ids)]

  def _encode(self, encode: Any, inputs: list[Any]) -> jax.Array:
    return encode(self.weights, pad_tokens(inputs, self.prompt_tokenizer.pad_id, _TEXT_BUCKET))

  @staticmethod
  def _for_each(questions: jax.Array, memories: jax.Array) -> jax.Array:
    return (
      jnp.broadcast_to(memories, (len(questions), *memories.shape))
      if memories.ndim == 3
      else memories
    )

  @functools.cached_property
  def _compress(self):
    return self.jit(self.model.compress)

  @functools.cached_property
  def _encode_query(self):
    return self.jit(self.model.encode_query)

  @functools.cached_property
  def _generate(self):
    return functools.cache(
      lambda length: make_generate(
        self.model,
        length,
        self.prompt_tokenizer.end_ids,
        self.prompt_tokenizer.pad_id,
        mesh=self.mesh,
      )
    )


def require(directory: str, weights: dict[str, Any], *groups: str) -> None:
  """Refuses weights that lack a role.

  Raises:
    CheckpointError: naming the role and those that there are.
  """
  for group in groups:
    if group not in weights:
      raise CheckpointError(
        f"{directory}: has no {group.replace('_', ' ')}; its roles are "
        f"{[r for r in ROLES if r in weights] or 'none'}"
      )


def _texts(texts: Sequence[str]) -> Sequence[str]:
  """Refuses one string, which is a sequence of letters."""
  if isinstance(texts, str):
    raise TypeError(f"expected a sequence of texts, got one string: [{texts!r:.40}]")
  return texts
