"""What has been done, on disk: one append-only file of lines with checksums (`io.sealed`). A kill
loses at most what was in flight; a finished document is told of once.

    {"r": document, "k": key, "t": reply, "u": [requests, tokens of prompts, of replies]}    a reply, while its document is not finished
    {"d": document, "h": hash of what it said, "o": outcome}  a finished document
    {"x": document}                                           its outcome is withdrawn: it is open again
    {"n": document}                                           it is asked anew: its replies so far were of no use
    {"u": […]}                                                what was spent since the last line with "u"

A document that was stopped is worked on again from its replies: its requests have the same keys. A
line that is damaged is skipped, and counted: what it told is done again.
"""  # noqa: E501

import collections
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from clara_jax import io
from clara_jax.config import ConfigError
from clara_jax.data.schemas import DataError

log = logging.getLogger(__name__)


class Journal:
  """Opens a journal, or begins one.

  Args:
    path: the file.

  Attributes:
    damaged: lines that were skipped.

  Raises:
    ConfigError: another process is working on it.
  """

  def __init__(self, path: str):
    self.path = path
    # Hashes of names and of what they said: a corpus has millions.
    self._done: dict[bytes, bytes] = {}
    self._tries: collections.Counter = collections.Counter()
    self.spent = [0, 0, 0]
    self._replies: dict[str, dict[str, str]] = {}
    self.damaged = 0
    try:
      self._lock = io.Lock(f"{path}.lock")
    except io.LockedError as error:
      raise ConfigError(f"{path}: another process is working on this shard ({error})") from None
    if os.path.exists(path):
      self._read()
    if self.damaged:
      log.warning(f"{path}: {self.damaged} damaged lines are skipped; what they told is done again")
    self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

  def _read(self) -> None:
    io.cut_back(self.path)
    waste = 0
    for value in _lines(self.path, self._count_damage):
      if "d" in value:
        self._done[_digest(value["d"])] = bytes.fromhex(value["h"])
      elif "x" in value:
        self._done.pop(_digest(value["x"]), None)
        self._tries[value["x"]] += 1
      elif "n" in value:
        self._tries[value["n"]] += 1
      if "u" in value:
        self.spent = [a + b for a, b in zip(self.spent, value["u"], strict=True)]
    for value in _lines(self.path):
      if "r" in value:
        if _digest(value["r"]) in self._done:
          waste += 1
        else:
          self._replies.setdefault(value["r"], {})[value["k"]] = value["t"]
    if waste > 1000:
      self._rewrite()

  def _count_damage(self) -> None:
    self.damaged += 1

  def _rewrite(self) -> None:
    """Without the replies of finished documents."""
    with io.rewriting(self.path) as file:
      dropped = [0, 0, 0]
      for value in _lines(self.path):
        if "r" not in value or _digest(value["r"]) not in self._done:
          file.write(io.sealed(value))
        else:
          dropped = [a + b for a, b in zip(dropped, value.get("u", [0, 0, 0]), strict=True)]
      file.write(io.sealed({"u": dropped}))

  def is_done(self, document: str, said: str) -> bool:
    """Whether a document is finished.

    Args:
      document: its name.
      said: what it says; another text under a name that is done is not skipped.

    Raises:
      DataError: it said something else when it was done.
    """
    digest = self._done.get(_digest(document))
    if digest is not None and digest != _digest(said, 4):
      raise DataError(
        f"{document!r} says something else than when it was done ({self.path}); name another --out"
      )
    return digest is not None

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
    """Keeps a reply, and what was spent since the last call of this or of `spend`: requests, tokens
    of prompts, tokens of replies."""
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
    io.append(self._file, io.sealed(value))

  def close(self) -> None:
    """Closes the file."""
    os.close(self._file)
    self._lock.release()


def outcomes(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """(document, outcome) of all that a journal has finished, each once, in the order in which they
  were; the file is only read."""
  last: dict[bytes, int] = {}  # the line that counts
  for number, value in enumerate(_lines(path)):
    if "d" in value:
      last[_digest(value["d"])] = number
    elif "x" in value:
      last.pop(_digest(value["x"]), None)
  for number, value in enumerate(_lines(path)):
    if "d" in value and last.get(_digest(value["d"])) == number:
      yield value["d"], value["o"]


# Lines of journals of before there were checksums: all fields that a kind has, "u" aside.
_HASH = re.compile("[0-9a-f]{8}")
_FIELDS = ({"r", "k", "t"}, {"d", "h", "o"}, {"x"}, {"n"}, set())


def _lines(path: str, on_damage: Callable[[], None] = lambda: None) -> Iterator[dict[str, Any]]:
  """The values of the whole lines that are not damaged."""
  old = True
  with open(path, "rb") as file:
    for line in file:
      if not line.endswith(b"\n"):
        return
      try:
        if old and not io.is_sealed(line):
          value = io.parse_json(line)
          if not _is_entry(value):
            raise io.DamagedError("no line of a journal")
        else:
          value, old = io.unsealed(line), False
      except ValueError:
        on_damage()
        continue
      yield value


def _is_entry(value: Any) -> bool:
  """Whether a line without a checksum, as journals had them before, can be one of theirs."""
  if not isinstance(value, dict) or set(value) - {"u"} not in _FIELDS:
    return False
  if "h" in value and not _HASH.fullmatch(str(value["h"])):
    return False
  usage = value.get("u", [0, 0, 0])
  counts = isinstance(usage, list) and len(usage) == 3 and all(type(n) is int for n in usage)
  return counts and all(isinstance(t, str) for name, t in value.items() if name not in ("u", "o"))


def _digest(text: str, size: int = 8) -> bytes:
  return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=size).digest()
