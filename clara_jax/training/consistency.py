"""Do the parts of a configuration fit each other, the stage and the mesh? Checks within one part
are in `config.py`."""

from collections.abc import Sequence

from jax.sharding import Mesh

from clara_jax import sharding
from clara_jax.config import ConfigError, RunConfig
from clara_jax.training.stages import STAGES, Stage


def check(config: RunConfig, stage: Stage, trained: Sequence[str], mesh: Mesh) -> None:
  """Refuses what contradicts itself.

  Args:
    config: the run.
    stage: its stage.
    trained: groups of weights that train.
    mesh: the devices.

  Raises:
    ConfigError: naming the fields.
  """
  _check_selection(config, stage)
  _check_batch(config, stage, mesh)
  quantization = config.clara.model.base_quantization
  if quantization != "none" and "base" in trained:
    raise ConfigError(
      f"clara.model.base_quantization={quantization!r}: stage {stage.name!r} trains the base"
    )
  sharding.check_heads(config.clara.model, mesh)


def _check_selection(config: RunConfig, stage: Stage) -> None:
  settings = config.train
  for name, is_set in (
    ("estimator", config.estimator),
    ("train.temperature_schedule", settings.temperature_schedule != "fixed"),
    ("train.gradients_every", settings.gradients_every),
  ):
    if is_set and not stage.selects:
      selecting = " and ".join(repr(s.name) for s in STAGES.values() if s.selects)
      raise ConfigError(f"{name}: stage {stage.name!r} selects no documents, {selecting} does")
  if settings.gradients_every and stage.gradient_paths is None:
    raise ConfigError(
      f"train.gradients_every: stage {stage.name!r} has no analysis of its gradient"
    )
  if config.estimator_args and not config.estimator:
    raise ConfigError("estimator_args: name config.estimator, too")
  if config.data.retrieve == "store" and not stage.selects:
    raise ConfigError(f"data.retrieve='store': stage {stage.name!r} takes the rows' own candidates")

  if config.data.expand and stage.data != "given":
    raise ConfigError(
      f"data.expand={config.data.expand}: stage {stage.name!r} chooses its documents in the step; "
      "train it in instruct"
    )


def _check_batch(config: RunConfig, stage: Stage, mesh: Mesh) -> None:
  data, accumulate = config.data, config.train.accumulate
  if data.batch_size % accumulate:
    raise ConfigError(
      f"data.batch_size={data.batch_size} is not a multiple of train.accumulate={accumulate}"
    )
  shards, rows = sharding.num_batch_shards(mesh), data.batch_size // accumulate
  if rows % shards:
    raise ConfigError(
      f"data.batch_size={data.batch_size} / train.accumulate={accumulate} does not divide over "
      f"the {shards} parts of mesh "
      f"{dict(mesh.shape)}; a larger mesh.tensor makes fewer parts"
    )
  brings_documents = stage.data == "given" or stage.data == "candidates" and not data.store
  if data.share_documents > 1 and brings_documents and rows % (4 * shards):
    raise ConfigError(
      f"data.share_documents={data.share_documents}: data.batch_size={data.batch_size} / "
      f"train.accumulate={accumulate} has "
      f"to be a multiple of 4 times the {shards} parts of mesh {dict(mesh.shape)}"
    )
