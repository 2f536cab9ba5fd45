"""AdamW with the paper's schedules (its appendix on training), clipping, and a learning-rate factor
for each group of weights."""

from collections.abc import Mapping

import jax
import optax

from clara_jax.config import ConfigError, TrainConfig


def schedule(config: TrainConfig, steps: int) -> optax.Schedule:
  """Step -> learning rate: linear warm-up, then cosine (paper), linear or constant (upstream's
  joint script)."""
  peak = config.learning_rate
  warmup = max(1, round(config.warmup_fraction * steps)) if config.warmup_fraction else 0
  rest = max(1, steps - warmup)
  end = peak * config.final_learning_rate_fraction
  after = {
    "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final_learning_rate_fraction),
    "linear": lambda: optax.linear_schedule(peak, end, rest),
    "constant": lambda: optax.constant_schedule(peak),
  }[config.schedule]()
  if not warmup:
    return after
  return optax.join_schedules(
    [optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1)), after], [warmup]
  )


def temperature(config: TrainConfig, start: float, steps: int) -> optax.Schedule | None:
  """Step -> τ where it is annealed, by the same factor each step from `start` to
  `final_temperature`; else None."""
  if config.temperature_schedule != "annealed":
    return None
  return optax.exponential_decay(start, max(1, steps - 1), config.final_temperature / start)


def scale_groups(
  factors: Mapping[str, float], groups: tuple[str, ...]
) -> optax.GradientTransformation:
  """Multiplies the updates of each top-level group of the tree.

  Raises:
    ConfigError: a factor for a group that does not train.
  """
  if unknown := set(factors) - set(groups):
    raise ConfigError(
      f"train.learning_rate_factors: {sorted(unknown)} do not train here; {list(groups)} do"
    )

  def update(updates, state, params=None):
    del params
    return {
      g: jax.tree.map(lambda u, g=g: u * factors.get(g, 1.0), tree) for g, tree in updates.items()
    }, state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(
  config: TrainConfig, steps: int, groups: tuple[str, ...]
) -> optax.GradientTransformation:
  """Clip by the global norm, AdamW, group factors."""
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      schedule(config, steps), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay
    ),
    scale_groups(config.learning_rate_factors, groups),
  )
