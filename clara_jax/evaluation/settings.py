"""The settings in which rows are answered. Imports nothing heavy: the command line lists them."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Setting:
  """What the generator reads.

  Attributes:
    description: the same, in words.
    form: 'memories' of documents, 'text' of documents, or 'nothing'.
    order: who finds the K documents among the row's: BM25, or a role that reads the question; None:
      all of them, as given.
    reader: the role that answers; None: the base alone.
  """

  description: str
  form: Literal["memories", "text", "nothing"]
  order: Literal["bm25", "compressor", "query_reasoner"] | None = None
  reader: Literal["generator"] | None = None

  def roles(self) -> list[str]:
    """Roles that a checkpoint must have."""
    read = {"compressor"} if self.form == "memories" else set()
    return sorted(read | {self.order, self.reader} & {"compressor", "query_reasoner", "generator"})


SETTINGS = {
  "no_documents": Setting("the base alone, no documents", "nothing"),
  "full_text": Setting("the base alone, the K first by BM25 as text", "text", "bm25"),
  "full_text_generator": Setting(
    "the generator of stage full_text, the K first by BM25 as text", "text", "bm25", "generator"
  ),
  "bm25": Setting("memory tokens of the K first by BM25", "memories", "bm25", "generator"),
  "compressor": Setting("memory tokens of all documents of the row", "memories", None, "generator"),
  "compressor_queries": Setting(
    "memory tokens of the K best; the compressor reads the question, as before the joint stage",
    "memories",
    "compressor",
    "generator",
  ),
  "joint": Setting(
    "memory tokens of the K best; the query reasoner reads the question",
    "memories",
    "query_reasoner",
    "generator",
  ),
}
