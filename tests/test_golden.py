"""The stages against the reference implementation's numbers (float32): tokens, memories, scores,
losses, gradients."""

import jax
import numpy as np
import pytest

from clara_jax.batch import Prompt
from clara_jax.testing import golden as golden_lib
from clara_jax.training import stages

VALUES = {"rtol": 0, "atol": 1e-4}
EVERY = 16  # the file keeps the logits of every 16th position of the padded row


def check_gradients(reference, grads):
  compared = list(golden_lib.gradients(reference, grads))
  assert compared
  for name, ours, expected in compared:
    np.testing.assert_allclose(
      ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=name
    )


def check_logits(model, weights, reference, prompt, memories):
  """Valid positions, not the labels only."""
  length = prompt.tokens.ids.shape[1]
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), prompt.tokens.ids.shape)
  everywhere = Prompt(prompt.tokens, positions, positions, np.ones_like(positions, np.float32))
  logits = np.asarray(model.answer_logits(weights, everywhere, memories))
  for row, expected, mask in zip(
    logits, reference["logits"], reference["dec_attention_mask"], strict=True
  ):
    kept = np.flatnonzero(mask[::EVERY])
    assert len(kept) >= 4
    np.testing.assert_allclose(row[kept * EVERY - (length - mask.sum())], expected[kept], **VALUES)


@pytest.mark.parametrize("name, k", [("stage1", 1), ("stage1_2", 2)])
def test_given_documents(golden, name, k):
  reference = np.load(golden / f"{name}.npz")
  model, weights = golden_lib.load(golden, name)
  batch = golden_lib.given_batch(reference, k)
  memories = model.compress(weights, batch.documents)
  np.testing.assert_allclose(
    np.asarray(memories).reshape(reference["compressed"].shape), reference["compressed"], **VALUES
  )
  check_logits(model, weights, reference, batch.prompt, memories)
  loss, metrics, grads = golden_lib.objective(
    model, stages.get("scp"), weights, batch, ("compressor", "generator")
  )
  assert metrics["ce"] == pytest.approx(float(reference["loss"]), abs=1e-5)
  assert metrics["mse"] == pytest.approx(float(reference["mse_loss"]), abs=1e-5)
  assert loss == pytest.approx(float(reference["total"]), abs=1e-5)
  check_gradients(reference, grads)


def test_joint(golden):
  reference = np.load(golden / "stage2.npz")
  model, weights = golden_lib.load(golden, "stage2")
  batch = golden_lib.joint_batch(reference, golden)
  memories = model.compress(weights, batch.documents)
  np.testing.assert_allclose(
    np.asarray(memories).reshape(8, 4, 64), reference["doc_embeddings"], **VALUES
  )
  query = model.encode_query(weights, batch.question)
  np.testing.assert_allclose(np.asarray(query).reshape(2, -1), reference["query_reps"], **VALUES)
  scores = model.score(query, memories)
  np.testing.assert_allclose(scores, reference["scores"], **VALUES)
  selected, indices = model.select(scores, memories)
  np.testing.assert_array_equal(indices, reference["topk_idx"])
  w = jax.nn.one_hot(indices, 4)
  np.testing.assert_array_equal(w, reference["W"])
  check_logits(model, weights, reference, batch.prompt, selected)
  loss, metrics, grads = golden_lib.objective(
    model, stages.get("joint"), weights, batch, ("query_reasoner", "generator")
  )
  assert loss == pytest.approx(float(reference["loss"]), abs=1e-5)
  check_gradients(reference, grads)


def test_contrastive(golden):
  reference = np.load(golden / "stage2_pretrain.npz")
  model, weights = golden_lib.load(golden, "stage2")
  batch = golden_lib.joint_batch(np.load(golden / "stage2.npz"), golden)
  loss, _, grads = golden_lib.objective(
    model, stages.get("contrastive"), weights, batch, ("query_reasoner",)
  )
  assert loss == pytest.approx(float(reference["loss"]), abs=1e-5)
  check_gradients(reference, grads)
