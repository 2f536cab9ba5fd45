"""The released code's numbers (tests/golden): read as batches, compared as gradients.

The arrays are as the reference implementation pads them, on the left; rows here are padded on the
right.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clara_jax.batch import Batch, Prompt, Tokens
from clara_jax.checkpoints import formats, upstream
from clara_jax.checkpoints.keymap import lora_place
from clara_jax.data.pipeline import pad_tokens
from clara_jax.data.prompt_tokenizer import PromptTokenizer
from clara_jax.inference.generate import make_generate
from clara_jax.model import Clara

ROLE_OF = {name: role for role, name in upstream.ADAPTERS.items()}


def load(golden: pathlib.Path, name: str, **overrides) -> tuple[Clara, dict[str, Any]]:
  """Model and weights of GOLDEN/ckpt_NAME in float32; `overrides` are fields of `ClaraConfig`."""
  opened = formats.open_checkpoint(
    str(golden / f"ckpt_{name}"), str(golden / "tiny_mistral"), "float32"
  )
  return Clara(dataclasses.replace(opened.config, **overrides)), formats.on_device(opened)


def right_pad(ids: np.ndarray, mask: np.ndarray) -> Tokens:
  """Left-padded reference rows (B, T) as right-padded `Tokens`."""
  rows = [row[keep.astype(bool)] for row, keep in zip(ids, mask, strict=True)]
  out = np.zeros(ids.shape, np.int32)
  for target, row in zip(out, rows, strict=True):
    target[: len(row)] = row
  return Tokens(out, np.array([len(r) for r in rows], np.int32))


def prompt_of(reference: Mapping[str, np.ndarray]) -> Prompt:
  """The decoder's inputs and labels as a `Prompt`."""
  tokens = right_pad(reference["dec_input_ids"], reference["dec_attention_mask"])
  labels = right_pad(reference["labels"], reference["dec_attention_mask"]).ids
  real = np.arange(labels.shape[1]) < tokens.lengths[:, None]
  is_label = (labels != -100) & real
  width = int(is_label.sum(1).max())
  positions, targets = np.zeros((2, len(labels), width), np.int32)
  weights = np.zeros((len(labels), width), np.float32)
  for i, row in enumerate(is_label):
    (where,) = np.nonzero(row)
    positions[i, : len(where)], targets[i, : len(where)] = where - 1, labels[i, where]
    weights[i, : len(where)] = 1
  return Prompt(tokens, positions, targets, weights)


def given_batch(reference: Mapping[str, np.ndarray], documents: int) -> Batch:
  """A batch of `scp` or `instruct`: `documents` given for each row."""
  prompt = prompt_of(reference)
  encoded = right_pad(reference["enc_input_ids"], reference["enc_attention_mask"])
  return Batch(prompt, _leading(encoded, len(prompt.labels), documents))


def joint_batch(reference: Mapping[str, np.ndarray], golden: pathlib.Path) -> Batch:
  """A batch of `joint` or `contrastive`: 2 rows of 4 candidates."""
  inputs = json.loads((golden / "inputs.json").read_text())
  documents = right_pad(reference["enc_input_ids"], reference["enc_attention_mask"])
  question = right_pad(reference["query_input_ids"], reference["query_attention_mask"])
  is_gold = np.zeros((2, 4), bool)
  for row, gold in zip(is_gold, inputs["POS_INDEX"], strict=True):
    row[gold] = True
  return Batch(prompt_of(reference), _leading(documents, 2, 4), None, question, is_gold)


def _leading(tokens: Tokens, *shape: int) -> Tokens:
  return Tokens(tokens.ids.reshape(*shape, -1), tokens.lengths.reshape(shape))


def objective(
  model: Clara, stage: Any, weights: dict, batch: Batch, trained: Sequence[str]
) -> tuple[float, dict[str, float], dict]:
  """The stage's loss, its metrics and the gradients of the groups `trained`."""
  frozen = {g: w for g, w in weights.items() if g not in trained}

  def total(trainable):
    terms, metrics = stage.loss(model, trainable, frozen, batch, None)
    return sum(t.value for t in terms.values()), metrics

  (loss, metrics), grads = jax.value_and_grad(total, has_aux=True)({g: weights[g] for g in trained})
  return float(loss), {k: float(m.value) for k, m in metrics.items()}, grads


def gradients(
  reference: Any, grads: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
  """(parameter, our gradient, the reference's) of every LoRA matrix that the file has."""
  for name in (n for n in reference.files if n.startswith("grad/")):
    key = name.removeprefix("grad/")
    adapter = next(a for a in ROLE_OF if f".{a}." in key)
    place = lora_place(key.replace(f".{adapter}.", "."))
    leaf = grads[ROLE_OF[adapter]]
    for part in place.path:
      leaf = leaf[part]
    yield name, np.asarray(leaf[place.layer], np.float32).T, reference[name]


def compress(
  model: Clara, weights: dict, prompt_tokenizer: PromptTokenizer, texts: list[str], *shape: int
) -> jax.Array:
  """Memory tokens (*shape, M, D) of as many texts."""
  tokens = pad_tokens([prompt_tokenizer.document(t) for t in texts], prompt_tokenizer.pad_id, 1)
  memories = model.compress(weights, tokens)
  return memories.reshape(*shape, model.config.num_memory_tokens, model.config.model.width)


def continuations(
  model: Clara,
  weights: dict,
  prompt_tokenizer: PromptTokenizer,
  prompts: list[np.ndarray],
  memories: jax.Array,
  end_ids: Sequence[int] | None = None,
  new: int = 12,
) -> list[list[int]]:
  """Greedy continuations of `new` tokens."""
  tokens = pad_tokens(prompts, prompt_tokenizer.pad_id, 1)
  generate = make_generate(
    model, new, prompt_tokenizer.end_ids if end_ids is None else end_ids, prompt_tokenizer.pad_id
  )
  ids = generate(weights, Tokens(jnp.asarray(tokens.ids), jnp.asarray(tokens.lengths)), memories)
  return np.asarray(ids).tolist()
