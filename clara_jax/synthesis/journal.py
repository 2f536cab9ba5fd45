"""What has been done, on disk: one append-only file. A kill loses at most what was in flight; a finished document is written once.

    {"r": document, "k": key, "t": reply, "u": [requests, tokens of prompts, of replies]}    a reply, while its document is not finished
    {"d": document, "h": hash of what it said, "o": outcome}  a finished document
    {"x": document}                                           its outcome is withdrawn: it is open again
    {"n": document}                                           it is asked anew: its replies so far were of no use
    {"u": […]}                                                what was spent since the last line with "u"

A document that was stopped is worked on again from its replies: its requests have the same keys.
"""

import collections
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from clara_jax.config import ConfigError
from clara_jax.data.schemas import DataError


class Journal:
  """Opens a journal, or begins one.

  Args:
    path: the file.

  Raises:
    DataError: a line in the middle is damaged.
    ConfigError: another process is working on it.
  """

  def __init__(self, path: str):
    self.path = path
    self._done: dict[bytes, bytes] = {}  # hashes of names and of what they said: a corpus has millions
    self._tries: collections.Counter = collections.Counter()
    self.spent = [0, 0, 0]
    self._replies: dict[str, dict[str, str]] = {}
    self._lock = os.open(f"{path}.lock", os.O_WRONLY | os.O_CREAT, 0o644)
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      os.close(self._lock)
      raise ConfigError(f"{path}: another process is working on this shard") from None
    if os.path.exists(path):
      self._read()
    self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

  def _read(self) -> None:
    end = 0
    waste = 0
    for start, value in _lines(self.path):
      end = start
      if "d" in value:
        self._done[_digest(value["d"])] = bytes.fromhex(value["h"])
      elif "x" in value:
        del self._done[_digest(value["x"])]
        self._tries[value["x"]] += 1
      elif "n" in value:
        self._tries[value["n"]] += 1
      if "u" in value:
        self.spent = [a + b for a, b in zip(self.spent, value["u"], strict=True)]
    if end < os.path.getsize(self.path):  # the line that a kill has cut
      os.truncate(self.path, end)
    for _, value in _lines(self.path):
      if "r" in value:
        if _digest(value["r"]) in self._done:
          waste += 1
        else:
          self._replies.setdefault(value["r"], {})[value["k"]] = value["t"]
    if waste > 1000:
      part = f"{self.path}.part"
      with open(part, "w", encoding="utf-8") as file:
        dropped = [0, 0, 0]
        for _, value in _lines(self.path):
          if "r" not in value or _digest(value["r"]) not in self._done:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
          else:
            dropped = [a + b for a, b in zip(dropped, value.get("u", [0, 0, 0]), strict=True)]
        file.write(json.dumps({"u": dropped}) + "\n")
      os.replace(part, self.path)

  def is_done(self, document: str, said: str) -> bool:
    """Whether a document is finished.

    Args:
      document: its name.
      said: what it says; another text under a name that is done is not passed over.

    Raises:
      DataError: it said something else when it was done.
    """
    there = self._done.get(_digest(document))
    if there is not None and there != _digest(said, 4):
      raise DataError(f"{document!r} says something else than when it was done ({self.path}); name another --out")
    return there is not None

  def tries(self, document: str) -> int:
    """How often a document was asked anew."""
    return self._tries[document]

  def ask_anew(self, document: str) -> None:
    """The next requests of an open document are others than before."""
    self._append({"n": document})
    self._tries[document] += 1

  def withdraw(self, document: str) -> None:
    """Opens a finished document again."""
    self._append({"x": document})
    del self._done[_digest(document)]
    self._tries[document] += 1

  @property
  def done(self) -> int:
    """Finished documents."""
    return len(self._done)

  def replies(self, document: str) -> dict[str, str]:
    """Replies that a document had when it was stopped, by key; they are handed over once."""
    return self._replies.pop(document, {})

  def reply(self, document: str, key: str, text: str, spent: Sequence[int] = (0, 0, 0)) -> None:
    """Keeps a reply, and what was spent since the last call of this or of `spend`: requests, tokens of prompts, tokens of replies."""
    self._append({"r": document, "k": key, "t": text, "u": list(spent)})
    self.spent = [a + b for a, b in zip(self.spent, spent, strict=True)]

  def finish(self, document: str, said: str, outcome: dict[str, Any]) -> None:
    """Keeps what became of a document."""
    hashed = _digest(said, 4)
    self._append({"d": document, "h": hashed.hex(), "o": outcome})
    self._done[_digest(document)] = hashed

  def spend(self, spent: Sequence[int]) -> None:
    """Keeps what was spent without a reply; see `reply`."""
    if any(spent):
      self._append({"u": list(spent)})
      self.spent = [a + b for a, b in zip(self.spent, spent, strict=True)]

  def _append(self, value: dict[str, Any]) -> None:
    data = memoryview((json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    while data:
      data = data[os.write(self._file, data):]

  def close(self) -> None:
    """Closes the file."""
    os.close(self._file)
    os.close(self._lock)


def outcomes(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """(document, outcome) of all that a journal has finished, in the order in which they were; the file is only read."""
  withdrawn = collections.Counter(value["x"] for _, value in _lines(path) if "x" in value)
  for _, value in _lines(path):
    if "d" in value:
      if withdrawn[value["d"]]:
        withdrawn[value["d"]] -= 1
      else:
        yield value["d"], value["o"]


def _lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """(end, value) of every whole line."""
  end = 0
  with open(path, "rb") as file:
    for number, line in enumerate(file, 1):
      if not line.endswith(b"\n"):
        return
      end += len(line)
      try:
        yield end, json.loads(line)
      except json.JSONDecodeError:
        raise DataError(f"{path}:{number}: the journal is damaged here") from None


def _digest(text: str, size: int = 8) -> bytes:
  return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=size).digest()
