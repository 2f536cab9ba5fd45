"""Scores of answers and of retrieval (SPEC §5), each with its variants named apart."""

import collections
import re
import string
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_BOOLEANS = {"true": "yes", "false": "no"}
_CLOSED = ("yes", "no", "noanswer")


def normalise(text: str) -> str:
  """Lower case, no punctuation, no articles, single spaces; True and False become yes and no.

  >>> normalise("The  U.S. is a place")
  'us is place'
  """
  text = "".join(c for c in text.lower() if c not in string.punctuation)
  text = " ".join(_ARTICLES.sub(" ", text).split())
  return _BOOLEANS.get(text, text)


def exact_match(prediction: str, answer: str) -> float:
  """1 where both are equal after `normalise`."""
  return float(normalise(prediction) == normalise(answer))


def f1(prediction: str, answer: str) -> float:
  """Token overlap; yes, no and noanswer count only when equal."""
  a, b = normalise(prediction), normalise(answer)
  if (a in _CLOSED or b in _CLOSED) and a != b:
    return 0.0
  left, right = a.split(), b.split()
  same = sum((collections.Counter(left) & collections.Counter(right)).values())
  return 2 * same / (len(left) + len(right)) if same else float(left == right)


def cover_em(prediction: str, answer: str) -> float:
  """1 where every token of the answer appears in the prediction, in any order (upstream's 'acc')."""
  return float(set(normalise(answer).split()) <= set(normalise(prediction).split()))


ANSWER_METRICS = {"em": exact_match, "f1": f1, "cover_em": cover_em}


def answer_scores(prediction: str, answers: Sequence[str]) -> dict[str, float]:
  """`em`, `f1`, `cover_em`: best over the gold answers; `…_first`: against the first one only, as upstream does."""
  scores = {name: max(metric(prediction, a) for a in answers) for name, metric in ANSWER_METRICS.items()}
  return scores | {f"{name}_first": metric(prediction, answers[0]) for name, metric in ANSWER_METRICS.items()}


def retrieval_scores(ranked: Sequence[int], gold: Sequence[int], cutoffs: Sequence[int] = (1, 3, 5)) -> dict[str, float]:
  """`recall_at_k` = |top-k ∩ gold| / |gold| and `precision_at_k` = |top-k ∩ gold| / k."""
  scores = {}
  for k in cutoffs:
    hits = len(set(ranked[:k]) & set(gold))
    scores[f"recall_at_{k}"] = hits / len(set(gold))
    scores[f"precision_at_{k}"] = hits / k
  return scores
