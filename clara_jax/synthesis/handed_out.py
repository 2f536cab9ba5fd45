"""A backend whose requests are answered by workers that come and go (`workers.Pool`): the journal
stays in one place."""

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from clara_jax.synthesis.client import Usage
from clara_jax.synthesis.factory import Backend
from clara_jax.workers import Pool


class Replier:
  """A worker's side: one request at a time to a backend of its own."""

  def __init__(self, backend: Backend):
    self._backend = backend

  def reply(
    self, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]
  ) -> tuple[str, int, int]:
    """(the reply, tokens of the prompt, tokens of the reply)."""
    before = dataclasses.replace(self._backend.usage)
    text = asyncio.run(self._backend.chat(messages, **options))
    usage = self._backend.usage
    return (
      text,
      usage.prompt_tokens - before.prompt_tokens,
      usage.completion_tokens - before.completion_tokens,
    )


class HandedOut:
  """The factory's side; see `factory.Backend`. Each request goes to a worker that is free.

  Args:
    pool: of `Replier`s.
  """

  def __init__(self, pool: Pool):
    self._pool = pool
    self._free: asyncio.Queue[int] = asyncio.Queue()
    for worker in range(len(pool)):
      self._free.put_nowait(worker)
    self.usage = Usage(in_flight=len(pool))

  async def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
    worker = await self._free.get()
    try:
      with self._pool.errors():
        text, prompt_tokens, reply_tokens = await self._pool.submit(
          worker, "reply", list(messages), options
        )
    finally:
      self._free.put_nowait(worker)
    self.usage.requests += 1
    self.usage.answered += 1
    self.usage.prompt_tokens += prompt_tokens
    self.usage.completion_tokens += reply_tokens
    return text
