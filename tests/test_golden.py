"""The stages against the reference implementation's numbers (float32): tokens, memories, scores,
losses, gradients."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from clara_jax.batch import Batch, Prompt, Tokens
from clara_jax.checkpoints import formats, upstream
from clara_jax.checkpoints.keymap import lora_place
from clara_jax.model import Clara
from clara_jax.training import stages

ROLE_OF = {name: role for role, name in upstream.ADAPTERS.items()}
VALUES = {"rtol": 0, "atol": 1e-4}


def load(golden, name, **overrides):
  opened = formats.open_checkpoint(
    str(golden / f"ckpt_{name}"), str(golden / "tiny_mistral"), "float32"
  )
  return Clara(dataclasses.replace(opened.config, **overrides)), formats.on_device(opened)


def right_pad(ids, mask):
  """Left-padded reference rows as right-padded `Tokens`."""
  rows = [row[keep.astype(bool)] for row, keep in zip(ids, mask, strict=True)]
  out = np.zeros(ids.shape, np.int32)
  for target, row in zip(out, rows, strict=True):
    target[: len(row)] = row
  return Tokens(out, np.array([len(r) for r in rows], np.int32))


def prompt_of(reference):
  tokens = right_pad(reference["dec_input_ids"], reference["dec_attention_mask"])
  labels = right_pad(reference["labels"], reference["dec_attention_mask"]).ids
  real = np.arange(labels.shape[1]) < tokens.lengths[:, None]
  is_label = (labels != -100) & real
  width = int(is_label.sum(1).max())
  positions, targets = np.zeros((2, len(labels), width), np.int32)
  weights = np.zeros((len(labels), width), np.float32)
  for i, row in enumerate(is_label):
    (where,) = np.nonzero(row)
    positions[i, : len(where)], targets[i, : len(where)], weights[i, : len(where)] = (
      where - 1,
      labels[i, where],
      1,
    )
  return Prompt(tokens, positions, targets, weights)


def leading(tokens, *shape):
  return Tokens(tokens.ids.reshape(*shape, -1), tokens.lengths.reshape(shape))


def objective(model, stage, weights, batch, trained):
  frozen = {g: w for g, w in weights.items() if g not in trained}

  def total(trainable):
    terms, metrics = stage.loss(model, trainable, frozen, batch, None)
    return sum(t.value for t in terms.values()), metrics

  (loss, metrics), grads = jax.value_and_grad(total, has_aux=True)({g: weights[g] for g in trained})
  return float(loss), {k: float(m.value) for k, m in metrics.items()}, grads


def check_gradients(reference, grads):
  names = [n for n in reference.files if n.startswith("grad/")]
  assert names
  for name in names:
    key = name.removeprefix("grad/")
    adapter = next(a for a in ROLE_OF if f".{a}." in key)
    place = lora_place(key.replace(f".{adapter}.", "."))
    leaf = grads[ROLE_OF[adapter]]
    for part in place.path:
      leaf = leaf[part]
    expected = reference[name]
    np.testing.assert_allclose(
      np.asarray(leaf[place.layer]).T,
      expected,
      rtol=0,
      atol=1e-4 * np.abs(expected).max(),
      err_msg=name,
    )


def check_logits(model, weights, reference, prompt, memories):
  """All valid positions, not the labels only."""
  length = prompt.tokens.ids.shape[1]
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), prompt.tokens.ids.shape)
  everywhere = Prompt(prompt.tokens, positions, positions, np.ones_like(positions, np.float32))
  logits = np.asarray(model.answer_logits(weights, everywhere, memories))
  for row, expected, mask in zip(
    logits, reference["logits"], reference["dec_attention_mask"], strict=True
  ):
    np.testing.assert_allclose(row[: mask.sum()], expected[mask.astype(bool)], **VALUES)


@pytest.mark.parametrize("name, k", [("stage1", 1), ("stage1_2", 2)])
def test_given_documents(golden, name, k):
  reference = np.load(golden / f"{name}.npz")
  model, weights = load(golden, name)
  prompt = prompt_of(reference)
  documents = right_pad(reference["enc_input_ids"], reference["enc_attention_mask"])
  rows = len(prompt.labels)
  batch = Batch(prompt, leading(documents, rows, k))
  memories = model.compress(weights, batch.documents)
  np.testing.assert_allclose(
    np.asarray(memories).reshape(reference["compressed"].shape), reference["compressed"], **VALUES
  )
  check_logits(model, weights, reference, prompt, memories)
  loss, metrics, grads = objective(
    model, stages.get("scp"), weights, batch, ("compressor", "generator")
  )
  assert metrics["ce"] == pytest.approx(float(reference["loss"]), abs=1e-5)
  assert metrics["mse"] == pytest.approx(float(reference["mse_loss"]), abs=1e-5)
  assert loss == pytest.approx(float(reference["total"]), abs=1e-5)
  check_gradients(reference, grads)


def joint_batch(reference, golden):
  inputs = json.loads((golden / "inputs.json").read_text())
  prompt = prompt_of(reference)
  documents = right_pad(reference["enc_input_ids"], reference["enc_attention_mask"])
  question = right_pad(reference["query_input_ids"], reference["query_attention_mask"])
  is_gold = np.zeros((2, 4), bool)
  for row, gold in zip(is_gold, inputs["POS_INDEX"], strict=True):
    row[gold] = True
  return Batch(prompt, leading(documents, 2, 4), None, question, is_gold)


def test_joint(golden):
  reference = np.load(golden / "stage2.npz")
  model, weights = load(golden, "stage2")
  batch = joint_batch(reference, golden)
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
  loss, metrics, grads = objective(
    model, stages.get("joint"), weights, batch, ("query_reasoner", "generator")
  )
  assert loss == pytest.approx(float(reference["loss"]), abs=1e-5)
  check_gradients(reference, grads)


def test_contrastive(golden):
  reference = np.load(golden / "stage2_pretrain.npz")
  model, weights = load(golden, "stage2")
  batch = joint_batch(np.load(golden / "stage2.npz"), golden)
  loss, _, grads = objective(model, stages.get("contrastive"), weights, batch, ("query_reasoner",))
  assert loss == pytest.approx(float(reference["loss"]), abs=1e-5)
  check_gradients(reference, grads)
