"""Our own base as the language model of the factory: a checkpoint, greedy, one request at a
time."""

import asyncio
import concurrent.futures
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clara_jax.checkpoints.formats import Checkpoint
from clara_jax.data.pipeline import pad_tokens
from clara_jax.data.schemas import DataError
from clara_jax.inference.generate import make_generate
from clara_jax.synthesis.client import ReplyError, Usage


class OwnModel:
  """Replies of a checkpoint's base, without any role; see `factory.Backend`. JSON is only asked for
  in words.

  Args:
    checkpoint: whose base replies.
    max_tokens: of a reply.
  """

  def __init__(self, checkpoint: Checkpoint, max_tokens: int = 512):
    self._prompt_tokenizer, self._weights = checkpoint.prompt_tokenizer, checkpoint.weights
    self._generate = make_generate(
      checkpoint.model,
      max_tokens,
      self._prompt_tokenizer.end_ids,
      self._prompt_tokenizer.pad_id,
      None,
      checkpoint.mesh,
    )
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self.usage = Usage(in_flight=1)

  async def chat(
    self,
    messages: Sequence[Mapping[str, str]],
    *,
    schema: Mapping[str, Any] | None = None,
    name: str = "reply",
    temperature: float = 0.0,
    max_tokens: int = 1024,
    seed: int | None = None,
  ) -> str:
    return await asyncio.get_running_loop().run_in_executor(self._thread, self._reply, messages)

  def _reply(self, messages):
    try:
      ids = self._prompt_tokenizer.chat(messages).ids
    except DataError as error:
      raise ReplyError(str(error)) from None
    reply_ids = np.asarray(
      self._generate(self._weights, pad_tokens([ids], self._prompt_tokenizer.pad_id, 128), None)
    )[0]
    text = self._prompt_tokenizer.text(reply_ids)
    self.usage.requests += 1
    self.usage.answered += 1
    self.usage.prompt_tokens += len(ids)
    self.usage.completion_tokens += int((reply_ids != self._prompt_tokenizer.pad_id).sum())
    return text
