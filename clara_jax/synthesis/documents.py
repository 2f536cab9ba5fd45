"""What is to be compressed, in pieces: JSONL, plain text or a Wikipedia extract, cut on sentence
bounds."""

import gzip
import hashlib
import html
import io
import itertools
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator

from tokenizers import Tokenizer

from clara_jax.config import ConfigError
from clara_jax.data.schemas import DataError, Document
from clara_jax.io import parse_json

_SPACE = re.compile(r"[^\S ]")
_GREEK = re.compile(r"[\u0370-\u03ff\u1f00-\u1fff]")
_PIECE = re.compile(r"#\d+$")
# WikiExtractor does not escape the quotes of a title.
_EXTRACT = re.compile(
  r'<doc id="([^"\n]*)"[^\n]*? title="([^\n]*?)"(?: \w+="[^"\n]*")*>\n(.*?)\n?</doc>', re.DOTALL
)


def read(path: str) -> Iterator[Document]:
  """Documents of a file or of all files below a directory, in order of their names.

  JSONL (`id`, `text`, `title`; also of WikiExtractor `--json`), WikiExtractor `<doc …>` files, and
  plain text, one document a file. All may be gzipped.

  Raises:
    DataError: by file and row; an id that is a duplicate.
  """
  root = pathlib.Path(path)
  if not root.exists():
    raise DataError(f"{path}: no such file")
  files = (
    sorted(f for f in root.rglob("*") if f.is_file() and not f.name.startswith("."))
    if root.is_dir()
    else [root]
  )
  seen: set[int] = set()  # of hashes: a corpus has millions
  for file in files:
    for document in _file(file, root):
      if (key := hash(document.id)) in seen:
        raise DataError(f"{file}: id {document.id!r} is a duplicate")
      seen.add(key)
      yield document


class Reading:
  """Documents of `read`, or only the `first` of them, in pieces of at most `limit` tokens, and how
  far it has come.

  Attributes:
    share: of the documents, how many have been read: 0 … 1.
  """

  def __init__(self, path: str, limit: int, count: Callable[[str], int], first: int | None = None):
    self._path, self._limit, self._count, self._first = path, limit, count, first
    self._total, self._done = 0, 0
    self._like_pieces: set[str] = set()  # ids of documents that could be a piece's
    for document in itertools.islice(read(path), first):
      self._total += 1
      if _PIECE.search(document.id):
        self._like_pieces.add(document.id)
    if not self._total:
      raise DataError(f"{path}: has no documents")

  @property
  def share(self) -> float:
    return self._done / max(1, self._total)

  def __iter__(self) -> Iterator[Document]:
    for document in itertools.islice(read(self._path), self._first):
      for piece in chunks(document, self._limit, self._count):
        if piece.id != document.id and piece.id in self._like_pieces:
          raise DataError(
            f"{self._path}: a piece of document {document.id!r} is {piece.id!r}, which is another "
            f"document's id"
          )
        yield piece
      self._done += 1


def _file(file: pathlib.Path, root: pathlib.Path) -> Iterator[Document]:
  try:
    with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as raw:
      # A JSON escape may still be half a character: `_clean`.
      stream = io.TextIOWrapper(raw, encoding="utf-8-sig")
      first = next((line for line in stream if line.strip()), "")
      stream.seek(0)
      if first.startswith("{") or file.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        yield from _rows(file, stream)
      elif first.startswith("<doc "):
        for number, title, text in _EXTRACT.findall(stream.read()):
          first_line, _, rest = text.partition("\n")
          text = rest if first_line.strip() == title.strip() else text
          if text.strip():  # redirects and categories have none
            yield Document(number, html.unescape(text.strip()), html.unescape(title))
      elif first:
        name = file.name if file == root else str(file.relative_to(root))
        yield Document(name.removesuffix(".gz").removesuffix(".txt"), stream.read().strip())
  except UnicodeDecodeError as error:
    raise DataError(f"{file}: not UTF-8 text: {error}") from None
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise DataError(f"{file}: a damaged .gz: {error}") from None


def _rows(file: pathlib.Path, stream: io.TextIOWrapper) -> Iterator[Document]:
  for number, line in enumerate(stream, 1):
    if not line.strip():
      continue
    try:
      value = parse_json(line)
      text = value.get("text", value.get("contents"))
    except (ValueError, AttributeError) as error:
      raise DataError(
        f"{file}:{number}: {error if isinstance(error, ValueError) else 'not a JSON object'}"
      ) from None
    if not isinstance(text, str):
      raise DataError(f"{file}:{number}: the document has no 'text'")
    if not text.strip():
      continue  # Wikipedia's redirects
    if value.get("id") in (None, "") or isinstance(value["id"], (dict, list, bool)):
      raise DataError(f"{file}:{number}: the document has no 'id'")
    yield Document(*map(_clean, (str(value["id"]), text.strip(), str(value.get("title") or ""))))


def _clean(text: str) -> str:
  return text.encode("utf-8", "replace").decode()


def sentences(text: str) -> list[str]:
  """Sentences of a text in any language, without the space around them; lines are bounds, too."""
  return [text[start:end] for start, end in _spans(text)]


def _spans(text: str) -> list[tuple[int, int]]:
  """Where the sentences are."""
  try:
    import sentencex
  except ImportError:
    raise ConfigError(
      "documents are cut on sentence bounds by sentencex: pip install -e '.[synthesize]'"
    ) from None
  spans, start = [], 0
  for line in text.split("\n"):
    place = start
    plain = _SPACE.sub(" ", line)  # other spaces make the library panic
    language = "el" if _GREEK.search(line) else "en"  # the other scripts' marks are known to all
    try:
      parts = sentencex.segment(language, plain)
    except BaseException as error:
      if type(error).__name__ != "PanicException":
        raise
      parts = [plain]
    for sentence in parts:
      first = start + plain.index(sentence, place - start)
      place = first + len(sentence)
      if inner := sentence.strip():
        first += len(sentence) - len(sentence.lstrip())
        spans.append((first, first + len(inner)))
    start += len(line) + 1
  return spans


def words(text: str) -> int:
  """Number of words: the measure where no tokenizer is chosen."""
  return len(text.split())


def token_counter(directory: str) -> Callable[[str], int]:
  """Number of tokens by a directory's tokenizer.json.

  Raises:
    ConfigError: there is none.
  """
  tokenizer = Tokenizer.from_file(str(_tokenizer_file(directory)))
  return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def tokenizer_hash(directory: str) -> str:
  """SHA-256 of a directory's tokenizer.json."""
  return hashlib.sha256(_tokenizer_file(directory).read_bytes()).hexdigest()


def _tokenizer_file(directory: str) -> pathlib.Path:
  path = pathlib.Path(directory, "tokenizer.json")
  if not path.is_file():
    raise ConfigError(f"--tokenizer {directory}: has no tokenizer.json")
  return path


def chunks(
  document: Document, limit: int, count: Callable[[str], int] = words
) -> Iterator[Document]:
  """Pieces of at most `limit` tokens with the document's title, `ID#0`, `ID#1` …; a document that
  fits keeps its id.

  Args:
    document: the whole. Of a title that takes more than half of the limit, the beginning stays.
    limit: tokens of title and text.
    count: tokens of a text. Sums over sentences stand for the whole, so that a piece may be a token
      or two off its count.
  """
  title = next(_short(document.title, limit // 2, count), "")
  room = limit - (count(title) + 1 if title else 0)
  pieces: list[str] = []
  held, size, end = "", 0, 0
  for first, last in _spans(document.text):
    for number, part in enumerate(_short(document.text[first:last], room, count)):
      length = count(part)
      # Chinese has no space between sentences
      between = " " if held and (number or first > end) else ""
      if held and size + length > room:
        pieces.append(held)
        held, size, between = "", 0, ""
      held += between + part
      size += length
    end = last
  if held:
    pieces.append(held)
  for number, text in enumerate(pieces):
    yield Document(document.id if len(pieces) == 1 else f"{document.id}#{number}", text, title)


def _short(sentence: str, room: int, count: Callable[[str], int]) -> Iterator[str]:
  """A sentence that is too long, in words; a word that is too long (a line of a script without
  spaces), in characters."""
  if count(sentence) <= room:
    yield sentence
    return
  held = ""
  for part in re.findall(r"\s*\S+", sentence):
    for piece in [part] if count(part) <= room else re.findall(r"\s*\S", part):
      if held and count(held + piece) > room:
        yield held.strip()
        held = ""
      held += piece
  if held.strip():
    yield held.strip()
