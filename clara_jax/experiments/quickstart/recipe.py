"""The quickstart's recipe: a tiny base, the stages of CLaRa, a compressed corpus, answers.

Every part is the part that the large case uses: `training.run.train`, `compress_corpus`, the index,
`Answerer`. Only sizes differ.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
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
from clara_jax.memory.store import MemoryLookup, MemoryStore
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


DESCRIPTIONS = {
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


class Recipe:
  """The recipe's parts, each under `workdir`; one that is finished is not repeated.

  Args:
    workdir: where everything is kept.
    seed: of the training; the world is always the same.
    sizes: see `Sizes`.
  """

  def __init__(self, workdir: str, seed: int = 0, sizes: Sizes = Sizes()):
    self.workdir, self.seed, self.sizes = workdir, seed, sizes
    self.world = World(sizes.world)
    tokenizer = self.world.tokenizer()
    self.config = clara_config(len(tokenizer))
    self.prompt_tokenizer = PromptTokenizer(tokenizer, self.config)
    self.shipped: dict[str, Any] | None = None
    self.seconds: dict[str, float] = {}
    questions = os.path.join(workdir, "questions.jsonl")
    write_rows(self.world.question_rows(CANDIDATES, True, sizes.evaluation_rows), questions)
    self.test_rows = schemas.read_rows([questions])

  def directory(self, name: str) -> str:
    """The workdir of a stage."""
    return os.path.join(self.workdir, "stages", name)

  def load(self, name: str) -> formats.Checkpoint:
    """The checkpoint of a stage."""
    return formats.load(self.directory(name))

  @contextlib.contextmanager
  def _timed(self, name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    self.seconds[name] = round(time.monotonic() - start, 1)

  def unpack_shipped(self) -> bool:
    """Takes over the stages that the installation ships; False where it ships none."""
    self.shipped = shipped_stages.unpack(
      os.path.join(self.workdir, "stages"), self.prompt_tokenizer
    )
    return self.shipped is not None

  def train(
    self,
    name: str,
    eval_rows: Sequence[schemas.Row] = (),
    memories: MemoryLookup | None = None,
  ) -> None:
    """Trains a stage from the previous one, unless it is shipped."""
    if self.shipped and name in self.shipped["stages"]:
      return
    log.info(f"\n== {name}: {DESCRIPTIONS[name]}")
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
    with self._timed(name):
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

  def training_memories(self) -> MemoryLookup:
    """The memory tokens of all documents, compressed by the `instruct` stage."""
    everyone = [schemas.Document(**d) for side in (False, True) for d in self.world.documents(side)]
    store = os.path.join(self.workdir, "training_store")
    with self._timed("compress for training"):
      compress_corpus(self.load("instruct"), everyone, store)
    return MemoryStore(store).lookup()

  def one_document(self) -> dict[str, float]:
    """The scores of the `scp` stage on unseen people, one document at a time."""
    rows = [
      schemas.parse_row(r, f"test:{i}")
      for i, r in enumerate(self.world.question_rows(1, True, self.sizes.evaluation_rows))
    ]
    return _evaluate(self.load("scp"), rows, "compressor")

  def before_and_after(self) -> list[dict[str, float]]:
    """The scores on unseen people with a new query reasoner and after the joint stage."""
    before, after = self.load("instruct"), self.load("joint")
    before.weights |= before.model.init(jax.random.key(0), ("query_reasoner",))
    return [_evaluate(checkpoint, self.test_rows, "joint") for checkpoint in (before, after)]

  def corpus_and_answers(self) -> tuple[Answerer, list[dict[str, Any]]]:
    """Unseen documents compressed and indexed, and the answers to three questions on them."""
    checkpoint = self.load("joint")
    corpus, store = (os.path.join(self.workdir, name) for name in ("documents.jsonl", "store"))
    write_rows(self.world.documents(test=True, limit=self.sizes.corpus), corpus)
    with self._timed("compress"):
      compress_corpus(checkpoint, schemas.read_documents(corpus), store)
    memory_store = MemoryStore(store)
    with self._timed("index"):
      kind = "scann" if index_lib.available("scann") else "exact"
      index, _ = index_lib.update(memory_store, kind)
    answerer = Answerer(checkpoint, memory_store, index=index, max_new_tokens=4)
    rows = list(self.world.question_rows(1, True, 40, seed=7))
    one_a_relation = {row["relation"]: row["question"] for row in reversed(rows)}
    relations = list(dict.fromkeys(row["relation"] for row in rows))[:3]
    with self._timed("ask"):
      answers = answerer.answer([one_a_relation[relation] for relation in relations])
    return answerer, [dataclasses.asdict(answer) for answer in answers]


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
  start = time.monotonic()
  os.makedirs(workdir, exist_ok=True)
  recipe = Recipe(workdir, seed, sizes)
  log.info(
    f"CLaRa on a generated world: {sizes.world.people:,} people with {sizes.world.pages} "
    f"documents each. "
    "A fifth of the people is never seen in training."
  )
  if not from_scratch:
    if sizes == Sizes() and recipe.unpack_shipped():
      log.info(
        "Starting from the shipped result of this same recipe; --from-scratch trains all of it "
        "here."
      )
    else:
      log.info("This installation ships no trained result: training everything here.")
      from_scratch = True
  for name in ("pretrain", "scp", "instruct"):
    recipe.train(name)
  log.info("\n== The scp stage on people never seen in training, one document at a time.")
  scp = recipe.one_document()
  log.info(
    "\n== All documents through the compressor, once: the joint stage reads memory tokens, not "
    "text."
  )
  memories = recipe.training_memories()
  for name in RETRIEVAL:
    recipe.train(name, recipe.test_rows, memories)
  log.info(
    "\n== Before and after the joint stage, on unseen people: 20 candidates with hard "
    "distractors, the best 3 are read."
  )
  joint = recipe.before_and_after()
  log.info(f"\n== {sizes.corpus:,} unseen documents: compress, index, ask.")
  answerer, answers = recipe.corpus_and_answers()

  curves = {name: report_lib.read_metrics(recipe.directory(name), "eval") for name in RETRIEVAL}
  report = {
    "scp": {"answer_em": scp["em"]},
    "joint": _joint(joint, curves),
    "contrastive": {"recall_at_1": _ends(curves["contrastive"], "recall_at_1")},
    "compression_ratio": round(_mean_tokens(answerer) / recipe.config.num_memory_tokens, 2),
    "documents": len(answerer.store),
    "index": index_lib.saved_settings(answerer.store)["kind"],
    "seed": seed,
    "from_scratch": from_scratch,
    "seconds": recipe.seconds | {"total": round(time.monotonic() - start, 1)},
  }
  if recipe.shipped:
    report["shipped"] = recipe.shipped
  with open(os.path.join(workdir, "report.json"), "w", encoding="utf-8") as file:
    json.dump(report, file, indent=2)
  _write_page(recipe, answerer.checkpoint, report, answers, curves)
  _tell(report, answers, workdir)
  return report


def _evaluate(
  checkpoint: formats.Checkpoint, rows: Sequence[schemas.Row], query: str
) -> dict[str, float]:
  return evaluator.evaluate(
    checkpoint, rows, query, batch_size=100, max_new_tokens=4, progress=False
  ).scores


def _mean_tokens(answerer: Answerer) -> float:
  tokenizer, store = answerer.checkpoint.prompt_tokenizer, answerer.store
  return sum(len(tokenizer.ids(d.text)) for d in store.documents()) / len(store)


def _joint(
  scores: list[dict[str, float]], curves: dict[str, list[dict[str, float]]]
) -> dict[str, Any]:
  return {
    **{name: [s[name] for s in scores] for name in ("recall_at_1", "recall_at_3", "recall_at_5")},
    "answer_em": [s["em"] for s in scores],
    **{
      f"{name}_recall_at_1": _ends(curves[name], "recall_at_1")
      for name in ("generator_only", "without_nested_dropout", "from_compressor")
    },
    "answers_given_gold": _ends(curves["joint"], "answers_given_gold"),
    **{
      name: round(curves["joint"][0][name], 4)
      for name in ("gold_gradient_top1", "gold_gradient_top3")
    },
  }


def _ends(curve: list[dict[str, float]], metric: str) -> list[float]:
  return [round(curve[i][metric], 4) for i in (0, -1)]


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
  recipe: Recipe,
  checkpoint: formats.Checkpoint,
  report: dict[str, Any],
  answers: list[dict[str, Any]],
  curves: dict[str, list[dict[str, float]]],
) -> None:
  losses = {
    name: report_lib.read_metrics(recipe.directory(name), "train")
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
  with open(os.path.join(recipe.workdir, "report.html"), "w", encoding="utf-8") as file:
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
