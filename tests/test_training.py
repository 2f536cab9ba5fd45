"""Stages, resume, accumulation, and what freezes."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax.checkpoints import workdir
from clara_jax.checkpoints.workdir import CheckpointError
from clara_jax.config import ConfigError, TrainConfig
from clara_jax.data.pipeline import RowEncoder, evaluation_batches
from clara_jax.data.schemas import DataError
from clara_jax.model import Clara
from clara_jax.testing import tiny
from clara_jax.training import optim, program, stages, trainer
from clara_jax.training.metrics import Mean
from clara_jax.training.step import init_state, train_step


def train(stage, workdir=None, stop_at=None, before=None, config=None, **fields):
  config = config or tiny.run_config(stage, **fields)
  return trainer.Trainer(
    config,
    tiny.prompt_tokenizer(),
    before if before is not None else tiny.weights(),
    tiny.rows(stage),
    tiny.rows(stage)[:10],
    workdir=workdir,
    progress=False,
    stop_at=stop_at,
  ).run()


def changed(before, after):
  return {
    g
    for g in before
    if any(
      (np.asarray(a) != np.asarray(b)).any()
      for a, b in zip(jax.tree.leaves(before[g]), jax.tree.leaves(after[g]), strict=True)
    )
  }


@pytest.mark.parametrize(
  "stage, trains",
  [
    ("pretrain", {"base"}),
    ("scp", {"compressor", "generator", "memory_embedding"}),
    ("instruct", {"compressor", "generator"}),
    ("joint", {"query_reasoner", "generator"}),
    ("contrastive", {"query_reasoner"}),
  ],
)
def test_only_the_stage_s_groups_change(stage, trains):
  before = tiny.weights()
  result = train(stage, before=before)
  assert np.isfinite(result.metrics["loss"])
  assert trains <= set(result.weights)
  if stage in ("pretrain", "scp"):  # these start afresh
    assert changed({"base": before["base"]}, result.weights) == (
      {"base"} if stage == "pretrain" else set()
    )
    return
  kept = {g: w for g, w in before.items() if g in result.weights}
  assert changed(kept, result.weights) == trains


def test_training_lowers_the_loss():
  result = train("contrastive", steps=30)
  losses = [numbers["loss"] for _, numbers in result.evaluations]
  assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", ["joint"])
def test_resume_is_exact(tmp_path, stage):
  straight = train(stage, steps=6)
  train(stage, str(tmp_path), stop_at=3, steps=6)
  resumed = train(stage, str(tmp_path), steps=6)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(straight.weights),
    jax.tree.leaves(resumed.weights),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def test_another_configuration_is_refused(tmp_path):
  # A run that never saved a step holds nothing.
  workdir.write_config(str(tmp_path), tiny.run_config("contrastive", learning_rate=0.7))
  train("contrastive", str(tmp_path), stop_at=1)
  with pytest.raises(CheckpointError, match="train.learning_rate"):
    train("contrastive", str(tmp_path), learning_rate=0.5)


@pytest.mark.parametrize("stage", ["scp"])  # two terms with counts of their own
def test_accumulation_gives_the_gradient_of_the_whole_batch(stage):
  config = dataclasses.replace(
    tiny.config(), lora=dataclasses.replace(tiny.config().lora, dropout=0.0)
  )
  row = stages.get(stage)
  optimizer = optim.make_optimizer(tiny.run_config(stage).train, 4, row.trains)
  weights = tiny.weights()
  encoder = RowEncoder(tiny.prompt_tokenizer(), row.data, tiny.run_config(stage).data, 2)
  batch = evaluation_batches(tiny.rows(stage)[:8], encoder, 8)[0]
  states = []
  for accumulate in (1, 4):
    state = init_state({g: weights[g] for g in row.trains}, optimizer, jax.random.key(0))
    step = jax.jit(functools.partial(train_step, Clara(config), row, optimizer, accumulate))
    state, metrics = step(state, {g: w for g, w in weights.items() if g not in row.trains}, batch)
    states.append((state.trainable, float(metrics["loss"].value)))
  (one, loss_one), (four, loss_four) = states
  assert loss_one == pytest.approx(loss_four, rel=1e-5)
  # Adam's first step is the gradient's sign: compare where the gradient is not noise.
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
    assert float((jnp.abs(a - b) > 1e-4).mean()) < 0.01


def test_one_trace_for_many_steps(monkeypatch):
  chex.clear_trace_counter()
  monkeypatch.setattr(program, "train_step", chex.assert_max_traces(n=1)(program.train_step))
  train("joint", steps=5)


def test_a_new_stage_is_one_function_and_one_line():
  def distance(model, trainable, frozen, batch, rng):
    memories = model.compress({**frozen, **trainable}, batch.documents, rng)
    value = Mean.of(jnp.square(memories))
    return {"size": value}, {"size": value}

  stages.register(
    stages.Stage(
      "shrink",
      data="given",
      loss=distance,
      trains=("compressor",),
      starts={"memory_embedding": ("memory_embedding",), "compressor": ("compressor",)},
    )
  )
  try:
    config = tiny.run_config("shrink", steps=10)
    result = trainer.Trainer(
      config,
      tiny.prompt_tokenizer(),
      tiny.weights(),
      tiny.rows("instruct"),
      tiny.rows("instruct")[:8],
      progress=False,
    ).run()
    assert result.evaluations[-1][1]["size"] < result.evaluations[0][1]["size"]
  finally:
    del stages.STAGES["shrink"]


def test_a_trainer_runs_once():
  tiny_trainer = trainer.Trainer(
    tiny.run_config("joint", steps=1),
    tiny.prompt_tokenizer(),
    tiny.weights(),
    tiny.rows("joint")[:8],
    progress=False,
  )
  for call in (tiny_trainer.evaluate, tiny_trainer.save):
    with pytest.raises(RuntimeError, match="is not at work"):
      call()
  tiny_trainer.run()
  with pytest.raises(RuntimeError, match="has run"):
    tiny_trainer.run()
  with pytest.raises(ConfigError, match="nowhere to save"):
    tiny_trainer.save()


def test_the_generator_learns_from_the_joint_stage_without_labels():
  # The gold positions are a metric only: without them the very same parameters come out.
  rows = tiny.rows("joint")
  blind = [dataclasses.replace(r, gold=()) for r in rows]
  a, b = (
    trainer.Trainer(
      tiny.run_config("joint"), tiny.prompt_tokenizer(), tiny.weights(), r, progress=False
    )
    .run()
    .weights
    for r in (rows, blind)
  )
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def test_nested_dropout_keeps_a_first_part():
  selected = jnp.ones((400, 4, 2, 3))
  kept = np.asarray(stages.nested_dropout(selected, 0.5, jax.random.key(0)))[..., 0, 0]
  # Never a gap, never nothing.
  assert (np.diff(kept, axis=1) <= 0).all() and (kept[:, 0] == 1).all()
  counts = np.bincount(kept.sum(1).astype(int), minlength=5) / 400
  np.testing.assert_allclose(counts, [0, 1 / 6, 1 / 6, 1 / 6, 1 / 2], atol=0.07)
  one = jnp.ones((8, 1, 2, 3))
  np.testing.assert_array_equal(stages.nested_dropout(one, 1.0, jax.random.key(0)), one)


def test_nested_dropout_is_for_training_only():
  model = Clara(dataclasses.replace(tiny.config(), nested_dropout=1.0))
  row = stages.get("joint")
  encoder = RowEncoder(tiny.prompt_tokenizer(), row.data, tiny.run_config("joint").data, 2)
  batch = evaluation_batches(tiny.rows("joint")[:8], encoder, 8)[0]
  weights = tiny.weights()
  losses = [
    float(row.loss(m, weights, {}, batch, rng)[0]["ce"].value)
    for m in (model, Clara(tiny.config()))
    for rng in (None, jax.random.key(0))
  ]
  assert losses[0] == losses[2] and losses[1] != losses[3]


@pytest.mark.parametrize("group", ["generator", "query_reasoner"])
def test_a_role_may_start_afresh(group):
  before = tiny.weights()
  starting_weights = stages.starting_weights(
    stages.get("joint"),
    TrainConfig(stage="joint", **{f"fresh_{group}": True}),
    before,
    lambda name: f"fresh {name}",
  )
  assert starting_weights.pop(group) == f"fresh {group}"
  assert all(weights is before[name] for name, weights in starting_weights.items())


@pytest.mark.parametrize(
  "fields, error, message",
  [
    ({"stage": "nothing"}, ConfigError, "train.stage='nothing'"),
    ({"freeze": ("compressor",)}, ConfigError, "train.freeze"),
    ({"freeze": ("query_reasoner", "generator")}, ConfigError, "leaves nothing to train"),
    ({"learning_rate_factors": {"base": 0.1}}, ConfigError, "learning_rate_factors"),
    ({"accumulate": 3}, ConfigError, "multiple of train.accumulate"),
  ],
)
def test_bad_settings(fields, error, message):
  with pytest.raises(error, match=message):
    train("joint", config=tiny.run_config(**{"stage": "joint", **fields}))


def test_bad_data():
  config = tiny.run_config("joint")
  with pytest.raises(DataError, match="data.candidates=50"):
    train(
      "joint",
      config=dataclasses.replace(config, data=dataclasses.replace(config.data, candidates=50)),
    )
  with pytest.raises(DataError, match="fewer than one batch"):
    train(
      "joint",
      config=dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=5000)),
    )
  weights = tiny.weights()
  del weights["compressor"], weights["query_reasoner"]
  with pytest.raises(ConfigError, match="starts its compressor from compressor"):
    train("joint", before=weights)


def test_schedule_warms_up_and_decays():
  config = tiny.run_config("scp", warmup_fraction=0.1, schedule="cosine").train
  rate = optim.schedule(config, 100)
  assert float(rate(0)) == pytest.approx(1e-3)
  assert max(float(rate(i)) for i in range(100)) == pytest.approx(1e-2)
  assert float(rate(99)) < 1e-4
