"""The rounds of one document (paper §3.1): questions → answers → checks → what is missing →
supplementary questions, until all is covered.

A document ends accepted or rejected with a reason. Every reply is asked for through `Ask`, which is
what is remembered.
"""

import collections
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from clara_jax.data.schemas import Document, Row
from clara_jax.synthesis import checks
from clara_jax.synthesis.client import ReplyError

ROUNDS = 10

_TEXTS = {"type": "array", "items": {"type": "string"}}


def _schema(**properties: Mapping[str, Any]) -> dict[str, Any]:
  return {
    "type": "object",
    "properties": properties,
    "required": list(properties),
    "additionalProperties": False,
  }


SCHEMAS = {
  "questions": _schema(questions=_TEXTS),
  "answers": _schema(answers=_TEXTS),
  "check": _schema(correct={"type": "array", "items": {"type": "boolean"}}, missing=_TEXTS),
  "verdict": _schema(
    correct={"type": "boolean"}, covered={"type": "boolean"}, reason={"type": "string"}
  ),
  "paraphrase": _schema(paraphrase={"type": "string"}),
  "paraphrase_check": _schema(lost=_TEXTS, added=_TEXTS),
  "teacher": _schema(answer={"type": "string"}),
}

# (template, schema's name, values) -> the parsed reply
Ask = Callable[..., Awaitable[dict[str, Any]]]


@dataclasses.dataclass
class Outcome:
  """What became of a document or a question.

  Attributes:
    rows: training rows (`data/schemas.py`) with their provenance; empty where it was rejected.
    reason: why it was rejected.
    rounds: most rounds that a part of it took.
    refused: how often the cheap checks and the model refused something, by reason.
    coverage: for 'simple' and 'complex', statements that were missing after each round.
    unread: whether it was rejected because no reply could be used.
  """

  rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  reason: str | None = None
  rounds: int = 0
  refused: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  coverage: dict[str, list[int]] = dataclasses.field(default_factory=dict)
  unread: bool = False


class _Rejected(Exception):
  pass


class _Unread(_Rejected):
  pass


async def scp(document: Document, ask: Ask, rounds: int = ROUNDS) -> Outcome:
  """SCP rows of a document: its simple questions, its complex questions (none where it tells one
  fact), its paraphrase."""
  text = f"{document.title}\n{document.text}" if document.title else document.text
  outcome = Outcome()
  try:
    rows = []
    for kind in ("simple", "complex"):
      pairs = await _pairs(kind, text, ask, outcome, rounds)
      if pairs:
        rows.append(
          {
            "data_type": "qa",
            "question": [q for q, _ in pairs],
            "answers": [a for _, a in pairs],
            "docs": [text],
            "kind": kind,
          }
        )
    written, attempts = await _paraphrase(text, ask, outcome, rounds)
    rows.append(
      {
        "data_type": "paraphrase",
        "question": "",
        "answer": written,
        "docs": [text],
        "kind": "paraphrase",
      }
    )
    for row in rows:
      provenance: dict[str, Any] = {
        "document": document.id,
        "rounds": attempts,
        "checks": ["cheap", "paraphrase_check"],
      }
      if row["kind"] != "paraphrase":
        missing = outcome.coverage[row["kind"]]
        provenance |= {
          "rounds": len(missing),
          "missing_by_round": missing,
          "checks": ["cheap", "check", "verdict"],
        }
      outcome.rows.append({"id": f"{document.id}/{row['kind']}", **row, "provenance": provenance})
  except _Rejected as problem:
    outcome.reason, outcome.unread = str(problem), isinstance(problem, _Unread)
  return outcome


async def _reply(ask: Ask, template: str, schema: str, **values: Any) -> dict[str, Any]:
  """A reply that parses; three tries, each with its repair."""
  for attempt in range(3):
    try:
      return await ask(template, schema, attempt, values)
    except ReplyError as error:
      problem = error
  raise _Unread(f"{template}: no usable reply: {problem}")


async def _pairs(
  kind: str, text: str, ask: Ask, outcome: Outcome, rounds: int
) -> list[tuple[str, str]]:
  kept: list[tuple[str, str]] = []
  missing: list[str] = []
  outcome.coverage[kind] = []
  for number in range(1, rounds + 1):
    outcome.rounds = max(outcome.rounds, number)
    if number == 1:
      reply = await _reply(ask, f"{kind}_questions", "questions", document=text)
      if kind == "complex" and not reply["questions"]:
        return []  # one fact only
    else:
      reply = await _reply(
        ask,
        f"{kind}_supplement",
        "questions",
        document=text,
        pairs=kept,
        missing=missing,
        round=number,
      )
    questions, reasons = checks.kept(reply["questions"], text, [q for q, _ in kept])
    outcome.refused.update(reasons)
    pairs = await _answered(questions, text, ask, outcome, number)
    checked = await _reply(
      ask, "check", "check", document=text, kept=kept, pairs=pairs, kind=kind, round=number
    )
    if len(checked["correct"]) != len(pairs):
      outcome.refused["check: another number of verdicts"] += 1
      missing = missing or ["everything"]
      outcome.coverage[kind].append(len(missing))
      continue
    if wrong := checked["correct"].count(False):
      outcome.refused["check: wrong pair"] += wrong
    kept += [pair for pair, right in zip(pairs, checked["correct"], strict=True) if right]
    missing = checked["missing"]
    outcome.coverage[kind].append(len(missing))
    if not missing and kept:
      break
  else:
    raise _Rejected(f"{kind}: not covered after {rounds} rounds")
  verdict = await _reply(ask, "verdict", "verdict", document=text, pairs=kept, kind=kind)
  if not verdict["correct"] or not verdict["covered"]:
    raise _Rejected(
      f"{kind}: the last verdict: {'wrong' if not verdict['correct'] else 'not covered'}"
    )
  return kept


async def _answered(
  questions: Sequence[str], text: str, ask: Ask, outcome: Outcome, number: int
) -> list[tuple[str, str]]:
  if not questions:
    return []
  answers = (
    await _reply(ask, "answers", "answers", document=text, questions=list(questions), round=number)
  )["answers"]
  if len(answers) != len(questions):
    outcome.refused["answer: another number of answers"] += 1
    return []
  pairs = []
  for question, answer in zip(questions, answers, strict=True):
    if problem := checks.answer(answer, text):
      outcome.refused[problem] += 1
    else:
      pairs.append((question, answer.strip()))
  return pairs


async def _paraphrase(text: str, ask: Ask, outcome: Outcome, rounds: int) -> tuple[str, int]:
  problems: list[str] = []
  for number in range(1, rounds + 1):
    outcome.rounds = max(outcome.rounds, number)
    written = (
      await _reply(ask, "paraphrase", "paraphrase", document=text, problems=problems, round=number)
    )["paraphrase"].strip()
    problems = checks.paraphrase(written, text)
    if problems:
      outcome.refused["paraphrase: " + problems[0].split(":")[0]] += 1
      continue
    verdict = await _reply(
      ask, "paraphrase_check", "paraphrase_check", document=text, paraphrase=written, round=number
    )
    problems = [f"lost: {x}" for x in verdict["lost"]] + [f"added: {x}" for x in verdict["added"]]
    if not problems:
      return written, number
    outcome.refused["paraphrase: check"] += 1
  raise _Rejected(f"paraphrase: not faithful after {rounds} rounds")


async def teacher(row: Row, ask: Ask) -> Outcome:
  """An instruct row: the teacher's answer to a question from its retrieved passages (the paper's
  second stage)."""
  outcome = Outcome(rounds=1)
  try:
    answer = (
      await _reply(
        ask, "teacher", "teacher", documents=list(row.documents), question=row.questions[0]
      )
    )["answer"].strip()
    problem = checks.answer(answer, "\n".join(row.documents)) if answer else "answer: empty"
    if problem:
      raise _Rejected(problem)
    outcome.rows.append(
      {
        "id": row.identifier,
        "data_type": "qa",
        "question": row.questions[0],
        "answer": answer,
        "docs": list(row.documents),
        "pos_index": list(row.gold),
        "provenance": {"golden_answers": list(row.answers), "rounds": 1},
      }
    )
  except _Rejected as problem:
    outcome.reason, outcome.unread = str(problem), isinstance(problem, _Unread)
  return outcome
