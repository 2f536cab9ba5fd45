"""Saved steps: broken ones are skipped, the best one is kept, the base may be laid out
otherwise."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from clara_jax.checkpoints import native
from clara_jax.checkpoints.workdir import OF_ORBAX, Checkpointer, CheckpointError, claim
from clara_jax.config import ConfigError
from clara_jax.data.pipeline import TrainingBatches
from clara_jax.testing import tiny
from clara_jax.training import program, trainer
from clara_jax.training.hooks import Hook


def run(workdir, stop_at=None, eval_rows=(), **fields):
  config = tiny.run_config(
    "contrastive",
    **{"steps": 6, "checkpoint_every": 2, "keep_checkpoints": 5, "log_every": 1, **fields},
  )
  return trainer.Trainer(
    config,
    tiny.prompt_tokenizer(),
    tiny.weights(),
    tiny.rows("contrastive"),
    eval_rows,
    workdir=workdir and str(workdir),
    progress=False,
    stop_at=stop_at,
  ).run()


@pytest.fixture(scope="module")
def straight():
  return run(None)


def largest(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("harm", ["truncate", "remove", "progress"])
def test_a_broken_last_step_is_passed_over(straight, tmp_path, caplog, harm):
  run(tmp_path / "run", stop_at=4)
  step = tmp_path / "run" / "checkpoints" / "4"
  if harm == "truncate":
    file = largest(step / "optimizer")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  elif harm == "remove":
    largest(step / "optimizer").unlink()
  else:
    (step / "progress" / "metadata").write_text("{")
  again = run(tmp_path / "run")
  assert "step 4 cannot be read and is skipped" in caplog.text
  assert [p.name.split("-")[0] for p in (tmp_path / "run" / "broken").iterdir()] == ["4"]
  for a, b in zip(jax.tree.leaves(straight.weights), jax.tree.leaves(again.weights), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_flipped_bit_is_passed_over_and_named(straight, tmp_path, caplog):
  """One bit in any file of a step: another step is gone on from, and a reader of the weights is
  told the file."""
  run(tmp_path / "run", stop_at=4)
  step = tmp_path / "run" / "checkpoints" / "4"
  weights = Checkpointer(str(tmp_path / "run"), read_only=True).weights()
  files = sorted(f for f in step.rglob("*") if f.is_file())
  random = np.random.default_rng(0)
  for file in files:
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[int(random.integers(len(whole)))] ^= 1 << int(random.integers(8))
    file.write_bytes(damaged)
    if file.name in OF_ORBAX:  # Orbax writes them last; they decide nothing
      jax.tree.map(
        np.testing.assert_array_equal,
        Checkpointer(str(tmp_path / "run"), read_only=True).weights(),
        weights,
      )
      file.write_bytes(whole)
      continue
    with pytest.raises(CheckpointError, match="step 4 is damaged: .*checkpoints/4/"):
      Checkpointer(str(tmp_path / "run"), read_only=True).weights()
    if "weights" in str(file.relative_to(step)):  # what it reads
      with pytest.raises(CheckpointError, match="step 4 is damaged: .*checkpoints/4/"):
        native.open_weights(str(tmp_path / "run"))
    if file is not files[-1]:
      file.write_bytes(whole)
  again = run(tmp_path / "run")
  assert "step 4 cannot be read and is skipped" in caplog.text
  for a, b in zip(jax.tree.leaves(straight.weights), jax.tree.leaves(again.weights), strict=True):
    np.testing.assert_array_equal(a, b)


class AfterStep(Hook):
  def __init__(self, call):
    self._call = call

  def after_step(self, trainer, row_ids):
    self._call(trainer.step)


def test_other_inputs_are_refused(tmp_path):
  rows = tmp_path / "rows.jsonl"
  rows.write_text("".join(json.dumps(r) + "\n" for r in tiny.raw_rows("contrastive")))

  def go(weights, path=str(rows), base="1", **options):
    config = tiny.run_config("contrastive", steps=4, checkpoint_every=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, rows=(path,)))
    return trainer.Trainer(
      config,
      tiny.prompt_tokenizer(),
      weights,
      tiny.rows("contrastive"),
      workdir=str(tmp_path / "run"),
      progress=False,
      base_sha256=base,
      **options,
    ).run()

  weights = tiny.weights()
  go(weights, stop_at=2)
  record = (tmp_path / "run" / "config.json").read_text()
  with pytest.raises(CheckpointError, match="another content of base"):
    go(weights, base="2")
  with pytest.raises(CheckpointError, match="another content of init_from"):
    go(weights | {"compressor": weights["generator"]})
  content = rows.read_text()
  rows.write_text(content + content)
  with pytest.raises(CheckpointError, match=r"another content of data\.rows"):
    go(weights)
  rows.write_text(content)
  assert (tmp_path / "run" / "config.json").read_text() == record
  with (
    pytest.raises(CheckpointError, match=r"another run is at work here \(process \d+ on "),
    claim(str(tmp_path / "run")),
  ):
    go(weights)
  starts = tmp_path / "run" / "starts.jsonl"
  starts.write_text(starts.read_text() + '{"time": 17')
  metrics = tmp_path / "run" / "metrics.jsonl"
  metrics.write_text(metrics.read_text() + '{"step": 2, "ki')
  rows.rename(tmp_path / "moved.jsonl")
  assert go(weights, os.path.relpath(tmp_path / "moved.jsonl")).metrics["step"] == 4
  assert [json.loads(line)["step"] for line in starts.read_text().splitlines()] == [0, 2]
  assert all(json.loads(line) for line in metrics.read_text().splitlines())


@pytest.mark.parametrize("when", ["before the step", "within", "after"])
def test_an_interruption_anywhere_loses_and_doubles_nothing(straight, tmp_path, monkeypatch, when):
  """Position and state are saved together: the run that goes on ends as the one that was not
  interrupted."""
  count = 0

  def interrupted(where):
    nonlocal count
    count += where == when
    if where == when and count == 3:
      signal.raise_signal(signal.SIGINT)

  following = TrainingBatches.__next__
  monkeypatch.setattr(
    TrainingBatches,
    "__next__",
    lambda self: (interrupted("before the step"), following(self), interrupted("within"))[1],
  )
  with pytest.raises(KeyboardInterrupt):
    config = tiny.run_config(
      "contrastive", steps=6, checkpoint_every=2, keep_checkpoints=5, log_every=1
    )
    trainer.Trainer(
      config,
      tiny.prompt_tokenizer(),
      tiny.weights(),
      tiny.rows("contrastive"),
      workdir=str(tmp_path),
      progress=False,
      hooks=[AfterStep(lambda step: interrupted("after"))],
    ).run()
  monkeypatch.undo()
  assert Checkpointer(str(tmp_path), read_only=True).latest_step() == 3
  again = run(tmp_path)
  for a, b in zip(jax.tree.leaves(straight.weights), jax.tree.leaves(again.weights), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_second_interruption_stops_at_once(tmp_path):
  """… and what was saved before stands."""

  def twice(step):
    if step == 3:
      signal.raise_signal(signal.SIGINT)
      signal.raise_signal(signal.SIGINT)

  with pytest.raises(KeyboardInterrupt):
    config = tiny.run_config("contrastive", steps=6, checkpoint_every=2, log_every=1)
    trainer.Trainer(
      config,
      tiny.prompt_tokenizer(),
      tiny.weights(),
      tiny.rows("contrastive"),
      workdir=str(tmp_path),
      progress=False,
      hooks=[AfterStep(twice)],
    ).run()
  assert Checkpointer(str(tmp_path), read_only=True).latest_step() == 2


def test_nothing_to_read_is_an_error(tmp_path):
  run(tmp_path, stop_at=2)
  largest(tmp_path / "checkpoints" / "2" / "optimizer").write_bytes(b"")
  with pytest.raises(CheckpointError, match="no saved step can be read"):
    run(tmp_path)


def test_the_best_step_stays(tmp_path):
  result = run(
    tmp_path,
    eval_rows=tiny.rows("contrastive")[:8],
    steps=8,
    eval_every=2,
    keep_checkpoints=1,
    keep_best="recall_at_1",
    learning_rate=0.3,
  )
  recalls = {
    step: numbers["recall_at_1"] for step, numbers in result.evaluations if step in (2, 4, 6, 8)
  }
  best = max(recalls, key=lambda s: (recalls[s], s))
  assert sorted({8, best}) == Checkpointer(str(tmp_path), read_only=True).all_steps()


def test_a_loss_that_is_not_finite_names_the_rows(tmp_path):
  with pytest.raises(
    trainer.NonFiniteLossError,
    match=r"the loss is nan at step [23] .*rows person/\w+/0/\w+/0, person/",
  ):
    run(tmp_path, learning_rate=1e38, log_every=6, clip_norm=1e38)


def test_metrics_file(tmp_path):
  pytest.importorskip("tensorboardX")
  run(tmp_path)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  trained = [line for line in lines if line["kind"] == "train"]
  assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
  assert {
    "loss",
    "gradient_norm",
    "gradient_norm_query_reasoner",
    "recall_at_1",
    "samples_per_second",
    "tokens_per_second",
    "input_wait",
    "goodput",
    "learning_rate",
  } <= set(trained[-1])
  assert 0 < trained[-1]["goodput"] <= 1 and 0 <= trained[-1]["input_wait"] <= 1
  assert any((tmp_path / "tensorboard").iterdir())


def test_a_profile_on_demand(tmp_path, monkeypatch):
  seconds = iter(range(0, 10**6, 10))
  monkeypatch.setattr(trainer.time, "monotonic", lambda: next(seconds))
  tmp_path.joinpath("profile").touch()
  run(tmp_path, steps=12)
  assert not (tmp_path / "profile").exists()
  assert list((tmp_path / "profiles").rglob("*.xplane.pb"))


def layouts(**model):
  config = tiny.run_config("scp", steps=3, log_every=1)
  return dataclasses.replace(
    config,
    clara=dataclasses.replace(config.clara, model=dataclasses.replace(config.clara.model, **model)),
  )


@pytest.fixture(scope="module")
def plain():
  return trainer.Trainer(
    layouts(), tiny.prompt_tokenizer(), tiny.weights(), tiny.rows("scp"), progress=False
  ).run()


def test_filling_the_vocabulary_up_changes_nothing(plain, tmp_path):
  rows = tiny.rows("scp")
  filled = trainer.Trainer(
    layouts(vocab_multiple=64, logits_chunk=16),
    tiny.prompt_tokenizer(),
    tiny.weights(),
    rows,
    progress=False,
    workdir=str(tmp_path),
  ).run()
  assert filled.weights["base"]["embedding"].shape[0] % 64 == 0
  assert filled.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-6)
  saved = Checkpointer(str(tmp_path), read_only=True).weights()
  assert saved["special_tokens"]["embedding"].shape[0] == tiny.config().num_memory_tokens + 3


def test_a_base_in_eight_bits(plain):
  pytest.importorskip("qwix")
  small = trainer.Trainer(
    layouts(base_quantization="int8"),
    tiny.prompt_tokenizer(),
    tiny.weights(),
    tiny.rows("scp"),
    progress=False,
  ).run()
  kernel = small.weights["base"]["layers"]["mlp"]["up"]
  whole = plain.weights["base"]["layers"]["mlp"]["up"]["kernel"]
  assert kernel["kernel"].dtype == np.int8 and kernel["scale"].shape == (
    whole.shape[0],
    whole.shape[2],
  )
  step = np.asarray(kernel["scale"])[:, None]
  assert (
    np.abs(np.asarray(kernel["kernel"], np.float32) * step - np.asarray(whole)) <= 0.5001 * step
  ).all()
  assert small.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=5e-3)
  with pytest.raises(ConfigError, match="trains the base"):
    program.Program(
      dataclasses.replace(
        layouts(base_quantization="int8"), train=tiny.run_config("pretrain").train
      ),
      1,
    )
