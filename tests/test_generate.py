"""Greedy continuations against the reference implementation's."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax.batch import Tokens
from clara_jax.data.pipeline import pad_tokens
from clara_jax.data.tokens import Layout
from clara_jax.inference.generate import Greedy, make_generate
from tests.test_golden import load


@pytest.fixture(scope="module")
def inputs(golden):
  return json.loads((golden / "inputs.json").read_text())


@pytest.fixture(scope="module")
def expected(golden):
  return json.loads((golden / "generation.json").read_text())


def continuations(model, weights, layout, prompts, memories, end_ids=None, new=12):
  tokens = pad_tokens(prompts, layout.pad_id, 1)
  generate = make_generate(model, new, layout.end_ids if end_ids is None else end_ids, layout.pad_id)
  ids = generate(weights, Tokens(jnp.asarray(tokens.ids), jnp.asarray(tokens.lengths)), memories)
  return np.asarray(ids).tolist()


def compress(model, weights, layout, texts, *shape):
  tokens = pad_tokens([layout.document(t) for t in texts], layout.pad_id, 1)
  return model.compress(weights, tokens).reshape(*shape, *model_shape(model))


def model_shape(model):
  return model.config.num_memory_tokens, model.config.model.width


def test_given_documents(golden, inputs, expected):
  model, weights = load(golden, "stage1_2")
  layout = Layout(str(golden / "tiny_mistral"), model.config)
  texts = [t for pool in inputs["POOL"] for t in pool[:2]]
  memories = compress(model, weights, layout, texts, 2, 2)
  prompts = [layout.answer_prompt(q, 2).ids for q in inputs["STAGE2_QUESTIONS"]]
  assert continuations(model, weights, layout, prompts, memories) == expected["from_text_stage1_2"]["ids"]


@pytest.mark.parametrize("shared", ["instruction", "documents"])
def test_what_prompts_begin_with_is_read_once(golden, inputs, shared):
  model, weights = load(golden, "stage1_2")
  layout = Layout(str(golden / "tiny_mistral"), model.config)
  memories = jnp.repeat(compress(model, weights, layout, inputs["POOL"][0][:2], 1, 2), 2, axis=0)
  prompts = [layout.answer_prompt(q, 2).ids for q in inputs["STAGE2_QUESTIONS"]]
  places = np.flatnonzero(np.isin(prompts[0], np.arange(model.config.num_memory_tokens) + model.config.model.vocab_size))
  length = places[0] if shared == "instruction" else places[-1] + 1
  tokens = pad_tokens(prompts, layout.pad_id, 32)
  greedy = Greedy(model, 12, layout.end_ids, layout.pad_id)
  beginning = greedy.read(weights, prompts[0][:length], memories[0])
  assert beginning.keys.shape[1] == 1
  np.testing.assert_array_equal(greedy(weights, tokens, memories, beginning), greedy(weights, tokens, memories))


def test_paraphrase(golden, inputs, expected):
  model, weights = load(golden, "stage1")
  layout = Layout(str(golden / "tiny_mistral"), model.config)
  prompts = json.loads((golden / "prompts.json").read_text())["prompts"]["paraphrase/top_k=1"]
  wanted = expected["from_paraphrase_stage1"]
  length, pads = wanted["prompt length"], wanted["pads per row"]
  lengths = [length - p for p in pads]
  # The reference drew its instructions at random; their lengths say which.
  chosen = [[np.array(p["ids"], np.int32) for p in prompts if len(p["ids"]) == n] for n in lengths]
  for i, options in enumerate(chosen):
    row = compress(model, weights, layout, [inputs["DOCS"][i]], 1, 1)
    found = [continuations(model, weights, layout, [ids], row)[0] for ids in options]
    assert wanted["ids"][i] in found


@pytest.mark.parametrize("variant", ["", "_eos_variant"])
def test_joint(golden, inputs, expected, variant):
  wanted = expected[f"from_questions_stage2{variant}"]
  model, weights = load(golden, "stage2")
  layout = Layout(str(golden / "tiny_mistral"), model.config)
  memories = compress(model, weights, layout, [t for pool in inputs["POOL"] for t in pool], 2, 4)
  query = model.encode_query(weights, pad_tokens([layout.query(q) for q in inputs["STAGE2_QUESTIONS"]], layout.pad_id, 1))
  scores = model.score(query, memories)
  if "scores" in wanted:
    np.testing.assert_allclose(scores, wanted["scores"], rtol=0, atol=1e-4)
  selected, indices = model.select(scores, memories)
  assert indices.tolist() == wanted["topk_idx"]
  prompts = [layout.answer_prompt(q, 2).ids for q in inputs["STAGE2_QUESTIONS"]]
  assert continuations(model, weights, layout, prompts, selected, wanted.get("eos_token_id")) == wanted["ids"]
