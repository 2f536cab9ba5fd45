"""CLaRa (arXiv 2511.18659): documents as memory tokens, retrieval and answers in one space.

The method in five lines:

    memories  = compress(documents)                       # [B, N, M, D]   compressor, once and offline
    query     = encode_query(question)                    # [B, M, D]      query reasoner
    scores    = score(query, memories)                    # [B, N]         cosine
    selected  = select(scores, memories)                  # [B, K, M, D]   straight-through top-k
    logits    = answer_logits(prompt, selected)           # [B, A, V]      generator

All of it is one frozen decoder with three sets of LoRA weights. Weights are a plain dict of groups
(`GROUPS`); a role is an entry of that dict. Everything here is a pure function of its arguments.
"""  # noqa: E501

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from clara_jax import axes
from clara_jax.axes import Array
from clara_jax.batch import Batch, Prompt, Tokens
from clara_jax.config import ROLES, ClaraConfig, Role, check_memory_tokens
from clara_jax.errors import InputError
from clara_jax.nn.decoder import Decoder, KeyValues
from clara_jax.ops.estimators import Estimator
from clara_jax.ops.topk import straight_through_top_k

Weights = Mapping[str, Any]
GROUPS = ("base", "memory_embedding", *ROLES)


class MissingWeightsError(InputError):
  """A group of weights that a computation needs is not there."""


@dataclasses.dataclass(frozen=True)
class Clara:
  """The computations of the method for one configuration; holds no weights.

  Weights are a dict with the groups
    base: the decoder's parameters, special tokens' rows included;
    memory_embedding: [M, D] input embeddings of `<MEM0>` … `<MEM{M-1}>`;
    compressor, query_reasoner, generator: LoRA weights;
    temperature: {'log': log τ [1]}, where it is learned or annealed.

  Attributes:
    config: sizes.
    estimator: what teaches the scores in training; None: the straight-through top-k of
      `config.masking`.
    memory_tokens: m, how many of the M memory tokens are written, scored and read; None for all
      (`first`). In the shapes below, M is m.
  """

  config: ClaraConfig
  estimator: Estimator | None = None
  memory_tokens: int | None = None

  @property
  def num_memory_tokens(self) -> int:
    """m: memory tokens of a document."""
    return self.memory_tokens or self.config.num_memory_tokens

  @property
  def compression_rate(self) -> float:
    """Tokens of the longest document for each memory token."""
    return self.config.doc_max_length / self.num_memory_tokens

  def first(self, m: int | None) -> "Clara":
    """The same with the first m memory tokens (None: with all).

    The compressor is causal: these are exactly what it writes when it writes all M.

    Raises:
      ConfigError: m is not 1 to M.
    """
    check_memory_tokens(m, self.config)
    return dataclasses.replace(self, memory_tokens=m)

  def reading(self, batch: Batch) -> "Clara":
    """The same with as many memory tokens as a batch has."""
    return self if batch.memory_tokens is None else self.first(batch.memory_tokens)

  @functools.cached_property
  def decoder(self) -> Decoder:
    """The base with LoRA."""
    return Decoder(self.config.model, self.config.vocab_size, self.config.lora)

  @functools.cached_property
  def plain_decoder(self) -> Decoder:
    """The base alone."""
    return Decoder(self.config.model, self.config.vocab_size)

  # ---- weights -----------------------------------------------------------------------------------

  def init_boxed(self, rng: jax.Array, groups: tuple[str, ...] = GROUPS) -> dict[str, Any]:
    """Fresh weights whose leaves carry their logical axes (for shardings under
    `jax.eval_shape`)."""
    weights: dict[str, Any] = {}
    for index, group in enumerate(GROUPS):
      if group not in groups:
        continue
      key = jax.random.fold_in(rng, index)
      if group == "memory_embedding":
        init = nn.with_logical_partitioning(
          nn.initializers.normal(self.config.model.initializer_range), (axes.MEMORY, axes.WIDTH)
        )
        weights[group] = init(
          key, (self.config.num_memory_tokens, self.config.model.width), jnp.float32
        )
      else:
        x = jnp.zeros((1, 1, self.config.model.width), self.config.model.dtype)
        variables = (self.plain_decoder if group == "base" else self.decoder).init(key, x)
        weights[group] = variables["params" if group == "base" else "lora"]
    if "temperature" in groups:
      weights["temperature"] = {
        "log": nn.with_logical_partitioning(
          lambda _: jnp.full(1, jnp.log(self.config.temperature)), (None,)
        )(rng)
      }
    return weights

  def init(self, rng: jax.Array, groups: tuple[str, ...] = GROUPS) -> dict[str, Any]:
    """Fresh weights of the named groups."""
    return nn.meta.unbox(self.init_boxed(rng, groups))

  # ---- one pass of the decoder in a role ---------------------------------------------------------

  def memory_slot(self, ids: Int[Array, "*B L"]) -> tuple[Bool[Array, "*B L"], Int[Array, "*B L"]]:
    """For token ids of any shape: (whether it is a `<MEMi>`, i where it is and 0 elsewhere)."""
    slot = ids - self.config.model.vocab_size
    is_memory = (slot >= 0) & (slot < self.config.num_memory_tokens)
    return is_memory, jnp.where(is_memory, slot, 0)

  def embed(self, weights: Weights, ids: Int[Array, "*B L"]) -> Float[Array, "*B L D"]:
    """ids: [..., L] -> [..., L, D]; `<MEM…>` ids read `memory_embedding`, all others the base's
    table."""
    is_memory, slot = self.memory_slot(ids)
    table = _apply(self.plain_decoder, {"params": _group(weights, "base")}, ids, method="embed")
    rows = _group(weights, "memory_embedding")[slot]
    return jnp.where(is_memory[..., None], rows.astype(table.dtype), table)

  def hidden(
    self,
    weights: Weights,
    role: Role | None,
    x: Float[Array, "B L D"],
    *,
    positions: Int[Array, "B L"] | None = None,
    cache: KeyValues | None = None,
    dropout: jax.Array | None = None,
    return_kv: bool = False,
  ) -> tuple[Float[Array, "B L D"], KeyValues | None]:
    """Last hidden states of the decoder in a role (None: the plain base), and keys and values; see
    `Decoder.__call__`.

    `dropout` is the key of LoRA dropout; None turns it off.
    """
    variables = {"params": _group(weights, "base")}
    decoder = self.plain_decoder
    if role is not None:
      variables["lora"] = _group(weights, role)
      decoder = self.decoder
    rngs = None if dropout is None else {"dropout": dropout}
    return _apply(
      decoder,
      variables,
      x,
      positions,
      cache,
      deterministic=dropout is None,
      return_kv=return_kv,
      rngs=rngs,
    )

  def logits(
    self,
    weights: Weights,
    hidden: Float[Array, "*B D"],
    output_matrix: Float[Array, "D V"] | None = None,
  ) -> Float[Array, "*B V"]:
    """hidden: [..., D] -> next-token logits [..., V] float32; `output_matrix` where many calls
    share it."""
    return _apply(
      self.plain_decoder,
      {"params": _group(weights, "base")},
      hidden,
      output_matrix,
      method="logits",
    )

  def output_matrix(self, weights: Weights) -> Float[Array, "D V"]:
    """[D, V], the head (or the tied embedding)."""
    return _apply(self.plain_decoder, {"params": _group(weights, "base")}, method="output_matrix")

  # ---- the method --------------------------------------------------------------------------------

  def encode(
    self, weights: Weights, role: Role, texts: Tokens, dropout: jax.Array | None = None
  ) -> tuple[Float[Array, "B M D"], Float[Array, "B L D"]]:
    """Reads `<ENC> <s> text </s> MEM_0 … MEM_{M-1}` in a role (paper §3.1).

    Args:
      weights: see the class.
      role: 'compressor' or 'query_reasoner'.
      texts: ids [B, L]; the memory tokens are the last M real ones.
      dropout: key of LoRA dropout, None for none.

    Returns:
      (memory tokens [B, M, D], all last hidden states [B, L, D]).
    """
    hidden, _ = self.hidden(weights, role, self.embed(weights, texts.ids), dropout=dropout)
    return jnp.take_along_axis(hidden, self.memory_positions(texts)[..., None], axis=-2), hidden

  def memory_positions(self, texts: Tokens) -> Int[Array, "B M"]:
    """Where the memory tokens of encoder inputs stand: [B, M]."""
    m = self.num_memory_tokens
    return jnp.maximum(texts.lengths[..., None] - m, 0) + jnp.arange(m)

  def compress(
    self, weights: Weights, documents: Tokens, dropout: jax.Array | None = None
  ) -> Float[Array, "*B M D"]:
    """Memory tokens of documents: ids [..., L] -> [..., M, D]. Leading axes (batch, candidates) are
    free."""
    lead = documents.ids.shape[:-1]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(lead) :]), documents)
    memories, _ = self.encode(weights, "compressor", flat, dropout)
    return memories.reshape(*lead, *memories.shape[1:])

  def encode_query(
    self, weights: Weights, questions: Tokens, dropout: jax.Array | None = None
  ) -> Float[Array, "B M D"]:
    """Memory tokens of questions, in the documents' space: ids [B, L] -> [B, M, D] (paper §3.2)."""
    return self.encode(weights, "query_reasoner", questions, dropout)[0]

  def score(
    self, query: Float[Array, "B M D"], memories: Float[Array, "B N M D"]
  ) -> Float[Array, "B N"]:
    """Cosine of the flattened memory tokens, float32 (paper Eq. 3.1): [B, M, D], [B, N, M, D] ->
    [B, N]."""
    query = query.reshape(*query.shape[:-2], -1).astype(jnp.float32)
    memories = memories.reshape(*memories.shape[:-2], -1).astype(jnp.float32)
    if self.config.center_scores:
      memories = memories - memories.mean(axis=-2, keepdims=True)
    return jnp.einsum("bd,bnd->bn", _normalize(query), _normalize(memories))

  def select(
    self, scores: Float[Array, "B N"], memories: Float[Array, "B N M D"], k: int | None = None
  ) -> tuple[Float[Array, "B K M D"], Int[Array, "B K"]]:
    """The K best candidates with the straight-through gradient (paper Eq. 3.3, Algorithm 1;
    `ops/topk.py`).

    Args:
      scores: [B, N].
      memories: [B, N, M, D].
      k: K; by default the configuration's.

    Returns:
      (selected memories [B, K, M, D], indices [B, K] int32), in order of score.

    Raises:
      ValueError: if K > N.
    """
    config = self.config
    return jax.vmap(
      lambda s, m: straight_through_top_k(
        s, m, k or config.top_k, config.temperature, config.masking
      )
    )(scores, memories)

  def temperature(self, weights: Weights) -> float | jax.Array:
    """τ: the configuration's, or what it has come to by now."""
    return (
      jnp.exp(weights["temperature"]["log"][0])
      if "temperature" in weights
      else self.config.temperature
    )

  def splice(
    self, weights: Weights, ids: Int[Array, "B T"], memories: Float[Array, "B K M D"]
  ) -> Float[Array, "B T D"]:
    """Prompt embeddings with the memory slots filled: ids [B, T], memories [B, K, M, D] -> [B, T,
    D].

    The i-th `<MEM…>` id of a row takes the i-th memory token of its documents.
    """
    is_memory, _ = self.memory_slot(ids)
    flat = memories.reshape(memories.shape[0], -1, memories.shape[-1])
    order = jnp.clip(jnp.cumsum(is_memory, axis=-1) - 1, 0, flat.shape[1] - 1)
    table = _apply(self.plain_decoder, {"params": _group(weights, "base")}, ids, method="embed")
    filled = jnp.take_along_axis(flat, order[..., None], axis=1)
    return jnp.where(is_memory[..., None], filled.astype(table.dtype), table)

  def answer_states(
    self,
    weights: Weights,
    prompt: Prompt,
    memories: Float[Array, "B K M D"] | None,
    role: Role | None = "generator",
    dropout: jax.Array | None = None,
  ) -> Float[Array, "B A D"]:
    """Last hidden states at the label positions.

    Args:
      weights: see the class.
      prompt: [B, T] tokens with their label positions [B, A].
      memories: [B, K, M, D] for the memory slots; None for a prompt of plain text.
      role: the generator, or None for the plain base.
      dropout: key of LoRA dropout.

    Returns:
      [B, A, D].
    """
    ids = prompt.tokens.ids
    x = self.embed(weights, ids) if memories is None else self.splice(weights, ids, memories)
    hidden, _ = self.hidden(weights, role, x, dropout=dropout)
    return jnp.take_along_axis(hidden, prompt.label_positions[..., None], axis=1)

  def answer_logits(
    self,
    weights: Weights,
    prompt: Prompt,
    memories: Float[Array, "B K M D"] | None,
    role: Role | None = "generator",
    dropout: jax.Array | None = None,
  ) -> Float[Array, "B A V"]:
    """Logits [B, A, V] float32 at the label positions only, so that [B, T, V] is never formed; see
    `answer_states`."""
    return self.logits(weights, self.answer_states(weights, prompt, memories, role, dropout))


def _apply(module: nn.Module, *arguments: Any, **options: Any) -> Any:
  return module.apply(*arguments, **options)


def _group(weights: Weights, name: str) -> Any:
  if name not in weights:
    raise MissingWeightsError(f"weights lack the group {name!r}; there are {sorted(weights)}")
  return weights[name]


def _normalize(x: jax.Array) -> jax.Array:
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
