"""Greedy answers: one prefill and one compiled decode loop over a preallocated cache."""

import functools

import jax
import jax.numpy as jnp

from clara_jax.batch import Tokens
from clara_jax.config import ModelConfig, Role
from clara_jax.model import Clara, Weights
from clara_jax.nn.decoder import KeyValues


def empty_cache(config: ModelConfig, batch: int, slots: int) -> KeyValues:
  """A cache of zeros, [Y, B, S, G, P] in the compute type."""
  shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
  return KeyValues(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def generate(model: Clara, weights: Weights, prompt: Tokens, memories: jax.Array | None, max_new_tokens: int, eos_id: int,
             pad_id: int, role: Role | None = "generator") -> jax.Array:
  """Greedy continuations; jit-able with everything but the arrays static (`make_generate`).

  Args:
    model: the method.
    weights: its weights.
    prompt: ids [B, T], right-padded.
    memories: [B, K, M, D] for the memory slots, or None.
    max_new_tokens: length of the answer; the loop ends when every row has stopped.
    eos_id: ends a row.
    pad_id: fills a row after its end.
    role: the generator, or None for the plain base.

  Returns:
    [B, max_new_tokens] int32; rows hold `eos_id` where they end and `pad_id` after it.
  """
  batch, length = prompt.ids.shape
  x = model.embed(weights, prompt.ids) if memories is None else model.splice(weights, prompt.ids, memories)
  positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
  cache = empty_cache(model.config.model, batch, length + max_new_tokens)
  hidden, cache = model.hidden(weights, role, x, positions=positions, cache=cache)
  last = jnp.take_along_axis(hidden, (prompt.lengths - 1)[:, None, None], axis=1)[:, 0]
  first = jnp.argmax(model.logits(weights, last), axis=-1).astype(jnp.int32)
  answer = jnp.full((batch, max_new_tokens), pad_id, jnp.int32).at[:, 0].set(first)

  def unfinished(state):
    step, _, stopped, _, _ = state
    return (step < max_new_tokens) & ~stopped.all()

  def decode(state):
    # The token chosen last stands at position lengths + step - 1; its slot in the cache held padding until now.
    step, token, stopped, answer, cache = state
    position = (prompt.lengths + step - 1)[:, None]
    hidden, cache = model.hidden(weights, role, model.embed(weights, token[:, None]), positions=position, cache=cache)
    token = jnp.argmax(model.logits(weights, hidden[:, 0]), axis=-1).astype(jnp.int32)
    token = jnp.where(stopped, pad_id, token)
    return step + 1, token, stopped | (token == eos_id), answer.at[:, step].set(token), cache

  state = (jnp.int32(1), first, first == eos_id, answer, cache)
  return jax.lax.while_loop(unfinished, decode, state)[3]


def make_generate(model: Clara, max_new_tokens: int, eos_id: int, pad_id: int, role: Role | None = "generator"):
  """`generate` compiled: (weights, prompt, memories) -> ids."""
  return jax.jit(functools.partial(
      _generate, model=model, max_new_tokens=max_new_tokens, eos_id=eos_id, pad_id=pad_id, role=role))


def _generate(weights, prompt, memories, **static):
  return generate(static.pop("model"), weights, prompt, memories, **static)
