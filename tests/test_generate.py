"""Greedy continuations against the reference implementation's."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax.data.pipeline import pad_tokens
from clara_jax.data.prompt_tokenizer import PromptTokenizer
from clara_jax.inference.generate import Greedy
from clara_jax.testing.golden import compress, continuations, load


@pytest.fixture(scope="module")
def inputs(golden):
  return json.loads((golden / "inputs.json").read_text())


@pytest.fixture(scope="module")
def expected(golden):
  return json.loads((golden / "generation.json").read_text())


def test_given_documents(golden, inputs, expected):
  model, weights = load(golden, "stage1_2")
  prompt_tokenizer = PromptTokenizer(str(golden / "tiny_mistral"), model.config)
  texts = [t for pool in inputs["POOL"] for t in pool[:2]]
  memories = compress(model, weights, prompt_tokenizer, texts, 2, 2)
  prompts = [prompt_tokenizer.answer_prompt(q, 2).ids for q in inputs["STAGE2_QUESTIONS"]]
  assert (
    continuations(model, weights, prompt_tokenizer, prompts, memories)
    == expected["from_text_stage1_2"]["ids"]
  )


@pytest.mark.parametrize("shared", ["instruction", "documents"])
def test_what_prompts_begin_with_is_read_once(golden, inputs, shared):
  model, weights = load(golden, "stage1_2")
  prompt_tokenizer = PromptTokenizer(str(golden / "tiny_mistral"), model.config)
  memories = jnp.repeat(
    compress(model, weights, prompt_tokenizer, inputs["POOL"][0][:2], 1, 2), 2, axis=0
  )
  prompts = [prompt_tokenizer.answer_prompt(q, 2).ids for q in inputs["STAGE2_QUESTIONS"]]
  places = np.flatnonzero(
    np.isin(prompts[0], np.arange(model.config.num_memory_tokens) + model.config.model.vocab_size)
  )
  length = places[0] if shared == "instruction" else places[-1] + 1
  tokens = pad_tokens(prompts, prompt_tokenizer.pad_id, 32)
  greedy = Greedy(model, 12, prompt_tokenizer.end_ids, prompt_tokenizer.pad_id)
  prefix_cache = greedy.prefill_prefix(weights, prompts[0][:length], memories[0])
  assert prefix_cache.keys.shape[1] == 1
  np.testing.assert_array_equal(
    greedy(weights, tokens, memories, prefix_cache), greedy(weights, tokens, memories)
  )


def test_paraphrase(golden, inputs, expected):
  model, weights = load(golden, "stage1")
  prompt_tokenizer = PromptTokenizer(str(golden / "tiny_mistral"), model.config)
  prompts = json.loads((golden / "prompts.json").read_text())["prompts"]["paraphrase/top_k=1"]
  reference = expected["from_paraphrase_stage1"]
  length, pads = reference["prompt length"], reference["pads per row"]
  lengths = [length - p for p in pads]
  # The reference drew its instructions at random; their lengths say which.
  chosen = [[np.array(p["ids"], np.int32) for p in prompts if len(p["ids"]) == n] for n in lengths]
  for i, options in enumerate(chosen):
    row = compress(model, weights, prompt_tokenizer, [inputs["DOCS"][i]], 1, 1)
    answers = [continuations(model, weights, prompt_tokenizer, [ids], row)[0] for ids in options]
    assert reference["ids"][i] in answers


@pytest.mark.parametrize("variant", ["", "_eos_variant"])
def test_joint(golden, inputs, expected, variant):
  reference = expected[f"from_questions_stage2{variant}"]
  model, weights = load(golden, "stage2")
  prompt_tokenizer = PromptTokenizer(str(golden / "tiny_mistral"), model.config)
  memories = compress(
    model, weights, prompt_tokenizer, [t for pool in inputs["POOL"] for t in pool], 2, 4
  )
  query = model.encode_query(
    weights,
    pad_tokens(
      [prompt_tokenizer.query(q) for q in inputs["STAGE2_QUESTIONS"]], prompt_tokenizer.pad_id, 1
    ),
  )
  scores = model.score(query, memories)
  if "scores" in reference:
    np.testing.assert_allclose(scores, reference["scores"], rtol=0, atol=1e-4)
  selected, indices = model.select(scores, memories)
  assert indices.tolist() == reference["topk_idx"]
  prompts = [prompt_tokenizer.answer_prompt(q, 2).ids for q in inputs["STAGE2_QUESTIONS"]]
  assert (
    continuations(
      model, weights, prompt_tokenizer, prompts, selected, reference.get("eos_token_id")
    )
    == reference["ids"]
  )
