"""Greedy answers: one prefill and one compiled decode loop over a preallocated cache.

`make_generate` is the two in one program; `make_stream` stops every few tokens, so that answers can
be shown while they grow.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from clara_jax import axes, distributed, sharding
from clara_jax.batch import Tokens
from clara_jax.config import ModelConfig, Role
from clara_jax.model import Clara, Weights
from clara_jax.nn.decoder import EMPTY, KeyValues, extend, first_slots
from clara_jax.nn.partition import constrain


def empty_cache(config: ModelConfig, batch: int, slots: int) -> KeyValues:
  """A cache that holds no token, in the compute type."""
  shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
  names = (axes.LAYERS, axes.BATCH, axes.KV_HEADS, axes.LENGTH, None)
  return KeyValues(
    constrain(jnp.zeros(shape, config.dtype), names),
    constrain(jnp.zeros(shape, config.dtype), names),
    constrain(jnp.full((batch, slots), EMPTY, jnp.int32), (axes.BATCH, axes.LENGTH)),
  )


@struct.dataclass
class Decoding:
  """Answers on their way.

  Attributes:
    step: number of tokens of each answer so far (int32).
    token: [B] int32, the last of them.
    stopped: [B] bool, whether a row has ended.
    answer: [B, max_new_tokens] int32; `pad_id` beyond the end.
    lengths: [B] int32, of the prompts.
    log_p: [B] float32, log-probability of each answer's tokens so far, its end included.
    cache: everything before; the slots of the prompts come first, then one for each token of the
      answers.
  """

  step: jax.Array
  token: jax.Array
  stopped: jax.Array
  answer: jax.Array
  lengths: jax.Array
  log_p: jax.Array
  cache: KeyValues


@dataclasses.dataclass(frozen=True)
class Greedy:
  """Greedy decoding for one model.

  Attributes:
    model: the method.
    max_new_tokens: length of the longest answer.
    end_ids: tokens of which each ends a row.
    pad_id: fills a row after its end.
    role: the generator, or None for the plain base.
  """

  model: Clara
  max_new_tokens: int
  end_ids: tuple[int, ...]
  pad_id: int
  role: Role | None = "generator"

  def prefill_prefix(
    self, weights: Weights, ids: jax.Array, memories: jax.Array | None
  ) -> KeyValues:
    """Reads the beginning [T] of prompts once, for `prefill` of many; memories: [K, M, D] for its
    memory slots, or None."""
    x = self._embed(weights, ids[None], None if memories is None else memories[None])
    return self.model.hidden(weights, self.role, x, return_kv=True)[1]

  def prefill(
    self,
    weights: Weights,
    prompt: Tokens,
    memories: jax.Array | None,
    prefix_cache: KeyValues | None = None,
  ) -> Decoding:
    """Reads the prompts and chooses the first token of each answer.

    Args:
      weights: the model's.
      prompt: ids [B, T], right-padded.
      memories: [B, K, M, D] for the memory slots, or None.
      prefix_cache: tokens that all prompts begin with and that were read already
        (`prefill_prefix`); shorter than every prompt.
    """
    model, (batch, length) = self.model, prompt.ids.shape
    start = 0 if prefix_cache is None else prefix_cache.positions.shape[1]
    positions = jnp.broadcast_to(
      jnp.arange(start, length, dtype=jnp.int32), (batch, length - start)
    )
    cache = empty_cache(model.config.model, batch, length + self.max_new_tokens)
    x = self._embed(weights, prompt.ids, memories)[:, start:]
    if prefix_cache is None:
      hidden, read = model.hidden(weights, self.role, x, return_kv=True)
    else:
      cache = extend(cache, prefix_cache, 0)
      hidden, read = model.hidden(
        weights, self.role, x, positions=positions, cache=first_slots(cache, start)
      )
    # Padding is no token: the positions after a prompt belong to its answer.
    read = read._replace(positions=jnp.where(positions < prompt.lengths[:, None], positions, EMPTY))
    cache = extend(cache, read, start)
    last = jnp.take_along_axis(hidden, (prompt.lengths - 1 - start)[:, None, None], axis=1)[:, 0]
    first, log_p = _best(model.logits(weights, last))
    answer = jnp.full((batch, self.max_new_tokens), self.pad_id, jnp.int32).at[:, 0].set(first)
    return Decoding(jnp.int32(1), first, self._ends(first), answer, prompt.lengths, log_p, cache)

  def decode(self, weights: Weights, state: Decoding, until: jax.Array | int) -> Decoding:
    """Goes on until every row has stopped or has `until` tokens."""
    model, first_slot = self.model, state.cache.positions.shape[1] - self.max_new_tokens

    def unfinished(s):
      return (s.step < until) & ~s.stopped.all()

    def one(s):
      position = s.lengths + s.step - 1  # of the token chosen last
      hidden, new = model.hidden(
        weights,
        self.role,
        model.embed(weights, s.token[:, None]),
        positions=position[:, None],
        cache=s.cache,
      )
      # One slot for all rows, wherever their prompts end: a slice, not a scatter.
      cache = extend(s.cache, new, first_slot + s.step - 1)
      token, log_p = _best(model.logits(weights, hidden[:, 0]))
      token, log_p = (
        jnp.where(s.stopped, self.pad_id, token),
        jnp.where(s.stopped, s.log_p, s.log_p + log_p),
      )
      return Decoding(
        s.step + 1,
        token,
        s.stopped | self._ends(token),
        s.answer.at[:, s.step].set(token),
        s.lengths,
        log_p,
        cache,
      )

    return jax.lax.while_loop(unfinished, one, state)

  def __call__(
    self,
    weights: Weights,
    prompt: Tokens,
    memories: jax.Array | None,
    prefix_cache: KeyValues | None = None,
  ) -> jax.Array:
    """Whole answers: [B, max_new_tokens] int32; rows hold one of `end_ids` where they end and
    `pad_id` after it."""
    return self.scored(weights, prompt, memories, prefix_cache)[0]

  def scored(
    self,
    weights: Weights,
    prompt: Tokens,
    memories: jax.Array | None,
    prefix_cache: KeyValues | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """(whole answers, [B] log-probability of each one's tokens, its end included)."""
    state = self.decode(
      weights, self.prefill(weights, prompt, memories, prefix_cache), self.max_new_tokens
    )
    return state.answer, state.log_p

  def _ends(self, token):
    return jnp.isin(token, jnp.array(self.end_ids, jnp.int32))

  def _embed(self, weights, ids, memories):
    return (
      self.model.embed(weights, ids)
      if memories is None
      else self.model.splice(weights, ids, memories)
    )


def _best(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """[B, V] -> (the best tokens [B] int32, their log-probabilities [B])."""
  return jnp.argmax(logits, axis=-1).astype(jnp.int32), logits.max(-1) - jax.nn.logsumexp(
    logits, axis=-1
  )


def make_generate(
  model: Clara,
  max_new_tokens: int,
  end_ids: tuple[int, ...],
  pad_id: int,
  role: Role | None = "generator",
  mesh: Mesh | None = None,
):
  """Whole answers, compiled: (weights, prompt, memories, prefix_cache=None) -> ids [B,
  max_new_tokens]; see `Greedy`, and `sharding.jit` for the mesh."""
  return sharding.jit(Greedy(model, max_new_tokens, end_ids, pad_id, role).__call__, mesh)


def make_stream(greedy: Greedy, mesh: Mesh | None = None) -> Callable[..., Any]:
  """Answers that grow: (weights, prompt, memories, every, prefix_cache=None) -> iterator of ids [B,
  max_new_tokens] after the first token, and then after every `every` more of them."""
  prefill = sharding.jit(greedy.prefill, mesh, gather=False)
  decode = sharding.jit(greedy.decode, mesh, gather=False, donate_argnums=1)

  def stream(weights, prompt, memories, every, prefix_cache=None):
    state = prefill(weights, prompt, memories, prefix_cache)
    yield distributed.to_host(state.answer)
    until = 1
    while until < greedy.max_new_tokens and not distributed.to_host(state.stopped).all():
      until = min(until + every, greedy.max_new_tokens)
      state = decode(weights, state, until)
      yield distributed.to_host(state.answer)

  return stream
