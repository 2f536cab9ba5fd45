"""A stage of one's own: `scp` without the alignment loss, as a row of the table.

    clara train --config configs/clara.py:scp --workdir runs/mine \
      --config.train.stage=examples/new_stage.py:STAGE

A loss is a function (model, trainable, frozen, batch, rng) -> (terms, metrics); `register` adds the
row.
"""

from clara_jax.training import stages


def answers_only(model, trainable, frozen, batch, rng):
  """The cross entropy of `scp` alone."""
  terms, metrics = stages.get("scp").loss(model, trainable, frozen, batch, rng)
  return {"ce": terms["ce"]}, metrics


STAGE = stages.register(
  stages.Stage(
    "answers_only",
    data="given",  # a batch has K documents a row
    loss=answers_only,
    roles=("compressor", "generator"),
    trains=("compressor", "generator", "memory_embedding"),
    starts=stages.get("scp").starts,
  )
)
