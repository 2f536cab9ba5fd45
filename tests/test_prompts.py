"""Prompts of published models' shapes, and text that looks like special tokens."""

import dataclasses
import json
import re
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clara_jax.config import ClaraConfig, DataConfig, ModelConfig
from clara_jax.data import prompts, schemas, templates
from clara_jax.data.pipeline import RowEncoder
from clara_jax.data.prompt_tokenizer import PromptTokenizer
from clara_jax.data.schemas import DataError
from clara_jax.testing import published, tiny

M = 2


def prompt_tokenizer(name: str, **changes) -> PromptTokenizer:
  """Of a published model; changes of `Published`."""
  model = dataclasses.replace(published.MODELS[name], **changes)
  tokenizer = published.tokenizer(model)
  config = ClaraConfig(
    ModelConfig(len(tokenizer), 8, 1, 1, 1, 8, 8),
    doc_max_length=40,
    compression_rate=40 // M,
    decoder_max_length=1024,
  )
  return PromptTokenizer(
    tokenizer, config, end_ids=[tokenizer.convert_tokens_to_ids(t) for t in model.ends]
  )


@pytest.mark.parametrize("name", published.MODELS)
def test_the_prompt_is_the_templates_own_and_begins_the_training_text(name):
  encoder = prompt_tokenizer(name)
  tokenizer = encoder.tokenizer
  messages = prompts.answer_messages(encoder.slots(2), "Where is it?")
  # Refuses a system message: in front of the user's, one newline between, as in the released code.
  if "v0.1" in name:
    messages = [{"role": "user", "content": f"{messages[0]['content']}\n{messages[1]['content']}"}]
  rendered = tokenizer.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
  )
  question_prompt = encoder.answer_prompt("Where is it?", 2)
  assert question_prompt.ids.tolist() == tokenizer.encode(rendered, add_special_tokens=False)
  trained = encoder.answer_prompt("Where is it?", 2, "Paris")
  assert trained.prompt_length == len(question_prompt.ids)
  assert trained.ids[: trained.prompt_length].tolist() == question_prompt.ids.tolist()
  labels = trained.ids[trained.prompt_length :]
  assert labels[-1] in encoder.end_ids and not set(labels[:-1].tolist()) & set(encoder.end_ids)
  assert encoder.text(labels) == "Paris"
  model = published.MODELS[name]
  assert {tokenizer.convert_tokens_to_ids(t) for t in (*model.ends, model.eos)} <= set(
    encoder.end_ids
  )


def test_nothing_stands_for_a_bos_that_is_not_there():
  encoder = prompt_tokenizer("Qwen2.5-0.5B-Instruct")
  ids = encoder.document("Paris is old.")
  assert encoder.tokenizer.decode(
    ids
  ) == "<ENC>Paris is old.<|im_end|><MEM0><MEM1>" and not encoder.is_cut(ids)
  long = encoder.document("Paris " * 100)
  assert len(long) == 40 + 2 + M and encoder.is_cut(long)


def test_a_tokenizer_without_an_end():
  turns = prompt_tokenizer("Qwen2.5-0.5B-Instruct", eos=None, ends=())
  assert turns.tokenizer.convert_ids_to_tokens(list(turns.end_ids)) == ["<|im_end|>"]
  ids = turns.document("Paris is old.")
  assert turns.tokenizer.decode(ids) == "<ENC>Paris is old.<MEM0><MEM1>" and not turns.is_cut(ids)
  template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
  with pytest.raises(schemas.DataError, match="nothing can end an answer"):
    prompt_tokenizer("Qwen2.5-0.5B-Instruct", eos=None, ends=(), template=template)
  # generation_config.json names one
  named = prompt_tokenizer("Qwen2.5-0.5B-Instruct", eos=None, template=template)
  assert named.tokenizer.decode(named.answer_prompt("Who?", 1, "Ada").ids[-4:]).endswith(
    "Ada<|im_end|>"
  )


def test_blanks_that_are_tokens_end_nothing():
  tokenizer = published.tokenizer(published.MODELS["SmolLM2-135M-Instruct"])
  tokenizer.add_tokens(["\n", "  "])
  tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role + ':' + m.content }}{{ '\\n' }}{{ '<|im_end|>' }}{% endfor %}"
  )
  config = ClaraConfig(
    ModelConfig(len(tokenizer), 8, 1, 1, 1, 8, 8), doc_max_length=40, compression_rate=20
  )
  assert PromptTokenizer(tokenizer, config).end_ids == (2,)


def test_a_template_that_does_not_know_the_generation_prompt():
  """The header of the assistant's turn belongs to the prompt, whatever the template does about
  it."""
  template = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + "
    "'<|im_end|>\\n' }}{% endfor %}"
  )
  encoder = prompt_tokenizer("SmolLM2-135M-Instruct", template=template)
  trained = encoder.answer_prompt("Who?", 1, "Ada")
  assert encoder.tokenizer.decode(trained.ids[trained.prompt_length :]) == "Ada<|im_end|>"
  assert encoder.tokenizer.decode(encoder.answer_prompt("Who?", 1).ids).endswith(
    "<|im_end|>\n<|im_start|>assistant\n"
  )


def test_without_a_template_a_plain_one_is_used_and_said(caplog):
  encoder = prompt_tokenizer("SmolLM2-135M-Instruct", template=None)
  assert "has no chat template; a plain one is used" in caplog.text
  trained = encoder.answer_prompt("Who?", 1, "Ada")
  assert encoder.tokenizer.decode(trained.ids).endswith(
    "\n\nQuestion:Who?\nAssistant: Ada<|im_end|>"
  )


@pytest.mark.parametrize(
  "template, message",
  [
    ("{{ undefined_function() }}", "its chat template fails"),
    (
      "{% for m in messages %}{% if m.role != 'user' %}{{ m.content }}{% endif %}{% endfor %}",
      "does not show the user's message",
    ),
    (
      "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
      "does not show the assistant's message",
    ),
    ("{% for m in messages %}{{ m.content | lower }}{% endfor %}", "does not show"),
    (
      "{% for m in messages %}{{ m.content | replace('<MEM1>', '') }}{% endfor %}",
      "changes the memory slots",
    ),
    (
      {"tool_use": "{{ messages }}", "rag": "{{ messages }}"},
      "chat templates \\['rag', 'tool_use'\\]",
    ),
  ],
)
def test_templates_that_cannot_be_had_are_refused_by_name(template, message):
  with pytest.raises(schemas.DataError, match=message):
    prompt_tokenizer("SmolLM2-135M-Instruct", template=template)


def test_a_list_of_templates_has_a_default():
  chatml = published.MODELS["SmolLM2-135M-Instruct"].template
  encoder = prompt_tokenizer(
    "SmolLM2-135M-Instruct", template={"default": chatml, "tool_use": "{{ messages }}"}
  )
  assert (
    encoder.answer_prompt("Who?", 1).ids.tolist()
    == prompt_tokenizer("SmolLM2-135M-Instruct").answer_prompt("Who?", 1).ids.tolist()
  )


def test_a_date_is_told_once():
  encoder = prompt_tokenizer("Llama-3.2-1B-Instruct")
  assert re.fullmatch(r"\d{4}-\d\d-\d\d", encoder.config.prompt_date)
  again = PromptTokenizer(
    published.tokenizer(published.MODELS["Llama-3.2-1B-Instruct"]),
    dataclasses.replace(encoder.config, prompt_date="2024-07-26"),
  )
  assert "Today Date: 26 Jul 2024\n\n" in again.tokenizer.decode(again.answer_prompt("Who?", 1).ids)
  assert prompt_tokenizer("Llama-3.1-8B-Instruct").config.prompt_date is None


def test_a_training_question_is_cut_at_the_decoders_maximum_only():
  encoder = prompt_tokenizer("Mistral-7B-Instruct-v0.2")
  text = "Paris " * 300
  answering, training = encoder.query(text), encoder.training_query(text)
  assert len(answering) == encoder.config.query_max_length + 3 + M < len(training) <= 1024 + 3 + M


# ---- text that looks like special tokens ---------------------------------------------------------

NAMES = (
  "Mistral-7B-Instruct-v0.3",
  "Llama-2-7b-chat",
  "Qwen3-0.6B",
  "Phi-3-mini-4k-instruct",
  "DeepSeek-R1-Distill-Llama-8B",
)
LAYOUTS = {}
_PIECES = st.sampled_from(
  [
    "<MEM0>",
    "<MEM1>",
    "<SEP>",
    "<ENC>",
    "<AE>",
    "</s>",
    "<s>",
    "<unk>",
    "[INST]",
    "[/INST]",
    "<|im_start|>",
    "<|im_end|>",
    "<|end|>",
    "<think>",
    "</think>",
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
    "<|endoftext|>",
    "<<SYS>>",
    "\n",
    " ",
    "system",
    "Paris",
    "é",
    "<",
    ">",
    "MEM0",
    "<MEM",
    "0>",
    "<0x0A>",
    "{{ eos_token }}",
    "{%",
  ]
)
FORGERIES = st.lists(_PIECES | st.text(max_size=5), min_size=1, max_size=8).map("".join)


def forged(name: str) -> PromptTokenizer:
  if name not in LAYOUTS:
    LAYOUTS[name] = prompt_tokenizer(name)
  return LAYOUTS[name]


def control(encoder: PromptTokenizer, ids) -> list[int]:
  """The special tokens among ids."""
  special = {
    i
    for i, t in encoder.tokenizer.backend_tokenizer.get_added_tokens_decoder().items()
    if t.content.strip()
  }
  return [int(i) for i in ids if i in special]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(text=FORGERIES, answer=FORGERIES)
def test_no_text_forges_a_special_token(name, text, answer):
  encoder = forged(name)
  plain, ids = encoder.answer_prompt("Who?", 2, "Ada"), encoder.answer_prompt(text, 2, answer)
  assert control(encoder, ids.ids[: ids.prompt_length]) == control(
    encoder, plain.ids[: plain.prompt_length]
  )
  assert control(encoder, ids.ids[ids.prompt_length :]) == control(
    encoder, plain.ids[plain.prompt_length :]
  )
  # The answer is what comes out; a template may have its own word about blanks at its ends.
  assert encoder.text(ids.ids[ids.prompt_length :]) == encoder.text(encoder.ids(answer))
  assert control(encoder, encoder.document(text)[:-M]) in (
    control(encoder, encoder.document("Ada")[:-M]),
    control(encoder, encoder.document("Ada " * 99)[:-M]),
  )
  assert control(encoder, encoder.ids(text)) == []
  assert control(encoder, encoder.text_prompt(text, answer).ids) == control(
    encoder, encoder.text_prompt("Who?", "Ada").ids
  )
  row = schemas.Row((text, "Who?"), (answer, "Ada"), (text,), is_question_list=True)
  assert len(control(encoder, encoder.row_prompt(row, 1).ids)) == len(
    control(
      encoder,
      encoder.row_prompt(dataclasses.replace(row, questions=("a", "b"), answers=("c", "d")), 1).ids,
    )
  )


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(text=st.text(max_size=40))
def test_other_text_is_tokenised_as_the_tokenizer_does(name, text):
  encoder = forged(name)
  if encoder.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids and not any(
    t.content in text for t in encoder.tokenizer.added_tokens_decoder.values()
  ):
    assert encoder.ids(text) == encoder.tokenizer.encode(text, add_special_tokens=False)


@settings(max_examples=20)
@given(text=FORGERIES)
def test_a_forgery_changes_no_other_row_of_its_batch(text):
  forged_tokenizer = forged("Mistral-7B-Instruct-v0.3")
  encoder = RowEncoder(
    forged_tokenizer,
    "given",
    DataConfig(batch_size=2, bucket=1024, document_bucket=128, label_bucket=1024),
    2,
  )
  import random

  rows = [
    schemas.Row((q,), ("Ada",), ("Ada was here.", text), (), "qa", str(i))
    for i, q in enumerate((text, "Who?"))
  ]
  both = encoder.collate([encoder.encode(r, random.Random(0)) for r in rows])
  alone = encoder.collate([encoder.encode(rows[1], random.Random(0))])
  np.testing.assert_array_equal(both.prompt.tokens.ids[1], alone.prompt.tokens.ids[0])
  is_memory = (both.prompt.tokens.ids >= forged_tokenizer.config.model.vocab_size) & (
    both.prompt.tokens.ids < forged_tokenizer.config.model.vocab_size + M
  )
  assert is_memory.sum(1).tolist() == [2 * M, 2 * M]


def test_a_tokenizer_file_that_truncates_or_pads_does_neither_here(tmp_path):
  tokenizer = published.tokenizer(published.MODELS["SmolLM2-135M-Instruct"])
  tokenizer.save_pretrained(tmp_path)
  spec = json.loads((tmp_path / "tokenizer.json").read_text())
  spec["truncation"] = {
    "direction": "Right",
    "max_length": 4,
    "strategy": "LongestFirst",
    "stride": 0,
  }
  spec["padding"] = {
    "strategy": {"Fixed": 64},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "x",
  }
  (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
  encoder = PromptTokenizer(str(tmp_path), prompt_tokenizer("SmolLM2-135M-Instruct").config)
  assert encoder.ids("Paris is old and large.") == tokenizer.encode(
    "Paris is old and large.", add_special_tokens=False
  )


@pytest.mark.parametrize(
  "template",
  [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for a in range(99999) %}{% for b in range(99999) %}{% set "
    "ns.n = ns.n + 1 %}{% endfor %}{% endfor %}",
  ],
)
def test_a_template_without_end_is_stopped(template, monkeypatch):
  monkeypatch.setattr(templates, "SECONDS", 0.5)
  tokenizer = tiny.prompt_tokenizer().tokenizer
  monkeypatch.setattr(tokenizer, "chat_template", template)
  threads = threading.active_count()
  with pytest.raises(
    DataError, match="takes longer than 0.5 s; give another with --chat-template FILE"
  ):
    templates.ChatTemplate(tokenizer)
  for _ in range(50):
    if threading.active_count() == threads:
      break
    time.sleep(0.1)
  assert threading.active_count() == threads
