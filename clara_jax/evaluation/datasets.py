"""Question answering sets, from the files in which they are published, as rows.

`read` knows, by what is in the file:

    squad       SQuAD 1.1 / 2.0 JSON: {"data": [{"title", "paragraphs": [{"context", "qas"}]}]}
    hotpot      HotpotQA and 2WikiMultihopQA JSON: [{"_id", "question", "answer", "context": [[title, [sentence, …]], …],
                "supporting_facts": [[title, sentence], …]}]
    musique     MuSiQue JSONL: {"paragraphs": [{"title", "paragraph_text", "is_supporting"}], "answer", "answer_aliases"}
    pubmedqa    PubMedQA JSON: {pmid: {"QUESTION", "CONTEXTS", "final_decision"}}
    nq          Natural Questions JSONL (simplified): {"question_text", "document_text", "annotations", "long_answer_candidates"}
    rows        JSONL of ours, of upstream (`eval_processed_*.jsonl`), FlashRAG, NQ-open, or one passage a row:
                question, answer | answers | golden_answers, and where there are any docs | contexts | text, pos_index, id

and `tfds:NAME[:SPLIT]` for sets that TFDS has: squad, natural_questions_open. A row may come without documents, perhaps with the ids of its
gold documents in a corpus (doc_ids, paragraph_id, paragraph_ids); `candidates.py` finds some.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from clara_jax.data.schemas import DataError, Malformed, Row, parse_row, read_jsonl

TFDS = ("squad", "natural_questions_open")


def read(path: str, malformed: Malformed | None = None) -> list[Row]:
  """Rows of a published file or a TFDS set, one question each, in order.

  Args:
    path: see the module.
    malformed: counts rows that cannot be read; by default the first one stops.

  Raises:
    DataError: by file and row.
  """
  malformed = Malformed() if malformed is None else malformed
  if path.startswith("tfds:"):
    return _checked(_tfds(path), _FORMATS["rows"], malformed)
  if path.endswith(".json"):
    return _checked(*_json(path), malformed)
  lines = read_jsonl(path, malformed)
  rows = []
  for where, value in lines:
    rows += _checked([(where, value)], _of_line(value), malformed)
  if not rows:
    raise DataError(f"{path}: no row could be read")
  return rows


def _json(path: str) -> tuple[list[tuple[str, Any]], Callable[[Any, str], Iterator[Row]]]:
  file = epath.Path(path)
  if not file.exists():
    raise DataError(f"{path}: no such file")
  try:
    value = json.loads(file.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise DataError(f"{path}: not valid JSON: {error}") from None
  if isinstance(value, dict) and isinstance(value.get("data"), list):
    return [(f"{path}: article {i}", v) for i, v in enumerate(value["data"])], _FORMATS["squad"]
  if isinstance(value, dict) and value and all(isinstance(v, dict) and "QUESTION" in v for v in value.values()):
    return [(f"{path}: {key}", {**v, "id": key}) for key, v in value.items()], _FORMATS["pubmedqa"]
  if isinstance(value, list):
    return [(f"{path}: row {i}", v) for i, v in enumerate(value)], _FORMATS["hotpot"]
  raise DataError(f"{path}: no known format; expected the JSON of SQuAD, HotpotQA, 2WikiMultihopQA or PubMedQA, or JSONL rows (*.jsonl)")


def _of_line(value: Mapping[str, Any]) -> Callable[[Any, str], Iterator[Row]]:
  name = "musique" if "paragraphs" in value else "nq" if "question_text" in value else "rows"
  return _FORMATS[name]


def _checked(values, read_one, malformed: Malformed) -> list[Row]:
  rows: list[Row] = []
  for where, value in values:
    try:
      found = list(read_one(value, where))
      for row in found:
        _check(row, where)
    except DataError as error:
      malformed.add(str(error))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
      what = f"lacks {error}" if isinstance(error, KeyError) else f"is not what was expected: {error}"
      malformed.add(f"{where}: the row {what}")
    else:
      rows += found
  return rows


def _check(row: Row, where: str) -> None:
  if not row.questions[0].strip():
    raise DataError(f"{where}: the row has no question")
  if not row.answers or not all(isinstance(a, str) for a in row.answers):
    raise DataError(f"{where}: the row has no answer")
  count = len(row.documents or row.document_ids)
  if any(not 0 <= place < count for place in row.gold):
    raise DataError(f"{where}: pos_index={list(row.gold)}: there are {count} documents")


def _row(question: str, answers, documents=(), gold=(), identifier="", ids=()) -> Row:
  unique = tuple(dict.fromkeys(answers))  # annotators agree often
  return Row((question,), unique, tuple(documents), tuple(gold), "qa", str(identifier), False, tuple(ids))


def _titled(title: str, text: str) -> str:
  return f"{title}\n{text}" if title else text


def _squad(article: Mapping[str, Any], where: str) -> Iterator[Row]:
  for paragraph in article["paragraphs"]:
    for asked in paragraph["qas"]:
      answers = [a["text"] for a in asked["answers"]] or (["noanswer"] if asked.get("is_impossible") else [])
      document = _titled(article["title"].replace("_", " "), paragraph["context"])
      yield _row(asked["question"], answers, [document], [0], asked["id"])


def _hotpot(value: Mapping[str, Any], where: str) -> Iterator[Row]:
  supporting = {title for title, _ in value["supporting_facts"]}
  titles = [title for title, _ in value["context"]]
  documents = [_titled(title, " ".join(s.strip() for s in sentences)) for title, sentences in value["context"]]
  yield _row(value["question"], [value["answer"]], documents, [i for i, t in enumerate(titles) if t in supporting], value["_id"])


def _musique(value: Mapping[str, Any], where: str) -> Iterator[Row]:
  documents = [_titled(p["title"], p["paragraph_text"]) for p in value["paragraphs"]]
  gold = [i for i, p in enumerate(value["paragraphs"]) if p["is_supporting"]]
  yield _row(value["question"], [value["answer"], *value.get("answer_aliases", ())], documents, gold, value["id"])


def _pubmedqa(value: Mapping[str, Any], where: str) -> Iterator[Row]:
  yield _row(value["QUESTION"], [value["final_decision"]], [" ".join(value["CONTEXTS"])], [0], value["id"])


def _natural_questions(value: Mapping[str, Any], where: str) -> Iterator[Row]:
  tokens = value["document_text"].split(" ")

  def text(span):
    return " ".join(t for t in tokens[span["start_token"]:span["end_token"]] if not (t.startswith("<") and t.endswith(">")))
  annotation = value["annotations"][0]
  answers = [text(span) for span in annotation["short_answers"]]
  if annotation.get("yes_no_answer", "NONE") != "NONE":
    answers = [annotation["yes_no_answer"].lower()]
  passages = [c for c in value["long_answer_candidates"] if c["top_level"]]
  long_answer = annotation["long_answer"]
  gold = [i for i, c in enumerate(passages) if c["start_token"] <= long_answer["start_token"] < c["end_token"]]
  yield _row(value["question_text"], answers, [text(c) for c in passages], gold, value["example_id"])


def _plain(value: Mapping[str, Any], where: str) -> Iterator[Row]:
  if "contexts" in value:
    value = {**value, "docs": value["contexts"]}
  elif isinstance(value.get("text"), str) and not any(value.get(k) for k in ("docs", "context", "content")):
    value = {**value, "docs": [_titled(value.get("title") or "", value["text"])], "pos_index": 0}
  answers = next((value[k] for k in ("golden_answers", "answers", "answer") if value.get(k) not in (None, "", [])), ())
  answers = [answers] if isinstance(answers, str) else answers
  if any(value.get(k) for k in ("docs", "context", "content")):
    row = parse_row(value, where)
    if row.is_question_list or row.data_type != "qa":
      raise DataError(f"{where}: expected one question a row")
    yield dataclasses.replace(row, answers=tuple(dict.fromkeys(answers)))
    return
  if not isinstance(value.get("question"), str):
    raise DataError(f"{where}: the row has no question")
  # The gold documents of a corpus, by their ids.
  ids = value.get("paragraph_ids") or ([value["paragraph_id"]] if value.get("paragraph_id") else value.get("doc_ids") or ())
  yield _row(value["question"], answers, (), range(len(ids)), value.get("id") or where, ids)


_FORMATS = {"squad": _squad, "hotpot": _hotpot, "musique": _musique, "pubmedqa": _pubmedqa, "nq": _natural_questions, "rows": _plain}


def _tfds(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
  _, name, *split = path.split(":")
  if name not in TFDS:
    raise DataError(f"{path}: expected tfds:NAME[:SPLIT] with NAME one of {', '.join(TFDS)}")
  try:
    import tensorflow_datasets as tfds
  except ImportError:
    raise DataError(f"{path}: needs tensorflow-datasets: pip install -e '.[records]'") from None
  print(f"{path}: read through TFDS, which downloads it the first time", file=sys.stderr, flush=True)
  source = tfds.data_source(name, split=split[0] if split else "validation")
  for i, value in enumerate(source):
    answers = value["answers"]["text"] if name == "squad" else value["answer"]
    row = {"id": _text(value["id"]) if "id" in value else f"{path}:{i}", "question": _text(value["question"]),
           "golden_answers": [_text(a) for a in answers]}
    if name == "squad":
      row |= {"title": _text(value["title"]).replace("_", " "), "text": _text(value["context"])}
    yield f"{path}: row {i}", row


def _text(value: Any) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)
