"""What people bring: published files in all their forms, damaged ones, files that no program of
ours wrote."""

import gzip
import json
import os
import subprocess
import sys
import threading
import zlib
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from clara_jax.cli.main import main
from clara_jax.data import schemas
from clara_jax.data.schemas import DataError, Malformed
from clara_jax.documents import reading
from clara_jax.evaluation import datasets, explain, metrics, plots
from clara_jax.reports import html
from clara_jax.synthesis import pages as pages_lib
from clara_jax.synthesis.journal import Journal

FACTS = {"question": "Who?", "answer": "Ada"}
HOTPOT = {
  "_id": "x",
  **FACTS,
  "context": [["T", ["Ada is here. ", "So."]], ["U", ["Bob."]]],
  "supporting_facts": [["T", 0]],
}
HOTPOT_HF = {
  "id": "x",
  **FACTS,
  "context": {"title": ["T", "U"], "sentences": [["Ada is here. ", "So."], ["Bob."]]},
  "supporting_facts": {"title": ["T"], "sent_id": [0]},
}


@pytest.mark.parametrize("value", [HOTPOT, HOTPOT_HF])
@pytest.mark.parametrize(
  "name, text",
  [
    ("a.json", lambda v: json.dumps([v])),
    ("b.json", lambda v: "\ufeff" + json.dumps([v], indent=1)),
    ("c.json.gz", lambda v: json.dumps([v])),
    ("d.jsonl", json.dumps),
    ("f.jsonl.gz", json.dumps),
    ("g.json", json.dumps),
    ("e.json", lambda v: json.dumps(v) + "\n" + json.dumps({**v, "id": "y", "_id": "y"})),
  ],
)
def test_hotpot_in_every_form(tmp_path, value, name, text):
  file = tmp_path / name
  content = text(value).encode()
  file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
  row = datasets.read(str(file))[0]
  assert (row.questions, row.answers, row.documents, row.gold, row.identifier) == (
    ("Who?",),
    ("Ada",),
    ("T\nAda is here. So.", "U\nBob."),
    (0,),
    "x",
  )


def test_published_sets_are_read_as_they_are_meant(tmp_path):
  file = tmp_path / "set.jsonl"
  paragraphs = [{"title": t, "paragraph_text": t, "is_supporting": t == "T"} for t in "TU"]
  twins = (
    {
      "id": "2hop",
      **FACTS,
      "answer_aliases": [],
      "answerable": a,
      "paragraphs": paragraphs[not a :],
    }
    for a in (True, False)
  )
  file.write_text("".join(json.dumps(twin) + "\n" for twin in twins))
  assert [(r.identifier, r.answers, r.gold) for r in datasets.read(str(file))] == [
    ("2hop", ("Ada",), (0,)),
    ("2hop (unanswerable)", ("noanswer",), ()),
  ]

  def annotation(start, short, closed="NONE"):
    return {
      "yes_no_answer": closed,
      "long_answer": {"start_token": start, "end_token": start + 1},
      "short_answers": [{"start_token": s, "end_token": s + 1} for s in short],
    }

  file.write_text(
    json.dumps(
      {
        "example_id": 1,
        "question_text": "who",
        "document_text": "Ada Bob Cy",
        "annotations": [
          annotation(-1, []),
          annotation(0, [0]),
          annotation(1, [1]),
          annotation(1, [1]),
          annotation(1, [], "YES"),
        ],
        "long_answer_candidates": [
          {"start_token": i, "end_token": i + 1, "top_level": True} for i in range(3)
        ],
      }
    )
  )
  (row,) = datasets.read(str(file))
  assert (row.answers, row.gold) == (("Ada", "Bob", "yes"), (0, 1))

  file.write_text(
    "".join(
      json.dumps({"id": str(i), **FACTS, **gold}) + "\n"
      for i, gold in enumerate(({"paragraph_ids": [0, 7]}, {"paragraph_id": 0}, {"doc_ids": ["a"]}))
    )
  )
  assert [r.document_ids for r in datasets.read(str(file))] == [("0", "7"), ("0",), ("a",)]


def test_an_answer_of_nothing_covers_nothing():
  assert [metrics.cover_em("anything at all", answer) for answer in ("A", "The", "", "…", "!")] == [
    0,
    0,
    0,
    0,
    0,
  ]
  assert metrics.cover_em("a cat sat", "the cat") == 1


@settings(max_examples=200)
@given(
  st.text(st.characters(max_codepoint=127), max_size=60),
  st.text(st.characters(max_codepoint=127), max_size=60),
)
def test_rouge_of_ascii_is_the_librarys(a, b):
  own = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(b, a)
  scores = metrics.paraphrase_scores(a, b)
  assert (scores["rouge1"], scores["rouge_l"]) == (own["rouge1"].fmeasure, own["rougeL"].fmeasure)


def test_rouge_knows_all_letters():
  for text in ("Мария Кюри родилась", "玛丽·居里出生于华沙", "Émile Zola"):
    assert metrics.paraphrase_scores(text, text)["rouge_l"] == 1
  assert (
    metrics.paraphrase_scores("Zola's book isn't long", "Zola’s book isn’t long")["rouge_l"] == 1
  )


def test_a_limit_limits(tmp_path):
  """Bad rows are counted one by one, whatever their places and ids are called."""
  folder = tmp_path / "my: data"
  folder.mkdir()
  question = {"question": "Who?", "answers": [{"text": "Ada"}]}
  questions = [
    {**question, "id": "a"},
    {**question, "id": "b", "answers": []},
    {**question, "id": "c"},
    {"id": "d"},
  ]
  squad = {
    "data": [
      {"title": "T", "paragraphs": [{"context": "Ada.", "qas": questions}]},
      {"title": "no paragraphs"},
    ]
  }
  (folder / "squad.json").write_text(json.dumps(squad))
  malformed = Malformed(3)
  assert [r.identifier for r in datasets.read(str(folder / "squad.json"), malformed)] == [
    "a",
    "c",
  ] and malformed.count == 3
  with pytest.raises(DataError, match=r"article 1.*\(3 malformed rows, max_malformed=2\)"):
    datasets.read(str(folder / "squad.json"), Malformed(2))
  (folder / "bad.jsonl").write_text(
    (json.dumps({"id": "same", "question": "Who?", "docs": ["d"]}) + "\n") * 3
  )
  malformed = Malformed(3)
  with pytest.raises(DataError, match="no row could be read"):
    datasets.read(str(folder / "bad.jsonl"), malformed)
  assert malformed.count == 3
  with pytest.raises(DataError, match="3 malformed rows, max_malformed=2"):
    list(schemas.parse_rows(str(folder / "bad.jsonl"), Malformed(2)))
  (folder / "documents.jsonl").write_text(
    "\n".join(
      json.dumps(d)
      for d in (
        {"id": 1, "text": "one"},
        {"id": 2, "text": " "},
        {"text": "no id"},
        {"id": 1, "text": "again"},
        {"id": [1], "text": "list"},
        {"id": 3, "text": "x"},
      )
    )
  )
  malformed = Malformed(3)
  first, unnamed, last = schemas.read_documents(str(folder / "documents.jsonl"), malformed)
  assert (first.id, unnamed.text, last.id, malformed.count) == ("1", "no id", "3", 3)
  with pytest.raises(DataError, match="documents.jsonl:2: the document has no 'text'"):
    list(schemas.read_documents(str(folder / "documents.jsonl")))


DAMAGED = {
  "zlib": (
    gzip.compress(b'{"id": "a", "text": "t"}\n' * 2000)[:40] + b"\xff" * 30,
    ".jsonl.gz",
    "1: not readable from here on",
  ),
  "no gzip": (b"{}", ".jsonl.gz", "1: not readable from here on"),
  "cut gzip": (gzip.compress(os.urandom(1000))[:-20], ".jsonl.gz", "not readable from here on"),
  "digits": (
    b'{"id": "a", "text": "t", "n": ' + b"1" * 5000 + b"}",
    ".jsonl",
    "1: not valid JSON: a number has too many digits",
  ),
  "brackets": (
    b'{"id": "a", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ".jsonl",
    "1: not valid JSON: brackets are nested too",
  ),
  "UTF-16": (
    '{"id": "a", "text": "t"}'.encode("utf-16"),
    ".jsonl",
    "1: not readable from here on: 'utf-8' codec can't decode byte 0xff",
  ),
  "Latin-1": (
    b'{"id": "a", "text": "t"}\n{"id": "b", "text": "caf\xe9"}',
    ".jsonl",
    "can't decode byte 0xe9",
  ),
  "NUL": (b"\0" * 512, ".jsonl", "1: not valid JSON"),
  "a list": (b"[1]", ".jsonl", "1: expected a JSON object, got list"),
  "a directory": (None, ".jsonl", "is a directory"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_one_line(tmp_path, case):
  content, suffix, message = DAMAGED[case]
  file = tmp_path / f"f{suffix}"
  file.mkdir() if content is None else file.write_bytes(content)
  for read in (schemas.read_documents, schemas.parse_rows, lambda p: iter(datasets.read(p))):
    with pytest.raises(DataError, match=message) as error:
      list(read(str(file)))
    assert str(file) in str(error.value)
  if content is not None:
    with pytest.raises(DataError, match="f.jsonl"):
      list(reading.read(str(file)))


_NAMES = (
  "id",
  "text",
  "question",
  "answer",
  "answers",
  "docs",
  "context",
  "paragraphs",
  "data",
  "qas",
  "supporting_facts",
  "pos_index",
  "golden_answers",
  "annotations",
  "title",
)
_JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=5)
  ),
  max_leaves=12,
)


@settings(max_examples=300)
@given(
  st.lists(_JSON, max_size=3),
  st.sampled_from([".json", ".jsonl", ".jsonl.gz"]),
  st.randoms(),
  st.booleans(),
)
def test_no_file_is_a_traceback(tmp_path_factory, values, suffix, random, flips):
  """Rows, or an error that names the file."""
  content = bytearray(b"\n".join(json.dumps(v).encode() for v in values) or b" ")
  if flips:
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
  file = tmp_path_factory.mktemp("f") / f"f{suffix}"
  file.write_bytes(zlib.compress(content, wbits=31) if suffix.endswith(".gz") else content)
  for read in (
    datasets.read,
    schemas.read_documents,
    schemas.parse_rows,
    reading.read,
    schemas.read_ids,
  ):
    try:
      list(read(str(file)))
    except DataError as error:
      assert str(file) in str(error)


def test_ids_of_all_sorts(tmp_path):
  file = tmp_path / "ids.txt"
  file.write_bytes("\ufeffa b\r\nc\r\n\r\na b\n".encode())
  assert schemas.read_ids(str(file)) == ["a b", "c"]
  file = tmp_path / "ids.jsonl"
  file.write_text('"two\\nlines"\n{"id": 7}\n7\n"7"\n')
  assert schemas.read_ids(str(file)) == ["two\nlines", "7"]
  file.write_text('"a"\n[1]\n')
  with pytest.raises(DataError, match="ids.jsonl:2: expected an id"):
    schemas.read_ids(str(file))


def test_a_pipe_with_an_id_that_comes_twice(tmp_path):
  os.mkfifo(pipe := tmp_path / "pipe.jsonl")
  threading.Thread(
    target=lambda: pipe.write_text('{"id": "a", "text": "t"}\n' * 2), daemon=True
  ).start()
  with pytest.raises(DataError, match="id 'a' was already used before"):
    list(schemas.read_documents(str(pipe)))


def test_disks_and_terminals(tmp_path, monkeypatch, capsys):
  """A full disk is one line and status 1; a terminal that knows ASCII only gets escapes."""
  from clara_jax.cli import records

  def full(_):
    raise OSError(28, "No space left on device", "out")

  monkeypatch.setattr(records, "run", full)
  assert main(["records", "--kind", "scp", "--rows", "r", "--out", "o"]) == 1
  assert capsys.readouterr().err == "clara records: [Errno 28] No space left on device: 'out'\n"
  code = (
    "from clara_jax.cli import main, records\nrecords.run = lambda _: {'word': 'na\\u00efve "
    "\\u6771'}\n"
    "print(main.main(['records', '--kind', 'scp', '--rows', '\\u6771', '--out', 'o', "
    "*__import__('sys').argv[1:]]))"
  )
  for flags, expected in (
    ((), "word  na\\xefve \\u6771"),
    (("--json",), '{"word": "na\\u00efve \\u6771"}'),
  ):
    done = subprocess.run(
      [sys.executable, "-c", code, *flags],
      env={**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
      capture_output=True,
      text=True,
    )
    assert done.stdout.strip().splitlines()[-2].strip() == expected, done.stderr


HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>'\"&lt;"


class _Tags(HTMLParser):
  def __init__(self):
    super().__init__()
    self.seen = []

  def handle_starttag(self, tag, attrs):
    self.seen.append((tag, dict(attrs)))


def tags(text):
  parser = _Tags()
  parser.feed(str(text))
  return parser.seen


def test_a_text_is_text_on_every_page(tmp_path):
  """Whatever stands in names, ids, questions, answers and documents; and the pages allow no
  script."""
  word = explain.Word(HOSTILE, 1.0, True, False)
  explanation = explain.Explanation(
    "1",
    HOSTILE,
    [HOSTILE],
    HOSTILE,
    -1.0,
    [word],
    [explain.ReadDocument(0, HOSTILE, True, 0.5, 0.5, 0.1, [word])],
  )
  pages = [
    html.page(
      HOSTILE,
      HOSTILE,
      [
        (HOSTILE, HOSTILE),
        ("t", html.table([HOSTILE], [[HOSTILE], [1], [None]])),
        ("e", plots.explained(explanation)),
      ],
    )
  ]
  journal = Journal(str(tmp_path / "journal-00000-of-00001.jsonl"))
  (tmp_path / "settings-00000-of-00001.json").write_text(
    json.dumps({"kind": "scp", HOSTILE: HOSTILE})
  )
  row = {
    "id": f"{HOSTILE}/simple",
    "question": [HOSTILE],
    "answers": [HOSTILE],
    "docs": [HOSTILE],
    "kind": "simple",
  }
  journal.finish(
    HOSTILE,
    "x",
    {"reason": HOSTILE, "rows": [], "refused": {HOSTILE: 1}, "coverage": {}, "rounds": 1},
  )
  journal.finish(
    "b",
    "x",
    {
      "reason": None,
      "rows": [row, {**row, "kind": "paraphrase", "question": "", "answer": HOSTILE}],
      "refused": {},
      "coverage": {"simple": [0]},
      "rounds": 1,
    },
  )
  journal.close()
  pages_lib.write(str(tmp_path))
  pages.append((tmp_path / "report.html").read_text())
  for page in pages:
    seen = tags(page)
    assert not {tag for tag, _ in seen} & {"script", "img", "iframe", "object"}
    assert not any(name.startswith("on") for _, attributes in seen for name in attributes)
    assert page.count("&lt;script&gt;alert(2)") >= 5
    policy = next(
      at["content"] for tag, at in seen if at.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy and "script" not in policy
