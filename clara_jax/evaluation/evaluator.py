"""Answers to every row of a file, with scores; a stage's loss on rows."""

import dataclasses
import hashlib
import json
import logging
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from clara_jax.batch import Tokens
from clara_jax.config import ConfigError
from clara_jax.data.pipeline import pad_tokens
from clara_jax.data.prompt_tokenizer import PromptTokenizer
from clara_jax.data.schemas import DataError, Row
from clara_jax.evaluation.candidates import Bm25
from clara_jax.evaluation.metrics import answer_scores, retrieval_scores
from clara_jax.evaluation.settings import SETTINGS, Setting
from clara_jax.inference.checkpoint import Checkpoint
from clara_jax.inference.generate import Greedy
from clara_jax.io import parse_json
from clara_jax.memory.store import fingerprint
from clara_jax.training import metrics as means
from clara_jax.training import stages

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Evaluation:
  """Mean scores and, for each row, its prediction with its scores; `confidence` is the geometric
  mean of its tokens' probabilities."""

  scores: dict[str, float]
  predictions: list[dict[str, Any]]


def evaluate(
  checkpoint: Checkpoint,
  rows: Sequence[Row],
  setting: str,
  *,
  batch_size: int = 16,
  max_new_tokens: int = 64,
  path: str | None = None,
  progress: bool = True,
  name: str | None = None,
  weights_sha256: str | None = None,
  expand: int = 0,
) -> Evaluation:
  """Answers rows from their documents.

  Args:
    checkpoint: with the roles of the setting.
    rows: single questions with documents; they may differ in how many.
    setting: of `SETTINGS`.
    batch_size: rows in a batch; rows with the same number of documents go together.
    max_new_tokens: longest answer.
    path: a JSONL file to which each pass adds its predictions; rows that it has from this
      checkpoint and setting are not answered again.
    progress: whether progress is logged.
    name: what they call it; default: the setting.
    weights_sha256: `weights_hash` of the weights, where it is known.
    expand: how many of the documents that are read, the best ones, are text in place of memory
      tokens (settings with memory tokens only).

  Raises:
    DataError: a row is no single question, or has too few documents.
    ConfigError: the file has predictions of another checkpoint or setting, or of other rows.
  """
  model, prompt_tokenizer, weights = (
    checkpoint.model,
    checkpoint.prompt_tokenizer,
    checkpoint.weights,
  )
  how = SETTINGS[setting]
  if expand and how.form != "memories":
    raise ConfigError(f"--expand {expand}: setting {setting!r} reads no memory tokens")
  for row in rows:
    check(row, how, model.config.top_k, prompt_tokenizer)
  if path:
    pathlib.Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
  identity = (
    f"{setting} {max_new_tokens} {model.config.top_k} {weights_sha256 or weights_hash(weights)}"
  )
  if model.num_memory_tokens < model.config.num_memory_tokens:
    identity += f" {model.num_memory_tokens}"
  if expand:
    identity += f" expand {expand}"
  made_by = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
  keys = [_key(i, row) for i, row in enumerate(rows)]
  existing = _read(path, made_by)
  if existing and not any(key in existing for key in keys):
    raise ConfigError(f"{path}: has predictions of other rows; name another place, or remove it")
  predictions: list[dict[str, Any] | None] = [existing.get(key) for key in keys]
  done = sum(p is not None for p in predictions)
  if done and progress:
    log.info(f"evaluate {name or setting}: {done} of {len(rows)} rows were answered before")
  cutoffs = (1, 3, 5) + ((20,) if max(len(r.documents) for r in rows) >= 20 else ())
  for chosen, answered in _Answers(checkpoint, how, max_new_tokens, expand).run(
    rows, [i for i, p in enumerate(predictions) if p is None], batch_size
  ):
    for i, output in zip(chosen, answered, strict=True):
      row = rows[i]
      prediction = {
        "id": row.identifier,
        "key": keys[i],
        "made_by": made_by,
        "question": row.questions[0],
        **output,
        "answers": list(row.answers),
        **answer_scores(output["prediction"], row.answers),
      }
      if "ranked" in output:
        prediction |= {"pos_index": list(row.gold)}
        if row.gold:
          prediction |= retrieval_scores(output["ranked"], row.gold, cutoffs)
      predictions[i] = prediction
    if path:
      with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(predictions[i], ensure_ascii=False) + "\n" for i in chosen)
    done += len(chosen)
    if progress:
      log.info(f"evaluate {name or setting}: {done}/{len(rows)} rows")
  return Evaluation({"n": len(rows), **mean_scores(predictions)}, predictions)


def check(row: Row, how: Setting, top_k: int, prompt_tokenizer: PromptTokenizer) -> None:
  """Refuses a row that cannot be answered in a setting.

  Raises:
    DataError: naming the row.
  """
  if row.is_question_list or row.data_type != "qa":
    raise DataError(f"{row.identifier}: expected one question a row")
  if how.form == "memories" and not row.documents:
    raise DataError(f"{row.identifier}: the row has no documents; `clara candidates` finds some")
  if how.order and len(row.documents) < top_k:
    raise DataError(f"{row.identifier}: {len(row.documents)} documents, but top_k={top_k}")
  if how.form == "memories":
    prompt_tokenizer.answer_prompt(
      row.questions[0], top_k if how.order else len(row.documents), where=row.identifier
    )
  else:
    prompt_tokenizer.text_prompt(row.questions[0], "", where=row.identifier)


# Numbers of a prediction that are no scores.
NO_SCORES = ("seconds", "confidence")


def mean_scores(predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
  """Means over the rows that have the score, by name."""
  named = sorted(
    {
      name
      for p in predictions
      for name, value in p.items()
      if isinstance(value, float) and name not in NO_SCORES
    }
  )
  return {name: float(np.mean([p[name] for p in predictions if name in p])) for name in named}


def _key(place: int, row: Row) -> str:
  content = json.dumps([place, row.questions, row.answers, row.documents, row.gold])
  return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def weights_hash(weights: dict[str, Any]) -> str:
  """A content hash of all groups of a checkpoint."""
  return fingerprint(weights, tuple(sorted(weights)))


def read_predictions(path: str) -> list[dict[str, Any]]:
  """Predictions of a file; a last line that a kill has cut is left out.

  Raises:
    DataError: the file is missing, or a line in it is no prediction.
  """
  file = pathlib.Path(path)
  if not file.is_file():
    raise DataError(
      f"{path}: {'is a directory, expected a file of predictions' if file.is_dir() else 'no such file'}"  # noqa: E501
    )
  try:
    lines = file.read_bytes().split(b"\n")
    predictions = [parse_json(line) for line in lines[:-1]]
  except ValueError as error:
    raise DataError(
      f"{path}: no file of predictions ({error}); of a report, name its directory"
    ) from None
  for number, value in enumerate(predictions, 1):
    if not isinstance(value, dict) or not {"key", "made_by", "prediction"} <= set(value):
      raise DataError(f"{path}:{number}: expected a prediction of clara evaluate")
  return predictions


def write_predictions(path: str, predictions: Sequence[dict[str, Any]]) -> None:
  """Writes a file of predictions anew."""
  part = pathlib.Path(f"{path}.part")
  part.write_text(
    "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions), encoding="utf-8"
  )
  part.replace(path)


def _read(path: str | None, made_by: str) -> dict[str, dict[str, Any]]:
  if path is None or not pathlib.Path(path).exists():
    return {}
  predictions = read_predictions(path)
  if any(p["made_by"] != made_by for p in predictions):
    raise ConfigError(
      f"{path}: has predictions of another checkpoint, setting, K, --memory-tokens or "
      f"--max-new-tokens; name another "
      "place, or remove it"
    )
  write_predictions(path, predictions)  # without a line that was cut
  return {p["key"]: p for p in predictions}


class _Answers:
  """Passes over rows in one setting."""

  def __init__(self, checkpoint: Checkpoint, how: Setting, max_new_tokens: int, expand: int = 0):
    self._expand = expand
    model, prompt_tokenizer, weights = (
      checkpoint.model,
      checkpoint.prompt_tokenizer,
      checkpoint.weights,
    )
    self._model, self._prompt_tokenizer, self._weights, self._how = (
      model,
      prompt_tokenizer,
      weights,
      how,
    )
    self._compress = checkpoint.jit(model.compress)
    self._score = checkpoint.jit(
      lambda weights, tokens, memories: model.score(self._query(weights, tokens), memories)
    )
    self._generate = checkpoint.jit(
      Greedy(
        model, max_new_tokens, prompt_tokenizer.end_ids, prompt_tokenizer.pad_id, how.reader
      ).scored
    )
    self._shapes: set[tuple] = set()

  def _query(self, weights, tokens):
    return self._model.encode(weights, self._how.order, tokens)[0]

  def run(
    self, rows: Sequence[Row], indices: Sequence[int], batch_size: int
  ) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    """Yields places of rows and what was found for each; a batch has rows with the same number of
    documents."""
    order = sorted(indices, key=lambda i: len(rows[i].documents))
    start = 0
    while start < len(order):
      count = len(rows[order[start]].documents)
      chosen = [i for i in order[start : start + batch_size] if len(rows[i].documents) == count]
      start += len(chosen)
      # Filled up, so that a pass of fewer rows compiles nothing.
      filled = [rows[i] for i in chosen] + [rows[chosen[0]]] * (
        min(batch_size, len(indices)) - len(chosen)
      )
      yield chosen, self._pass(filled)[: len(chosen)]

  def _pass(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
    how, prompt_tokenizer, k = self._how, self._prompt_tokenizer, self._model.config.top_k
    memories = self._memories(rows) if how.form == "memories" else None
    begin = time.perf_counter()  # documents are compressed once, for all questions to come
    ranked, scores = self._ranked(rows, memories)
    if how.form == "memories":
      if ranked is not None:
        memories = memories[np.arange(len(rows))[:, None], ranked[:, :k]]
      count = memories.shape[1]
      read, shown = [count] * len(rows), min(self._expand, count)
      memories = memories[:, shown:]
      texts = [
        [self._read_part(r.documents[i]) for i in order[:shown]]
        for r, order in zip(
          rows, ranked if ranked is not None else [range(count)] * len(rows), strict=True
        )
      ]
      contents = [
        (count - shown) * self._model.num_memory_tokens
        + sum(len(prompt_tokenizer.ids(text)) for text in some)
        for some in texts
      ]
      tokens = [
        prompt_tokenizer.answer_prompt(
          r.questions[0], count - shown, where=r.identifier, texts=some
        ).ids
        for r, some in zip(rows, texts, strict=True)
      ]
      memories = memories if count > shown else None
    else:
      taken = [
        [r.documents[i] for i in ranked[n, :k]] if ranked is not None else []
        for n, r in enumerate(rows)
      ]
      tokens, read, contents = zip(
        *(self._text_prompt(r.questions[0], d) for r, d in zip(rows, taken, strict=True)),
        strict=True,
      )
    answers, log_p = map(
      np.asarray,
      self._generate(
        self._weights, pad_tokens(list(tokens), prompt_tokenizer.pad_id, 32), memories
      ),
    )
    shape = (
      len(rows),
      -(-max(map(len, tokens)) // 32),
      None if memories is None else memories.shape,
    )
    # The first one compiles.
    seconds = (time.perf_counter() - begin) / len(rows) if shape in self._shapes else None
    self._shapes.add(shape)
    confidence = np.exp(
      log_p / [len(prompt_tokenizer.truncate_at_eos(a, with_end=True)) for a in answers]
    )
    results = []
    for n in range(len(rows)):
      results.append(
        {
          "prediction": prompt_tokenizer.text(answers[n]),
          "documents_read": int(read[n]),
          "context_tokens": int(contents[n]),
          "confidence": float(confidence[n]),
          "seconds": seconds,
        }
      )
      if ranked is not None:
        results[-1] |= {"ranked": ranked[n].tolist()}
      if scores is not None:
        results[-1] |= {"scores": scores[n].tolist()}
    return results

  def _read_part(self, text: str) -> str:
    """A document's text as far as the compressor reads it."""
    limit = self._prompt_tokenizer.config.doc_max_length
    return text[: self._prompt_tokenizer.read_part(text, limit)[2]]

  def _memories(self, rows):
    tokens = pad_tokens(
      self._prompt_tokenizer.documents([d for row in rows for d in row.documents]),
      self._prompt_tokenizer.pad_id,
      32,
    )
    count = len(rows[0].documents)
    shaped = Tokens(
      tokens.ids.reshape(len(rows), count, -1), tokens.lengths.reshape(len(rows), count)
    )
    return self._compress(self._weights, shaped)

  def _ranked(self, rows, memories):
    """Places of the documents [B, N], best first, and their scores by place; None where nobody
    ranks them."""
    if self._how.order is None:
      return None, None
    if self._how.order == "bm25":
      return np.stack(
        [Bm25(r.documents).search(r.questions, len(r.documents))[0] for r in rows]
      ), None
    tokens = pad_tokens(
      [self._prompt_tokenizer.query(r.questions[0]) for r in rows],
      self._prompt_tokenizer.pad_id,
      16,
    )
    scores = np.asarray(self._score(self._weights, tokens, memories))
    return np.argsort(-scores, axis=-1, kind="stable"), scores

  def _text_prompt(self, question, documents):
    """As many documents as fit the window, first ones first: (prompt, documents, their tokens)."""
    prompt_tokenizer, count = self._prompt_tokenizer, len(documents)
    while True:
      # A trained reader: as its stage joins them.
      text = ("\n" if self._how.reader else "\n\n").join(documents[:count])
      try:
        ids = prompt_tokenizer.text_prompt(question, text, where=f"question {question!r:.60}").ids
        return ids, count, len(prompt_tokenizer.ids(text))
      except DataError:
        if not count:
          raise
        count -= 1


def stage_loss(
  checkpoint: Checkpoint, stage_name: str, rows: Sequence[Row], batch_size: int = 16
) -> dict[str, Any]:
  """A stage's loss over all label tokens of the rows, without dropout or update.

  Returns:
    `loss` (the stage's main metric), `mse` and `total`; where the stage selects documents also
    `rows`: [{`scores`, `selected`}].

  Raises:
    DataError: there are no rows, or a row does not fit.
    ConfigError: the stage's main metric is none of its metrics.
  """
  model, weights, stage = checkpoint.model, checkpoint.weights, stages.get(stage_name)
  step = checkpoint.jit(lambda w, b: stage.loss(model.reading(b), w, {}, b, None))
  retrieve = checkpoint.jit(lambda w, b: _scores(model, w, b))
  terms, total, listed = None, None, []
  for batch in stages.make_batches(stage_name, checkpoint, rows, batch_size):
    of_batch = step(weights, batch)
    terms, total = means.add(terms, of_batch[0]), means.add(total, of_batch[1])
    if stage.selects:
      scores, indices = jax.device_get(retrieve(weights, batch))
      listed += [
        {"scores": s.tolist(), "selected": i.tolist()} for s, i in zip(scores, indices, strict=True)
      ]
  values = means.values(total)
  if stage.main_metric not in values:
    raise ConfigError(
      f"stage {stage.name!r}: its main_metric {stage.main_metric!r} is none of its metrics, "
      f"{sorted(values)}"
    )
  report = {
    "loss": values[stage.main_metric],
    "mse": values.get("mse"),
    "total": sum(means.values(terms).values()),
  }
  return report | ({"rows": listed[: len(rows)]} if stage.selects else {})


def _scores(model, weights, batch):
  query = model.encode_query(weights, batch.question)
  memories = stages.candidates(model, weights, batch, query).memories
  scores = model.score(query, memories)
  return scores, model.select(scores, memories)[1]
