"""One pure training step, and one of evaluation.

`TrainState` holds only what trains; the frozen rest is another argument that is not donated, so that a frozen 7 B base costs
neither optimiser slots nor copies.
"""

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


def init_state(trainable: dict[str, Any], optimizer: optax.GradientTransformation, rng: jax.Array) -> TrainState:
  """A state before the first step."""
  return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), rng)


def train_step(model: Clara, stage: Stage, optimizer: optax.GradientTransformation, accumulate: int, state: TrainState,
               frozen: Weights, batch: Batch, *, temperature: optax.Schedule | None = None) -> tuple[TrainState, Metrics]:
  """Gradient of the stage's loss over the batch, clipped and applied.

  Args:
    model, stage, optimizer, accumulate: static.
    state: donated by the caller's jit.
    frozen: the groups that do not train.
    batch: its first axis is B; with `accumulate` = C, micro-batches of B/C rows go one after another and give the gradient of the
      whole batch, exactly: every term of the loss is divided by its count over the whole batch.
    temperature: τ by step, where it is annealed.

  Returns:
    (the new state, metrics: the loss's terms, gradient norm, and the stage's own).
  """
  model = model.reading(batch)
  rng = jax.random.fold_in(state.rng, state.step)
  frozen = with_temperature(frozen, temperature, state.step)
  # Every C-th row, so that a device's rows stay on it.
  micro = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
  keys = jax.random.split(rng, accumulate)

  def totals(trainable, batch, key, counts):
    terms, metrics = stage.loss(model, trainable, frozen, batch, key)
    return sum(t.total / jnp.maximum(counts[name], 1e-9) for name, t in terms.items()), (terms, metrics)

  def count(args):
    # Counts depend on the data alone: XLA drops the rest of this pass.
    terms, _ = stage.loss(model, state.trainable, frozen, *args)
    return {name: t.count for name, t in terms.items()}

  if accumulate == 1:
    counts = count((jax.tree.map(lambda x: x[0], micro), keys[0]))
  else:
    counts = jax.tree.map(lambda c: c.sum(0), jax.lax.map(count, (micro, keys)))
  gradient = jax.value_and_grad(totals, has_aux=True)

  def add_micro(carry, args):
    (loss, (_, metrics)), grads = gradient(state.trainable, *args, counts)
    return jax.tree.map(jnp.add, carry, (grads, loss, metrics)), None

  first = jax.tree.map(lambda x: x[0], (micro, keys))
  if accumulate == 1:
    (loss, (_, metrics)), grads = gradient(state.trainable, *first, counts)
  else:
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda: (lambda out: (out[1], out[0][0], out[0][1][1]))(gradient(state.trainable, *first, counts))))
    (grads, loss, metrics), _ = jax.lax.scan(add_micro, zeros, (micro, keys))

  updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
  trainable = optax.apply_updates(state.trainable, updates)
  one = jnp.ones((), jnp.float32)
  metrics = {"loss": Mean(loss, one), "gradient_norm": Mean(optax.global_norm(grads), one),
             **{f"gradient_norm_{group}": Mean(optax.global_norm(tree), one) for group, tree in grads.items()}, **metrics}
  return TrainState(state.step + 1, trainable, opt_state, state.rng), metrics


def with_temperature(weights: Weights, temperature: optax.Schedule | None, step: jax.Array) -> Weights:
  """Weights with the τ of a step, where it is annealed."""
  return weights if temperature is None else {**weights, "temperature": {"log": jnp.log(temperature(step))[None]}}


def evaluation_step(model: Clara, stage: Stage, trainable: Weights, frozen: Weights, batch: Batch) -> Metrics:
  """The stage's metrics and diagnostics, without dropout or update."""
  model = model.reading(batch)
  terms, metrics = stage.loss(model, trainable, frozen, batch, None)
  if stage.diagnostics:
    metrics = metrics | stage.diagnostics(model, {**frozen, **trainable}, batch)
  loss = sum(t.value for t in terms.values())
  return {"loss": Mean(loss, jnp.ones(())), **metrics}
