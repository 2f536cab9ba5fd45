"""Rows of JSONL files, read and checked (rows of stages, rows for evaluation, documents).

Every error names the file and the line. Files may be gzipped and may lie anywhere `etils.epath`
reaches.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import logging
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from clara_jax.errors import InputError
from clara_jax.io import parse_json

log = logging.getLogger(__name__)


class DataError(InputError):
  """A file or a row is not what it should be; the message has the file and the line."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One training or evaluation row.

  Attributes:
    questions: one question, or all of a document's (SCP). Empty for a paraphrase row.
    answers: for one question, every accepted answer, the first being the target; for several, one
      answer each.
    documents: texts; K given documents, or N candidates.
    gold: 0-based positions of the gold documents.
    data_type: 'qa' or 'paraphrase'.
    identifier: the row's id, or 'file:line'.
    is_question_list: each question has its own answer (an SCP row); else one question with accepted
      answers.
    document_ids: the documents' ids in a memory store, where the row names them.
  """

  questions: tuple[str, ...]
  answers: tuple[str, ...]
  documents: tuple[str, ...]
  gold: tuple[int, ...] = ()
  data_type: str = "qa"
  identifier: str = ""
  is_question_list: bool = False
  document_ids: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Document:
  """One document of a corpus.

  Attributes:
    id, text, title: what they are.
    place: where in its file a piece stands: pages, characters; empty for a document of its own.
  """

  id: str
  text: str
  title: str = ""
  place: str = ""


class Malformed:
  """Counts bad rows and stops at a limit.

  Args:
    limit: how many are skipped; the next one stops the run. 0 stops at the first.
    quiet: whether they are not reported.

  Attributes:
    names: of whole documents that could not be read.
  """

  def __init__(self, limit: int = 0, quiet: bool = False):
    self.limit, self._quiet = limit, quiet
    self._places: set[Any] = set()
    self.names: set[str] = set()

  @property
  def count(self) -> int:
    """Bad rows so far."""
    return len(self._places)

  def add(self, problem: str, place: Any, name: str = "") -> None:
    """Reports a bad row.

    Args:
      problem: what is wrong, and where.
      place: what tells the row apart from others; it counts once.
      name: of the document, where the bad row is all of it.

    Raises:
      DataError: there are more than the limit.
    """
    if place in self._places:
      return
    self._places.add(place)
    if name:
      self.names.add(name)
    if self.count > self.limit:
      more = f" ({self.count} malformed rows, max_malformed={self.limit})" if self.limit else ""
      raise DataError(f"{problem}{more}")
    if not self._quiet:
      log.warning(f"malformed row {self.count} of at most {self.limit} is skipped: {problem}")


def read_jsonl(
  path: str, malformed: Malformed | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields ('file:line', object) of a JSONL file, gzipped or not.

  Raises:
    DataError: the file is missing or empty, or more lines than `malformed` allows are not JSON
      objects.
  """
  malformed = Malformed() if malformed is None else malformed
  count = 0
  with open_text(path) as stream:
    for where, value in json_lines(stream, path, malformed):
      count += 1
      yield where, value
  if not count:
    raise DataError(f"{path}: the file has no rows")


_UNREADABLE = (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error)


@contextlib.contextmanager
def open_text(path: str) -> Iterator[io.TextIOBase]:
  """A UTF-8 text file, gzipped or not, with or without a byte order mark, wherever `etils.epath`
  reaches.

  Raises:
    DataError: it is not there, is a directory, or is no such text; also while it is being read.
  """
  file = epath.Path(path)
  if not file.exists():
    raise DataError(f"{path}: no such file")
  if file.is_dir():
    raise DataError(f"{path}: is a directory, expected a file")
  gzipped = str(path).endswith(".gz")
  try:
    with (
      file.open("rb") as raw,
      gzip.open(raw) if gzipped else contextlib.nullcontext(raw) as stream,
    ):
      yield io.TextIOWrapper(stream, encoding="utf-8-sig")
  except _UNREADABLE as error:
    raise DataError(
      f"{path}: not readable as {'gzipped ' if gzipped else ''}UTF-8 text: {error}"
    ) from None


def json_lines(
  stream: Iterable[str], name: str, malformed: Malformed
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields ('name:line', object) of lines of JSON; empty ones are skipped, bad ones are counted."""
  number = 0
  try:
    for number, line in enumerate(stream, 1):
      if not line.strip():
        continue
      where = f"{name}:{number}"
      try:
        value = parse_json(line)
        if "\\ud" in line.lower():
          json.dumps(value, ensure_ascii=False).encode()
        if not isinstance(value, dict):
          raise ValueError(f"expected a JSON object, got {type(value).__name__}")
      except UnicodeEncodeError:
        malformed.add(f"{where}: half of a surrogate pair is no text", where)
      except ValueError as error:
        malformed.add(f"{where}: {error}", where)
      else:
        yield where, value
  except _UNREADABLE as error:
    raise DataError(f"{name}:{number + 1}: not readable from here on: {error}") from None


def read_ids(path: str) -> list[str]:
  """Ids of a file, each once: one a line; of a *.jsonl file (.gz), JSON strings, or objects with an
  'id'.

  Raises:
    DataError: a line of JSON is neither.
  """
  ids: dict[str, None] = {}
  with open_text(path) as stream:
    for number, line in enumerate(stream, 1):
      if not line.strip():
        continue
      value: Any = line.strip()
      if str(path).removesuffix(".gz").endswith(".jsonl"):
        try:
          value = parse_json(line)
          value = value["id"] if isinstance(value, dict) else value
        except (ValueError, KeyError) as error:
          raise DataError(
            f"{path}:{number}: {error if isinstance(error, ValueError) else 'lacks an id'}"
          ) from None
        if isinstance(value, (dict, list, bool)) or value in (None, ""):
          raise DataError(f"{path}:{number}: expected an id, got {value!r:.60}")
      ids[str(value)] = None
  return list(ids)


def parse_rows(path: str, malformed: Malformed | None = None) -> Iterator[Row]:
  """The checked rows of a JSONL file; bad ones are counted by `malformed`."""
  malformed = Malformed() if malformed is None else malformed
  for where, value in read_jsonl(path, malformed):
    try:
      row = parse_row(value, where)
    except DataError as error:
      malformed.add(str(error), where)
      continue
    yield row


def parse_row(value: Mapping[str, Any], where: str) -> Row:
  """Checks one stage or evaluation row.

  Documents are `docs`, `context` or `content`; the answer is `answer`, else `answers`, else
  `golden_answers`.

  Raises:
    DataError: no documents, no answer, counts that do not match, positions out of range; with
      `where`.
  """
  documents = next((value[k] for k in ("docs", "context", "content") if value.get(k)), None)
  documents = _strings(documents, where, "docs")
  if not documents:
    raise DataError(f"{where}: the row has no documents ('docs', 'context' or 'content')")
  data_type = value.get("data_type") or "qa"
  if data_type not in ("qa", "paraphrase"):
    raise DataError(f"{where}: data_type={data_type!r}: expected 'qa' or 'paraphrase'")
  answers = next(
    (
      value[k]
      for k in ("answer", "answers", "golden_answers")
      if value.get(k) not in (None, "", [])
    ),
    None,
  )
  answers = _strings(answers, where, "answer")
  if not answers:
    raise DataError(f"{where}: the row has no answer ('answer', 'answers' or 'golden_answers')")
  listed = isinstance(value.get("question"), list)
  questions = _strings(value.get("question"), where, "question")
  if data_type == "qa" and not questions:
    raise DataError(f"{where}: the row has no question")
  if data_type == "qa" and listed and len(questions) != len(answers):
    raise DataError(f"{where}: {len(questions)} questions but {len(answers)} answers")
  gold = value.get("pos_index")
  gold = () if gold is None else tuple(gold) if isinstance(gold, (list, tuple)) else (gold,)
  for position in gold:
    if (
      isinstance(position, bool)
      or not isinstance(position, int)
      or not 0 <= position < len(documents)
    ):
      raise DataError(f"{where}: pos_index={position!r}: expected 0 … {len(documents) - 1}")
  document_ids = _strings(value.get("doc_ids"), where, "doc_ids")
  if document_ids and len(document_ids) != len(documents):
    raise DataError(f"{where}: {len(documents)} documents but {len(document_ids)} doc_ids")
  return Row(
    questions if data_type == "qa" else (),
    answers,
    documents,
    gold,
    data_type,
    where if value.get("id") in (None, "") else str(value["id"]),
    listed and data_type == "qa",
    document_ids,
  )


def _strings(value: Any, where: str, field: str) -> tuple[str, ...]:
  if value is None:
    return ()
  values = [value] if isinstance(value, str) else value
  if not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
    raise DataError(f"{where}: {field}: expected text or a list of texts, got {value!r:.80}")
  return tuple(values)


def place_of(row: Row) -> bytes:
  """What tells a row apart from others, of the same id, too."""
  return hashlib.blake2b(repr(row).encode("utf-8", "replace"), digest_size=8).digest()


def require_one_question(row: Row) -> None:
  """Refuses a row with a list of questions, or without one.

  Raises:
    DataError: naming the row.
  """
  if row.is_question_list or row.data_type != "qa":
    raise DataError(f"{row.identifier}: this stage needs one question a row")


def read_rows(paths: Sequence[str], malformed: Malformed | None = None) -> list[Row]:
  """All rows of the files, in order."""
  malformed = Malformed() if malformed is None else malformed
  return [row for path in paths for row in parse_rows(path, malformed)]


def write_rows(rows: Iterable[dict[str, Any]], path: str) -> int:
  """Writes JSONL; returns the number of rows."""
  count = 0
  with open(path, "w", encoding="utf-8") as file:
    for row in rows:
      file.write(json.dumps(row, ensure_ascii=False) + "\n")
      count += 1
  return count


def read_documents(path: str, malformed: Malformed | None = None) -> Iterator[Document]:
  """Documents of a corpus: `text` and optionally `title` and `id`; without, it is a hash of both.

  Raises:
    DataError: more documents than `malformed` allows lack a text, or have an id that came before.
  """
  malformed = Malformed() if malformed is None else malformed
  seen: set[bytes] = set()  # hashes: a corpus has millions
  for where, document in _parsed(read_jsonl(path, malformed), malformed):
    digest = hashlib.blake2b(document.id.encode(), digest_size=16).digest()
    if digest in seen:
      malformed.add(
        f"{where}: id {document.id!r} was already used{_first_use(path, document.id)}", where
      )
      continue
    seen.add(digest)
    yield document


def parse_documents(stream: Iterable[str], name: str, malformed: Malformed) -> Iterator[Document]:
  """Documents of lines of JSON; bad ones are counted. Empty ones, Wikipedia's redirects, are left
  out."""
  rows = json_lines(stream, name, malformed)
  full = ((where, row) for where, row in rows if row.get("text") != "")
  for _, document in _parsed(full, malformed):
    yield document


def _parsed(
  rows: Iterable[tuple[str, dict[str, Any]]], malformed: Malformed
) -> Iterator[tuple[str, Document]]:
  for where, value in rows:
    text = value.get("text", value.get("contents"))
    if not isinstance(text, str) or not text.strip():
      malformed.add(f"{where}: the document has no 'text'", where)
      continue
    title, identifier = str(value.get("title") or ""), value.get("id")
    if isinstance(identifier, (dict, list, bool)):
      malformed.add(f"{where}: id={identifier!r:.60}: expected text or a number", where)
      continue
    if identifier in (None, ""):
      identifier = hashlib.blake2b(f"{title}\n{text}".encode(), digest_size=8).hexdigest()
    yield where, Document(str(identifier), text, title)


def _first_use(path: str, identifier: str) -> str:
  if "://" not in path and not os.path.isfile(path):  # a pipe cannot be read twice
    return " before"
  everything = read_jsonl(path, Malformed(sys.maxsize, quiet=True))
  return next(
    (f" at {place}" for place, other in everything if str(other.get("id")) == identifier), " before"
  )
