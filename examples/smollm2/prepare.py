"""Rows of every stage from real text, divided by article (SQuAD, Natural Questions, HotpotQA,
Wikipedia passages).

    python examples/smollm2/prepare.py --data DIR --out rows

DIR has squad/, nq/, multihop/ and wiki/ (JSONL, gzipped). What is written:

    scp.jsonl       a document with one question, with all of its questions as a list, or to be told again (its text is the answer)
    instruct.jsonl  a question with K documents: the gold one and others of the same article or that BM25 takes for it
    joint.jsonl     a question with N candidates of the same kinds, the gold documents marked
    squad.jsonl, hotpotqa.jsonl    test rows with N candidates, of articles that nothing above has
    squad_given.jsonl              the same questions with K documents, the gold one among them
    passages.jsonl  all paragraphs of the test articles, as documents

Rows that share their documents stand one after another (`data.share_documents` compresses these
once).
"""  # noqa: E501

import argparse
import collections
import gzip
import json
import pathlib
import random
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import Any

from clara_jax.evaluation.candidates import Bm25

TEST_ARTICLES, TEST_SQUAD, TEST_HOTPOTQA = 15, 500, 300
LISTED = 4  # questions of a list
# Words of a document; longer ones are left out: few of the others are cut at 256 tokens.
LONGEST = 220


def main() -> None:
  """Writes all files and prints how many rows each has."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", type=pathlib.Path, required=True, metavar="DIR")
  parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
  parser.add_argument(
    "--passages", type=int, default=20_000, help="that are only told again; default 20000"
  )
  parser.add_argument("--candidates", type=int, default=20, help="N; default 20")
  parser.add_argument("--top-k", type=int, default=5, help="K; default 5")
  parser.add_argument(
    "--limit", type=int, help="articles of SQuAD, and rows of the other sets, for a trial"
  )
  options = parser.parse_args()
  options.out.mkdir(parents=True, exist_ok=True)
  datasets = rows(options.data, options.passages, options.candidates, options.top_k, options.limit)
  for name, values in datasets.items():
    with open(options.out / f"{name}.jsonl", "w", encoding="utf-8") as file:
      file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
  print(json.dumps({name: len(values) for name, values in datasets.items()}))


def rows(
  data: pathlib.Path, passages: int, n: int, k: int, limit: int | None = None
) -> dict[str, list[dict[str, Any]]]:
  """Rows by the name of their file; see the module."""
  rng = random.Random(0)
  paragraphs = {
    p["id"]: p for p in _read(data / "squad" / "paragraphs.jsonl.gz") if _fits(p["text"])
  }
  questions = [q for q in _read(data / "squad" / "qa.jsonl.gz") if q["paragraph_id"] in paragraphs]
  titles = sorted({q["title"] for q in questions if q["split"] == "dev"})
  rng.shuffle(titles)
  held_out = set(titles[:TEST_ARTICLES])
  if limit:
    kept = held_out | set(sorted({q["title"] for q in questions} - held_out)[:limit])
    questions = [q for q in questions if q["title"] in kept]
  hotpot = [
    row
    for row in _read(data / "multihop" / "hotpotqa.jsonl.gz")
    if len(row["docs"]) >= k and all(map(_fits, row["docs"]))
  ]
  rng.shuffle(hotpot)
  test_hotpot, train_hotpot = hotpot[:TEST_HOTPOTQA], hotpot[TEST_HOTPOTQA:][:limit]
  # Articles that answer a question of the test are of no training row.
  held_out |= {row["titles"][g] for row in test_hotpot for g in row["pos_index"]}
  # SQuAD has titles as they stand in addresses
  elsewhere = held_out | {urllib.parse.unquote(title) for title in held_out}
  train_hotpot = [row for row in train_hotpot if not elsewhere & set(row["titles"])]

  sides = {
    side: _Squad(
      paragraphs, [q for q in questions if (q["title"] in held_out) == (side == "test")], n, k
    )
    for side in ("train", "test")
  }
  natural = [
    q
    for q in _read(data / "nq" / "nq_passage_qa.jsonl.gz")
    if q["title"] not in elsewhere and _fits(q["text"])
  ][:limit]
  squad = sides["train"]
  passage_texts = [
    f"{p['title']}\n{p['text']}"
    for p in _read(data / "wiki" / "passages.jsonl.gz")
    if p["title"] not in elsewhere and _fits(p["text"])
  ]
  passage_texts = rng.sample(
    passage_texts, min(passages, limit or len(passage_texts), len(passage_texts))
  )
  scp = [row for group in squad.by_paragraph() for row in _scp(group)]
  scp += [
    {
      "id": q["id"],
      "question": q["question"],
      "golden_answers": q["golden_answers"],
      "docs": [f"{q['title']}\n{q['text']}"],
    }
    for q in natural
  ]
  scp += [
    {"id": f"told-{i}", "data_type": "paraphrase", "docs": [text], "answers": [text]}
    for i, text in enumerate(passage_texts)
  ]
  hotpot_pool = list(dict.fromkeys(d for row in train_hotpot for d in row["docs"]))
  test_pool = list(dict.fromkeys(d for row in test_hotpot for d in row["docs"]))
  instruct = squad.rows(k) + [_hotpot(row, k, hotpot_pool, None, rng) for row in train_hotpot]
  joint = squad.rows(n) + _filled_up(train_hotpot, n, hotpot_pool, rng)
  # Questions that are tested, whatever their number of candidates.
  tested = {row["id"] for row in rng.sample(sides["test"].rows(n), TEST_SQUAD)}
  squad_test, squad_given = (
    [
      row
      for row in sorted(sides["test"].rows(count), key=lambda row: row["id"])
      if row["id"] in tested
    ]
    for count in (n, k)
  )
  return {
    "scp": scp,
    # Some rows of HotpotQA have lost their gold documents; nothing is to be learned from these.
    "instruct": [row for row in instruct if row["pos_index"]],
    "joint": [row for row in joint if row["pos_index"]],
    "squad": squad_test,
    "squad_given": squad_given,
    "hotpotqa": _filled_up(test_hotpot, n, test_pool, rng),
    "passages": [
      {"id": p["id"], "title": p["title"], "text": p["text"]} for p in sides["test"].paragraphs
    ],
  }


class _Squad:
  """Questions of some articles, with candidates that a paragraph's questions share."""

  def __init__(self, paragraphs: dict[str, dict], questions: Sequence[dict], n: int, k: int):
    self._groups: dict[str, list[dict]] = collections.defaultdict(list)
    for q in questions:
      self._groups[q["paragraph_id"]].append(q)
    titles = {q["title"] for q in questions}
    self.paragraphs = [p for p in paragraphs.values() if p["title"] in titles]
    self._texts = [f"{p['title']}\n{p['text']}" for p in self.paragraphs]
    self._place = {p["id"]: i for i, p in enumerate(self.paragraphs)}
    self._article: dict[str, list[int]] = collections.defaultdict(list)
    for i, p in enumerate(self.paragraphs):
      self._article[p["title"]].append(i)
    self._candidates = self._search(n)
    self._n, self._k = n, k

  def by_paragraph(self) -> Iterable[tuple[str, str, list[dict]]]:
    """(id, text, questions) of each paragraph."""
    for identifier, group in self._groups.items():
      yield identifier, self._texts[self._place[identifier]], group

  def _search(self, n: int) -> dict[str, list[int]]:
    """Others for each paragraph, hardest first, from its article and from BM25 over all in turn."""
    retriever = Bm25(self._texts)
    names = list(self._groups)
    rankings = retriever.search(
      [" ".join(q["question"] for q in self._groups[name]) for name in names],
      min(3 * n, len(self._texts)),
    )
    candidates = {}
    for name, near in zip(names, rankings.tolist(), strict=True):
      gold = self._place[name]
      article = set(self._article[self.paragraphs[gold]["title"]])
      own = [p for p in near if p in article] + sorted(
        article - set(near), key=lambda p: abs(p - gold)
      )
      turns = [
        p for pair in zip(own, [p for p in near if p not in article], strict=False) for p in pair
      ]
      candidates[name] = [p for p in dict.fromkeys([*turns, *own, *near]) if p != gold][: n - 1]
    return candidates

  def rows(self, count: int) -> list[dict[str, Any]]:
    """Every question with so many candidates."""
    candidate_rows = []
    for name, group in self._groups.items():
      gold = self._place[name]
      chosen = [gold, *self._candidates[name][: count - 1]]
      random.Random(f"{name} {count}").shuffle(chosen)
      candidate_rows += [
        {
          "id": q["id"],
          "question": q["question"],
          "golden_answers": q["answers"],
          "docs": [self._texts[p] for p in chosen],
          "pos_index": [chosen.index(gold)],
        }
        for q in group
      ]
    return candidate_rows


def _scp(group: tuple[str, str, list[dict]]) -> list[dict[str, Any]]:
  identifier, text, questions = group
  pretraining_rows = [
    {"id": q["id"], "question": q["question"], "golden_answers": q["answers"], "docs": [text]}
    for q in questions
  ]
  listed = questions[:LISTED]
  pretraining_rows.append(
    {
      "id": f"{identifier}-list",
      "question": [q["question"] for q in listed],
      "answers": [q["answers"][0] for q in listed],
      "docs": [text],
    }
  )
  return [
    *pretraining_rows,
    {"id": f"{identifier}-told", "data_type": "paraphrase", "docs": [text], "answers": [text]},
  ]


def _hotpot(
  row: dict, count: int, pool: Sequence[str], near: Sequence[int] | None, rng: random.Random
) -> dict[str, Any]:
  gold = [row["docs"][g] for g in row["pos_index"]]
  others = [d for d in row["docs"] if d not in gold] + [
    pool[p] for p in near or () if pool[p] not in row["docs"]
  ]
  chosen = list(dict.fromkeys([*gold, *others]))[:count]
  rng.shuffle(chosen)
  return {
    "id": row["id"],
    "question": row["question"],
    "golden_answers": row["golden_answers"],
    "docs": chosen,
    "pos_index": sorted(chosen.index(d) for d in gold),
  }


def _filled_up(
  hotpot_rows: Sequence[dict], n: int, pool: Sequence[str], rng: random.Random
) -> list[dict[str, Any]]:
  """HotpotQA's own ten documents and what BM25 finds among those of the others."""
  rankings = (
    Bm25(pool).search([row["question"] for row in hotpot_rows], min(3 * n, len(pool))).tolist()
  )
  return [_hotpot(row, n, pool, near, rng) for row, near in zip(hotpot_rows, rankings, strict=True)]


def _fits(text: str) -> bool:
  return len(text.split()) <= LONGEST


def _read(path: pathlib.Path) -> list[dict]:
  with gzip.open(path, "rt", encoding="utf-8") as file:
    return [json.loads(line) for line in file]


if __name__ == "__main__":
  main()
