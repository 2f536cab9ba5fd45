"""A stage's batch of rows in memory, for experiments with its loss."""

from collections.abc import Sequence

from clara_jax.batch import Batch
from clara_jax.config import DataConfig
from clara_jax.data.pipeline import RowEncoder, evaluation_batches
from clara_jax.data.schemas import DataError, Row
from clara_jax.inference.checkpoint import Checkpoint
from clara_jax.training.stages.table import get


def make_batch(stage: str, checkpoint: Checkpoint, rows: Sequence[Row]) -> Batch:
  """One batch of all rows, as the stage reads it.

  Args:
    stage: a name of the table, or FILE.py:STAGE.
    checkpoint: whose tokenizer makes the tokens.
    rows: with the same number of documents each, where the stage selects among them.

  Raises:
    DataError: there are no rows, or a row does not fit.
  """
  if not rows:
    raise DataError("no rows")
  counts = {len(row.documents) for row in rows}
  kind = get(stage).data
  if kind == "candidates" and len(counts) > 1:
    raise DataError(
      f"{rows[0].identifier}: rows have {sorted(counts)} candidates; all must have the same number"
    )
  encoder = RowEncoder(
    checkpoint.prompt_tokenizer,
    kind,
    DataConfig(candidates=min(counts)),
    checkpoint.model.config.top_k,
  )
  (batch,) = evaluation_batches(rows, encoder, len(rows))
  return batch
