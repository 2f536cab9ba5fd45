"""An answerer over several processes: what the first one is asked, all compute.

Each process holds an `Answerer` over the same mesh. The first one serves; before each call it sends
the call to the others, which make it, too. Nobody waits in silence: where there is nothing to do,
a sign of life goes out every few seconds, for some networks give up on a collective that waits
longer.
"""

import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from clara_jax.errors import InputError
from clara_jax.evaluation import logit_lens
from clara_jax.inference.answer import Answer, Answerer, Found, Question

log = logging.getLogger(__name__)

SIGN_OF_LIFE = 5.0  # seconds


class Leader:
  """The first process's side: an `Answerer` whose calls the other processes make, too.

  Attributes that are not named here are the answerer's. `close` ends the other processes.
  """

  def __init__(self, answerer: Answerer):
    self._answerer = answerer
    self._lock = threading.Lock()  # one call at a time, on all processes in the same order
    self._closed = threading.Event()
    threading.Thread(target=self._show_life, daemon=True).start()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._answerer, name)

  def search(self, questions: Sequence[Question]) -> list[list[Found]]:
    """See `Answerer.search`."""
    with self._lock:
      _send("search", [dataclasses.asdict(q) for q in questions])
      return self._answerer.search(questions)

  def answer(
    self,
    questions: Sequence[Question | str] | str,
    on_text: Callable[[int, str], None] | None = None,
    on_found: Callable[[int, list[Found]], None] | None = None,
  ) -> list[Answer]:
    """See `Answerer.answer`."""
    if isinstance(questions, str):
      questions = [questions]
    requests = [Question(q) if isinstance(q, str) else q for q in questions]
    with self._lock:
      _send("answer", [dataclasses.asdict(q) for q in requests], on_text is not None)
      return self._answerer.answer(requests, on_text, on_found)

  def nearest_memories(self, vectors: np.ndarray, k: int) -> np.ndarray:
    """See `Answerer.nearest_memories`."""
    with self._lock:
      _send("nearest_memories", vectors.tolist(), k)
      return self._answerer.nearest_memories(vectors, k)

  def lens(self, question: str, top: int) -> list[tuple[str, float]]:
    """See `logit_lens.queries`."""
    with self._lock:
      _send("lens", question, top)
      return logit_lens.queries(self._answerer.checkpoint, [question], top)[0]["tokens"]

  def close(self) -> None:
    """Sends the others home."""
    with self._lock:
      self._closed.set()
      _send("close")

  def _show_life(self) -> None:
    while not self._closed.wait(SIGN_OF_LIFE):
      with self._lock:
        if not self._closed.is_set():
          _send("wait")


def follow(answerer: Answerer) -> None:
  """The other processes' side: makes the calls of the first one until that closes."""
  while True:
    name, *arguments = _receive()
    try:
      if name == "close":
        return
      if name == "search":
        answerer.search([_question(q) for q in arguments[0]])
      elif name == "answer":
        questions, streams = arguments
        answerer.answer([_question(q) for q in questions], (lambda *_: None) if streams else None)
      elif name == "lens":
        logit_lens.queries(answerer.checkpoint, [arguments[0]], arguments[1])
      elif name == "nearest_memories":
        answerer.nearest_memories(np.asarray(arguments[0], np.float32), arguments[1])
    except InputError as error:  # as on the first process, which says so
      log.debug("%s", error)


def _question(fields: dict[str, Any]) -> Question:
  ids = fields.pop("ids")
  return Question(**fields, ids=None if ids is None else tuple(ids))


def _send(*call: Any) -> None:
  data = np.frombuffer(json.dumps(call).encode(), np.uint8)
  multihost_utils.broadcast_one_to_all(np.int32(len(data)), True)
  multihost_utils.broadcast_one_to_all(np.pad(data, (0, _size(len(data)) - len(data))), True)


def _receive() -> list[Any]:
  length = int(multihost_utils.broadcast_one_to_all(np.int32(0), False))
  data = multihost_utils.broadcast_one_to_all(np.zeros(_size(length), np.uint8), False)
  return json.loads(np.asarray(data, np.uint8)[:length].tobytes())


def _size(length: int) -> int:
  """Few sizes, few compilations."""
  return max(1024, 1 << (length - 1).bit_length())
