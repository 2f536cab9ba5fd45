"""One pure training step, and one of evaluation.

`TrainState` holds only what trains; the frozen rest is another argument that is not donated, so
that a frozen 7 B base costs neither optimizer slots nor copies.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from clara_jax.batch import Batch
from clara_jax.model import Clara, Weights
from clara_jax.training.metrics import Mean, Metrics
from clara_jax.training.stages import Stage


@struct.dataclass
class TrainState:
  """What a step changes. `rng` is the run's key; a step uses `fold_in(rng, step)`."""

  step: jax.Array
  trainable: dict[str, Any]
  opt_state: optax.OptState
  rng: jax.Array


def init_state(
  trainable: dict[str, Any], optimizer: optax.GradientTransformation, rng: jax.Array
) -> TrainState:
  """A state before the first step."""
  return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), rng)


def train_step(
  model: Clara,
  stage: Stage,
  optimizer: optax.GradientTransformation,
  accumulate: int,
  state: TrainState,
  frozen: Weights,
  batch: Batch,
  *,
  temperature: optax.Schedule | None = None,
) -> tuple[TrainState, Metrics]:
  """Gradient of the stage's loss over the batch, clipped and applied.

  Args:
    model, stage, optimizer, accumulate: static.
    state: donated by the caller's jit.
    frozen: the groups that do not train.
    batch: its first axis is B; with `accumulate` = C, micro-batches of B/C rows go one after
      another and give the gradient of the whole batch, exactly: every term of the loss is divided
      by its count over the whole batch.
    temperature: τ by step, where it is annealed.

  Returns:
    (the new state, metrics: the loss's terms, gradient norm, and the stage's own).
  """
  model = model.reading(batch)
  rng = jax.random.fold_in(state.rng, state.step)
  frozen = with_temperature(frozen, temperature, state.step)

  def loss(trainable, batch, key, counts=None):
    terms, metrics = stage.loss(model, trainable, frozen, batch, key)
    return sum(
      t.total / jnp.maximum(t.count if counts is None else counts[name], 1e-9)
      for name, t in terms.items()
    ), metrics

  gradient = jax.value_and_grad(loss, has_aux=True)
  if accumulate == 1:
    (value, metrics), grads = gradient(state.trainable, batch, jax.random.split(rng, 1)[0])
  else:
    value, metrics, grads = _accumulated(
      gradient,
      state.trainable,
      micro_batches(batch, accumulate),
      jax.random.split(rng, accumulate),
      lambda *micro: stage.loss(model, state.trainable, frozen, *micro)[0],
    )

  updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
  trainable = optax.apply_updates(state.trainable, updates)
  one = jnp.ones((), jnp.float32)
  metrics = {
    "loss": Mean(value, one),
    "gradient_norm": Mean(optax.global_norm(grads), one),
    **{
      f"gradient_norm_{group}": Mean(optax.global_norm(tree), one) for group, tree in grads.items()
    },
    **metrics,
  }
  return TrainState(state.step + 1, trainable, opt_state, state.rng), metrics


def micro_batches(batch: Batch, count: int) -> Batch:
  """[B, ...] -> [count, B / count, ...]; each takes every count-th row, so that a device's rows
  stay on it."""
  return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def _accumulated(
  gradient: Callable[..., Any],
  trainable: Weights,
  batches: Batch,
  keys: jax.Array,
  terms: Callable[[Batch, jax.Array], Metrics],
) -> tuple[jax.Array, Metrics, Weights]:
  """Loss, metrics and gradient of all micro-batches together, one after another.

  A term of the loss is divided by its count over the whole batch, which has to be known before the
  first gradient: the terms are computed twice, but counts depend on the data alone, and XLA drops
  the rest of that pass.
  """
  counts = jax.lax.map(
    lambda micro: {name: t.count for name, t in terms(*micro).items()}, (batches, keys)
  )
  counts = jax.tree.map(lambda c: c.sum(0), counts)

  def one(micro):
    (value, metrics), grads = gradient(trainable, *micro, counts)
    return value, metrics, grads

  def add(total, micro):
    return jax.tree.map(jnp.add, total, one(micro)), None

  shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], (batches, keys)))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(add, zeros, (batches, keys))[0]


def gradient_paths_step(
  model: Clara,
  stage: Stage,
  state: TrainState,
  frozen: Weights,
  batch: Batch,
  *,
  temperature: optax.Schedule | None = None,
) -> Metrics:
  """What the gradient of the selection is made of on the batch of the coming step; arguments as
  `train_step`."""
  weights = with_temperature({**frozen, **state.trainable}, temperature, state.step)
  rng = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), 3)
  return stage.gradient_paths(model.reading(batch), weights, batch, rng)


def with_temperature(
  weights: Weights, temperature: optax.Schedule | None, step: jax.Array
) -> Weights:
  """Weights with the τ of a step, where it is annealed."""
  return (
    weights
    if temperature is None
    else {**weights, "temperature": {"log": jnp.log(temperature(step))[None]}}
  )


def evaluation_step(
  model: Clara, stage: Stage, trainable: Weights, frozen: Weights, batch: Batch
) -> Metrics:
  """The stage's metrics and diagnostics, without dropout or update."""
  model = model.reading(batch)
  terms, metrics = stage.loss(model, trainable, frozen, batch, None)
  if stage.diagnostics:
    metrics = metrics | stage.diagnostics(model, {**frozen, **trainable}, batch)
  loss = sum(t.value for t in terms.values())
  return {"loss": Mean(jnp.asarray(loss), jnp.ones(())), **metrics}
