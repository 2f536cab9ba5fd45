"""Logit lens (paper §5): the words that memory tokens stand for, through the base's own head."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from clara_jax.data.pipeline import pad_tokens
from clara_jax.inference.checkpoint import Checkpoint


def words(checkpoint: Checkpoint, memories: np.ndarray, top: int) -> list[list[tuple[str, float]]]:
  """The words of highest logit, over all memory tokens of each row, each word once with its best
  logit.

  Args:
    memories: [B, M, D].
    top: words a memory token.

  Returns:
    For each row, (word, logit) in order of logit; special tokens are left out.
  """
  model, prompt_tokenizer, weights = (
    checkpoint.model,
    checkpoint.prompt_tokenizer,
    checkpoint.weights,
  )
  logits = np.asarray(checkpoint.jit(model.logits)(weights, memories))[
    ..., : model.config.model.vocab_size
  ]
  special = set(prompt_tokenizer.tokenizer.all_special_ids)
  listed = []
  for row in logits:
    best: dict[int, float] = {}
    for token_logits in row:
      for token in np.argsort(-token_logits)[:top]:
        if int(token) not in special:
          best[int(token)] = max(best.get(int(token), -np.inf), float(token_logits[token]))
    ordered = sorted(best.items(), key=lambda item: -item[1])
    listed.append(
      [
        (prompt_tokenizer.tokenizer.decode([token]).strip(), round(logit, 3))
        for token, logit in ordered
      ]
    )
  return listed


def queries(checkpoint: Checkpoint, questions: Sequence[str], top: int) -> list[dict[str, Any]]:
  """The lens of questions' memory tokens: [{`question`, `tokens`: [(word, logit), …]}]."""
  model, prompt_tokenizer, weights = (
    checkpoint.model,
    checkpoint.prompt_tokenizer,
    checkpoint.weights,
  )
  tokens = pad_tokens([prompt_tokenizer.query(q) for q in questions], prompt_tokenizer.pad_id, 16)
  memories = checkpoint.jit(model.encode_query)(weights, tokens)
  return [
    {"question": q, "tokens": top_words}
    for q, top_words in zip(questions, words(checkpoint, memories, top), strict=True)
  ]
