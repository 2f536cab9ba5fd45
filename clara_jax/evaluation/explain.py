"""Why an answer came out: words of memory tokens, attention to documents, what each document did
for the answer."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clara_jax.data.pipeline import pad_tokens
from clara_jax.data.schemas import DataError, Row
from clara_jax.evaluation import logit_lens
from clara_jax.evaluation.likelihood import make_likelihood
from clara_jax.inference.checkpoint import Checkpoint
from clara_jax.inference.generate import make_generate
from clara_jax.model import Clara
from clara_jax.ops.losses import masked_mean

_WORD = re.compile(r"[^\W_]{2,}")


@dataclasses.dataclass(frozen=True)
class Word:
  """A word of the logit lens, with its logit and where else it stands."""

  word: str
  logit: float
  in_question: bool
  in_gold: bool


@dataclasses.dataclass(frozen=True)
class ReadDocument:
  """A document that the generator read.

  Attributes:
    place: among the row's candidates; text, is_gold: of it.
    score: cosine with the question.
    attention: share of the answer tokens' attention to memory tokens that went to this document's,
      mean over layers and heads.
    gain: log p(answer) with all documents minus without this one, in nats: positive where it speaks
      for the answer.
    lens: words of its memory tokens.
  """

  place: int
  text: str
  is_gold: bool
  score: float
  attention: float
  gain: float
  lens: list[Word]


@dataclasses.dataclass(frozen=True)
class Explanation:
  """One row, explained; `documents` in the order in which they were read."""

  id: str
  question: str
  answers: list[str]
  prediction: str
  log_p: float
  lens: list[Word]
  documents: list[ReadDocument]


class Explainer:
  """Explains answers of a joint checkpoint.

  Args:
    checkpoint: with all roles.
    max_new_tokens: longest answer.
    top: words of the lens for each memory token, before they are filtered (letters and digits only,
      two or more).
  """

  def __init__(self, checkpoint: Checkpoint, max_new_tokens: int = 64, top: int = 50):
    model, prompt_tokenizer, weights = (
      checkpoint.model,
      checkpoint.prompt_tokenizer,
      checkpoint.weights,
    )
    self._checkpoint = checkpoint
    self._model, self._prompt_tokenizer, self._weights, self._top = (
      model,
      prompt_tokenizer,
      weights,
      top,
    )
    self._compress = checkpoint.jit(model.compress)
    self._encode = checkpoint.jit(model.encode_query)
    self._generate = make_generate(
      model, max_new_tokens, prompt_tokenizer.end_ids, prompt_tokenizer.pad_id, mesh=checkpoint.mesh
    )
    self._likelihood = make_likelihood(checkpoint)
    self._attention = checkpoint.jit(functools.partial(answer_attention, model))

  def explain(self, row: Row) -> Explanation:
    """One row with K or more candidates, two at least.

    Raises:
      DataError: there are fewer.
    """
    prompt_tokenizer, weights, k, m = (
      self._prompt_tokenizer,
      self._weights,
      self._model.config.top_k,
      self._model.num_memory_tokens,
    )
    if len(row.documents) < k:
      raise DataError(f"{row.identifier}: {len(row.documents)} documents, but top_k={k}")
    question = row.questions[0]
    memories = self._compress(
      weights, pad_tokens(prompt_tokenizer.documents(row.documents), prompt_tokenizer.pad_id, 32)
    )
    query = self._encode(
      weights, pad_tokens([prompt_tokenizer.query(question)], prompt_tokenizer.pad_id, 16)
    )
    scores = np.asarray(self._model.score(query, memories[None]))[0]
    chosen = np.argsort(-scores, kind="stable")[:k]
    read = memories[chosen][None]
    prompt = prompt_tokenizer.answer_prompt(question, k, where=row.identifier).ids
    answer = prompt_tokenizer.truncate_at_eos(
      np.asarray(self._generate(weights, pad_tokens([prompt], prompt_tokenizer.pad_id, 32), read))[
        0
      ],
      with_end=True,
    )
    whole = self._likelihood(weights, [prompt], [answer], read)[0][0]
    gains = np.zeros(k)
    if k > 1:
      without = np.array([[j for j in range(k) if j != left_out] for left_out in range(k)])
      shorter = prompt_tokenizer.answer_prompt(question, k - 1, where=row.identifier).ids
      gains = whole - self._likelihood(weights, [shorter] * k, [answer] * k, read[0][without])[0]
    tokens = pad_tokens([np.concatenate([prompt, answer])], prompt_tokenizer.pad_id, 32)
    attention = (
      np.asarray(
        self._attention(weights, tokens.ids, read, len(prompt), len(prompt) + len(answer))
      )[0]
      .reshape(k, m)
      .sum(1)
    )
    gold = " ".join(row.documents[g] for g in row.gold)
    lenses = self._lens(np.concatenate([np.asarray(query), np.asarray(read)[0]]), question, gold)
    documents = [
      ReadDocument(
        int(p),
        row.documents[p],
        int(p) in row.gold,
        float(scores[p]),
        float(share),
        float(gain),
        lens,
      )
      for p, share, gain, lens in zip(
        chosen, attention / attention.sum(), gains, lenses[1:], strict=True
      )
    ]
    return Explanation(
      row.identifier,
      question,
      list(row.answers),
      prompt_tokenizer.text(answer),
      float(whole),
      lenses[0],
      documents,
    )

  def _lens(self, memories, question: str, gold: str) -> list[list[Word]]:
    question_words, gold_words = (
      {w.lower() for w in _WORD.findall(text)} for text in (question, gold)
    )
    listed = logit_lens.words(self._checkpoint, memories, self._top)
    return [
      [
        Word(word, logit, word.lower() in question_words, word.lower() in gold_words)
        for word, logit in words
        if _WORD.fullmatch(word)
      ]
      for words in listed
    ]


def answer_attention(
  model: Clara,
  weights: dict[str, Any],
  ids: jax.Array,
  memories: jax.Array,
  start: jax.Array | int,
  stop: jax.Array | int,
) -> jax.Array:
  """Attention of the positions that predict an answer to each memory slot.

  Args:
    model, weights: the generator's.
    ids: [B, T] prompts with their answers.
    memories: [B, K, M, D].
    start, stop: the answer's tokens are start … stop - 1; position t predicts token t + 1.

  Returns:
    [B, K·M] float32, mean over layers, heads and these positions.
  """
  config = model.config.model
  variables = {"params": weights["base"], "lora": weights["generator"]}
  (_, read), sown = model.decoder.apply(
    variables, model.splice(weights, ids, memories), return_kv=True, mutable=["queries"]
  )
  at = jnp.arange(ids.shape[1])
  visible = at <= at[:, None]
  windowed = np.isin(np.arange(config.num_layers), config.full_attention_layers, invert=True) & (
    config.sliding_window is not None
  )
  near = at > at[:, None] - (config.sliding_window or 0)
  predicts = (at >= start - 1) & (at < stop - 1)

  def layer(q, keys, windowed):
    keys = jnp.repeat(jnp.moveaxis(keys, 1, 2), config.num_heads // config.num_kv_heads, axis=2)
    scores = (
      jnp.einsum("bthp,bshp->bhts", q, keys, preferred_element_type=jnp.float32)
      * config.head_dim**-0.5
    )
    weights = jax.nn.softmax(jnp.where(visible & (near | ~windowed), scores, -1e30), axis=-1)
    return (weights * predicts[:, None]).sum((1, 2)) / (config.num_heads * predicts.sum())

  (queries,) = sown["queries"]["layers"]["attention"]["rotated"]
  shares = jax.lax.map(lambda x: layer(*x), (queries, read.keys, windowed)).mean(0)
  is_memory, _ = model.memory_slot(ids)
  count = memories.shape[1] * memories.shape[2]
  places = jnp.argsort(~is_memory, axis=-1, stable=True)[:, :count]
  return jnp.take_along_axis(shares, places, axis=1)


def document_and_memory_means(
  checkpoint: Checkpoint, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
  """Means of the compressor's states over each document's own tokens and over its memory tokens,
  [n, D] each: what L_MSE brings together (paper §3.1)."""
  model, prompt_tokenizer, weights = (
    checkpoint.model,
    checkpoint.prompt_tokenizer,
    checkpoint.weights,
  )

  @checkpoint.jit
  def both(weights, tokens):
    memories, hidden = model.encode(weights, "compressor", tokens)
    real = jnp.arange(tokens.ids.shape[1]) < tokens.lengths[:, None] - model.num_memory_tokens
    return masked_mean(hidden, real), memories.mean(1)

  return tuple(
    np.asarray(x, np.float32)
    for x in both(
      weights, pad_tokens(prompt_tokenizer.documents(texts), prompt_tokenizer.pad_id, 32)
    )
  )


def pca_2d(
  documents: np.ndarray, memories: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """PCA of both sets together: ([n, 2], [n, 2], share of the variance of each axis [2])."""
  both = np.concatenate([documents, memories]).astype(np.float64)
  centered = both - both.mean(0)
  _, values, directions = np.linalg.svd(centered, full_matrices=False)
  flat = centered @ directions[:2].T
  return flat[: len(documents)], flat[len(documents) :], (values**2 / (values**2).sum())[:2]
