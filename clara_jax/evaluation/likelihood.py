"""How likely given answers are."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from clara_jax.config import Role
from clara_jax.data.pipeline import pad_prompts, padded_length
from clara_jax.data.prompt_tokenizer import PromptTokens
from clara_jax.inference.checkpoint import Checkpoint
from clara_jax.ops.losses import cross_entropy


def make_likelihood(
  checkpoint: Checkpoint, role: Role | None = "generator"
) -> Callable[..., np.ndarray]:
  """(weights, prompts, answers, memories) -> log p of each answer's tokens after its prompt, summed
  [B], and their number [B].

  `prompts` and `answers` are rows of token ids, `memories` [B, K, M, D] or None.
  """

  model, prompt_tokenizer = checkpoint.model, checkpoint.prompt_tokenizer

  @checkpoint.jit
  def log_p(weights, prompt, memories):
    loss, _ = cross_entropy(model.answer_logits(weights, prompt, memories, role), prompt.labels)
    return -(loss * prompt.label_weights).sum(-1), prompt.label_weights.sum(-1)

  def likelihood(
    weights: dict[str, Any],
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    memories: Any,
  ):
    rows = [
      PromptTokens(np.concatenate([p, a]).astype(np.int32), len(p))
      for p, a in zip(prompts, answers, strict=True)
    ]
    length, width = max(len(r.ids) for r in rows), max(1, *(len(a) for a in answers))
    starts = [r.prompt_length for r in rows]
    prompt = pad_prompts(
      rows, starts, prompt_tokenizer.pad_id, padded_length(length, 32), padded_length(width, 8)
    )
    return tuple(np.asarray(x) for x in log_p(weights, prompt, memories))

  return likelihood
