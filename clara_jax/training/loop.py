"""A run of one stage: place the weights, take the steps, report, save, resume."""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath

from clara_jax.config import ClaraConfig, ConfigError, RunConfig
from clara_jax.data.pipeline import MemoryLookup, RowEncoder, evaluation_batches, training_batches
from clara_jax.data.schemas import Row
from clara_jax.data.tokens import Layout
from clara_jax.model import Clara, Weights
from clara_jax.sharding import activation_rules, batch_sharding, make_mesh, place, tree_shardings
from clara_jax.training import metrics as metrics_lib
from clara_jax.training import optim, stages
from clara_jax.training.checkpoint import Checkpointer, write_config
from clara_jax.training.step import evaluation_step, init_state, train_step


class NonFiniteLossError(RuntimeError):
  """The loss is not a number any more."""


@dataclasses.dataclass
class Result:
  """What a run leaves: all groups of weights, the last metrics, and the history of evaluations [(step, metrics)]."""

  weights: dict[str, Any]
  metrics: dict[str, float]
  evaluations: list[tuple[int, dict[str, float]]]
  seconds: float


def number_of_steps(config: RunConfig, rows: int) -> int:
  """`train.steps`, or as many as make `train.epochs` passes over the rows."""
  return config.train.steps or max(1, math.ceil(config.train.epochs * rows / config.data.batch_size))


def train(
    config: RunConfig,
    layout: Layout,
    before: Weights,
    rows: Sequence[Row],
    eval_rows: Sequence[Row] = (),
    *,
    workdir: str | None = None,
    memories: MemoryLookup | None = None,
    progress: bool = True,
    base_sha256: str | None = None,
    stop_at: int | None = None,
    on_evaluation: Callable[[int, dict[str, float]], None] | None = None,
) -> Result:
  """Runs one stage to its end; goes on from `workdir` where a run of the same configuration was stopped.

  Args:
    config: the run.
    layout: tokenizer and layouts.
    before: groups of weights to start from: the base (except in `pretrain`) and those of the stage before.
    rows: training rows.
    eval_rows: rows whose metrics are reported every `train.eval_every` steps, and at the start and the end.
    workdir: for checkpoints and metrics; None keeps nothing on disk.
    memories: memory tokens of documents by text; None compresses candidates in the step.
    progress: whether lines go to standard error.
    base_sha256: hash of the base's tensors, for the checkpoint's record.
    stop_at: stops (and saves) after this step, for tests and for time limits.
    on_evaluation: called with each evaluation.

  Raises:
    ConfigError: the configuration does not fit the data or the weights before.
    DataError: a row does not fit.
    NonFiniteLossError: naming the step.
  """
  settings, data = config.train, config.data
  stage = stages.get(settings.stage)
  trained = stage.trained(settings)
  if data.batch_size % settings.accumulate:
    raise ConfigError(f"data.batch_size={data.batch_size} is not a multiple of train.accumulate={settings.accumulate}")
  steps = number_of_steps(config, len(rows))
  model = Clara(config.clara)
  encoder = RowEncoder(layout, stage.data, data, config.clara.top_k, memories)
  batches = training_batches(rows, encoder, data.batch_size, settings.seed, data.prefetch)
  evaluation = evaluation_batches(eval_rows, encoder, data.eval_batch_size) if eval_rows else []
  optimizer = optim.make_optimizer(settings, steps, trained)
  mesh = make_mesh(config.mesh)
  if data.batch_size // settings.accumulate % (mesh.shape["data"] * mesh.shape["fsdp"]):
    raise ConfigError(f"data.batch_size={data.batch_size} / train.accumulate={settings.accumulate} does not divide over "
                      f"{mesh.shape['data'] * mesh.shape['fsdp']} devices")

  with jax.set_mesh(mesh), activation_rules():
    weights = _placed_weights(model, stage, config, before, mesh)
    trainable = {g: weights.pop(g) for g in trained}
    frozen = weights
    state_shardings = tree_shardings(
        jax.eval_shape(lambda: init_state({g: _boxed(model, g) for g in trained}, optimizer, jax.random.key(0))), mesh)
    state = jax.jit(functools.partial(init_state, optimizer=optimizer), out_shardings=state_shardings)(
        trainable, rng=jax.random.key(settings.seed))
    del trainable
    step_fn = jax.jit(functools.partial(train_step, model, stage, optimizer, settings.accumulate), donate_argnums=0,
                      out_shardings=(state_shardings, None))
    evaluation_fn = jax.jit(functools.partial(evaluation_step, model, stage))
    to_device = functools.partial(jax.device_put, device=batch_sharding(mesh))

    checkpointer = None
    if workdir is not None:
      write_config(workdir, config, base_sha256)
      layout.tokenizer.save_pretrained(str(epath.Path(workdir) / "tokenizer"))
      checkpointer = Checkpointer(workdir, settings.keep_checkpoints)
      if checkpointer.latest_step() is not None:
        state = checkpointer.restore(state, batches)
    reporter = metrics_lib.Reporter(
        epath.Path(workdir) / "metrics.jsonl" if workdir else None, settings.stage, steps, progress)
    carried = {g: w for g, w in frozen.items() if g != "base"}
    if "base" in frozen:
      carried["special_tokens"] = special_tokens(frozen["base"], config.clara)
    history: list[tuple[int, dict[str, float]]] = []
    last: dict[str, float] = {}
    step, end = int(state.step), min(steps, stop_at or steps)
    start = time.monotonic()

    def evaluate():
      total = None
      for batch in evaluation:
        total = metrics_lib.add(total, evaluation_fn(state.trainable, frozen, to_device(batch)))
      numbers = metrics_lib.values(total)
      history.append((step, numbers))
      reporter.write(step, numbers, "eval")
      if on_evaluation:
        on_evaluation(step, numbers)

    try:
      if evaluation and step < end:
        evaluate()
      running, since, rows_since = None, time.monotonic(), 0
      while step < end:
        state, numbers = step_fn(state, frozen, to_device(next(batches)))
        step += 1
        rows_since += data.batch_size
        running = metrics_lib.add(running, numbers)
        if step % settings.log_every == 0 or step == end:
          last = metrics_lib.values(running)
          now = time.monotonic()
          last |= {"learning_rate": float(optim.schedule(settings, steps)(step - 1)), "samples_per_second": rows_since / (now - since)}
          running, since, rows_since = None, now, 0
          reporter.write(step, last)
          if not np.isfinite(last["loss"]):
            raise NonFiniteLossError(f"{settings.stage}: the loss is {last['loss']} at step {step} (seed {settings.seed}); "
                                     f"the last checkpoint is kept")
        if evaluation and step < end and settings.eval_every and step % settings.eval_every == 0:
          evaluate()
        if checkpointer and step < end and step % settings.checkpoint_every == 0:
          checkpointer.save(state, carried, batches)
      if evaluation and (not history or history[-1][0] != step):
        evaluate()
    except KeyboardInterrupt:
      if checkpointer and checkpointer.latest_step() != int(state.step):
        checkpointer.save(state, carried, batches)
        checkpointer.wait()
        print(f"stopped at step {int(state.step)}; the same command goes on from there", file=sys.stderr)
      raise
    finally:
      reporter.close()
    if checkpointer:
      if checkpointer.latest_step() != step:
        checkpointer.save(state, carried, batches)
      checkpointer.close()
    return Result({**frozen, **state.trainable}, {"step": step, **last, **(history[-1][1] if history else {})}, history,
                  time.monotonic() - start)


def special_tokens(base: Weights, config: ClaraConfig) -> dict[str, jax.Array]:
  """The rows of CLaRa's own tokens, which the base on disk does not have: embedding [M+3, D] and, if it is not tied, head [D, M+3]."""
  first = config.model.vocab_size
  return {"embedding": base["embedding"][first:], **({"head": base["head"][:, first:]} if "head" in base else {})}


def _boxed(model: Clara, group: str) -> Any:
  return model.init_boxed(jax.random.key(0), (group,))[group]


def _placed_weights(model: Clara, stage: stages.Stage, config: RunConfig, before: Weights, mesh: jax.sharding.Mesh
                    ) -> dict[str, Any]:
  """Every group that the stage needs, on its devices: fresh ones are made there, given ones are copied."""
  key = jax.random.key(config.train.seed)

  def shardings(group):
    return tree_shardings(jax.eval_shape(lambda: _boxed(model, group)), mesh)

  def fresh(group):
    make = jax.jit(lambda: nn.meta.unbox(model.init(key, (group,))[group]), out_shardings=shardings(group))
    return make()

  groups = stages.starting_weights(stage, config.train, before, fresh)
  if "base" in before:
    groups["base"] = before["base"]
  elif "base" in stage.trains:
    groups["base"] = fresh("base")
  else:
    raise ConfigError(f"stage {stage.name!r} needs a base; set config.base")
  shapes = jax.eval_shape(lambda: model.init(key, tuple(groups)))
  for group, tree in groups.items():
    check_tree(tree, shapes[group], group)
  # A copy, because training donates its state and the caller keeps what it gave.
  return {g: jax.tree.map(lambda x, to, like: place(x, to, like.dtype), tree, shardings(g), shapes[g]) for g, tree in groups.items()}


def check_tree(tree: Any, expected: Any, name: str) -> None:
  """Compares names and shapes of two trees.

  Raises:
    ConfigError: naming the leaf, what was expected and what came.
  """
  def shapes(t):
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(t)}
  have, want = shapes(tree), shapes(expected)
  for path in {**want, **have}:
    if have.get(path) != want.get(path):
      raise ConfigError(f"weights {name}{path}: expected shape {want.get(path, 'none')}, got {have.get(path, 'none')}")
