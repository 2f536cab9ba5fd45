"""The stages of CLaRa as rows of a table (paper §3).

A stage says which groups of weights train, where each starts, what a batch holds and its loss

    (model, trainable, frozen, batch, rng) -> (terms, metrics)

whose terms are `Mean`s; the loss is the sum of their values. To add a stage, write its loss and one
`register` line: here, or in a file of your own (`--config.train.stage=FILE.py:STAGE`, where STAGE
is what `register` returned; `examples/new_stage.py`).
"""

from clara_jax.training.stages.batches import make_batch, make_batches
from clara_jax.training.stages.candidates import Candidates, candidates
from clara_jax.training.stages.gradient_paths import selection_gradients
from clara_jax.training.stages.losses import (
  answer_terms,
  contrastive_loss,
  full_text_loss,
  given_documents_loss,
  joint_diagnostics,
  joint_loss,
  nested_dropout,
  pretrain_loss,
  repeat,
)
from clara_jax.training.stages.table import (
  BUILT_IN,
  FRESH,
  STAGES,
  LossFn,
  Stage,
  get,
  register,
  starting_weights,
)

__all__ = [
  "FRESH",
  "STAGES",
  "Candidates",
  "LossFn",
  "Stage",
  "answer_terms",
  "candidates",
  "get",
  "make_batch",
  "make_batches",
  "nested_dropout",
  "register",
  "repeat",
  "starting_weights",
]

_CARRIED = {"memory_embedding": ("memory_embedding",), "compressor": ("compressor",)}
_QUERY_REASONER = {"query_reasoner": ("query_reasoner", "compressor")}

PRETRAIN = register(
  Stage(
    "pretrain",
    data="text",
    loss=pretrain_loss,
    trains=("base",),
    starts={"memory_embedding": (FRESH,)},
  )
)

FULL_TEXT = register(
  Stage(
    "full_text",
    data="text",
    loss=full_text_loss,
    roles=("generator",),
    trains=("generator",),
    starts={"memory_embedding": (FRESH,), "generator": (FRESH,)},
  )
)

SCP = register(
  Stage(
    "scp",
    data="given",
    loss=given_documents_loss,
    roles=("compressor", "generator"),
    trains=("compressor", "generator", "memory_embedding"),
    starts={"memory_embedding": (FRESH,), "compressor": (FRESH,), "generator": (FRESH,)},
  )
)

INSTRUCT = register(
  Stage(
    "instruct",
    data="given",
    loss=given_documents_loss,
    roles=("compressor", "generator"),
    trains=("compressor", "generator"),
    starts={**_CARRIED, "generator": ("generator",)},
  )
)

JOINT = register(
  Stage(
    "joint",
    data="candidates",
    loss=joint_loss,
    roles=("compressor", "query_reasoner", "generator"),
    trains=("query_reasoner", "generator"),
    starts={**_CARRIED, "generator": ("generator",), **_QUERY_REASONER},
    selects=True,
    diagnostics=joint_diagnostics,
    gradient_paths=selection_gradients,
  )
)

CONTRASTIVE = register(
  Stage(
    "contrastive",
    data="candidates",
    loss=contrastive_loss,
    roles=("compressor", "query_reasoner"),
    main_metric="contrastive",
    trains=("query_reasoner",),
    starts={**_CARRIED, "generator": ("generator",), **_QUERY_REASONER},
  )
)

BUILT_IN.update(STAGES)
