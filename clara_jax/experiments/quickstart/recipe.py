"""The quickstart's recipe: a tiny base, the stages of CLaRa, a compressed corpus, answers.

Every part is the part that the large case uses: `training.run.train`, `compress_corpus`, the index,
`Answerer`. Only sizes differ.
"""

import dataclasses
import itertools
import json
import logging
import os
import time
from collections.abc import Iterable
from typing import Any

import jax

from clara_jax.checkpoints import formats
from clara_jax.config import (
  ClaraConfig,
  DataConfig,
  LoraConfig,
  ModelConfig,
  RunConfig,
  TrainConfig,
)
from clara_jax.data import schemas
from clara_jax.data.prompt_tokenizer import PromptTokenizer
from clara_jax.data.schemas import write_rows
from clara_jax.evaluation import evaluator, logit_lens
from clara_jax.experiments.quickstart import report as report_lib
from clara_jax.experiments.quickstart import shipped as shipped_stages
from clara_jax.experiments.world import World, WorldConfig
from clara_jax.inference.answer import Answerer
from clara_jax.inference.compress import compress_corpus
from clara_jax.memory.store import MemoryStore
from clara_jax.retrieval import index as index_lib
from clara_jax.training import run as training

log = logging.getLogger(__name__)

CANDIDATES, TOP_K = 20, 3


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What makes the recipe long: the world, how many test rows and unseen documents, and the steps
  of each stage.

  Six documents a person, one fact each: a name alone does not find the document, the question's
  relation matters too.
  """

  world: WorldConfig = WorldConfig(
    level=2,
    kinds=("person",),
    people=2_000,
    first_names=60,
    last_names=60,
    relations=6,
    pages=6,
    wordings=2,
    sentences=2,
  )
  evaluation_rows: int = 500
  corpus: int = 2_000
  pretrain: int = 900
  scp: int = 500
  instruct: int = 120
  contrastive: int = 100
  joint: int = 200


SAYS = {
  "pretrain": "A tiny base learns to find a fact in a text that it has before it.",
  "scp": "Compressor and generator learn to put a document into a few memory tokens and to answer "
  "from them.",
  "instruct": "They learn to answer when the memory tokens of several documents stand side by side.",  # noqa: E501
  "contrastive": "For comparison: retrieval learned WITH relevance labels, the ceiling for the "
  "next stage.",
  "joint": "The query reasoner learns to retrieve from the answers' loss alone, without a single "
  "relevance label.",
  "generator_only": "For comparison: the same run with the query reasoner frozen.",
  "without_nested_dropout": "For comparison: the same run where the generator always reads all K "
  "documents.",
  "from_compressor": "For comparison: the same run with a query reasoner that starts as a copy of "
  "the compressor.",
}
RETRIEVAL = ("contrastive", "joint", "generator_only", "without_nested_dropout", "from_compressor")
PREVIOUS = {
  "pretrain": None,
  "scp": "pretrain",
  "instruct": "scp",
  **dict.fromkeys(RETRIEVAL, "instruct"),
}


def clara_config(vocab_size: int) -> ClaraConfig:
  """0.9 M parameters; documents of 30 tokens become 3 memory tokens."""
  model = ModelConfig(
    vocab_size=vocab_size,
    width=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=384,
    tie_embeddings=True,
    initializer_range=0.06,
    dtype="float32",
    param_dtype="float32",
    remat="full",
  )
  return ClaraConfig(
    model,
    LoraConfig(rank=16, alpha=32.0, dropout=0.0),
    doc_max_length=30,
    compression_rate=10,
    query_max_length=24,
    decoder_max_length=512,
    top_k=TOP_K,
    nested_dropout=0.9,
  )


def stage_rows(world: World, name: str) -> Iterable[dict[str, Any]]:
  """Training rows of a stage, as a JSONL file has them."""
  if name == "pretrain":
    questions = (r for r in world.scp_rows(versions=1, complex_share=0.0) if r["data_type"] == "qa")
    return itertools.chain(world.lookup_rows(versions=1), questions, world.note_rows(most=4))
  if name == "scp":
    return itertools.chain(
      world.scp_rows(versions=1, complex_share=0.0), world.lookup_rows(versions=1)
    )
  if name == "instruct":
    return itertools.chain(
      world.question_list_rows(TOP_K, questions=5, seed=1), world.question_rows(TOP_K)
    )
  return world.question_rows(CANDIDATES)


def _stage(name: str, sizes: Sizes, seed: int) -> tuple[DataConfig, TrainConfig]:
  common = {"seed": seed, "log_every": 50, "checkpoint_every": 500}
  data = DataConfig(batch_size=32, eval_batch_size=128, candidates=CANDIDATES, bucket=32)
  train = {
    "pretrain": TrainConfig(
      stage="pretrain",
      steps=sizes.pretrain,
      learning_rate=3e-3,
      schedule="linear",
      final_learning_rate_fraction=0.2,
      **common,
    ),
    "scp": TrainConfig(
      stage="scp", steps=sizes.scp, learning_rate=3e-3, schedule="linear", **common
    ),
    "instruct": TrainConfig(
      stage="instruct", steps=sizes.instruct, learning_rate=2e-3, schedule="linear", **common
    ),
    "contrastive": TrainConfig(
      stage="contrastive", steps=sizes.contrastive, learning_rate=2e-3, eval_every=50, **common
    ),
    # A new query reasoner: a copy of the compressor, as the paper starts it, finds every second
    # document before it has learned anything here (compare `from_compressor`).
    "joint": TrainConfig(
      stage="joint",
      steps=sizes.joint,
      learning_rate=2e-3,
      eval_every=50,
      fresh_query_reasoner=True,
      learning_rate_factors={"generator": 0.1},
      **common,
    ),
  }
  train["without_nested_dropout"] = train["joint"]
  train["from_compressor"] = dataclasses.replace(train["joint"], fresh_query_reasoner=False)
  train["generator_only"] = dataclasses.replace(train["joint"], freeze=("query_reasoner",))
  return data, train[name]


@dataclasses.dataclass
class _Stages:
  """Where each stage lies, and how long it took."""

  workdir: str
  sizes: Sizes
  seed: int
  world: World
  prompt_tokenizer: PromptTokenizer
  config: ClaraConfig
  seconds: dict[str, float]

  def directory(self, name: str) -> str:
    return os.path.join(self.workdir, "stages", name)

  def run(self, name: str, eval_rows=(), memories=None) -> None:
    """Trains a stage from the previous one; a finished one is not repeated."""
    log.info(f"\n== {name}: {SAYS[name]}")
    start = time.monotonic()
    previous = PREVIOUS[name]
    data, train = _stage(name, self.sizes, self.seed)
    rows = [schemas.parse_row(r, f"{name}:{i}") for i, r in enumerate(stage_rows(self.world, name))]
    config = (
      dataclasses.replace(self.config, nested_dropout=0.0)
      if name == "without_nested_dropout"
      else self.config
    )
    run = RunConfig(
      config,
      data,
      train,
      base=self.directory("pretrain") if previous else None,
      init_from=self.directory(previous) if previous else None,
    )
    result = training.train(
      run,
      self.directory(name),
      rows=rows,
      eval_rows=eval_rows,
      memories=memories,
      tokenizer=None if previous else self.prompt_tokenizer.tokenizer,
    )
    if result.stopped is not None:  # by SIGTERM; what was done is saved
      raise KeyboardInterrupt
    self.seconds[name] = round(time.monotonic() - start, 1)


def run(
  workdir: str, *, from_scratch: bool = False, seed: int = 0, sizes: Sizes = Sizes()
) -> dict[str, Any]:
  """Trains, compresses, indexes and answers; writes DIR/report.json and DIR/report.html.

  Args:
    workdir: everything is kept here; a second call goes on where the first one stopped.
    from_scratch: train every stage here; otherwise start from the shipped result of the same
      recipe.
    seed: of the training; the world is always the same.
    sizes: other ones are for tests; they exclude the shipped result.

  Returns:
    The report, as in report.json.
  """
  began = time.monotonic()
  os.makedirs(workdir, exist_ok=True)
  world = World(sizes.world)
  tokenizer = world.tokenizer()
  config = clara_config(len(tokenizer))
  prompt_tokenizer = PromptTokenizer(tokenizer, config)
  stages = _Stages(workdir, sizes, seed, world, prompt_tokenizer, config, {})
  log.info(
    f"CLaRa on a generated world: {sizes.world.people:,} people with {sizes.world.pages} "
    f"documents each. "
    "A fifth of the people is never seen in training."
  )
  shipped = (
    None
    if from_scratch or sizes != Sizes()
    else shipped_stages.unpack(os.path.join(workdir, "stages"), prompt_tokenizer)
  )
  if shipped:
    log.info(
      "Starting from the shipped result of this same recipe; --from-scratch trains all of it here."
    )
  elif not from_scratch:
    log.info("This installation ships no trained result: training everything here.")
    from_scratch = True

  questions = os.path.join(workdir, "questions.jsonl")
  write_rows(world.question_rows(CANDIDATES, True, sizes.evaluation_rows), questions)
  test_rows = schemas.read_rows([questions])
  one_rows = [
    schemas.parse_row(r, f"test:{i}")
    for i, r in enumerate(world.question_rows(1, True, sizes.evaluation_rows))
  ]
  shipped_names = shipped["stages"] if shipped else ()
  for name in ("pretrain", "scp", "instruct"):
    if name not in shipped_names:
      stages.run(name)
  log.info("\n== The scp stage on people never seen in training, one document at a time.")
  scp = _load(stages, "scp")
  scp_scores = evaluator.evaluate(
    scp, one_rows, "compressor", batch_size=100, max_new_tokens=4, progress=False
  ).scores

  log.info(
    "\n== All documents through the compressor, once: the joint stage reads memory tokens, not "
    "text."
  )
  start = time.monotonic()
  instruct = _load(stages, "instruct")
  everyone = [schemas.Document(**d) for side in (False, True) for d in world.documents(side)]
  store = os.path.join(workdir, "training_store")
  compress_corpus(instruct, everyone, store)
  memories = MemoryStore(store).lookup()
  stages.seconds["compress for training"] = round(time.monotonic() - start, 1)
  for name in RETRIEVAL:
    if name not in shipped_names:
      stages.run(name, test_rows, memories)

  log.info(
    "\n== Before and after the joint stage, on unseen people: 20 candidates with hard "
    "distractors, the best 3 are read."
  )
  before, after = (_load(stages, name) for name in ("instruct", "joint"))
  before.weights |= before.model.init(jax.random.key(0), ("query_reasoner",))
  scores = [
    evaluator.evaluate(
      c, test_rows, "joint", batch_size=100, max_new_tokens=4, progress=False
    ).scores
    for c in (before, after)
  ]

  log.info(f"\n== {sizes.corpus:,} unseen documents: compress, index, ask.")
  start = time.monotonic()
  corpus = os.path.join(workdir, "documents.jsonl")
  write_rows(world.documents(test=True, limit=sizes.corpus), corpus)
  store = os.path.join(workdir, "store")
  compressed = compress_corpus(after, schemas.read_documents(corpus), store)
  stages.seconds["compress"] = round(time.monotonic() - start, 1)
  start = time.monotonic()
  memory_store = MemoryStore(store)
  kind = "scann" if index_lib.available("scann") else "exact"
  index, _ = index_lib.update(memory_store, kind)
  stages.seconds["index"] = round(time.monotonic() - start, 1)
  answerer = Answerer(after, memory_store, index=index, max_new_tokens=4)
  shown = [r for r in world.question_rows(1, True, 40, seed=7)]
  picked = [
    next(r for r in shown if r["relation"] == relation)
    for relation in dict.fromkeys(r["relation"] for r in shown)
  ][:3]
  start = time.monotonic()
  answers = [dataclasses.asdict(a) for a in answerer.answer([r["question"] for r in picked])]
  stages.seconds["ask"] = round(time.monotonic() - start, 1)

  curves = {name: report_lib.read_metrics(stages.directory(name), "eval") for name in RETRIEVAL}
  tokens = sum(len(prompt_tokenizer.ids(d.text)) for d in memory_store.documents()) / len(
    memory_store
  )
  report = {
    "scp": {"answer_em": scp_scores["em"]},
    "joint": {
      **{name: [s[name] for s in scores] for name in ("recall_at_1", "recall_at_3", "recall_at_5")},
      "answer_em": [s["em"] for s in scores],
      "generator_only_recall_at_1": _ends(curves["generator_only"], "recall_at_1"),
      "without_nested_dropout_recall_at_1": _ends(curves["without_nested_dropout"], "recall_at_1"),
      "from_compressor_recall_at_1": _ends(curves["from_compressor"], "recall_at_1"),
      "answers_given_gold": _ends(curves["joint"], "answers_given_gold"),
      **{
        name: round(curves["joint"][0][name], 4)
        for name in ("gold_gradient_top1", "gold_gradient_top3")
      },
    },
    "contrastive": {"recall_at_1": _ends(curves["contrastive"], "recall_at_1")},
    "compression_ratio": round(tokens / config.num_memory_tokens, 2),
    "documents": compressed.documents,
    "index": kind,
    "seed": seed,
    "from_scratch": from_scratch,
    "seconds": stages.seconds | {"total": round(time.monotonic() - began, 1)},
  }
  if shipped:
    report["shipped"] = shipped
  with open(os.path.join(workdir, "report.json"), "w", encoding="utf-8") as file:
    json.dump(report, file, indent=2)
  _write_page(stages, after, report, answers, curves)
  _tell(report, answers, workdir)
  return report


def _ends(curve: list[dict[str, float]], metric: str) -> list[float]:
  return [round(curve[i][metric], 4) for i in (0, -1)]


def _load(stages: _Stages, name: str) -> formats.Checkpoint:
  return formats.load(stages.directory(name))


TABLE = (
  (("scp", "answer_em"), "answers from one document's memory tokens, exact match"),
  (("joint", "recall_at_1"), "gold document first of 20, before and after the joint stage"),
  (("joint", "recall_at_5"), "gold document among the first 5"),
  (("joint", "answer_em"), "answers from the 3 best documents, exact match"),
  (("joint", "generator_only_recall_at_1"), "the same with the query reasoner frozen"),
  (
    ("joint", "without_nested_dropout_recall_at_1"),
    "the same where the generator always reads all 3",
  ),
  (
    ("joint", "from_compressor_recall_at_1"),
    "the same with a query reasoner that starts as a copy of the compressor",
  ),
  (("joint", "answers_given_gold"), "answers where the gold document is among the 3"),
  (
    ("joint", "gold_gradient_top3"),
    "missed gold documents among the 3 that the answer's loss pulls up most (chance: 0.15)",
  ),
  (("contrastive", "recall_at_1"), "retrieval trained with labels: the ceiling"),
  (("compression_ratio",), "tokens of a document for each memory token"),
)


def _table(report: dict[str, Any]) -> list[tuple[str, Any, str]]:
  rows = []
  shipped = report.get("shipped", {}).get("stages", ())
  for path, meaning in TABLE:
    value: Any = report
    for key in path:
      value = value[key]
    stage = path[-1].removesuffix("_recall_at_1") if path[0] == "joint" else path[0]
    # scp's answers are given here, by the shipped weights.
    rows.append(
      (
        ".".join(path),
        value,
        meaning + (" (shipped figure)" if stage in shipped and stage != "scp" else ""),
      )
    )
  return rows


def _write_page(
  stages: _Stages,
  checkpoint: formats.Checkpoint,
  report: dict[str, Any],
  answers: list[dict[str, Any]],
  curves: dict[str, list[dict[str, float]]],
) -> None:
  losses = {
    name: report_lib.read_metrics(stages.directory(name), "train")
    for name in ("pretrain", "scp", "instruct", "joint")
  }
  question = answers[0]["question"]
  lens = logit_lens.queries(checkpoint, [question], 20)[0]["tokens"]
  recall = {name: curves[name] for name in ("joint", "generator_only", "without_nested_dropout")}
  plots = [
    ("Losses", report_lib.loss_plot(losses)),
    ("Recall on unseen people during the joint stage", report_lib.recall_plot(recall)),
    (
      f"Logit lens: what the memory tokens of “{question}” stand for",
      report_lib.lens_plot(lens, question),
    ),
  ]
  text = report_lib.page(
    "CLaRa quickstart",
    "A generated world of people with six documents each. Documents become memory tokens; "
    "questions find them and "
    "are answered from them. All figures are on people never seen in training.",
    _table(report),
    plots,
    answers,
    report,
  )
  with open(os.path.join(stages.workdir, "report.html"), "w", encoding="utf-8") as file:
    file.write(text)


def _tell(report: dict[str, Any], answers: list[dict[str, Any]], workdir: str) -> None:
  log.info("")
  rows = _table(report)
  width = max(len(name) for name, *_ in rows)
  for name, value, meaning in rows:
    shown = (
      " -> ".join(f"{v:.3f}" for v in value)
      if isinstance(value, list)
      else (f"{value:.3f}" if isinstance(value, float) else str(value))
    )
    log.info(f"{name:>{width}}  {shown:<16} {meaning}")
  for answer in answers:
    log.info(f"\n{answer['question']}\n  -> {answer['answer']}")
    for document in answer["documents"]:
      log.info(f"     {document['score']:.3f}  {document['text']}")
  log.info(
    f"\nTry it:  clara ask --checkpoint {os.path.join(workdir, 'stages', 'joint')} --store "
    f"{os.path.join(workdir, 'store')} "
    f'--max-new-tokens 4 "{answers[0]["question"]}"'
  )
  log.info(
    f"Written: {os.path.join(workdir, 'report.json')} and {os.path.join(workdir, 'report.html')}, "
    f"after {report['seconds']['total']:.0f} s."
  )
