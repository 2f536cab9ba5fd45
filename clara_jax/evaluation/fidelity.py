"""What memory tokens keep of a document: paraphrases that the generator writes from them alone
(paper §5), beside the document."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from clara_jax.config import ConfigError
from clara_jax.data.pipeline import pad_tokens
from clara_jax.data.schemas import Document
from clara_jax.evaluation.evaluator import Evaluation, mean_scores
from clara_jax.evaluation.metrics import paraphrase_scores
from clara_jax.inference.checkpoint import Checkpoint
from clara_jax.inference.generate import make_generate

log = logging.getLogger(__name__)


def paraphrase(
  checkpoint: Checkpoint,
  documents: Sequence[Document],
  *,
  batch_size: int = 16,
  max_new_tokens: int = 256,
  bert_model: str | None = None,
  progress: bool = True,
) -> Evaluation:
  """Writes each document again from its memory tokens and scores it against the document: `rouge1`,
  `rouge_l`, `entities_kept`, and `bertscore` (F1) where a model is given.

  Args:
    checkpoint: with compressor and generator, best one of the stage `scp`.
    documents: what is written again.
    batch_size: documents in a batch.
    max_new_tokens: longest paraphrase.
    bert_model: a Hugging Face model for BERTScore (arXiv 1904.09675), as NAME or NAME:LAYER; by
      default its best layer, where it is a published one.
    progress: whether progress is logged.

  Raises:
    ConfigError: a library is missing (extras 'evaluate', 'bertscore').
  """
  model, prompt_tokenizer, weights = (
    checkpoint.model,
    checkpoint.prompt_tokenizer,
    checkpoint.weights,
  )
  scorer = _bert_scorer(bert_model) if bert_model else None
  prompt = prompt_tokenizer.paraphrase_prompt().ids
  compress = checkpoint.jit(model.compress)
  generate = make_generate(
    model, max_new_tokens, prompt_tokenizer.end_ids, prompt_tokenizer.pad_id, mesh=checkpoint.mesh
  )
  rows: list[dict[str, Any]] = []
  for start in range(0, len(documents), batch_size):
    batch = documents[start : start + batch_size]
    filled = [*batch, *[batch[0]] * (min(batch_size, len(documents)) - len(batch))]
    memories = compress(
      weights,
      pad_tokens(prompt_tokenizer.documents([d.text for d in filled]), prompt_tokenizer.pad_id, 32),
    )
    written = np.asarray(
      generate(
        weights, pad_tokens([prompt] * len(filled), prompt_tokenizer.pad_id, 1), memories[:, None]
      )
    )
    texts = [prompt_tokenizer.text(ids) for ids in written[: len(batch)]]
    try:
      rows += [
        {"id": d.id, "text": d.text, "prediction": t, **paraphrase_scores(t, d.text)}
        for d, t in zip(batch, texts, strict=True)
      ]
    except ImportError:
      raise ConfigError("ROUGE needs rouge-score: pip install 'clara_jax[evaluate]'") from None
    if progress:
      log.info(f"paraphrase: {len(rows)}/{len(documents)} documents")
  if scorer:
    scores = scorer.score([r["prediction"] for r in rows], [r["text"] for r in rows])[2].tolist()
    rows = [{**row, "bertscore": score} for row, score in zip(rows, scores, strict=True)]
  return Evaluation({"n": len(rows), **mean_scores(rows)}, rows)


def _bert_scorer(name: str) -> Any:
  try:
    from bert_score import BERTScorer
  except ImportError:
    raise ConfigError("--bertscore needs bert-score: pip install 'clara_jax[bertscore]'") from None
  model, _, layer = name.rpartition(":") if name.rpartition(":")[2].isdigit() else (name, "", "")
  try:
    return BERTScorer(model_type=model, num_layers=int(layer) if layer else None)
  except (KeyError, OSError, ValueError) as error:
    raise ConfigError(
      f"--bertscore {name}: {error}; expected a Hugging Face model, NAME:LAYER where bert-score "
      f"does not know it"
    ) from None
