"""What flows from the data pipeline to the model: arrays with names. See `axes.py` for the
letters."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from clara_jax.axes import Array

GOLD = 8  # gold documents of a question, at most, where candidates are retrieved from a corpus


@struct.dataclass
class Tokens:
  """Right-padded rows of token ids: ids [..., L] int32, and how many of each row are real, lengths
  [...] int32."""

  ids: Int[Array, "*B L"]
  lengths: Int[Array, "*B"]

  def is_real(self) -> Bool[Array, "*B L"]:
    """[..., L] bool."""
    return jnp.arange(self.ids.shape[-1]) < self.lengths[..., None]


@struct.dataclass
class Prompt:
  """Decoder input with its labels.

  Attributes:
    tokens: [B, T]; memory slots hold the ids of `<MEM…>` and are filled with memory tokens.
    label_positions: [B, A] int32, positions whose *next* token is a label.
    labels: [B, A] int32, those tokens.
    label_weights: [B, A] float32, 1 for a label, 0 for padding.
  """

  tokens: Tokens
  label_positions: Int[Array, "B A"]
  labels: Int[Array, "B A"]
  label_weights: Float[Array, "B A"]


@struct.dataclass
class Batch:
  """Rows of any stage; a stage reads the fields it needs.

  Attributes:
    prompt: the generator's input and labels.
    documents: [B, K, L] (scp, instruct) or [B, N, L] (joint, contrastive) encoder inputs; None
      where memories are given. Where rows share documents, [U, L], each once.
    document_slots: [B, K] or [B, N] int32, where rows share documents: which of the U each is; of a
      micro-batch's own.
    memories: [B, N, M, D] memory tokens read from a store; None where documents are given.
    question: [B, L] encoder inputs of the query reasoner (joint, contrastive).
    is_gold: [B, N] bool, the gold documents among the candidates: a label for the contrastive
      stage, a metric elsewhere.
    gold_slots: [B, GOLD] int32, the gold documents' slots in a `Corpus` from which the candidates
      are retrieved; -1 fills up.
    valid: [B] float32, 0 for rows that only fill up the last batch of an evaluation.
    memory_tokens: m, how many of the M memory tokens its documents, memories, question and prompt
      have; None for all.
  """

  prompt: Prompt
  documents: Tokens | None = None
  memories: Float[Array, "B N M D"] | None = None
  question: Tokens | None = None
  is_gold: Bool[Array, "B N"] | None = None
  gold_slots: Int[Array, "B gold"] | None = None
  valid: Float[Array, " B"] | None = None
  document_slots: Int[Array, "B K"] | None = None
  memory_tokens: int | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class Corpus:
  """All documents of a store on the devices, divided along the whole mesh.

  Attributes:
    memories: [S, M, D] memory tokens; slots beyond the documents are zeros.
    scales: for every m that is searched with, [S] float32: 1 / norm of a document's first m memory
      tokens, flattened; 0 for an empty slot.
    candidates: N, how many are retrieved for a question.
  """

  memories: Float[Array, "S M D"]
  scales: dict[int, Float[Array, " S"]]
  candidates: int = struct.field(pytree_node=False)
