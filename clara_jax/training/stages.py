"""The stages of CLaRa as rows of a table (paper §3; SPEC §1).

A stage says which groups of weights train, where each starts, what a batch holds and its loss

    (model, trainable, frozen, batch, rng) -> (terms, metrics)

whose terms are `Mean`s; the loss is the sum of their values. To add a stage, write its loss and one `register` line.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from clara_jax.batch import Batch, Prompt, Tokens
from clara_jax.config import ConfigError, TrainConfig
from clara_jax.model import Clara, Weights
from clara_jax.ops import estimators, losses
from clara_jax.ops.nearest import nearest, take
from clara_jax.ops.topk import push
from clara_jax.training.metrics import Mean, Metrics

LossFn = Callable[[Clara, Weights, Weights, Batch, jax.Array | None], tuple[Metrics, Metrics]]
DiagnosticsFn = Callable[[Clara, Weights, Batch], Metrics]

FRESH = "fresh"


@dataclasses.dataclass(frozen=True)
class Stage:
  """One row of the table.

  Attributes:
    name: what `config.train.stage` says.
    trains: groups of weights that are trained (`model.GROUPS`).
    starts: for each group that this stage needs, the groups of the checkpoint before that it may be copied from, in order of
      preference, with 'fresh' for new weights. The base is always the run's own.
    data: what a batch holds: 'text' (documents as text in the prompt), 'given' (K documents) or 'candidates' (N documents and the
      question on its own).
    loss: see the module docstring.
    diagnostics: further metrics for evaluation only, too slow for every step.
  """

  name: str
  trains: tuple[str, ...]
  starts: Mapping[str, tuple[str, ...]]
  data: Literal["text", "given", "candidates"]
  loss: LossFn
  diagnostics: DiagnosticsFn | None = None

  def trained(self, config: TrainConfig) -> tuple[str, ...]:
    """The groups that train in this run, without those that the configuration freezes."""
    if unknown := set(config.freeze) - set(self.trains):
      raise ConfigError(f"train.freeze: {sorted(unknown)} do not train in stage {self.name!r}; {list(self.trains)} do")
    left = tuple(group for group in self.trains if group not in config.freeze)
    if not left:
      raise ConfigError(f"train.freeze leaves nothing to train in stage {self.name!r}")
    return left


STAGES: dict[str, Stage] = {}


def register(stage: Stage) -> Stage:
  """Adds a stage to the table."""
  STAGES[stage.name] = stage
  return stage


def get(name: str) -> Stage:
  """The stage of that name.

  Raises:
    ConfigError: there is none.
  """
  if name not in STAGES:
    raise ConfigError(f"train.stage={name!r}: expected one of {sorted(STAGES)}")
  return STAGES[name]


# ---- losses ------------------------------------------------------------------------------------------------------------------


def answer_terms(model: Clara, weights: Weights, states: jax.Array, prompt: Prompt) -> tuple[Mean, jax.Array, jax.Array]:
  """Cross entropy over all label tokens, and whether each row's labels are all predicted (which greedy decoding would repeat).

  With `model.logits_chunk` the logits of that many label positions are formed at a time, and again in the backward pass.

  Args:
    model, weights: for the head.
    states: [B, A, D] hidden states at the label positions.
    prompt: its labels.

  Returns:
    (Mean over label tokens, [B] bool, [B] the rows' sums).
  """
  matrix = model.output_matrix(weights)

  def one(states, labels, counted):
    loss, right = losses.cross_entropy(model.logits(weights, states, matrix), labels)
    return (loss * counted).sum(-1), (right | (counted == 0)).all(-1)

  values = (states, prompt.labels, prompt.label_weights)
  chunk, length = model.config.model.logits_chunk, prompt.labels.shape[1]
  if not chunk or chunk >= length:
    rows, right = one(*values)
  else:
    def chunked(x):
      x = jnp.pad(x, [(0, 0), (0, -length % chunk), *[(0, 0)] * (x.ndim - 2)])
      return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)
    parts, rights = jax.lax.map(lambda xs: jax.checkpoint(one)(*xs), jax.tree.map(chunked, values))
    rows, right = parts.sum(0), rights.all(0)
  return Mean(rows.sum(), prompt.label_weights.sum()), right, rows


def valid(batch: Batch) -> jax.Array:
  """[B]: 1 for rows, 0 for what fills a batch up."""
  return jnp.ones(batch.prompt.labels.shape[0]) if batch.valid is None else batch.valid


def of_rows(batch: Batch, memories: jax.Array) -> jax.Array:
  """Memory tokens of a batch's documents, [U, M, D] or [B, K, M, D] in any leading shape -> those of each row's, [B, K, M, D] (or N)."""
  if batch.document_slots is not None:
    return memories[batch.document_slots]
  return memories.reshape(*batch.documents.lengths.shape, *memories.shape[-2:])


def given_documents_loss(model: Clara, trainable: Weights, frozen: Weights, batch: Batch, rng: jax.Array | None
                         ) -> tuple[Metrics, Metrics]:
  """CE of the answer from K given documents + λ · MSE of document and memory means (paper Eq. for L_SCP; §3.1)."""
  weights = {**frozen, **trainable}
  compress_key, answer_key = (None, None) if rng is None else jax.random.split(rng)
  ids, lengths = batch.documents.ids, batch.documents.lengths
  documents = Tokens(ids.reshape(-1, ids.shape[-1]), lengths.reshape(-1))
  memories, hidden = model.encode(weights, "compressor", documents, compress_key)
  is_memory, _ = model.memory_slot(documents.ids)
  # Rows with fewer documents than others are filled up with documents of length 0; one that several rows have counts for each.
  counted = documents.lengths > 0
  if batch.document_slots is not None:
    counted *= jnp.zeros(len(memories)).at[batch.document_slots.reshape(-1)].add(1.0)
  mse = Mean.of(losses.alignment_mse(hidden, documents.is_real() & ~is_memory, documents.is_real() & is_memory), counted)
  states = model.answer_states(weights, batch.prompt, of_rows(batch, memories), dropout=answer_key)
  ce, right, _ = answer_terms(model, weights, states, batch.prompt)
  terms = {"ce": ce, "mse": Mean(mse.total * model.config.mse_weight, mse.count)}
  return terms, {"ce": ce, "mse": mse, "answers": Mean.of(right, valid(batch))}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Candidates:
  """The documents that a question's are selected from.

  Attributes:
    memories: [B, N, M, D].
    is_gold: [B, N] bool, or None where it is not known.
    num_gold: [B] int32, the question's gold documents, among these or not.
  """

  memories: jax.Array
  is_gold: jax.Array | None
  num_gold: jax.Array | None


def candidates(model: Clara, weights: Weights, batch: Batch, query: jax.Array) -> Candidates:
  """A row's own N candidates, read from the store or compressed here by the frozen compressor; or the N nearest of a whole corpus.

  Args:
    model, weights: the method; with `weights['corpus']`, a `Corpus`, the nearest are retrieved from it.
    batch: the rows.
    query: [B, M, D].
  """
  if "corpus" not in weights:
    memories = batch.memories
    if memories is None:
      memories = of_rows(batch, jax.lax.stop_gradient(model.compress(weights, batch.documents)))
    count = None if batch.is_gold is None else batch.is_gold.sum(-1)
    return Candidates(memories.astype(model.config.model.dtype), batch.is_gold, count)
  # Which documents are near is no function that a gradient goes through; their scores are, in `select`.
  corpus = jax.lax.stop_gradient(weights["corpus"])
  kept = corpus.memories[:, :query.shape[1]]
  flat, scale = kept.reshape(kept.shape[0], -1), corpus.scales[query.shape[1]]
  at = jax.lax.stop_gradient(query).reshape(query.shape[0], -1).astype(jnp.float32)
  slots, _ = nearest(flat, scale, at, corpus.candidates)
  memories = take(flat, slots).reshape(*slots.shape, *kept.shape[1:])
  gold = batch.gold_slots
  return Candidates(memories.astype(model.config.model.dtype), (slots[:, :, None] == gold[:, None]).any(-1), (gold >= 0).sum(-1))


def recall(scores: jax.Array, found: Candidates, valid: jax.Array) -> Metrics:
  """Recall@1, 3 and 5 = |top-k ∩ gold| / |gold|, over rows that have gold documents. scores: [B, N]."""
  order = jnp.argsort(-scores, axis=-1)
  taken = jnp.take_along_axis(found.is_gold, order, axis=-1).astype(jnp.float32)
  weight = valid * (found.num_gold > 0)
  return {f"recall_at_{k}": Mean.of(taken[:, :k].sum(-1) / jnp.maximum(found.num_gold, 1), weight) for k in (1, 3, 5)}


def joint_loss(model: Clara, trainable: Weights, frozen: Weights, batch: Batch, rng: jax.Array | None
               ) -> tuple[Metrics, Metrics]:
  """CE of the answer from the K best of N candidates; the straight-through top-k teaches the query reasoner (paper §3.2).

  `model.estimator` may choose and teach in another way in training; evaluation always takes the K best.
  """
  weights = {**frozen, **trainable}
  query_key, answer_key, nested_key = (None, None, None) if rng is None else jax.random.split(rng, 3)
  query = model.encode_query(weights, batch.question, query_key)
  found = candidates(model, weights, batch, query)
  scores = model.score(query, found.memories)
  draws = 1
  if rng is None:
    selected, indices = model.select(scores, found.memories)
    log_prob = None
  else:
    estimator = estimator_of(model)
    draws = estimator.samples
    batch, found, scores = (repeat(x, draws) for x in (batch, found, scores))
    # Not split off: the other keys are as without an estimator.
    choice = estimator(scores, model.config.top_k, model.temperature(weights), jax.random.fold_in(rng, 3))
    selected, indices, log_prob = choice.rows(found.memories), choice.indices, choice.log_prob
  if nested_key is not None and model.config.nested_dropout:
    selected = nested_dropout(selected, model.config.nested_dropout, nested_key)
  states = model.answer_states(weights, batch.prompt, selected, dropout=answer_key)
  ce, right, losses_of_rows = answer_terms(model, weights, states, batch.prompt)
  terms = {"ce": ce}
  if log_prob is not None:  # of value 0; by the label tokens of the rows themselves, as CE is
    term = estimators.leave_one_out(losses_of_rows, log_prob, draws)
    terms["score_function"] = Mean(term, ce.count / draws)
  metrics = {"ce": ce, "answers": Mean.of(right, valid(batch))}
  if "temperature" in weights:
    metrics["temperature"] = Mean(model.temperature(weights), jnp.ones(()))
  if found.is_gold is not None:
    metrics |= recall(scores, found, valid(batch))
    metrics["answers_given_gold"] = Mean.of(right, valid(batch) * gold_selected(indices, found))
  return terms, metrics


def estimator_of(model: Clara) -> estimators.Estimator:
  """What teaches the scores: the straight-through top-k where no other is named."""
  return model.estimator or estimators.get(model.config.masking)


def repeat(tree: Any, times: int) -> Any:
  """Every row so many times, side by side."""
  return tree if times == 1 else jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


def nested_dropout(selected: jax.Array, rate: float, rng: jax.Array) -> jax.Array:
  """With probability `rate` a row keeps only its first k documents, k uniform in 1 … K-1; the others become zeros.

  Once the gold document is among the K, the answer's loss is indifferent to its place. Cutting the list off at random makes the
  order matter (nested dropout, Rippel et al., arXiv 1402.0915) and still needs no label.

  Args:
    selected: [B, K, M, D], in order of score.
    rate: probability.
    rng: key.

  Returns:
    [B, K, M, D].
  """
  b, k = selected.shape[:2]
  if k == 1:
    return selected
  cut_key, kept_key = jax.random.split(rng)
  kept = jnp.where(jax.random.bernoulli(cut_key, rate, (b,)), jax.random.randint(kept_key, (b,), 1, k), k)
  return jnp.where((jnp.arange(k) < kept[:, None])[..., None, None], selected, 0)


def gold_selected(indices: jax.Array, found: Candidates) -> jax.Array:
  """Whether every gold document of a row is among the selected: indices [B, K] -> [B] bool."""
  taken = jnp.take_along_axis(found.is_gold, indices, axis=-1).sum(-1)
  return (taken == found.num_gold) & (taken > 0)


def joint_diagnostics(model: Clara, weights: Weights, batch: Batch) -> Metrics:
  """Is the straight-through signal right? The gold document's place in the order of the push, where it was not selected.

  `push_first` and `push_top3` are the shares of such rows in which the gold document is pulled up more strongly than all other
  candidates, or than all but two. Chance is 1/N and 3/N.
  """
  query = model.encode_query(weights, batch.question)
  found = candidates(model, weights, batch, query)
  if found.is_gold is None:
    return {}
  scores = model.score(query, found.memories)
  selected, indices = model.select(scores, found.memories)

  def loss(selected):
    mean, *_ = answer_terms(model, weights, model.answer_states(weights, batch.prompt, selected), batch.prompt)
    return mean.total

  config = model.config
  pushes = jax.vmap(lambda s, m, i, d: push(s, m, i, d, config.temperature, config.masking))(
      scores, found.memories, indices, jax.grad(loss)(selected))
  gold = jnp.argmax(found.is_gold, axis=-1)
  place = (pushes > jnp.take_along_axis(pushes, gold[:, None], axis=-1)).sum(-1)
  missed = valid(batch) * ~gold_selected(indices, found) * found.is_gold.any(-1)
  ordered = jnp.sort(scores, axis=-1)
  return {"push_first": Mean.of(place == 0, missed), "push_top3": Mean.of(place < 3, missed),
          "score_spread": Mean.of(ordered[:, -1] - ordered[:, 0], valid(batch))}


def contrastive_loss(model: Clara, trainable: Weights, frozen: Weights, batch: Batch, rng: jax.Array | None
                     ) -> tuple[Metrics, Metrics]:
  """Retrieval with labels (the paper's Sup-Instruct baseline): the ceiling that the joint stage is held against."""
  weights = {**frozen, **trainable}
  query = model.encode_query(weights, batch.question, rng)
  found = candidates(model, weights, batch, query)
  scores = model.score(query, found.memories)
  has_gold = batch.is_gold.any(-1).sum().astype(jnp.float32)
  loss = Mean(losses.contrastive(scores, batch.is_gold, model.config.temperature) * has_gold, has_gold)
  return {"contrastive": loss}, {"contrastive": loss} | recall(scores, found, valid(batch))


def pretrain_loss(model: Clara, trainable: Weights, frozen: Weights, batch: Batch, rng: jax.Array | None
                  ) -> tuple[Metrics, Metrics]:
  """Next-token cross entropy of the plain base on prompts with the documents as text."""
  del rng  # the base has no dropout
  return _text_loss(model, {**frozen, **trainable}, batch, None, None)


def full_text_loss(model: Clara, trainable: Weights, frozen: Weights, batch: Batch, rng: jax.Array | None
                   ) -> tuple[Metrics, Metrics]:
  """CE of the answer where the generator reads the documents as text: the ceiling that memory tokens are held against."""
  return _text_loss(model, {**frozen, **trainable}, batch, "generator", rng)


def _text_loss(model, weights, batch, role, rng):
  states = model.answer_states(weights, batch.prompt, None, role=role, dropout=rng)
  ce, right, _ = answer_terms(model, weights, states, batch.prompt)
  return {"ce": ce}, {"ce": ce, "answers": Mean.of(right, valid(batch))}


_ROLES_FROM_BASE = {"memory_embedding": (FRESH,), "compressor": (FRESH,), "generator": (FRESH,)}
_CARRIED = {"memory_embedding": ("memory_embedding",), "compressor": ("compressor",)}

register(Stage("pretrain", ("base",), {"memory_embedding": (FRESH,)}, "text", pretrain_loss))
register(Stage("full_text", ("generator",), {"memory_embedding": (FRESH,), "generator": (FRESH,)}, "text", full_text_loss))
register(Stage("scp", ("compressor", "generator", "memory_embedding"), _ROLES_FROM_BASE, "given", given_documents_loss))
register(Stage("instruct", ("compressor", "generator"), {**_CARRIED, "generator": ("generator",)}, "given",
               given_documents_loss))
register(Stage("joint", ("query_reasoner", "generator"),
               {**_CARRIED, "generator": ("generator",), "query_reasoner": ("query_reasoner", "compressor")}, "candidates",
               joint_loss, joint_diagnostics))
register(Stage("contrastive", ("query_reasoner",),
               {**_CARRIED, "generator": ("generator",), "query_reasoner": ("query_reasoner", "compressor")}, "candidates",
               contrastive_loss))


def starting_weights(stage: Stage, config: TrainConfig, before: Weights, fresh: Callable[[str], Any]) -> dict[str, Any]:
  """The groups a stage starts from, base excepted.

  Args:
    stage: a row of the table.
    config: `fresh_generator` and `fresh_query_reasoner` override the table (the released code's instruct; the paper's ablation).
    before: groups of the checkpoint before.
    fresh: makes new weights of a group.

  Raises:
    ConfigError: the checkpoint before lacks a group that this stage needs.
  """
  override = {name for name in ("generator", "query_reasoner") if getattr(config, f"fresh_{name}")}
  started = {}
  for group, sources in stage.starts.items():
    if group in override or sources == (FRESH,):
      started[group] = fresh(group)
      continue
    source = next((s for s in sources if s in before), None)
    if source is None:
      raise ConfigError(f"stage {stage.name!r} starts its {group} from {' or '.join(sources)}, but the checkpoint before has only "
                        f"{sorted(before) or 'no weights'}; set config.init_from to a checkpoint that has it")
    started[group] = before[source]
  return started
