"""The settings in which rows are answered. Imports nothing heavy: the command line lists them."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Setting:
  """What the generator reads.

  Attributes:
    says: the same, in words.
    form: 'memories' of documents for the generator; 'text' of documents or 'nothing' for the base alone.
    order: who finds the K documents among the row's: BM25, or a role that reads the question; None: all of them, as given.
  """

  says: str
  form: Literal["memories", "text", "nothing"]
  order: Literal["bm25", "compressor", "query_reasoner"] | None = None

  def roles(self) -> list[str]:
    """Roles that a checkpoint must have."""
    memories = {"compressor", "generator"} if self.form == "memories" else set()
    return sorted(memories | ({self.order} & {"compressor", "query_reasoner"}))


SETTINGS = {
    "no_documents": Setting("the base alone, no documents", "nothing"),
    "full_text": Setting("the base alone, the K first by BM25 as text", "text", "bm25"),
    "bm25": Setting("memory tokens of the K first by BM25", "memories", "bm25"),
    "compressor": Setting("memory tokens of all documents of the row", "memories"),
    "compressor_queries": Setting("memory tokens of the K best; the compressor reads the question, as before the joint stage", "memories",
                                  "compressor"),
    "joint": Setting("memory tokens of the K best; the query reasoner reads the question", "memories", "query_reasoner"),
}
