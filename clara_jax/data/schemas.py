"""Rows of JSONL files, read and checked (SPEC: stage rows, evaluation rows, documents).

Every error names the file and the line. Files may be gzipped and may lie anywhere `etils.epath` reaches.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath


class DataError(ValueError):
  """A file or a row is not what it should be; the message has the file and the line."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One training or evaluation row.

  Attributes:
    questions: one question, or all of a document's (SCP). Empty for a paraphrase row.
    answers: for one question, every accepted answer, the first being the target; for several, one answer each.
    documents: texts; K given documents, or N candidates.
    gold: 0-based positions of the gold documents.
    data_type: 'qa' or 'paraphrase'.
    identifier: the row's id, or 'file:line'.
    is_question_list: each question has its own answer (an SCP row); else one question with accepted answers.
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
  """One document of a corpus."""

  id: str
  text: str
  title: str = ""


class Malformed:
  """Counts bad rows and stops at a limit.

  Args:
    limit: how many are passed over; the next one stops the run. 0 stops at the first.
  """

  def __init__(self, limit: int = 0):
    self.limit = limit
    self._places: set[str] = set()

  @property
  def count(self) -> int:
    """Bad rows so far."""
    return len(self._places)

  def add(self, problem: str) -> None:
    """Reports a bad row, once; `problem` begins with its place and a colon.

    Raises:
      DataError: there are more than the limit.
    """
    place = problem.split(": ", 1)[0]
    if place in self._places:
      return
    self._places.add(place)
    if self.count > self.limit:
      more = f" ({self.count} malformed rows, max_malformed={self.limit})" if self.limit else ""
      raise DataError(f"{problem}{more}")
    print(f"malformed row {self.count} of at most {self.limit} is passed over: {problem}", file=sys.stderr, flush=True)


def read_jsonl(path: str, malformed: Malformed | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields ('file:line', object) of a JSONL file, gzipped or not.

  Raises:
    DataError: the file is missing or empty, or more lines than `malformed` allows are not JSON objects.
  """
  malformed = Malformed() if malformed is None else malformed
  file = epath.Path(path)
  if not file.exists():
    raise DataError(f"{path}: no such file")
  if file.is_dir():
    raise DataError(f"{path}: is a directory, expected a JSONL file")
  count = 0
  with file.open("rb") as raw:
    try:
      stream = gzip.open(raw) if str(path).endswith(".gz") else raw
      for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig"), 1):
        if not line.strip():
          continue
        try:
          value = json.loads(line)
          if "\\ud" in line.lower():
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
          malformed.add(f"{path}:{number}: half of a surrogate pair is no text")
          continue
        except json.JSONDecodeError as error:
          malformed.add(f"{path}:{number}: not valid JSON: {error}")
          continue
        if not isinstance(value, dict):
          malformed.add(f"{path}:{number}: expected a JSON object, got {type(value).__name__}")
          continue
        count += 1
        yield f"{path}:{number}", value
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
      raise DataError(f"{path}: not readable as {'gzipped ' if str(path).endswith('.gz') else ''}UTF-8 text: {error}") from None
  if not count:
    raise DataError(f"{path}: the file has no rows")


def parse_rows(path: str, malformed: Malformed | None = None) -> Iterator[Row]:
  """The checked rows of a JSONL file; bad ones are counted by `malformed`."""
  malformed = Malformed() if malformed is None else malformed
  for where, value in read_jsonl(path, malformed):
    try:
      row = parse_row(value, where)
    except DataError as error:
      malformed.add(str(error))
      continue
    yield row


def parse_row(value: Mapping[str, Any], where: str) -> Row:
  """Checks one stage or evaluation row.

  Documents are `docs`, `context` or `content`; the answer is `answer`, else `answers`, else `golden_answers`.

  Raises:
    DataError: no documents, no answer, counts that do not match, positions out of range; with `where`.
  """
  documents = next((value[k] for k in ("docs", "context", "content") if value.get(k)), None)
  documents = _strings(documents, where, "docs")
  if not documents:
    raise DataError(f"{where}: the row has no documents ('docs', 'context' or 'content')")
  data_type = value.get("data_type") or "qa"
  if data_type not in ("qa", "paraphrase"):
    raise DataError(f"{where}: data_type={data_type!r}: expected 'qa' or 'paraphrase'")
  answers = next((value[k] for k in ("answer", "answers", "golden_answers") if value.get(k) not in (None, "", [])), None)
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
    if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position < len(documents):
      raise DataError(f"{where}: pos_index={position!r}: expected 0 … {len(documents) - 1}")
  document_ids = _strings(value.get("doc_ids"), where, "doc_ids")
  if document_ids and len(document_ids) != len(documents):
    raise DataError(f"{where}: {len(documents)} documents but {len(document_ids)} doc_ids")
  return Row(questions if data_type == "qa" else (), answers, documents, gold, data_type,
             str(value.get("id") or where), listed and data_type == "qa", document_ids)


def _strings(value: Any, where: str, field: str) -> tuple[str, ...]:
  if value is None:
    return ()
  values = [value] if isinstance(value, str) else value
  if not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
    raise DataError(f"{where}: {field}: expected text or a list of texts, got {value!r:.80}")
  return tuple(values)


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


def read_documents(path: str) -> Iterator[Document]:
  """Documents of a corpus: `id`, `text` and optionally `title`.

  Raises:
    DataError: an id is missing or comes twice, or there is no text.
  """
  seen: set[bytes] = set()  # hashes: a corpus has millions
  for where, value in read_jsonl(path):
    text = value.get("text", value.get("contents"))
    if not isinstance(text, str) or not text.strip():
      raise DataError(f"{where}: the document has no 'text'")
    if value.get("id") in (None, ""):
      raise DataError(f"{where}: the document has no 'id'")
    identifier = str(value["id"])
    digest = hashlib.blake2b(identifier.encode(), digest_size=16).digest()
    if digest in seen:
      first = next(place for place, other in read_jsonl(path) if str(other.get("id")) == identifier)
      raise DataError(f"{where}: id {identifier!r} was already used at {first}")
    seen.add(digest)
    yield Document(identifier, text, str(value.get("title") or ""))
