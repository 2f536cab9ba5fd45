"""Documents as people have them: read, cut in pieces, compressed, followed when they change."""

import dataclasses
import gzip
import json
import shutil
import zipfile

import numpy as np
import pytest

from clara_jax.cli import main as cli
from clara_jax.data.schemas import DataError, Document, Malformed
from clara_jax.documents import pieces, reading
from clara_jax.documents.reading import Text
from clara_jax.memory.store import MemoryStore
from clara_jax.testing import tiny
from tests.helpers import refused

pytest.importorskip("sentencex")


def texts(path, malformed=None):
  return list(reading.read(str(path), malformed))


# ---- reading -------------------------------------------------------------------------------------


def test_rows_text_and_wikipedia(tmp_path):
  (tmp_path / "a.jsonl").write_text(
    '{"id": 1, "title": "T", "text": "One."}\n{"id": 2, "text": ""}\n{"text": "No id."}\n'
  )
  (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"Plain text.\r\nTwo.\n"))
  (tmp_path / "empty.txt").write_text("\n")
  (tmp_path / ".hidden").write_text("hidden")
  (tmp_path / "wiki_00").write_text(
    '<doc id="7" url="u" title="A &amp; B">\nA &amp; B\n\nIt is so.\n</doc>\n'
    '<doc id="8" url="u" title="x">\n</doc>\n'
    '<doc id="9" url="u" title="The "B" side">\nThe "B" side\nText.\n</doc>\n'
    '<doc id="10" title="C" rev="1">\nNo title here.\n</doc>\n'
  )
  (one, unnamed, *rest) = texts(tmp_path)
  assert one == Text("1", "One.", "T", True)
  assert (unnamed.text, len(unnamed.id)) == ("No id.", 16)
  assert rest == [
    Text("b", "Plain text.\nTwo."),
    Text("7", "It is so.", "A & B", True),
    Text("9", "Text.", 'The "B" side', True),
    Text("10", "No title here.", "C", True),
  ]
  (tmp_path / "c.jsonl").write_text('{"id": 1, "text": "again"}\n')
  with pytest.raises(DataError, match="id '1' is a duplicate"):
    texts(tmp_path)


def test_bad_rows_and_files_are_named(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"id": "u", "text": "Half \\ud83d of one."}\n')
  with pytest.raises(DataError, match="a.jsonl:1: half of a surrogate pair"):
    texts(tmp_path / "a.jsonl")
  (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"{}" * 500)[:20] + b"garbage" * 9)
  with pytest.raises(DataError, match="c.txt.gz: a damaged .gz"):
    texts(tmp_path / "c.txt.gz")
  with pytest.raises(DataError, match="nothing: no such file"):
    texts(tmp_path / "nothing")


def test_json_in_one_piece(tmp_path):
  (tmp_path / "a.json").write_text(
    json.dumps([{"id": 1, "text": "One."}, {"text": "Two."}], indent=1)
  )
  assert [t.text for t in texts(tmp_path)] == ["One.", "Two."]
  (tmp_path / "a.json").write_text(json.dumps({"name": "x"}, indent=1))
  with pytest.raises(DataError, match="a.json:1: the document has no 'text'"):
    texts(tmp_path)


def docx(path, paragraphs):
  """A Word file; (style, text) of each paragraph."""
  body = "".join(
    f'<w:p><w:pPr><w:pStyle w:val="{style}"/></w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>'
    if style
    else f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>"
    for style, text in paragraphs
  )
  main = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
  package = "http://schemas.openxmlformats.org/package/2006"
  office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
  kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
  with zipfile.ZipFile(path, "w") as file:
    file.writestr(
      "[Content_Types].xml",
      f'<Types xmlns="{package}/content-types"><Default Extension="rels" '
      'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
      f'<Override PartName="/word/document.xml" ContentType="{kind}"/></Types>',
    )
    file.writestr(
      "_rels/.rels",
      f'<Relationships xmlns="{package}/relationships"><Relationship Id="r" Type="{office}" '
      'Target="word/document.xml"/></Relationships>',
    )
    file.writestr(
      "word/document.xml", f'<w:document xmlns:w="{main}"><w:body>{body}</w:body></w:document>'
    )


def pdf(path, pages):
  plotting = pytest.importorskip("matplotlib")
  plotting.use("agg")
  from matplotlib import pyplot
  from matplotlib.backends.backend_pdf import PdfPages

  with PdfPages(path) as file:
    for text in pages:
      figure = pyplot.figure()
      figure.text(0.1, 0.5, text)
      file.savefig(figure)
      pyplot.close(figure)


def fill(folder):
  """A mixed folder, as people have them."""
  pytest.importorskip("kreuzberg")
  (folder / "Über uns").mkdir(parents=True)
  (folder / "notes.txt").write_text("Mila lives in Oslo. She is a baker.\n")
  (folder / "Über uns" / "read me.md").write_text(
    "# The firm\n\nIt makes bread.\n\n## People\n\nMila runs *it*. Jon helps her.\n"
  )
  (folder / "page.html").write_text(
    "<html><head><title>Prices</title><style>p{}</style></head><body><script>x()</script>"
    "<h1><a href='#b'>Bread</a></h1><p><b>Rye</b> is 3 &euro;.</p><h2>Cakes</h2>"
    "<p>None today.</p></body></html>"
  )
  docx(
    folder / "contract.docx",
    [("Heading1", "Contract"), ("", "Jon is paid on Fridays."), ("Heading1", "End")],
  )
  pdf(folder / "report.pdf", ["The first page.", "The second page."])
  (folder / "broken.pdf").write_bytes(b"%PDF-1.4\n" + b"nothing" * 99)
  (folder / "photo.png").write_bytes(
    bytes.fromhex("89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489")
  )
  sentences = (f"In year {i} the firm baked {i * 37 % 1009} loaves." for i in range(2000))
  (folder / "long.txt").write_text(" ".join(sentences))


def test_a_mixed_folder(tmp_path):
  fill(tmp_path)
  malformed = Malformed(2)
  found = {t.id: t for t in texts(tmp_path, malformed)}
  assert malformed.names == {"broken.pdf", "photo.png"}
  assert set(found) == {
    *("notes", "long", "page.html", "contract.docx", "report.pdf", "Über uns/read me.md")
  }
  page = found["page.html"]
  assert page.title == "Prices" and "Rye is 3 €." in page.text and "x()" not in page.text
  assert [heading[1:] for heading in page.headings] == [(1, "Bread"), (2, "Cakes")]
  report = found["report.pdf"]
  assert [report.text[p:].split("\n")[0] for p in report.pages] == [
    "The first page.",
    "The second page.",
  ]
  readme = found["Über uns/read me.md"]
  assert "Mila runs it. Jon helps her." in readme.text
  for start, _, heading in readme.headings:
    assert readme.text[start:].startswith(heading)
  assert [heading[2] for heading in found["contract.docx"].headings] == ["Contract", "End"]
  with pytest.raises(DataError, match=r"broken.pdf: cannot be read as application/pdf: .*Invalid"):
    texts(tmp_path)
  with pytest.raises(DataError, match="photo.png: image/png is no document"):
    texts(tmp_path / "photo.png")


# ---- pieces --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "text",
  ["M\u00a0. Dupont came.", "in the U.S\u00a0. now", "M\u3000. Yes. No.", "a\u2009. b\x85 c. D"],
)
def test_odd_spaces(text):
  cut = pieces.cut(Text("x", text), 50)
  assert "".join("".join(p.text for p in cut).split()) == "".join(text.split())


def test_pieces_end_on_sentence_bounds():
  text = (
    'Dr. J. Smith came in 1912. "Who is it?" she asked. It was late (very late). 它很小。它很大。'
  )
  assert pieces.sentences(text) == [
    "Dr. J. Smith came in 1912.",
    '"Who is it?" she asked.',
    "It was late (very late).",
    "它很小。",
    "它很大。",
  ]
  body = " ".join(f"Sentence {i} has five words." for i in range(9)) + " " + "word " * 30
  long = Text("x", body.strip(), "A title")
  cut = list(pieces.cut(long, 20))
  assert all(p.id.startswith("x#") and p.title == "A title" for p in cut)
  assert len({p.id for p in cut}) == len(cut) > 4
  assert all(pieces.words(p.document().text) <= 20 for p in cut)
  assert " ".join(p.text for p in cut).split() == body.split()
  assert all(body[p.start : p.end].split() == p.text.split() for p in cut)
  assert list(pieces.cut(Text("y", "Short. Text."), 20)) == [
    pieces.Piece("y", "Short. Text.", end=12)
  ]
  (piece,) = pieces.cut(Text("z", "Short. Text.", "a title that is much too long"), 10)
  assert piece.title == "a title that is much"


def test_a_piece_knows_its_section_and_page():
  text = "Top\nHello there.\nOne\nMila bakes bread all day.\nTwo\nJon sells it in the town."
  headings = tuple((text.index(name), level, name) for name, level in (("Top", 1), ("Two", 2)))
  cut = list(pieces.cut(Text("f", text, "Firm", headings=headings, pages=(0, 20)), 12))
  assert [p.section for p in cut][0] == ("Top",) and cut[-1].section == ("Top", "Two")
  assert (cut[0].page, cut[-1].page) == (1, 2)
  last = cut[-1].document()
  assert last.text.startswith("Firm › Top › Two\n") and last.title == "Firm › Top › Two"
  assert last.place == f"page 2, characters {cut[-1].start}-{len(text)}"


def test_a_piece_repeats_what_stands_before_it():
  text = " ".join(f"Sentence {i} has five words." for i in range(20))
  plain, repeating = (list(pieces.cut(Text("x", text), 30, overlap=n)) for n in (0, 6))
  assert all(not p.overlap for p in plain) and not repeating[0].overlap
  for before, piece in zip(repeating, repeating[1:], strict=False):
    assert before.text.endswith(piece.overlap) and pieces.words(piece.overlap) == 5
  assert " ".join(p.text for p in repeating) == text


def test_a_change_leaves_the_other_pieces_their_ids():
  text = " ".join(f"In year {i} the firm baked {i * 37 % 1009} loaves." for i in range(1000))
  ids = [p.id for p in pieces.cut(Text("x", text), 60)]
  place = text.index("In year 500")
  changed = text[:place] + "A fire came. All was lost. " + text[place:]
  new = [p.id for p in pieces.cut(Text("x", changed), 60)]
  assert len(set(ids) - set(new)) <= 4 and len(set(new) - set(ids)) <= 4


def test_a_piece_is_no_other_document(tmp_path):
  text = " ".join(f"Sentence {i} has five words." for i in range(9))
  first = next(pieces.cut(Text("a", text), 12)).id
  rows = [{"id": "a", "text": text}, {"id": first, "text": "Short."}]
  (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
  with pytest.raises(DataError, match=f"a piece of document 'a' is '{first}', which is another"):
    list(pieces.Reading(str(tmp_path / "b.jsonl"), 12, pieces.words))


def test_how_far_reading_has_come(tmp_path):
  (tmp_path / "a.txt").write_text("One.")
  (tmp_path / "b.txt").write_text("Two.")
  told = pieces.Reading([str(tmp_path)], 20, pieces.words)
  assert told.share == 0 and len(list(told)) == 2 and told.share == 1


# ---- compressed ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  path = tmp_path_factory.mktemp("start")
  tiny.write_checkpoint(str(path), tiny.config(), tiny.weights())
  return path


def compress(start, folder, store, *more, capsys):
  arguments = ("--documents", folder, "--store", store, "--max-malformed", 2, "--json", *more)
  status = cli.main([str(a) for a in ("compress", "--checkpoint", start, *arguments)])
  out = capsys.readouterr()
  assert status == 0, out.err
  return json.loads(out.out)


def content(path):
  store = MemoryStore(str(path))
  return {
    d.id: (dataclasses.astuple(d), m)
    for d, m in zip(store.documents(), store.memories(), strict=True)
  }


def test_a_folder_is_followed(start, tmp_path, capsys):
  """Edits, deletions, renames: the store is the one made afresh, and what was untouched stays."""
  folder, store = tmp_path / "folder", tmp_path / "store"
  folder.mkdir()
  fill(folder)
  first = compress(start, folder, store, capsys=capsys)
  assert first["cut"] == 0 and first["documents"] > 300
  before = content(store)
  long = (folder / "long.txt").read_text()
  place = long.index("In year 1000")
  (folder / "long.txt").write_text(long[:place] + "A fire came. " + long[place:])
  (folder / "notes.txt").write_text("Mila lives in Bergen now.\n")
  (folder / "page.html").unlink()
  shutil.move(folder / "contract.docx", folder / "old contract.docx")
  (folder / "new.txt").write_text("Nothing more.")
  again = compress(start, folder, store, "--replace", "--delete-missing", capsys=capsys)
  afresh = tmp_path / "afresh"
  compress(start, folder, afresh, capsys=capsys)
  now, straight = content(store), content(afresh)
  assert {i: d for i, (d, _) in now.items()} == {i: d for i, (d, _) in straight.items()}
  for identifier, (_, memory) in straight.items():
    np.testing.assert_allclose(now[identifier][1], memory, atol=1e-5)  # other batches
  assert len(set(before) & set(now)) > 0.95 * len(before)
  assert again["deleted"] == len(set(before) - set(now)) and again["replaced"] < 10


def test_what_could_not_be_read_is_not_deleted(start, tmp_path, capsys):
  folder, store = tmp_path / "folder", tmp_path / "store"
  folder.mkdir()
  pytest.importorskip("kreuzberg")
  pdf(folder / "report.pdf", ["The first page."])
  (folder / "a.txt").write_text("One.")
  (folder / "b.txt").write_text("Two.")
  compress(start, folder, store, capsys=capsys)
  (folder / "report.pdf").write_bytes(b"%PDF-1.4\nhalf")
  (folder / "b.txt").unlink()
  assert compress(start, folder, store, "--delete-missing", capsys=capsys)["deleted"] == 1
  assert set(content(store)) == {"report.pdf", "a"}
  (folder / "rows.jsonl").write_text('{"no": "text"}\n')  # which document is it?
  (folder / "a.txt").unlink()
  assert compress(start, folder, store, "--delete-missing", capsys=capsys)["deleted"] == 0


def test_rows_are_whole_unless_they_are_to_be_split(start, tmp_path, capsys):
  file = tmp_path / "rows.jsonl"
  long = " ".join(f"Mila lives in Oslo {i}." for i in range(60))
  file.write_text(json.dumps({"id": "long", "text": long}) + '\n{"id": "short", "text": "One."}\n')
  whole = compress(start, file, tmp_path / "whole", capsys=capsys)
  assert (whole["documents"], whole["cut"]) == (2, 1)
  split = compress(start, file, tmp_path / "split", "--split", "always", capsys=capsys)
  assert split["cut"] == 0 and split["documents"] > 5
  assert MemoryStore(str(tmp_path / "split")).documents([0]) != [Document("long", long)]
  assert "short" in content(tmp_path / "split")


def test_wrong_options_are_named(start, tmp_path):
  (tmp_path / "a.txt").write_text("One.")
  given = ("compress", "--checkpoint", start, "--store", tmp_path / "s", "--documents", tmp_path)
  assert "--overlap 99: expected 0 to 10" in refused(*given, "--overlap", "99")
  said = refused(*given, "--delete-missing", "--process", 0, "--processes", 2)
  assert "delete_missing" in said or "--delete-missing" in said


def test_a_first_run_that_failed_is_not_in_the_way(start, tmp_path, capsys):
  (tmp_path / "bad.jsonl").write_text('{"no": "text"}\n')
  (tmp_path / "good.jsonl").write_text('{"text": "One."}\n')
  store = tmp_path / "store"
  given = ("compress", "--checkpoint", start, "--store", store, "--documents")
  assert "bad.jsonl:1" in refused(*given, tmp_path / "bad.jsonl", "--encoding", "int8")
  made = compress(start, tmp_path / "good.jsonl", store, "--encoding", "float32", capsys=capsys)
  assert made["documents"] == 1
