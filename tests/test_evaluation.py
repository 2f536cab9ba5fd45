"""Datasets, candidates, settings, intervals, explanations and pages."""

import collections
import dataclasses
import json
import random
import re
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax.config import ConfigError
from clara_jax.data.pipeline import pad_tokens
from clara_jax.data.schemas import DataError, Document, Malformed, Row, write_rows
from clara_jax.evaluation import (
  candidates,
  datasets,
  evaluator,
  explain,
  fidelity,
  metrics,
  plots,
  runs,
  statistics,
)
from clara_jax.evaluation.likelihood import make_likelihood
from clara_jax.evaluation.settings import SETTINGS
from clara_jax.experiments.claims import claims
from clara_jax.experiments.laboratory.compare import compare
from clara_jax.experiments.laboratory.variants import parse
from clara_jax.inference.checkpoint import Checkpoint
from clara_jax.model import Clara
from clara_jax.testing import tiny
from tests.conftest import shared

# ---- the official definitions, written from their descriptions -----------------------------------


def official_normalise(text):
  """SQuAD 1.1 evaluate-v1.1.py: lower, remove punctuation, articles, extra white space."""
  text = "".join(c for c in text.lower() if c not in set(string.punctuation))
  return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def official_squad(prediction, golds):
  def f1(gold):
    p, g = official_normalise(prediction).split(), official_normalise(gold).split()
    same = sum((collections.Counter(p) & collections.Counter(g)).values())
    if same == 0:
      return 0
    precision, recall = same / len(p), same / len(g)
    return 2 * precision * recall / (precision + recall)

  return float(any(official_normalise(prediction) == official_normalise(g) for g in golds)), max(
    map(f1, golds)
  )


def official_hotpot(prediction, gold):
  """hotpot_evaluate_v1.py."""
  p, g = official_normalise(prediction), official_normalise(gold)
  em = float(p == g)
  if p in ("yes", "no", "noanswer") and p != g or g in ("yes", "no", "noanswer") and p != g:
    return em, 0
  a, b = p.split(), g.split()
  same = sum((collections.Counter(a) & collections.Counter(b)).values())
  if same == 0:
    return em, 0
  precision, recall = same / len(a), same / len(b)
  return em, 2 * precision * recall / (precision + recall)


def upstream(prediction, gold):
  """As the released code: True and False are yes and no; F1 as HotpotQA's, two empty texts are
  equal; every gold token in the prediction, and at least one."""

  def normalize(text):
    normalized = official_normalise(text)
    return {"true": "yes", "false": "no"}.get(normalized, normalized)

  p, g = normalize(prediction), normalize(gold)
  f1 = float(p == g) if not p and not g else official_hotpot(p, g)[1]
  return float(p == g), f1, float(bool(g.split()) and all(t in p.split() for t in g.split()))


def random_texts(count):
  rng = random.Random(0)
  words = [
    "the",
    "a",
    "an",
    "Paris",
    "paris,",
    "U.S.",
    "1,234",
    "12.5%",
    "yes",
    "no",
    "No.",
    "noanswer",
    "True",
    "false",
    "café",
    "東京",
    "naïve",
    "O’Neil",
    "O'Neil",
    "—",
    "...",
    "!",
    "Straße",
    "x\ty",
    "Ⅳ",
    "the-end",
    "Yes!",
    "I\u00a0am",
  ]

  def text():
    return " ".join(rng.choice(words) for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 5))))

  return [(text(), [text() for _ in range(rng.choice((1, 1, 2, 3)))]) for _ in range(count)]


def test_metrics_equal_the_official_definitions():
  for prediction, golds in random_texts(10_000):
    scores = metrics.answer_scores(prediction, golds)
    assert (scores["squad_em"], scores["squad_f1"]) == pytest.approx(
      official_squad(prediction, golds)
    )
    assert (scores["hotpot_em"], scores["hotpot_f1"]) == pytest.approx(
      official_hotpot(prediction, golds[0])
    )
    assert (scores["em_first"], scores["f1_first"], scores["cover_em_first"]) == pytest.approx(
      upstream(prediction, golds[0])
    )
    assert (scores["em"], scores["f1"], scores["cover_em"]) == pytest.approx(
      np.max([upstream(prediction, g) for g in golds], axis=0)
    )


def test_ranking_by_hand():
  scores = metrics.retrieval_scores([7, 2, 9, 4], [2, 4, 5], (1, 2, 4))
  assert (
    scores["mrr"] == 0.5
    and scores["recall_at_4"] == pytest.approx(2 / 3)
    and scores["precision_at_4"] == 0.5
  )
  ideal = 1 + 1 / np.log2(3) + 1 / 2
  assert (
    scores["ndcg_at_4"] == pytest.approx((1 / np.log2(3) + 1 / np.log2(5)) / ideal)
    and scores["ndcg_at_1"] == 0
  )


def test_paraphrases():
  source = "In 1912 Ada Lovelace met Charles Babbage. The engine had 25,000 parts."
  assert metrics.entities(source) == {"1912", "ada lovelace", "charles babbage", "25000"}
  scores = metrics.paraphrase_scores("Ada Lovelace knew Babbage; it had 25,000 parts.", source)
  assert scores["entities_kept"] == 0.5 and 0 < scores["rouge_l"] <= scores["rouge1"] < 1
  assert metrics.paraphrase_scores(source, source) == {
    "rouge1": 1,
    "rouge_l": 1,
    "entities_kept": 1,
  }


def test_intervals_cover():
  rng = np.random.default_rng(0)
  inside = 0
  for seed in range(60):
    interval = statistics.mean(rng.random(200) < 0.3, seed)
    inside += interval.low <= 0.3 <= interval.high
  assert 52 <= inside <= 60
  a = rng.random(300)
  assert statistics.compare(a, a + 0.1).p < 0.01 and statistics.compare(a, a).p == 1
  noise = statistics.compare(a, a + rng.normal(size=300))
  assert noise.low < noise.mean < noise.high


# ---- datasets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "path, rows, documents, gold",
  [
    ("official_samples/squad_v1.1_sample.json", 208, 1, 208),
    ("official_samples/hotpot_distractor_sample.json", 50, None, None),
    ("official_samples/2wikimultihop_sample.json", 50, 10, None),
    ("official_samples/musique_ans_sample.jsonl", 50, 20, None),
    ("multihop/hotpotqa.jsonl.gz", 1783, None, 3136),
    ("multihop/2wikimultihopqa.jsonl.gz", 797, None, 1938),
    ("multihop/musique.jsonl.gz", 245, None, 589),
    ("nq/nq_passage_qa.jsonl.gz", 7088, 1, 7088),
    ("nq/nq_open_dev_flashrag.jsonl.gz", 2529, 0, 0),
    ("other_domains/pubmedqa.jsonl.gz", 711, None, 0),
    ("other_domains/covidqa_qa.jsonl.gz", 944, 0, None),
    ("squad/qa.jsonl.gz", 27_313, 0, None),
  ],
)
def test_published_files(path, rows, documents, gold):
  loaded_rows = datasets.read(str(shared("data", *path.split("/"))))
  assert len(loaded_rows) == rows
  assert documents is None or {len(r.documents) for r in loaded_rows} == {documents}
  assert all(r.answers and r.questions[0] for r in loaded_rows)
  assert gold is None or sum(len(r.gold) for r in loaded_rows) == gold


@pytest.mark.parametrize("stage, documents", [(1, 5), (2, 20)])
def test_upstream_files(stage, documents):
  for path in sorted(shared("data", "clara_eval", f"stage{stage}_eval").rglob("*.jsonl")):
    rows = datasets.read(str(path))
    values = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 60 and {len(r.documents) for r in rows} == {documents}
    assert [list(r.gold) for r in rows] == [v.get("pos_index") or [] for v in values]
    assert [r.answers[0] for r in rows] == [v["golden_answers"][0] for v in values]


def test_gold_positions_are_those_of_the_files():
  folder = shared("data", "official_samples")
  hotpot = json.loads((folder / "hotpot_distractor_sample.json").read_text())
  for value, row in zip(
    hotpot, datasets.read(str(folder / "hotpot_distractor_sample.json")), strict=True
  ):
    supporting_titles = {title for title, _ in value["supporting_facts"]}
    assert {row.documents[g].split("\n")[0] for g in row.gold} == supporting_titles & {
      title for title, _ in value["context"]
    }
  musique = [
    json.loads(line) for line in (folder / "musique_ans_sample.jsonl").read_text().splitlines()
  ]
  for value, row in zip(
    musique, datasets.read(str(folder / "musique_ans_sample.jsonl")), strict=True
  ):
    assert [p["idx"] for p in value["paragraphs"] if p["is_supporting"]] == list(row.gold)
    assert row.answers == tuple(dict.fromkeys([value["answer"], *value["answer_aliases"]]))
  squad = json.loads((folder / "squad_v1.1_sample.json").read_text())
  questions = [q for article in squad["data"] for p in article["paragraphs"] for q in p["qas"]]
  assert [q["id"] for q in questions] == [
    r.identifier for r in datasets.read(str(folder / "squad_v1.1_sample.json"))
  ]


def test_other_formats(tmp_path):
  (tmp_path / "pubmed.json").write_text(
    json.dumps({"7": {"QUESTION": "Q?", "CONTEXTS": ["one", "two"], "final_decision": "yes"}})
  )
  assert datasets.read(str(tmp_path / "pubmed.json")) == [
    Row(("Q?",), ("yes",), ("one two",), (0,), "qa", "7")
  ]
  text = "<P> Paris is big . </P> <P> Rome is old . </P>"
  spans = [
    {"start_token": 0, "end_token": 6, "top_level": True},
    {"start_token": 6, "end_token": 12, "top_level": True},
  ]
  value = {
    "question_text": "what is old",
    "document_text": text,
    "long_answer_candidates": spans,
    "example_id": 5,
    "annotations": [
      {
        "long_answer": spans[1],
        "short_answers": [{"start_token": 7, "end_token": 8}],
        "yes_no_answer": "NONE",
      }
    ],
  }
  (tmp_path / "nq.jsonl").write_text(json.dumps(value))
  assert datasets.read(str(tmp_path / "nq.jsonl")) == [
    Row(("what is old",), ("Rome",), ("Paris is big .", "Rome is old ."), (1,), "qa", "5")
  ]


def test_tfds_sets(monkeypatch):
  tfds = pytest.importorskip("tensorflow_datasets")
  rows = [
    {
      "id": b"1",
      "title": b"A_b",
      "context": b"It is red.",
      "question": b"What color?",
      "answers": {"text": [b"red", b"red"]},
    }
  ]
  monkeypatch.setattr(
    tfds, "data_source", lambda name, split: rows if (name, split) == ("squad", "train") else None
  )
  assert datasets.read("tfds:squad:train") == [
    Row(("What color?",), ("red",), ("A b\nIt is red.",), (0,), "qa", "1")
  ]
  with pytest.raises(DataError, match="tfds:nothing: expected tfds:NAME"):
    datasets.read("tfds:nothing")


def test_broken_rows_are_named(tmp_path, caplog):
  good = {"question": "Q?", "golden_answers": ["a"], "docs": ["d"], "pos_index": [0]}
  bad = [
    "{",
    {**good, "golden_answers": []},
    {**good, "pos_index": [1]},
    {**good, "question": ["Q?"]},
    {"question": "Q?"},
  ]
  lines = [json.dumps(good), *[b if isinstance(b, str) else json.dumps(b) for b in bad]]
  path = tmp_path / "rows.jsonl"
  path.write_text("\n".join(lines))
  with pytest.raises(DataError, match=r"rows.jsonl:2: not valid JSON"):
    datasets.read(str(path))
  assert len(datasets.read(str(path), Malformed(5))) == 1
  said = caplog.text
  assert all(f"rows.jsonl:{n}:" in said for n in range(2, 7)) and "pos_index=1" in said
  (tmp_path / "hotpot.json").write_text(json.dumps([{"question": "Q?"}]))
  with pytest.raises(DataError, match="hotpot.json: row 0: the row lacks 'supporting_facts'"):
    datasets.read(str(tmp_path / "hotpot.json"))
  with pytest.raises(DataError, match="no known format"):
    (tmp_path / "other.json").write_text("{}")
    datasets.read(str(tmp_path / "other.json"))


# ---- candidates ----------------------------------------------------------------------------------


def make_candidates(*arguments, **options):
  *rows, summary = candidates.make(*arguments, **options)
  return rows, summary


def test_bm25_candidates(tmp_path):
  rows = datasets.read(str(shared("data", "multihop", "hotpotqa.jsonl.gz")))[:150]
  corpus = candidates.own_corpus(rows)
  normal, summary = make_candidates(rows, corpus, 20, "normal")
  places = {d.text: i for i, d in enumerate(corpus)}
  rankings = candidates.Bm25([d.text for d in corpus]).search([r.questions[0] for r in rows], 20)
  hits = [
    {places[r.documents[g]] for g in r.gold} & set(f[:5].tolist())
    for r, f in zip(rows, rankings, strict=True)
  ]
  recall = np.mean([len(h) / len(r.gold) for h, r in zip(hits, rows, strict=True)])
  assert (
    summary.recall_at_5 == pytest.approx(recall, abs=1e-4)
    and 0.4 < summary.recall_at_5 < summary.recall_at_count < 1
  )
  assert summary.gold_not_in_corpus == 0 and summary.documents == len(corpus)
  oracle, _ = make_candidates(rows, corpus, 20, "oracle")
  path = str(tmp_path / "rows.jsonl")
  write_rows(oracle, path)
  for row, before in zip(datasets.read(path), rows, strict=True):
    assert {row.documents[g] for g in row.gold} == {before.documents[g] for g in before.gold}
    assert len(set(row.documents)) == 20 and row.answers == before.answers
  assert len({row.gold[0] for row in datasets.read(path)}) > 10  # shuffled
  elsewhere, lost = make_candidates(rows[:5], corpus[-40:], 6, "oracle")
  assert lost.gold_not_in_corpus == 10 and all(
    {r["docs"][g] for g in r["pos_index"]} == {b.documents[g] for g in b.gold}
    for r, b in zip(elsewhere, rows, strict=False)
  )
  assert [r["docs"] for r in normal] == [[corpus[p].text for p in f] for f in rankings]


def test_questions_without_documents_and_dense_retrievers(tmp_path, monkeypatch):
  (tmp_path / "encoder.py").write_text(
    "import numpy as np\ndef encode(texts, kind):\n"
    "  return np.array([[t.count(c) for c in 'abc'] for t in texts], float) + 1e-3\n"
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  corpus = [Document("x", "aaa"), Document("y", "bbb", "b"), Document("z", "cc")]
  rows = [
    Row(("b",), ("yes",), (), (0,), "qa", "1", False, ("y",)),
    Row(("c",), ("no",), (), (), "qa", "2"),
  ]
  candidate_rows, summary = make_candidates(rows, corpus, 2, "normal", "encoder:encode")
  assert (
    candidate_rows[0]["docs"][0] == "b\nbbb"
    and candidate_rows[0]["pos_index"] == [0]
    and candidate_rows[1]["doc_ids"][0] == "z"
    and summary.recall_at_count == 1
  )
  for name, says in (
    ("nothing", "no such directory of a sentence-transformers model"),
    (str(tmp_path), "has no modules.json"),
  ):
    with pytest.raises(ConfigError, match=f"--retriever {re.escape(name)}: {says}"):
      candidates.open_retriever(name, ["a"])
  (tmp_path / "modules.json").write_text("[")
  with pytest.raises(ConfigError, match=r"--retriever .*modules.json: Expecting value"):
    candidates.open_retriever(str(tmp_path), ["a"])
  with pytest.raises(ConfigError, match="--retriever nothing:here"):
    make_candidates(rows, corpus, 2, "normal", "nothing:here")
  with pytest.raises(DataError, match="4 candidates a row, but the corpus has 3 documents"):
    make_candidates(rows, corpus, 4, "normal")


# ---- settings ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint():
  return Checkpoint(Clara(tiny.config()), tiny.prompt_tokenizer(), tiny.weights(), "here")


def test_every_setting_and_a_page(checkpoint, tmp_path, monkeypatch):
  rows = tiny.rows("joint")[:11]
  options = dict(also={"other": checkpoint}, title="tiny", batch_size=4, max_new_tokens=3)
  summaries = runs.run(checkpoint, rows, list(SETTINGS), str(tmp_path), **options)["runs"]
  assert set(summaries) == {*SETTINGS, "other"}
  assert (
    summaries["no_documents"]["context_tokens"] == 0
    and summaries["joint"]["context_tokens"] == 2 * 2
  )
  assert (
    summaries["compressor"]["context_tokens"] == 6 * 2
    and summaries["full_text"]["context_tokens"] > 10
  )
  assert (
    summaries["joint"]["recall_at_1"] == summaries["other"]["recall_at_1"]
    and "recall_at_1" not in summaries["compressor"]
  )
  with pytest.raises(ConfigError, match="has a report with bm25, .*; name these as well"):
    runs.run(checkpoint, rows, ["joint"], str(tmp_path), **options)
  page = (tmp_path / "report.html").read_text()
  assert "this checkpoint, other" in page  # one compressor, one picture
  assert (
    page.count("<svg") >= 5
    and "src=" not in page
    and "href='http" not in page
    and len(page) < 3_000_000
  )
  # Stopped in the middle: what was answered is not answered again.
  path = tmp_path / "predictions" / "joint.jsonl"
  lines = path.read_text().splitlines()
  path.write_text("\n".join(lines[:4]) + "\n" + lines[4][:20])
  passes = []
  run = evaluator._Answers._pass
  monkeypatch.setattr(
    evaluator._Answers, "_pass", lambda self, rows: passes.append(len(rows)) or run(self, rows)
  )
  again = evaluator.evaluate(
    checkpoint, rows, "joint", batch_size=4, max_new_tokens=3, path=str(path)
  )
  assert passes == [4, 4]  # seven rows
  whole = [json.loads(line) for line in lines]
  same = lambda p: {k: v for k, v in p.items() if k not in ("seconds", "confidence", "scores")}
  assert sorted(map(str, map(same, again.predictions))) == sorted(map(str, map(same, whole)))
  assert len(path.read_text().splitlines()) == 11
  with pytest.raises(ConfigError, match="another checkpoint, setting, K"):
    evaluator.evaluate(
      Checkpoint(checkpoint.model, checkpoint.prompt_tokenizer, tiny.weights(1)),
      rows,
      "joint",
      path=str(path),
    )


def test_two_runs_are_compared(checkpoint, tmp_path):
  rows = tiny.rows("joint")[:8]
  for name, seed in (("a", 0), ("b", 1)):
    other = Checkpoint(checkpoint.model, checkpoint.prompt_tokenizer, tiny.weights(seed), name)
    runs.run(other, rows, ["joint"], str(tmp_path / name), also={}, title=name, max_new_tokens=3)
  differences = runs.compare(str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "page.html"))[
    "joint"
  ]
  a, b = (
    evaluator.read_predictions(str(tmp_path / n / "predictions" / "joint.jsonl")) for n in "ab"
  )
  assert differences["recall_at_1"]["mean"] == pytest.approx(
    np.mean([q["recall_at_1"] - p["recall_at_1"] for p, q in zip(a, b, strict=True)])
  )
  assert "B is right where A was wrong" in (tmp_path / "page.html").read_text()
  with pytest.raises(DataError, match="no such file or directory"):
    runs.compare(str(tmp_path / "a"), str(tmp_path / "c"))
  with pytest.raises(ConfigError, match="predictions of other rows"):
    runs.run(
      checkpoint,
      tiny.rows("joint")[20:24],
      ["joint"],
      str(tmp_path / "a"),
      also={},
      title="a",
      max_new_tokens=3,
    )


# ---- explanations --------------------------------------------------------------------------------


def test_explanations(checkpoint):
  row = tiny.rows("joint")[0]
  explanation = explain.Explainer(checkpoint, max_new_tokens=3).explain(row)
  assert len(explanation.documents) == 2 and sum(
    d.attention for d in explanation.documents
  ) == pytest.approx(1)
  assert [d.score for d in explanation.documents] == sorted(
    (d.score for d in explanation.documents), reverse=True
  )
  assert all(d.is_gold == (d.place in row.gold) for d in explanation.documents)
  question = row.questions[0].lower()
  assert all(
    w.in_question == (w.word.lower() in re.findall(r"[^\W_]{2,}", question))
    for w in explanation.lens
  )
  assert explanation.question in plots.explained(explanation)


def test_gains_and_attention_by_the_plain_formula(checkpoint):
  model, weights, prompt_tokenizer = (
    checkpoint.model,
    checkpoint.weights,
    checkpoint.prompt_tokenizer,
  )
  rng = np.random.default_rng(0)
  memories = jnp.asarray(rng.normal(size=(1, 2, 2, 16)), jnp.float32)
  prompt = prompt_tokenizer.answer_prompt("who", 2).ids
  answer = np.array([5, 6, 7], np.int32)
  log_p, count = make_likelihood(Checkpoint(model, prompt_tokenizer, weights))(
    weights, [prompt], [answer], memories
  )
  ids = jnp.asarray(np.concatenate([prompt, answer]))[None]
  hidden, _ = model.hidden(weights, "generator", model.splice(weights, ids, memories))
  logits = jax.nn.log_softmax(model.logits(weights, hidden))[0]
  expected = sum(float(logits[len(prompt) - 1 + i, t]) for i, t in enumerate(answer))
  assert log_p[0] == pytest.approx(expected, abs=1e-4) and count[0] == 3
  shares = explain.answer_attention(model, weights, ids, memories, len(prompt), len(prompt) + 3)
  # Attention is linear in its values: with one layer's values replaced by indicators of a slot it
  # would return these shares. Here the plain formula, from the keys and queries of each layer.
  variables = {"params": weights["base"], "lora": weights["generator"]}
  (_, read), sown = model.decoder.apply(
    variables, model.splice(weights, ids, memories), return_kv=True, mutable=["queries"]
  )
  (queries,) = sown["queries"]["layers"]["attention"]["rotated"]
  slots = np.flatnonzero(np.isin(np.asarray(ids[0]), model.config.model.vocab_size + np.arange(2)))
  total = np.zeros(len(slots))
  # One key/value head.
  for q, k in zip(np.asarray(queries)[:, 0], np.asarray(read.keys)[:, 0, 0], strict=True):
    for t in range(len(prompt) - 1, len(prompt) + 2):
      for head in range(2):
        scores = k[: t + 1] @ q[t, head] / np.sqrt(8)
        total += (np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum())[slots]
  np.testing.assert_allclose(shares[0], total / (2 * 2 * 3), rtol=1e-4)


def test_pictures_are_of_what_the_mse_measures(checkpoint):
  texts = [d["text"] for d in tiny.world().documents(False)[:6]]
  documents, memories = explain.document_and_memory_means(checkpoint, texts)
  tokens = pad_tokens(
    checkpoint.prompt_tokenizer.documents(texts), checkpoint.prompt_tokenizer.pad_id, 1
  )
  made_, hidden = checkpoint.model.encode(checkpoint.weights, "compressor", tokens)
  length = int(tokens.lengths[2]) - 2
  np.testing.assert_allclose(documents[2], hidden[2, :length].mean(0), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(memories, made_.mean(1), rtol=1e-5)
  a, b, share = explain.pca_2d(documents, memories)
  assert a.shape == b.shape == (6, 2) and 0 < share[1] <= share[0] <= 1


# ---- paraphrases ---------------------------------------------------------------------------------


def test_paraphrases_from_memory_tokens(checkpoint, tmp_path):
  documents = [Document(d["id"], d["text"]) for d in tiny.world().documents(False)[:5]]
  evaluation = fidelity.paraphrase(
    checkpoint, documents, batch_size=4, max_new_tokens=8, bert_model=bert(tmp_path)
  )
  assert [p["id"] for p in evaluation.predictions] == [
    d.id for d in documents
  ] and evaluation.scores["n"] == 5
  for p in evaluation.predictions:
    assert {k: p[k] for k in ("rouge1", "rouge_l", "entities_kept")} == metrics.paraphrase_scores(
      p["prediction"], p["text"]
    )
  assert {"rouge1", "rouge_l", "entities_kept", "bertscore"} < set(evaluation.scores)


def bert(folder):
  """A BERT that knows letters."""
  pytest.importorskip("bert_score")
  from transformers import BertConfig, BertModel, BertTokenizerFast

  letters = list(string.ascii_lowercase)
  (folder / "vocab.txt").write_text(
    "\n".join(
      ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *[f"##{c}" for c in letters]]
    )
  )
  BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder)
  sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
  BertModel(BertConfig(vocab_size=57, **sizes)).save_pretrained(folder)
  return f"{folder}:2"


# ---- the paper's claims --------------------------------------------------------------------------


def test_verdicts():
  assert claims.outcome([0.9, 0.8], [0.7, 0.6]) == claims.HOLDS
  assert claims.outcome([0.9, 0.8], [0.95, 0.97]) == claims.OPPOSITE
  assert claims.outcome([0.9, 0.6], [0.7, 0.65]) == claims.OPEN
  results = {
    s: {
      "answers_all": {"em": 0.9},
      "answers_reconstruction": {"em": 0.5},
      "answers_none": {"em": 0.95},
    }
    for s in (0, 1)
  }
  verdict = claims.judge(claims.CLAIMS["a"], results)["verdict"]
  assert verdict.startswith("in part: answers (EM), SCP over reconstruction only: as in the paper")


@pytest.mark.real
def test_one_claim_is_reproduced_and_kept(tmp_path, monkeypatch):
  # 20 candidates for a test question
  world = dataclasses.replace(tiny.WORLD, people=150, first_names=15, last_names=15)
  sizes = claims.ExperimentSizes(world=world, test_rows=6, pretrain=1, scp=1, instruct=1, joint=1)
  report = claims.run(str(tmp_path), ("h",), seeds=1, sizes=sizes)
  assert set(report["results"][0]["documents_at_test"]) == {
    "em_1",
    "em_2",
    "em_3",
    "em_5",
    "em_8",
    "seconds",
  }
  assert (
    "| (h) |" in (tmp_path / "reproduction.md").read_text()
    and "<svg" in (tmp_path / "reproduction.html").read_text()
  )
  monkeypatch.setattr(claims.Experiments, "_train", None)  # nothing is done again
  claims.run(str(tmp_path), ("h",), seeds=1, sizes=sizes)
  monkeypatch.undo()
  # The trainings of clara gradients --train start from the same checkpoints.
  name = "gumbel(temperature=0.1)"
  trained = compare(str(tmp_path), [parse(name)], seeds=1, sizes=sizes)
  assert trained["results"][name][0]["milliseconds"] > 0 and [
    line["step"] for line in trained["results"][name][0]["gradients"]
  ] == [0]
  kept = json.loads((tmp_path / "seed_0/estimator_gumbel-temperature=0.1/config.json").read_text())[
    "run"
  ]
  assert kept["estimator"] == "gumbel" and kept["clara"]["temperature"] == 0.1
  with pytest.raises(ConfigError, match="has experiments of other sizes"):
    claims.run(str(tmp_path), ("h",), seeds=1)
