"""Estimators against the exact gradient: bias, variance, cosine and norm, with synthetic losses and
with a real generator's.

Axes: R instances (rows), N documents, K slots, T draws of an estimate.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clara_jax import sharding
from clara_jax.checkpoints.formats import Checkpoint
from clara_jax.config import ConfigError, DataConfig
from clara_jax.data.pipeline import RowEncoder, evaluation_batches
from clara_jax.data.schemas import Row
from clara_jax.experiments.laboratory import exact
from clara_jax.experiments.laboratory.variants import Variant
from clara_jax.ops.estimators import Estimator, leave_one_out
from clara_jax.training import stages

log = logging.getLogger(__name__)

WIDTH = 16  # of synthetic memories


@dataclasses.dataclass(frozen=True)
class AuditSetting:
  """A synthetic case.

  Attributes:
    loss: of `LOSSES`.
    n, k: N and K.
    temperature: τ.
    spread: standard deviation of the scores; spread/τ says how sharp the softmax is.
    correlation: of the memories with each other, 0 … 1.
  """

  loss: str = "answer"
  n: int = 8
  k: int = 2
  temperature: float = 0.02
  spread: float = 0.03
  correlation: float = 0.0


# One thing at a time, everything else as in `AuditSetting()`.
VARIED: dict[str, tuple[Any, ...]] = {
  "temperature": (0.005, 0.01, 0.02, 0.05, 0.1, 0.3),
  "spread": (0.003, 0.01, 0.03, 0.1, 0.3),
  "k": (1, 2, 3, 4),
  "n": (4, 6, 8, 12),
  "correlation": (0.0, 0.5, 0.9),
  "loss": ("linear", "answer", "two_hops", "quadratic"),
}

# rows [K, WIDTH] that are read, facts [2, WIDTH] that are asked for -> loss


def _mention_probability(rows, fact):
  """Probability that one of the rows tells a fact."""
  return 1 - jnp.prod(1 - jax.nn.sigmoid(10 * (rows @ fact) - 5))


LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "linear": lambda rows, facts: -(rows @ facts[0]).mean(),
  "answer": lambda rows, facts: -jnp.log(0.02 + 0.98 * _mention_probability(rows, facts[0])),
  "two_hops": lambda rows, facts: (
    -jnp.log(
      0.02 + 0.98 * _mention_probability(rows, facts[0]) * _mention_probability(rows, facts[1])
    )
  ),
  "quadratic": lambda rows, facts: jnp.square(rows.mean(0) - facts[0]).sum(),
}


def instances(
  setting: AuditSetting, count: int, seed: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Scores [R, N], unit memories [R, N, WIDTH], the facts that documents 0 and 1 tell [R, 2,
  WIDTH].

  Scores know nothing of the facts, as before training.
  """
  keys = jax.random.split(jax.random.key(seed), 3)
  scores = setting.spread * jax.random.normal(keys[0], (count, setting.n))
  common = jax.random.normal(keys[1], (count, 1, WIDTH))
  own = jax.random.normal(keys[2], (count, setting.n, WIDTH))
  memories = np.sqrt(setting.correlation) * common + np.sqrt(1 - setting.correlation) * own
  memories = memories / jnp.linalg.norm(memories, axis=-1, keepdims=True)
  return scores, memories, memories[:, :2]


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 7))
def estimates(
  estimator: Estimator,
  scores: jax.Array,
  memories: jax.Array,
  losses: Callable[..., jax.Array],
  k: int,
  temperature: jax.Array,
  keys: jax.Array,
  at_once: int,
  context: Any = (),
) -> jax.Array:
  """An estimator's gradients.

  Args:
    estimator: what is audited.
    scores: [R, N].
    memories: [R, N, ...].
    losses: (rows [R·S, K, ...], S, context) -> [R·S], S draws of an instance side by side.
    k: K.
    temperature: τ.
    keys: [T].
    at_once: draws that are computed together.
    context: arrays for `losses`.

  Returns:
    [T, R, N].
  """
  draws = estimator.samples

  def one(key):
    def objective(scores):
      choice = estimator(stages.repeat(scores, draws), k, temperature, key)
      draw_losses = losses(choice.rows(stages.repeat(memories, draws)), draws, context)
      term = 0.0 if choice.log_prob is None else leave_one_out(draw_losses, choice.log_prob, draws)
      return draw_losses.sum() / draws + term

    return jax.grad(objective)(scores)

  return jax.lax.map(one, keys, batch_size=at_once)


def summary(drawn: np.ndarray, truth: np.ndarray) -> dict[str, float]:
  """How far draws [T, R, N] are from the exact gradients [R, N].

  Returns:
    bias: ‖mean - exact‖ / ‖exact‖; bias_error: the same of chance alone, by the draws' variance.
    variance: trace of the covariance / ‖exact‖².
    cosine: of the mean and the exact one; cosine_of_one: of a single draw, on average.
    norm: ‖mean‖ / ‖exact‖.
    Medians over instances; a gradient of 0 has cosine 0.
  """
  mean, size = drawn.mean(0), np.maximum(np.linalg.norm(truth, axis=-1), 1e-30)
  variance = (drawn - drawn[:1]).var(0, ddof=1).sum(-1)  # 0 where all draws are the same

  def cosine(x):
    return (x * truth).sum(-1) / np.maximum(np.linalg.norm(x, axis=-1) * size, 1e-30)

  values = {
    "bias": np.linalg.norm(mean - truth, axis=-1) / size,
    "bias_error": np.sqrt(variance / len(drawn)) / size,
    "variance": variance / size**2,
    "cosine": cosine(mean),
    "cosine_of_one": cosine(drawn).mean(0),
    "norm": np.linalg.norm(mean, axis=-1) / size,
  }
  return {name: float(np.median(value)) for name, value in values.items()}


def exact_gradients(
  scores: np.ndarray,
  losses: np.ndarray,
  selections: np.ndarray,
  temperature: float,
  policies: Sequence[str] = tuple(exact.POLICIES),
) -> dict[str, np.ndarray]:
  """∂J/∂s [R, N] for each policy, in float64: scores [R, N], losses [R, P] of the choices [P,
  K]."""
  with jax.enable_x64(True):
    return {
      name: np.stack(
        [
          np.asarray(
            _exact_gradient(
              exact.POLICIES[name],
              np.float64(s),
              np.float64(v),
              selections,
              np.float64(temperature),
            )
          )
          for s, v in zip(scores, losses, strict=True)
        ]
      )
      for name in policies
    }


_exact_gradient = jax.jit(exact.exact_gradient, static_argnums=0)


def _synthetic(rows, draws, facts, loss):
  return jax.vmap(LOSSES[loss])(rows, stages.repeat(facts, draws))


# One object each: jit knows them again.
_LOSS_OF = {name: functools.partial(_synthetic, loss=name) for name in LOSSES}


def audit_setting(
  setting: AuditSetting,
  variants: Sequence[Variant],
  draws: int = 1000,
  count: int = 16,
  seed: int = 0,
) -> dict[str, dict[str, dict[str, float]]]:
  """Estimators in one synthetic case: name -> policy -> `summary`.

  Raises:
    ConfigError: an unknown loss, or more choices than can be enumerated.
  """
  if setting.loss not in LOSSES:
    raise ConfigError(f"loss={setting.loss!r}: expected one of {sorted(LOSSES)}")
  selections = exact.choices(setting.n, setting.k)
  scores, memories, facts = instances(setting, count, seed)
  of_choices = jax.jit(
    jax.vmap(lambda m, f: jax.vmap(lambda i: LOSSES[setting.loss](m[i], f))(selections))
  )(memories, facts)
  truths: dict[float, dict[str, np.ndarray]] = {}
  summaries = {}
  for variant in variants:
    tau = variant.temperature or setting.temperature
    if tau not in truths:
      truths[tau] = exact_gradients(np.asarray(scores), np.asarray(of_choices), selections, tau)
    keys = jax.random.split(jax.random.key(seed + 1), draws)
    drawn = np.asarray(
      estimates(
        variant.estimator,
        scores,
        memories,
        _LOSS_OF[setting.loss],
        setting.k,
        jnp.float32(tau),
        keys,
        min(draws, 100),
        facts,
      )
    )
    if not np.isfinite(drawn).all():
      raise ConfigError(f"{variant.name}: a gradient is not finite with {setting}")
    summaries[variant.name] = {
      policy: summary(drawn, truth) for policy, truth in truths[tau].items()
    }
  return summaries


def audit_generator(
  checkpoint: Checkpoint,
  rows: Sequence[Row],
  variants: Sequence[Variant],
  *,
  n: int = 6,
  draws: int = 32,
  seed: int = 0,
) -> dict[str, Any]:
  """The same with the answer's loss of a real generator, on a row's gold documents and others, N in
  all.

  Args:
    checkpoint: with query reasoner (or compressor, of which it is a copy at the start of the joint
      stage) and generator.
    rows: questions with at least N documents; K is the configuration's.
    variants: what is audited.
    n: N.
    draws: T.
    seed: of the draws and of the documents that are kept.

  Raises:
    ConfigError: more choices than can be enumerated.
    DataError: a row has fewer documents.
  """
  model, k = checkpoint.model, checkpoint.model.config.top_k
  selections = exact.choices(n, k)
  weights = dict(checkpoint.weights)
  weights.setdefault("query_reasoner", weights.get("compressor"))
  rng = np.random.default_rng(seed)

  def cut(row):
    others = [i for i in range(len(row.documents)) if i not in row.gold]
    kept = rng.permutation([*row.gold[:n], *others[: max(0, n - len(row.gold))]])
    return dataclasses.replace(
      row,
      documents=tuple(row.documents[i] for i in kept),
      gold=tuple(j for j, i in enumerate(kept) if i in row.gold),
      document_ids=(),
    )

  encoder = RowEncoder(
    checkpoint.prompt_tokenizer, "candidates", DataConfig(candidates=n, bucket=32), k
  )
  (batch,) = evaluation_batches([cut(row) for row in rows], encoder, len(rows))

  def cross_entropy(selected, draws, context):
    """Of each row, a mean over its label tokens: rows [R·S, K, M, D] -> [R·S]."""
    weights, prompt = context
    prompt = stages.repeat(prompt, draws)
    *_, sums = stages.answer_terms(
      model, weights, model.answer_states(weights, prompt, selected), prompt
    )
    return sums / prompt.label_weights.sum(-1)

  @checkpoint.jit
  def prepare(weights, batch):
    memories = model.compress(weights, batch.documents)
    scores = model.score(model.encode_query(weights, batch.question), memories)
    of_choices = jax.lax.map(
      lambda i: cross_entropy(memories[:, i], 1, (weights, batch.prompt)), jnp.asarray(selections)
    )
    return memories, scores, of_choices.T

  memories, scores, of_choices = prepare(weights, batch)
  summaries: dict[str, Any] = {}
  for variant in variants:
    tau, start = variant.temperature or model.config.temperature, time.monotonic()
    truths = exact_gradients(np.asarray(scores), np.asarray(of_choices), selections, tau)
    keys = jax.random.split(jax.random.key(seed + 1), draws)
    with sharding.context(checkpoint.mesh):
      drawn = np.asarray(
        estimates(
          variant.estimator,
          scores,
          memories,
          cross_entropy,
          k,
          jnp.float32(tau),
          keys,
          1,
          (weights, batch.prompt),
        )
      )
    summaries[variant.name] = {
      policy: summary(drawn, truth) for policy, truth in truths.items()
    } | {"seconds": round(time.monotonic() - start, 2)}
    log.info(f"gradients: {variant.name}, {time.monotonic() - start:.0f} s")
  return {
    "rows": len(rows),
    "n": n,
    "k": k,
    "choices": len(selections),
    "draws": draws,
    "temperature": model.config.temperature,
    "spread": float(np.asarray(scores).std(-1).mean()),
    "estimators": summaries,
  }
