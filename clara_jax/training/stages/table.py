"""What a stage of training is, and the table of stages (paper §3)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax

from clara_jax import extensions
from clara_jax.batch import Batch
from clara_jax.config import ConfigError, Role, TrainConfig
from clara_jax.model import Clara, Weights
from clara_jax.training.metrics import Metrics

FRESH = "fresh"


class LossFn(Protocol):
  """The loss of a stage on one batch."""

  def __call__(
    self, model: Clara, trainable: Weights, frozen: Weights, batch: Batch, rng: jax.Array | None, /
  ) -> tuple[Metrics, Metrics]:
    """Computes the loss.

    Args:
      model: the method.
      trainable, frozen: groups of weights.
      batch: the rows.
      rng: key of dropout and of draws; None for evaluation.

    Returns:
      (terms, metrics) by name; the loss is the sum of the terms' values.
    """


DiagnosticsFn = Callable[[Clara, Weights, Batch], Metrics]


@dataclasses.dataclass(frozen=True)
class Stage:
  """One row of the table.

  Attributes:
    name: what `config.train.stage` says, unless it names a file (`FILE.py:STAGE`).
    data: what a batch holds: 'text' (documents as text in the prompt), 'given' (K documents) or
      'candidates' (N documents and the question on its own).
    loss: see `LossFn`.
    trains: groups of weights that are trained (`model.GROUPS`).
    starts: for each group that this stage needs, the groups of the previous stage's checkpoint that
      it may be copied from, in order of preference, with 'fresh' for new weights. The base is
      always the run's own.
    roles: the roles that its loss reads.
    selects: whether it selects K of the candidates by an estimator whose gradient reaches the
      scores.
    main_metric: the metric that is its loss, without terms of regularization.
    diagnostics: further metrics for evaluation only, too slow for every step.
    gradient_paths: what the gradient of the selection is made of, for `train.gradients_every`
      (`gradient_paths.py`).
  """

  name: str
  _: dataclasses.KW_ONLY
  data: Literal["text", "given", "candidates"]
  loss: LossFn
  trains: tuple[str, ...]
  starts: Mapping[str, tuple[str, ...]]
  roles: tuple[Role, ...] = ()
  selects: bool = False
  main_metric: str = "ce"
  diagnostics: DiagnosticsFn | None = None
  gradient_paths: Callable[..., Metrics] | None = None

  def value(
    self,
    model: Clara,
    trainable: Weights,
    frozen: Weights,
    batch: Batch,
    rng: jax.Array | None = None,
  ) -> jax.Array:
    """The loss of a batch, a scalar; arguments as `LossFn`."""
    terms, _ = self.loss(model.reading(batch), trainable, frozen, batch, rng)
    return sum(term.value for term in terms.values())  # type: ignore[return-value]

  def trained(self, config: TrainConfig) -> tuple[str, ...]:
    """The groups that train in this run, without those that the configuration freezes."""
    if unknown := set(config.freeze) - set(self.trains):
      raise ConfigError(
        f"train.freeze: {sorted(unknown)} do not train in stage {self.name!r}; "
        f"{list(self.trains)} do"
      )
    left = tuple(group for group in self.trains if group not in config.freeze)
    if not left:
      raise ConfigError(f"train.freeze leaves nothing to train in stage {self.name!r}")
    return left


STAGES: dict[str, Stage] = {}
BUILT_IN: set[str] = set()


def register(stage: Stage) -> Stage:
  """Adds a stage to the table.

  Raises:
    ConfigError: its name is one of clara_jax's own.
  """
  if stage.name in BUILT_IN:
    raise ConfigError(f"stage {stage.name!r}: is one of clara_jax's own; choose another name")
  STAGES[stage.name] = stage
  return stage


def get(name: str) -> Stage:
  """The stage of a name, or of `FILE.py:STAGE`.

  Raises:
    ConfigError: there is none.
  """
  if name in STAGES:
    return STAGES[name]
  stage = extensions.from_file(name, "train.stage")
  if stage is None:
    raise ConfigError(f"train.stage={name!r}: expected one of {sorted(STAGES)}, or FILE.py:STAGE")
  if not isinstance(stage, Stage):
    raise ConfigError(f"train.stage={name!r}: expected a Stage, got {type(stage).__name__}")
  return stage


def starting_weights(
  stage: Stage, config: TrainConfig, init_weights: Weights, fresh: Callable[[str], Any]
) -> dict[str, Any]:
  """The groups a stage starts from, base excepted.

  Args:
    stage: a row of the table.
    config: `fresh_generator` and `fresh_query_reasoner` override the table (the released code's
      instruct; the paper's ablation).
    init_weights: groups of the previous checkpoint.
    fresh: makes new weights of a group.

  Raises:
    ConfigError: the previous checkpoint lacks a group that this stage needs.
  """
  override = {name for name in ("generator", "query_reasoner") if getattr(config, f"fresh_{name}")}
  started = {}
  for group, sources in stage.starts.items():
    if group in override or sources == (FRESH,):
      started[group] = fresh(group)
      continue
    source = next((s for s in sources if s in init_weights), None)
    if source is None:
      raise ConfigError(
        f"stage {stage.name!r} starts its {group} from {' or '.join(sources)}, but the previous "
        f"checkpoint has only "
        f"{sorted(init_weights) or 'no weights'}; set config.init_from to a checkpoint that has it"
      )
    started[group] = init_weights[source]
  return started
