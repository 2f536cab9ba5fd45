"""Scores of answers, of retrieval and of paraphrases (as the released code computes them), each
with its variants named apart.

    em, f1, cover_em              best over the gold answers; True and False count as yes and no
    em_first, f1_first, …         against the first gold answer only, as upstream does
    squad_em, squad_f1            as the official script of SQuAD 1.1 (arXiv 1606.05250) has them
    hotpot_em, hotpot_f1          as the official script of HotpotQA (arXiv 1809.09600) has them: one gold answer, the first
    recall_at_k, precision_at_k, ndcg_at_k, mrr
    rouge1, rouge_l, entities_kept

The official definitions, from their descriptions: an answer is normalized (lower case, no
punctuation, no articles, single spaces); EM is equality; F1 is that of the two bags of tokens, 0
where they share none, also where both are empty; HotpotQA's F1 is also 0 where one of the two is
yes, no or noanswer and the other is not the same.
"""  # noqa: E501

import collections
import functools
import math
import re
import string
import unicodedata
from collections.abc import Sequence

import regex

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_BOOLEANS = {"true": "yes", "false": "no"}
_CLOSED = ("yes", "no", "noanswer")


def squad_normalize(text: str) -> str:
  """Lower case, no punctuation (ASCII), no articles, single spaces: SQuAD's `normalize_answer`.

  >>> squad_normalize("The  U.S. is a place")
  'us is place'
  """
  text = "".join(c for c in text.lower() if c not in string.punctuation)
  return " ".join(_ARTICLES.sub(" ", text).split())


def normalize(text: str) -> str:
  """The same, and True and False become yes and no."""
  text = squad_normalize(text)
  return _BOOLEANS.get(text, text)


def exact_match(prediction: str, answer: str) -> float:
  """1 where both are equal after `normalize`."""
  return float(normalize(prediction) == normalize(answer))


def f1(prediction: str, answer: str) -> float:
  """Token overlap; yes, no and noanswer count only when equal; two empty answers are equal."""
  a, b = normalize(prediction), normalize(answer)
  return float(a == b) if not a and not b else _closed_f1(a, b)


def cover_em(prediction: str, answer: str) -> float:
  """1 where every token of the answer appears in the prediction, in any order (upstream's 'acc').
  An answer that `normalize` leaves nothing of, such as 'A', is covered by nothing."""
  answer_tokens = set(normalize(answer).split())
  return float(bool(answer_tokens) and answer_tokens <= set(normalize(prediction).split()))


def squad_em(prediction: str, answer: str) -> float:
  """SQuAD 1.1's `exact_match_score`; HotpotQA's is the same."""
  return float(squad_normalize(prediction) == squad_normalize(answer))


def squad_f1(prediction: str, answer: str) -> float:
  """SQuAD 1.1's `f1_score`."""
  return _overlap_f1(squad_normalize(prediction), squad_normalize(answer))


def hotpot_f1(prediction: str, answer: str) -> float:
  """HotpotQA's `f1_score`."""
  return _closed_f1(squad_normalize(prediction), squad_normalize(answer))


def _closed_f1(a: str, b: str) -> float:
  return 0.0 if (a in _CLOSED or b in _CLOSED) and a != b else _overlap_f1(a, b)


def _overlap_f1(a: str, b: str) -> float:
  left, right = a.split(), b.split()
  same = sum((collections.Counter(left) & collections.Counter(right)).values())
  return 2 * same / (len(left) + len(right)) if same else 0.0


ANSWER_METRICS = {"em": exact_match, "f1": f1, "cover_em": cover_em}


def answer_scores(prediction: str, answers: Sequence[str]) -> dict[str, float]:
  """All scores of an answer; see the module for their names."""
  scores = {
    name: max(metric(prediction, a) for a in answers) for name, metric in ANSWER_METRICS.items()
  }
  scores |= {
    f"{name}_first": metric(prediction, answers[0]) for name, metric in ANSWER_METRICS.items()
  }
  scores |= {
    "squad_em": max(squad_em(prediction, a) for a in answers),
    "squad_f1": max(squad_f1(prediction, a) for a in answers),
  }
  return scores | {
    "hotpot_em": squad_em(prediction, answers[0]),
    "hotpot_f1": hotpot_f1(prediction, answers[0]),
  }


def retrieval_scores(
  ranked: Sequence[int], gold: Sequence[int], cutoffs: Sequence[int] = (1, 3, 5)
) -> dict[str, float]:
  """`recall_at_k` = |top-k ∩ gold| / |gold|, `precision_at_k` = |top-k ∩ gold| / k, `ndcg_at_k`
  (gain 1 for a gold document, discount log2(place + 1)), `mrr` = 1 / place of the first gold
  document.

  Args:
    ranked: candidates, best first.
    gold: those that are right, at least one; they need not be among the candidates.
    cutoffs: k.
  """
  right = set(gold)
  hits = [int(place in right) for place in ranked]
  scores = {"mrr": next((1 / place for place, hit in enumerate(hits, 1) if hit), 0.0)}
  for k in cutoffs:
    scores[f"recall_at_{k}"] = sum(hits[:k]) / len(right)
    scores[f"precision_at_{k}"] = sum(hits[:k]) / k
    scores[f"ndcg_at_{k}"] = _gain(hits[:k]) / _gain([1] * min(k, len(right)))
  return scores


def _gain(hits: Sequence[int]) -> float:
  return sum(hit / math.log2(place + 1) for place, hit in enumerate(hits, 1))


# Scripts without spaces between words: every character is one.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(
  rf"[{UNSPACED}]\p{{M}}*|[\p{{L}}\p{{M}}\p{{N}}--[{UNSPACED}]]+(?:['’][\p{{L}}\p{{M}}]+)*",
  regex.VERSION1,
)


def words(text: str) -> list[str]:
  """Words of a text in any script, in lower case and one form of each letter (NFKC); of scripts
  without spaces, characters.

  >>> words("Émile Zola's 東京 (1867)")
  ['émile', "zola's", '東', '京', '1867']
  """
  return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def said(text: str) -> set[str]:
  """Words of a text, as SQuAD's normalization divides it and as `words` does."""
  return {*squad_normalize(text).split(), *words(text)}


# A number, or a run of capitalised words that does not begin a sentence.
_NUMBER = re.compile(r"\b\d[\d.,:/-]*\b")
_NAME = re.compile(r"(?<![.!?]\s)(?<!^)\b[A-Z][\w'’-]*(?:\s+[A-Z][\w'’-]*)*")


def entities(text: str) -> set[str]:
  """Numbers and names (runs of capitalised words inside sentences) of a text, normalized: a rule,
  not a model."""
  return {
    squad_normalize(entity) for pattern in (_NUMBER, _NAME) for entity in pattern.findall(text)
  } - {""}


def entities_kept(paraphrase: str, source: str) -> float:
  """Share of the source's `entities` whose tokens all appear in the paraphrase; 1 where it has
  none."""
  source_entities, tokens = entities(source), said(paraphrase)
  return (
    sum(set(e.split()) <= tokens for e in source_entities) / len(source_entities)
    if source_entities
    else 1.0
  )


def paraphrase_scores(paraphrase: str, source: str) -> dict[str, float]:
  """Fidelity of a text that was written from memory tokens: `rouge1`, `rouge_l` (F1, stemmed) and
  `entities_kept`.

  Raises:
    ImportError: the library rouge-score is missing (extra 'evaluate').
  """
  rouge_scores = _rouge().score(source, paraphrase)
  return {
    "rouge1": rouge_scores["rouge1"].fmeasure,
    "rouge_l": rouge_scores["rougeL"].fmeasure,
    "entities_kept": entities_kept(paraphrase, source),
  }


@functools.cache
def _rouge():
  from rouge_score import rouge_scorer, tokenizers

  ascii_only = tokenizers.DefaultTokenizer(use_stemmer=True)

  class Tokenizer(tokenizers.Tokenizer):
    """The library's own drops every letter that is not ASCII; words with one are kept as they
    are."""

    def tokenize(self, text):
      text = text.replace("’", "'")
      if text.isascii():  # as the library has it, to the last token
        return ascii_only.tokenize(text)
      return [
        token
        for word in words(text)
        for token in (ascii_only.tokenize(word) if word.isascii() else [word])
      ]

  return rouge_scorer.RougeScorer(["rouge1", "rougeL"], tokenizer=Tokenizer())
