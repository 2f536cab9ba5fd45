"""Cheap checks, made before a model is asked: each returns why something is refused, or None."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

from clara_jax.evaluation.metrics import entities, normalise_officially, paraphrase_scores

_POINTS_AT_IT = re.compile(r"\b(the|this|that|given|above)\s+(document|passage|text|article|paragraph|excerpt|story|context)\b"
                           r"|\baccording to (it|this)\b|\bmentioned (above|here)\b", re.IGNORECASE)
QUESTION_WORDS, ANSWER_WORDS = (3, 60), (1, 50)
NEAR_DUPLICATE, FOUND, ROUGE_L = 0.9, 0.5, (0.1, 0.95)
QUESTIONS = 50  # of one reply; a model that repeats itself does not hold the others up


def question(text: str, document: str, others: Iterable[str]) -> str | None:
  """Refuses a question that is too short or long, no question, in another script, about "the document", or asked already."""
  words = normalise_officially(text).split()
  if not QUESTION_WORDS[0] <= len(text.split()) <= QUESTION_WORDS[1] and not _unspaced(text):
    return "question: length"
  if not text.rstrip().endswith(("?", "？", "؟")):
    return "question: no question mark"
  if _POINTS_AT_IT.search(text):
    return "question: names the document"
  if not _scripts(text) <= _scripts(document) | {"LATIN"}:
    return "question: another script"
  bag = set(words)
  for other in others:
    there = set(normalise_officially(other).split())
    if bag == there or len(bag & there) >= NEAR_DUPLICATE * len(bag | there):
      return "question: duplicate"
  return None


def answer(text: str, document: str) -> str | None:
  """Refuses an answer that is empty, too long, or whose words do not stand in the document (yes and no pass)."""
  tokens = normalise_officially(text).split()
  if not tokens:
    return "answer: empty"
  if len(text.split()) > ANSWER_WORDS[1]:
    return "answer: length"
  if tokens in (["yes"], ["no"]):
    return None
  told = normalise_officially(document)
  if " ".join(tokens) in told:
    return None
  there = set(told.split())
  return None if sum(t in there for t in tokens) >= FOUND * len(tokens) else "answer: not in the document"


def paraphrase(text: str, document: str) -> list[str]:
  """What is wrong with a paraphrase, as problems that its writer can read; empty where nothing is."""
  if not text.strip():
    return ["it is empty"]
  rouge = paraphrase_scores(text, document)["rouge_l"]
  problems = []
  if rouge > ROUGE_L[1]:
    problems.append("it says the same in the same words")
  if rouge < ROUGE_L[0]:
    problems.append("it has hardly a word of the document")
  tokens = set(normalise_officially(text).split())
  if lost := sorted(e for e in entities(document) if not set(e.split()) <= tokens):
    problems.append(f"names or numbers are lost: {', '.join(lost)}")
  return problems


def _scripts(text: str) -> set[str]:
  return {unicodedata.name(c, "UNKNOWN").split()[0] for c in text if c.isalpha()}


def _unspaced(text: str) -> bool:
  """Chinese and Japanese have no spaces between words."""
  return bool(_scripts(text) & {"CJK", "HIRAGANA", "KATAKANA", "THAI"})


def kept(questions: Sequence[str], document: str, there: Sequence[str]) -> tuple[list[str], list[str]]:
  """Questions that pass, each compared with those before it, and why the others do not."""
  passed: list[str] = []
  reasons = ["question: too many in a reply"] * max(0, len(questions) - QUESTIONS)
  for text in questions[:QUESTIONS]:
    if problem := question(text, document, [*there, *passed]):
      reasons.append(problem)
    else:
      passed.append(text)
  return passed, reasons
