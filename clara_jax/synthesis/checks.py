"""Cheap checks, made before a model is asked: each returns why something is refused, or None."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

import regex

from clara_jax.evaluation.metrics import (
  UNSPACED,
  entities,
  paraphrase_scores,
  said,
  squad_normalize,
  words,
)

_POINTS_AT_IT = re.compile(
  r"\b(the|this|that|given|above)\s+(document|passage|text|article|paragraph|excerpt|story|context)\b"
  r"|\baccording to (it|this)\b|\bmentioned (above|here)\b",
  re.IGNORECASE,
)
QUESTION_WORDS, ANSWER_WORDS = (3, 60), (1, 50)
NEAR_DUPLICATE, FOUND, ROUGE_L = 0.9, 0.5, (0.1, 0.95)
_UNSPACED = regex.compile(f"[{UNSPACED}]")
QUESTIONS = 50  # of one reply; a model that repeats itself does not hold the others up


def question(text: str, document: str, others: Iterable[str]) -> str | None:
  """Refuses a question that is too short or long, no question, in another script, about "the
  document", or asked already."""
  if (
    not QUESTION_WORDS[0]
    <= len(words(text) if _unspaced(text) else text.split())
    <= QUESTION_WORDS[1]
  ):
    return "question: length"
  if not _asks(text):
    return "question: no question mark"
  if _POINTS_AT_IT.search(text):
    return "question: names the document"
  if not _scripts(text) <= _scripts(document) | {"LATIN"}:
    return "question: another script"
  bag = _bag(text)
  for other in others:
    other_bag = _bag(other)
    if bag == other_bag or len(bag & other_bag) >= NEAR_DUPLICATE * len(bag | other_bag):
      return "question: duplicate"
  return None


def answer(text: str, document: str) -> str | None:
  """Refuses an answer that is empty, too long, or whose words do not stand in the document (yes and
  no pass)."""
  tokens = squad_normalize(text).split()
  if not words(text):
    return "answer: empty"
  if len(words(text) if _unspaced(text) else text.split()) > ANSWER_WORDS[1] * (
    4 if _unspaced(text) else 1
  ):
    return "answer: length"
  if tokens in (["yes"], ["no"]):
    return None
  document_text = squad_normalize(document)
  if " ".join(tokens) in document_text:
    return None
  if (scripts := _scripts(text)) and "LATIN" not in scripts:
    return None if _stands_in(words(text), words(document)) else "answer: not in the document"
  document_tokens = said(document)
  return (
    None
    if sum(t in document_tokens for t in tokens) >= FOUND * len(tokens)
    else "answer: not in the document"
  )


def _stands_in(answer_words: Sequence[str], document_words: Sequence[str]) -> bool:
  """Whether enough words stand there; many of these languages inflect: a word is known by its first
  two thirds."""
  vocabulary = set(document_words)
  # Its words are characters, which any text has: pairs of them.
  if _UNSPACED.search("".join(answer_words)) and len(answer_words) > 1:
    answer_words, vocabulary = (
      ["".join(pair) for pair in zip(answer_words, answer_words[1:])],
      {"".join(pair) for pair in zip(document_words, document_words[1:])},
    )

  def is_there(word):
    stem = word[: max(3, -(-2 * len(word) // 3))]
    return (
      word in vocabulary
      or len(word) > 3
      and not any(c.isdigit() for c in word)
      and any(other.startswith(stem) for other in vocabulary)
    )

  return sum(map(is_there, answer_words)) >= FOUND * len(answer_words)


# Of Greek (also as the ASCII semicolon), Arabic, Armenian, Ethiopic, Vai, and the wide, small and
# turned forms.
_QUESTION_MARKS = ("?", "？", "؟", "\u037e", "՞", "፧", "꘏", "﹖", "⸮", "︖")
# What ends a question where no mark is needed: Japanese か and の, Chinese 吗, 呢 and 么, Korean 까, 니,  # noqa: E501
# 나요, 가요.
_ENDINGS = regex.compile(r"[かの吗嗎呢么麼까니]$|[나가]요$")
# Thai, Lao, Khmer, Burmese and Tibetan have no question mark of their own.
_NO_MARK = regex.compile(r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]")


def _asks(text: str) -> bool:
  text = text.rstrip().rstrip("\"'”’»」』)）")
  if (
    text.endswith(_QUESTION_MARKS)
    or text.endswith(";")
    and "GREEK" in _scripts(text)
    or "՞" in text
  ):
    return True
  return bool(_ENDINGS.search(text.rstrip(" 。．.")) or _NO_MARK.search(text))


def _bag(text: str) -> set[str]:
  return set(words(text)) if _unspaced(text) else set(squad_normalize(text).split())


def paraphrase(text: str, document: str) -> list[str]:
  """What is wrong with a paraphrase, as problems that its writer can read; empty where nothing
  is."""
  if not text.strip():
    return ["it is empty"]
  rouge = paraphrase_scores(text, document)["rouge_l"]
  problems = []
  if rouge > ROUGE_L[1]:
    problems.append("it says the same in the same words")
  if rouge < ROUGE_L[0]:
    problems.append("it has hardly a word of the document")
  tokens = said(text)
  if lost := sorted(e for e in entities(document) if not set(e.split()) <= tokens):
    problems.append(f"names or numbers are lost: {', '.join(lost)}")
  return problems


def _scripts(text: str) -> set[str]:
  """As the names of letters begin; those that are written together are one, and signs of no script
  are none."""
  names = {
    re.split(r"[ -]", unicodedata.name(c, "UNKNOWN"))[0]
    for c in unicodedata.normalize("NFKC", text)
    if c.isalpha()
  }
  return {
    "CJK" if name in ("HIRAGANA", "KATAKANA", "BOPOMOFO", "IDEOGRAPHIC") else name for name in names
  } - {"MODIFIER", "MICRO"}


def _unspaced(text: str) -> bool:
  """Whether the text is of a script without spaces between words."""
  return bool(_UNSPACED.search(text))


def kept(
  questions: Sequence[str], document: str, previous_questions: Sequence[str]
) -> tuple[list[str], list[str]]:
  """Questions that pass, each compared with those before it, and why the others do not."""
  passed: list[str] = []
  reasons = ["question: too many in a reply"] * max(0, len(questions) - QUESTIONS)
  for text in questions[:QUESTIONS]:
    if problem := question(text, document, [*previous_questions, *passed]):
      reasons.append(problem)
    else:
      passed.append(text)
  return passed, reasons
