"""Documents of files: rows of JSONL, Wikipedia extracts, plain text, and what kreuzberg reads
(Markdown, HTML, PDF, Office and many more; extra `documents`).
"""

import dataclasses
import gzip
import hashlib
import html
import io
import json
import os
import pathlib
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from clara_jax import buckets
from clara_jax.config import ConfigError
from clara_jax.data import schemas
from clara_jax.data.schemas import DataError, Malformed
from clara_jax.io import parse_json

# WikiExtractor does not escape the quotes of a title.
_EXTRACT = re.compile(
  r'<doc id="([^"\n]*)"[^\n]*? title="([^\n]*?)"(?: \w+="[^"\n]*")*>\n(.*?)\n?</doc>', re.DOTALL
)
_LINES = (".jsonl", ".ndjson")
_ROWS = (*_LINES, ".json")
_PLAIN = (".txt", ".text", "")
_INLINE = ("a", "b", "strong", "em", "i", "code", "mark", "u")  # of HTML, whose text is enough
_NO_DOCUMENTS = ("image/", "audio/", "video/", "application/zip", "application/x-tar")
_SECONDS = 300  # that one file may take


@dataclasses.dataclass(frozen=True)
class Text:
  """A document as it was read.

  Attributes:
    id: of a row, or the file's path below the folder that was named.
    text: all of it.
    title: of the row or the file, if it has one.
    is_row: whether somebody gave it its id.
    headings: (offset, level 1 to 6, text) of each, in order; offsets in characters.
    pages: offset of each page; empty where there are none.
  """

  id: str
  text: str
  title: str = ""
  is_row: bool = False
  headings: tuple[tuple[int, int, str], ...] = ()
  pages: tuple[int, ...] = ()


def read(paths: str | Sequence[str], malformed: Malformed | None = None) -> Iterator[Text]:
  """Documents of files, or of all files below folders in order of their names; hidden files are
  left out, and empty ones have nothing.

  Args:
    paths: files, folders, gs://….
    malformed: counts what cannot be read: files that are no documents or are broken, rows.

  Raises:
    DataError: a path is not there, more is malformed than allowed, an id comes twice.
    ConfigError: a file needs a library that is not installed.
  """
  malformed = Malformed() if malformed is None else malformed
  seen: set[bytes] = set()  # hashes: a corpus has millions
  for path in [paths] if isinstance(paths, str) else paths:
    for document in _read(path, malformed):
      key = hashlib.blake2b(document.id.encode(), digest_size=16).digest()
      if key in seen:
        malformed.add(f"{path}: id {document.id!r} is a duplicate", (path, document.id))
        continue
      seen.add(key)
      yield document


def _read(path: str, malformed: Malformed) -> Iterator[Text]:
  where = epath.Path(path)
  if not where.exists():
    raise DataError(f"{path}: no such file")
  if where.is_dir():
    root = pathlib.Path(buckets.local_copy(path))
    for file in sorted(root.rglob("*")):
      below = file.relative_to(root)
      if file.is_file() and not any(part.startswith(".") for part in below.parts):
        yield from _read_file(file, below.as_posix(), malformed)
  elif _kind(where.name) in _LINES or not buckets.is_remote(path) and not os.path.isfile(path):
    for document in schemas.read_documents(path, malformed):  # also from a pipe
      yield Text(document.id, document.text, document.title, is_row=True)
  elif buckets.is_remote(path):
    with tempfile.TemporaryDirectory() as folder:
      copy = pathlib.Path(folder) / where.name
      copy.write_bytes(where.read_bytes())
      yield from _read_file(copy, where.name, malformed)
  else:
    yield from _read_file(pathlib.Path(path), where.name, malformed)


def _kind(name: str) -> str:
  return pathlib.PurePath(name.removesuffix(".gz")).suffix.lower()


def _read_file(file: pathlib.Path, name: str, malformed: Malformed) -> Iterator[Text]:
  kind = _kind(name)
  try:
    with gzip.open(file, "rb") if name.endswith(".gz") else open(file, "rb") as raw:
      beginning = raw.read(4096)
      raw.seek(0)
      if not beginning.strip():
        return
      if kind == ".json" and (values := _whole_json(raw)) is not None:
        lines = io.StringIO("".join(json.dumps(value) + "\n" for value in values))
        yield from _rows(file, lines, malformed)
        return
      if kind in _ROWS or kind in _PLAIN and beginning.lstrip(b"\xef\xbb\xbf \n").startswith(b"{"):
        yield from _rows(file, io.TextIOWrapper(raw, encoding="utf-8-sig"), malformed)
        return
      content = raw.read()
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    malformed.add(f"{file}: a damaged .gz: {error}", str(file), _identifier(name))
    return
  except OSError as error:
    malformed.add(f"{file}: {error.strerror or error}", str(file), _identifier(name))
    return
  if kind in _PLAIN:
    try:
      text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
      if kind:  # in another encoding, perhaps
        yield from _extracted(file, name, content, malformed)
      else:
        malformed.add(f"{file}: not UTF-8 text: {error}", str(file), _identifier(name))
      return
    if text.startswith("<doc "):
      yield from _extracts(text)
    elif text := text.strip().replace("\r\n", "\n"):
      yield Text(_identifier(name), text)
  else:
    yield from _extracted(file, name, content, malformed)


def _whole_json(raw: Any) -> list[Any] | None:
  """The objects of a file that is one value of JSON; None where it may be one a line."""
  try:
    value = parse_json(raw.read())
  except ValueError:
    return None
  finally:
    raw.seek(0)
  return value if isinstance(value, list) else [value]


def _identifier(name: str) -> str:
  return name.removesuffix(".gz").removesuffix(".txt")


def _rows(file: pathlib.Path, stream: io.TextIOBase, malformed: Malformed) -> Iterator[Text]:
  for document in schemas.parse_documents(stream, str(file), malformed):
    yield Text(document.id, document.text.strip(), document.title, is_row=True)


def _extracts(text: str) -> Iterator[Text]:
  for number, title, inner in _EXTRACT.findall(text):
    first_line, _, rest = inner.partition("\n")
    inner = rest if first_line.strip() == title.strip() else inner
    if inner.strip():  # redirects and categories have none
      yield Text(number, html.unescape(inner.strip()), html.unescape(title), is_row=True)


def _extracted(
  file: pathlib.Path, name: str, content: bytes, malformed: Malformed
) -> Iterator[Text]:
  """What kreuzberg reads of a file."""
  try:
    import kreuzberg
  except ImportError:
    raise ConfigError(
      f"{file}: files of other kinds than text and JSONL are read by kreuzberg: "
      "pip install 'clara_jax[documents]'"
    ) from None
  settings = kreuzberg.ExtractionConfig(
    use_cache=False,
    disable_ocr=True,
    output_format="plain",
    include_document_structure=True,
    pages=kreuzberg.PageConfig(extract_pages=True),
    html_options={"strip_tags": [*_INLINE], "skip_images": True},
    extraction_timeout_secs=_SECONDS,
  )
  try:
    kind = kreuzberg.detect_mime_type_from_path(str(file.with_name(file.name.removesuffix(".gz"))))
  except Exception:
    kind = kreuzberg.detect_mime_type(content)
  if kind.startswith(_NO_DOCUMENTS):
    malformed.add(f"{file}: {kind} is no document", str(file), _identifier(name))
    return
  try:
    result = kreuzberg.extract_bytes_sync(content, kind, config=settings)
  except BaseException as error:
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    problem = " ".join(str(error).split()).removeprefix(f"{type(error).__name__}: ")
    malformed.add(f"{file}: cannot be read as {kind}: {problem:.200}", str(file), _identifier(name))
    return
  text, pages = _pages(result)
  if not text.strip():
    malformed.add(
      f"{file}: has no text (pictures of text are not read)", str(file), _identifier(name)
    )
    return
  title = str(result.metadata.get("title") or "").strip()
  if title.lower() in ("untitled", "(anonymous)", "unspecified"):
    title = ""
  yield Text(_identifier(name), text, title, False, _headings(result, text), pages)


def _pages(result: Any) -> tuple[str, tuple[int, ...]]:
  """The text with one kind of line break, and where its pages begin."""
  if not result.pages or not any(_content(page).strip() for page in result.pages):
    return result.content.replace("\r\n", "\n").strip("\n"), ()
  text, pages = "", []
  for page in result.pages:
    pages.append(len(text))
    text += _content(page).replace("\r\n", "\n").strip("\n") + "\n\n"
  return text.rstrip("\n"), tuple(pages)


def _content(page: Any) -> str:
  return page["content"] if isinstance(page, dict) else page.content


def _headings(result: Any, text: str) -> tuple[tuple[int, int, str], ...]:
  """Headings of the document's structure, where they stand as a line of the text."""
  nodes = (result.document or {}).get("nodes", ())
  headings, end = [], 0
  for node in nodes:
    content = node["content"]
    if content.get("node_type") != "heading" or not content.get("text", "").strip():
      continue
    line = re.compile(rf"^{re.escape(content['text'].strip())}[ \t]*$", re.MULTILINE)
    if found := line.search(text, end):
      headings.append((found.start(), int(content["level"]), found[0].strip()))
      end = found.end()
  return tuple(headings)
