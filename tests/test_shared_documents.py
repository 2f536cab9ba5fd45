"""Rows that share their documents: the same loss and gradient, each document compressed once."""

import dataclasses

import jax
import numpy as np
import pytest

from clara_jax.config import ConfigError, LoraConfig
from clara_jax.data import records
from clara_jax.data.pipeline import RowEncoder, TrainingBatches
from clara_jax.data.schemas import DataError, Row
from clara_jax.sharding import make_mesh, positions_of, put_batch
from clara_jax.testing import tiny
from clara_jax.training import trainer
from clara_jax.training.program import Program

CONFIG = dataclasses.replace(tiny.config(), lora=LoraConfig(rank=2, alpha=4.0, dropout=0.0))
SHARE = 4


def rows(stage: str, count: int = 64) -> list[Row]:
  """Four or fewer questions one after another with the same documents."""
  stage_rows = tiny.rows(stage)[:count]
  return [
    dataclasses.replace(row, documents=stage_rows[i // 3 * 3].documents, identifier=str(i))
    for i, row in enumerate(stage_rows)
  ]


def run_config(stage: str, share: int = SHARE, **fields):
  run = tiny.run_config(stage)
  data = dataclasses.replace(
    run.data, batch_size=16, share_documents=share, **fields.pop("data", {})
  )
  return dataclasses.replace(
    run, clara=CONFIG, data=data, train=dataclasses.replace(run.train, **fields)
  )


def first_batch(run, positions=None, agree=lambda x: x):
  kind = "given" if run.train.stage in ("scp", "instruct") else "candidates"
  encoder = RowEncoder(
    tiny.prompt_tokenizer(lora=CONFIG.lora), kind, run.data, 2, None, run.train.accumulate
  )
  source = records.divide(rows(run.train.stage), run.data.shards, SHARE)
  return next(TrainingBatches([source], encoder, 0, positions, agree))


def unshared(batch):
  """The same rows, every row with documents of its own."""
  ids, lengths = (
    batch.documents.ids[batch.document_slots],
    batch.documents.lengths[batch.document_slots],
  )
  return batch.replace(
    documents=batch.documents.replace(ids=ids, lengths=lengths), document_slots=None
  )


@pytest.mark.parametrize("stage", ["scp", "instruct", "joint"])
def test_one_step_is_that_of_rows_with_documents_of_their_own(stage):
  run = run_config(stage)
  training_batch = first_batch(run)
  assert (
    training_batch.batch.documents.ids.shape[0] <= training_batch.batch.document_slots.size * 3 // 4
  )
  states = []
  for batch in (training_batch.batch, unshared(training_batch.batch)):
    program, before = Program(run, 4, make_mesh()), tiny.weights()
    with program.context():
      weights = program.place_weights(before)
      state = program.initial_state({g: weights.pop(g) for g in program.trained})
      placed = put_batch(batch, program.batch_sharding, 16, training_batch.positions)
      state, metrics = program.step(state, weights, placed)
      states.append(
        (
          jax.tree.map(np.asarray, state.trainable),
          float(metrics["loss"].value),
          float(metrics["gradient_norm"].value),
        )
      )
  (shared, *numbers), (alone, *expected) = states
  np.testing.assert_allclose(numbers, expected, rtol=1e-5)
  for a, b in zip(*map(jax.tree.leaves, (shared, alone)), strict=True):
    # Adam's first step is of the size of its rate, whatever the gradient
    np.testing.assert_allclose(a, b, atol=2e-4)


def test_micro_batches_give_the_same_loss():
  results = []
  for accumulate in (1, 4):
    run = run_config("scp", accumulate=accumulate)
    training_batch = first_batch(run)
    program, before = Program(run, 4, make_mesh(devices=jax.devices()[:1])), tiny.weights()
    with program.context():
      weights = program.place_weights(before)
      state = program.initial_state({g: weights.pop(g) for g in program.trained})
      _, metrics = program.step(
        state,
        weights,
        put_batch(training_batch.batch, program.batch_sharding, 16, training_batch.positions),
      )
      results.append(
        (training_batch.ids, float(metrics["loss"].value), float(metrics["gradient_norm"].value))
      )
  assert results[0][0] == results[1][0]
  np.testing.assert_allclose(results[0][1:], results[1][1:], rtol=1e-5)


def test_rows_stay_together_and_parts_make_the_whole():
  run = run_config("scp", data={"shards": 2})
  whole = first_batch(run)
  assert all(
    int(a) // SHARE == int(b) // SHARE
    for a, b in zip(whole.ids[::SHARE], whole.ids[SHARE - 1 :: SHARE], strict=True)
  )

  def agree(x):  # as if another process had a row with two documents, and more different ones
    return np.maximum(x, [0, 0, 2, 0, 0, 0] if x.shape[1] > 1 else 6)

  halves = [first_batch(run, np.arange(8) + 8 * i, agree) for i in range(2)]
  u = [h.batch.documents.lengths.size for h in halves]
  assert u[0] == u[1]
  for i, half in enumerate(halves):
    own = half.batch.document_slots - i * u[0]
    assert (half.batch.documents.lengths[own[:, 1]] == 0).all()
    own = own[:, :1]
    ids, expected = (
      half.batch.documents.ids[own],
      whole.batch.documents.ids[whole.batch.document_slots[8 * i : 8 * i + 8]],
    )
    width = min(ids.shape[-1], expected.shape[-1])
    np.testing.assert_array_equal(ids[..., :width], expected[..., :width])


def test_documents_of_a_process_lie_where_its_rows_do():
  # Parts 1 and 3 of four of eight rows; six documents a part.
  rows_here = np.concatenate([np.arange(8, 16), np.arange(24, 32)])
  np.testing.assert_array_equal(positions_of(16, rows_here), rows_here)
  np.testing.assert_array_equal(
    positions_of(12, rows_here), np.concatenate([np.arange(6, 12), np.arange(18, 24)])
  )
  np.testing.assert_array_equal(
    positions_of(80, rows_here), np.concatenate([np.arange(40, 80), np.arange(120, 160)])
  )


def test_what_does_not_divide_is_refused():
  with pytest.raises(ConfigError, match="multiple of 4 times the 2 parts"):
    Program(run_config("scp", accumulate=4), 4, make_mesh(devices=jax.devices()[:2]))
  with pytest.raises(DataError, match="has to be a multiple of it, and of 4"):
    first_batch(run_config("scp", share=3))
  run = run_config("scp")
  with pytest.raises(DataError, match="rows of clara records are in no order"):
    trainer.Trainer(
      run,
      tiny.prompt_tokenizer(lora=CONFIG.lora),
      tiny.weights(),
      sources=[[tuple(rows("scp"))]],
      progress=False,
    ).run()
