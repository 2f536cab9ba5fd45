"""Long documents in pieces of so many tokens, on sentence bounds.

A piece ends where a section ends, or where the next sentence would not fit. Which sentence begins a
piece depends, as far as it can, on that sentence alone (an *anchor*): after a change in the middle
of a text the pieces behind it soon are those of before, with the same ids.
"""

import bisect
import collections
import dataclasses
import hashlib
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from tokenizers import Tokenizer

from clara_jax.config import ConfigError
from clara_jax.data.schemas import DataError, Document, Malformed
from clara_jax.documents.reading import Text, read

_SPACE = re.compile(r"[^\S ]")
_GREEK = re.compile(r"[\u0370-\u03ff\u1f00-\u1fff]")
_PIECE = re.compile(r"#[0-9a-f]{8}(-\d+)?$")
VERSION = 2  # of how documents are cut
_MARGIN = 4  # tokens by which sums over sentences may be off
_ANCHORS = 4  # every fourth sentence is one
_SECTION = 3  # a section ends a piece that is at least a third full


@dataclasses.dataclass(frozen=True)
class Piece:
  """Part of a document.

  Attributes:
    id: the document's where it is all of it, else `ID#` and a hash of the piece's text.
    text: its sentences.
    title: of the document.
    section: headings above it, outermost first.
    page: on which it begins, from 1; 0 where the document has no pages.
    start, end: in the document's text, in characters.
    overlap: sentences before it that it repeats, in front.
  """

  id: str
  text: str
  title: str = ""
  section: tuple[str, ...] = ()
  page: int = 0
  start: int = 0
  end: int = 0
  overlap: str = ""

  @property
  def heading(self) -> str:
    """Title and section."""
    return " › ".join(dict.fromkeys(filter(None, (self.title, *self.section))))

  def document(self) -> Document:
    """With title and section in its text, to be compressed, and its place."""
    parts = (self.heading, self.overlap, self.text)
    place = f"page {self.page}, " if self.page else ""
    place += f"characters {self.start}-{self.end}"
    return Document(self.id, "\n".join(filter(None, parts)), self.heading, place)


class Reading:
  """Documents of `read`, or only the `first` of them, in pieces of at most `limit` tokens, and how
  far it has come.

  Attributes:
    share: of the documents, how many have been read: 0 … 1.
  """

  def __init__(
    self,
    paths: str | Sequence[str],
    limit: int,
    count: Callable[[str], int],
    first: int | None = None,
    max_malformed: int = 0,
  ):
    self._paths, self._limit, self._count, self._first = paths, limit, count, first
    self._max_malformed = max_malformed
    self._total, self._done = 0, 0
    self._like_pieces: set[str] = set()  # ids of documents that could be a piece's
    for text in self._texts(quiet=False):
      self._total += 1
      if _PIECE.search(text.id):
        self._like_pieces.add(text.id)
    if not self._total:
      raise DataError(f"{paths}: has no documents")

  def _texts(self, quiet: bool) -> Iterator[Text]:
    malformed = Malformed(self._max_malformed, quiet=quiet)
    return itertools.islice(read(self._paths, malformed), self._first)

  @property
  def share(self) -> float:
    return self._done / max(1, self._total)

  def __iter__(self) -> Iterator[Document]:
    for text in self._texts(quiet=True):
      for piece in cut(text, self._limit, self._count):
        if piece.id != text.id and piece.id in self._like_pieces:
          raise DataError(
            f"{self._paths}: a piece of document {text.id!r} is {piece.id!r}, which is another "
            f"document's id"
          )
        yield Document(piece.id, piece.text, piece.title)
      self._done += 1


def sentences(text: str) -> list[str]:
  """Sentences of a text in any language, without the space around them; lines are bounds, too."""
  return [text[start:end] for start, end in _spans(text)]


def _spans(text: str) -> list[tuple[int, int]]:
  """Where the sentences are."""
  try:
    import sentencex
  except ImportError:
    raise ConfigError(
      "documents are cut on sentence bounds by sentencex: pip install 'clara_jax[documents]'"
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


SPLIT = ("auto", "always", "never")


def documents(
  texts: Iterable[Text],
  limit: int,
  count: Callable[[str], int],
  split: str = "auto",
  overlap: int = 0,
) -> Iterator[Document]:
  """Documents to be compressed.

  Args:
    texts: as they were read.
    limit: tokens that a compressor reads.
    count: tokens of a text.
    split: 'always' cuts what is too long in pieces, 'never' does not (the compressor leaves the end
      out), 'auto' leaves rows whole, whose ids others may know.
    overlap: see `cut`.
  """
  for text in texts:
    if split == "never" or split == "auto" and text.is_row:
      yield Document(text.id, text.text, text.title)
    elif text.is_row and count(text.text) <= limit:
      yield Document(text.id, text.text, text.title)
    else:
      for piece in cut(text, limit, count, overlap):
        yield piece.document()


def cut(
  text: Text, limit: int, count: Callable[[str], int] = words, overlap: int = 0
) -> Iterator[Piece]:
  """Pieces of at most `limit` tokens; a document that fits is one.

  Args:
    text: the whole. Of a title that takes more than half of the limit, the beginning stays.
    limit: tokens of title, section, overlap and text.
    count: tokens of a text.
    overlap: tokens at most of the sentences before a piece that it repeats.
  """
  title = next(_short(text.title, limit // 2, count), "")
  sections = _Sections(text, title, limit // 2, count)
  pieces: list[Piece] = []
  numbers: collections.Counter[str] = collections.Counter()

  def piece(held: list["_Sentence"], before: list["_Sentence"]) -> Piece:
    body, start = _joined(held), held[0].start
    digest = hashlib.blake2b(body.encode(), digest_size=4).hexdigest()
    page = sum(first <= start for first in text.pages)
    section, repeated = sections.at(held[0].end), _tail(before, overlap)
    return Piece(f"{text.id}#{digest}", body, title, section, page, start, held[-1].end, repeated)

  held: list[_Sentence] = []
  before: list[_Sentence] = []
  size = 0
  for sentence in _sentences(text.text, sections.room - overlap - _MARGIN, count):
    room = sections.room_of(held[0] if held else sentence) - overlap
    full = size + sentence.tokens > room - _MARGIN and (
      count(piece([*held, sentence], before).document().text) > limit
    )
    new_section = sections.changes(held, sentence) and size * _SECTION >= room
    if held and (full or new_section or sentence.is_anchor and 2 * size >= room):
      pieces.append(piece(held, before))
      before, held, size = held, [], 0
    held.append(sentence)
    size += sentence.tokens
  if held:
    pieces.append(piece(held, before))
  if len(pieces) == 1:
    pieces = [dataclasses.replace(pieces[0], id=text.id)]
  for one in pieces:
    numbers[one.id] += 1
    again = numbers[one.id]  # the same text once more
    yield one if again == 1 else dataclasses.replace(one, id=f"{one.id}-{again}")


@dataclasses.dataclass(frozen=True)
class _Sentence:
  text: str
  start: int
  end: int
  tokens: int
  between: str  # what stands before it
  is_anchor: bool = False


def _sentences(text: str, room: int, count: Callable[[str], int]) -> Iterator[_Sentence]:
  """Sentences, one that is too long in parts that fit."""
  end = 0
  for first, last in _spans(text):
    sentence = text[first:last]
    anchor = hashlib.blake2b(sentence.encode(), digest_size=1).digest()[0] % _ANCHORS == 0
    place = first
    for number, part in enumerate(_short(sentence, max(1, room), count)):
      place = text.index(part, place) if part in text[place:last] else place
      # Chinese has no space between sentences; a new paragraph stays one.
      gap = text[end:first]
      between = " " if number else "\n" if "\n\n" in gap else " " if gap else ""
      yield _Sentence(part, place, place + len(part), count(part), between, anchor and not number)
      place += len(part)
    end = last


def _joined(sentences: Sequence[_Sentence]) -> str:
  return sentences[0].text + "".join(s.between + s.text for s in sentences[1:])


def _tail(sentences: list[_Sentence], tokens: int) -> str:
  """The last sentences, of so many tokens at most."""
  kept: list[_Sentence] = []
  for sentence in reversed(sentences):
    tokens -= sentence.tokens
    if tokens < 0:
      break
    kept.insert(0, sentence)
  return _joined(kept) if kept else ""


class _Sections:
  """Which headings stand above a place, and what room they leave."""

  def __init__(self, text: Text, title: str, limit: int, count: Callable[[str], int]):
    self._starts: list[int] = []
    self._paths: list[tuple[str, ...]] = []
    self._rooms: list[int] = []
    self._whole = 2 * limit
    stack: list[tuple[int, str]] = []
    for start, level, heading in ((-1, 0, ""), *text.headings):
      stack = [entry for entry in stack if entry[0] < level]
      if heading and heading != title:
        stack.append((level, heading))
      path = tuple(name for _, name in stack)
      shown = Piece("", "", title, path).heading
      while path and count(shown) > limit:  # the innermost counts
        path = path[1:]
        shown = Piece("", "", title, path).heading
      if count(shown) > limit:
        path, shown = (), title
      self._starts.append(start)
      self._paths.append(path)
      self._rooms.append(self._whole - (count(shown) + 1 if shown else 0))
    self.room = min(self._rooms)

  def _number(self, place: int) -> int:
    return bisect.bisect_right(self._starts, place - 1) - 1

  def at(self, place: int) -> tuple[str, ...]:
    """Headings above a place."""
    return self._paths[self._number(place)]

  def room_of(self, sentence: _Sentence) -> int:
    """Tokens beside the headings of a piece that begins with a sentence."""
    return self._rooms[self._number(sentence.end)]

  def changes(self, held: Sequence[_Sentence], sentence: _Sentence) -> bool:
    """Whether a section begins with a sentence."""
    return bool(held) and self._number(held[-1].end) != self._number(sentence.end)


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
