"""A stage's batches of rows in memory, to compute its loss outside of a run."""

from collections.abc import Sequence

from clara_jax.batch import Batch
from clara_jax.config import DataConfig
from clara_jax.data.pipeline import RowEncoder, evaluation_batches
from clara_jax.data.schemas import DataError, Row
from clara_jax.inference.checkpoint import Checkpoint
from clara_jax.training.stages.table import get


def make_batches(
  stage: str, checkpoint: Checkpoint, rows: Sequence[Row], batch_size: int
) -> list[Batch]:
  """All rows in order, as the stage reads them; the last batch is filled up with rows that do not
  count.

  Args:
    stage: a name of the table, or FILE.py:STAGE.
    checkpoint: whose tokenizer makes the tokens.
    rows: with the same number of documents each, where the stage reads candidates.
    batch_size: rows in a batch, at most.

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
  data = DataConfig(candidates=min(counts))
  encoder = RowEncoder(checkpoint.prompt_tokenizer, kind, data, checkpoint.model.config.top_k)
  return evaluation_batches(rows, encoder, min(batch_size, len(rows)))


def make_batch(stage: str, checkpoint: Checkpoint, rows: Sequence[Row]) -> Batch:
  """One batch of all rows; see `make_batches`."""
  (batch,) = make_batches(stage, checkpoint, rows, len(rows))
  return batch
