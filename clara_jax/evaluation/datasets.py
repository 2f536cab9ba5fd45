"""Question answering sets, from the files in which they are published, as rows.

`read` knows, by what is in the file:

    squad       SQuAD 1.1 / 2.0 JSON: {"data": [{"title", "paragraphs": [{"context", "qas"}]}]}
    hotpot      HotpotQA and 2WikiMultihopQA: {"_id", "question", "answer", "context": [[title, [sentence, …]], …],
                "supporting_facts": [[title, sentence], …]}, also as Hugging Face's data set has it: {"id", "context": {"title",
                "sentences"}, "supporting_facts": {"title", "sent_id"}}
    musique     MuSiQue JSONL: {"paragraphs": [{"title", "paragraph_text", "is_supporting"}], "answer", "answer_aliases", "answerable"}
    pubmedqa    PubMedQA JSON: {pmid: {"QUESTION", "CONTEXTS", "final_decision"}}
    nq          Natural Questions JSONL (simplified): {"question_text", "document_text", "annotations", "long_answer_candidates"}
    rows        JSONL of ours, of upstream (`eval_processed_*.jsonl`), FlashRAG, NQ-open, or one passage a row:
                question, answer | answers | golden_answers, and where there are any docs | contexts | text, pos_index, id

as one JSON value or as lines of JSON, gzipped or not; and `tfds:NAME[:SPLIT]` for sets that TFDS
has: squad, natural_questions_open. A row may come without documents, perhaps with the ids of its
gold documents in a corpus (doc_ids, paragraph_id, paragraph_ids); `candidates.py` finds some. A
question that its documents do not answer (SQuAD 2.0, MuSiQue-Full) has the one answer 'noanswer'.
"""  # noqa: E501

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from clara_jax.data.schemas import DataError, Malformed, Row, open_text, parse_row, read_jsonl
from clara_jax.io import parse_json

log = logging.getLogger(__name__)

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
  rows = []
  if path.removesuffix(".gz").endswith(".json") and (contents := _whole(path)) is not None:
    rows = _checked(*contents, malformed)
  else:
    for where, value in read_jsonl(path, malformed):
      rows += _checked([(where, value)], _FORMATS[_of_object(value)], malformed)
  if not rows:
    raise DataError(f"{path}: no row could be read")
  return rows


def _whole(path: str) -> tuple[list[tuple[str, Any]], Callable[[Any, str], Iterator[Row]]] | None:
  """A file that is one JSON value, in parts with their places, and what reads a part; None where it
  is lines of JSON."""
  with open_text(path) as stream:
    text = stream.read()
  try:
    value = parse_json(text)
  except ValueError as error:
    first, _, rest = text.strip().partition("\n")
    if rest and first.rstrip().endswith("}") and first.startswith("{"):
      return None
    raise DataError(f"{path}: {error}") from None
  if isinstance(value, dict) and isinstance(value.get("data"), list):
    return list(_squad_questions(value["data"], path)), _squad
  if (
    isinstance(value, dict)
    and value
    and all(isinstance(v, dict) and "QUESTION" in v for v in value.values())
  ):
    return [(f"{path}: {key}", {**v, "id": key}) for key, v in value.items()], _FORMATS["pubmedqa"]
  if isinstance(value, list):
    kinds = [_of_object(v) for v in value if isinstance(v, dict)]
    are_rows = any(
      {"golden_answers", "answers", "answer"} & v.keys() for v in value if isinstance(v, dict)
    )
    name = next((kind for kind in kinds if kind != "rows"), "rows" if are_rows else "hotpot")
    return [(f"{path}: row {i}", v) for i, v in enumerate(value)], _FORMATS[name]
  if (
    isinstance(value, dict)
    and {"question", "question_text"} & value.keys()
    and "\n" not in text.strip()
  ):
    return None  # one line of JSON lines
  raise DataError(
    f"{path}: no known format; expected the JSON of SQuAD, HotpotQA, 2WikiMultihopQA or PubMedQA, "
    f"or JSONL rows (*.jsonl)"
  )


def _of_object(value: Mapping[str, Any]) -> str:
  if "supporting_facts" in value or "_id" in value:
    return "hotpot"
  return "musique" if "paragraphs" in value else "nq" if "question_text" in value else "rows"


def _checked(values, read_one, malformed: Malformed) -> list[Row]:
  rows: list[Row] = []
  for where, value in values:
    try:
      parsed_rows = list(read_one(value, where))
      for row in parsed_rows:
        _check(row, where)
    except DataError as error:
      malformed.add(str(error), where)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
      what = (
        f"lacks {error}" if isinstance(error, KeyError) else f"is not what was expected: {error}"
      )
      malformed.add(f"{where}: the row {what}", where)
    else:
      rows += parsed_rows
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
  return Row(
    (question,), unique, tuple(documents), tuple(gold), "qa", str(identifier), False, tuple(ids)
  )


def _titled(title: str, text: str) -> str:
  return f"{title}\n{text}" if title else text


def _squad_questions(articles: Sequence[Any], path: str) -> Iterator[tuple[str, Any]]:
  """Every question with its article's title and its paragraph's text, so that one that is bad costs
  no other."""
  for i, article in enumerate(articles):
    where = f"{path}: article {i}"
    if not isinstance(article, dict) or not isinstance(article.get("paragraphs"), list):
      yield where, {}
      continue
    for j, paragraph in enumerate(article["paragraphs"]):
      questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
      for k, question in enumerate(questions if isinstance(questions, list) else [{}]):
        name = (
          f"question {question['id']!r}"
          if isinstance(question, dict) and "id" in question
          else f"question {k}"
        )
        yield (
          f"{where}, paragraph {j}, {name}",
          {"title": article.get("title") or "", "paragraph": paragraph, "asked": question},
        )


def _squad(value: Mapping[str, Any], where: str) -> Iterator[Row]:
  question = value["asked"]
  answers = (
    ["noanswer"] if question.get("is_impossible") else [a["text"] for a in question["answers"]]
  )
  document = _titled(value["title"].replace("_", " "), value["paragraph"]["context"])
  yield _row(question["question"], answers, [document], [0], question["id"])


def _hotpot(value: Mapping[str, Any], where: str) -> Iterator[Row]:
  facts, context = value["supporting_facts"], value["context"]
  if isinstance(context, dict):  # columns, as Hugging Face's data set has them
    context = list(zip(context["title"], context["sentences"], strict=True))
  supporting = set(facts["title"] if isinstance(facts, dict) else [title for title, _ in facts])
  documents = [
    _titled(title, " ".join(s.strip() for s in sentences)) for title, sentences in context
  ]
  yield _row(
    value["question"],
    [value["answer"]],
    documents,
    [i for i, (title, _) in enumerate(context) if title in supporting],
    value["_id"] if "_id" in value else value["id"],
  )


def _musique(value: Mapping[str, Any], where: str) -> Iterator[Row]:
  documents = [_titled(p["title"], p["paragraph_text"]) for p in value["paragraphs"]]
  if not value.get("answerable", True):
    # The twin has the id and the answer of the question that the other documents answer.
    yield _row(value["question"], ["noanswer"], documents, (), f"{value['id']} (unanswerable)")
    return
  gold = [i for i, p in enumerate(value["paragraphs"]) if p["is_supporting"]]
  yield _row(
    value["question"],
    [value["answer"], *value.get("answer_aliases", ())],
    documents,
    gold,
    value["id"],
  )


def _pubmedqa(value: Mapping[str, Any], where: str) -> Iterator[Row]:
  yield _row(
    value["QUESTION"], [value["final_decision"]], [" ".join(value["CONTEXTS"])], [0], value["id"]
  )


def _natural_questions(value: Mapping[str, Any], where: str) -> Iterator[Row]:
  tokens = value["document_text"].split(" ")

  def text(span):
    return " ".join(
      t
      for t in tokens[span["start_token"] : span["end_token"]]
      if not (t.startswith("<") and t.endswith(">"))
    )

  passages = [c for c in value["long_answer_candidates"] if c["top_level"]]
  answers, gold = [], set()
  # One in training, five in validation; what any of them says counts.
  for annotation in value["annotations"]:
    closed = annotation.get("yes_no_answer", "NONE")
    answers += (
      [text(span) for span in annotation["short_answers"]] if closed == "NONE" else [closed.lower()]
    )
    start = annotation["long_answer"]["start_token"]
    gold |= {i for i, c in enumerate(passages) if c["start_token"] <= start < c["end_token"]}
  gold = sorted(gold)
  yield _row(
    value["question_text"], answers, [text(c) for c in passages], gold, value["example_id"]
  )


def _plain(value: Mapping[str, Any], where: str) -> Iterator[Row]:
  if "contexts" in value:
    value = {**value, "docs": value["contexts"]}
  elif isinstance(value.get("text"), str) and not any(
    value.get(k) for k in ("docs", "context", "content")
  ):
    value = {**value, "docs": [_titled(value.get("title") or "", value["text"])], "pos_index": 0}
  answers = next(
    (
      value[k]
      for k in ("golden_answers", "answers", "answer")
      if value.get(k) not in (None, "", [])
    ),
    (),
  )
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
  ids = next(
    (
      value[k]
      for k in ("paragraph_ids", "paragraph_id", "doc_ids")
      if value.get(k) not in (None, "", [])
    ),
    (),
  )
  # They may be numbers, and 0 is one; a corpus has texts.
  ids = [ids] if isinstance(ids, (str, int)) else ids
  yield _row(
    value["question"],
    answers,
    (),
    range(len(ids)),
    where if value.get("id") in (None, "") else value["id"],
    map(str, ids),
  )


_FORMATS = {
  "hotpot": _hotpot,
  "musique": _musique,
  "pubmedqa": _pubmedqa,
  "nq": _natural_questions,
  "rows": _plain,
}


def _tfds(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
  _, name, *split = path.split(":")
  if name not in TFDS:
    raise DataError(f"{path}: expected tfds:NAME[:SPLIT] with NAME one of {', '.join(TFDS)}")
  try:
    import tensorflow_datasets as tfds
  except ImportError:
    raise DataError(
      f"{path}: needs tensorflow-datasets: pip install 'clara_jax[records]'"
    ) from None
  log.info(f"{path}: read through TFDS, which downloads it the first time")
  source = tfds.data_source(name, split=split[0] if split else "validation")
  for i, value in enumerate(source):
    answers = value["answers"]["text"] if name == "squad" else value["answer"]
    row = {
      "id": _text(value["id"]) if "id" in value else f"{path}:{i}",
      "question": _text(value["question"]),
      "golden_answers": [_text(a) for a in answers],
    }
    if name == "squad":
      row |= {"title": _text(value["title"]).replace("_", " "), "text": _text(value["context"])}
    yield f"{path}: row {i}", row


def _text(value: Any) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)
