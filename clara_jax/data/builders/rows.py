"""One builder a kind of rows: SCP, instruct, joint.

Rows are checked as they are written: what does not parse, or does not fit its stage, is counted and
reported by file and line. TFDS shuffles them by a hash of their place, so that every file is a
sample of the whole.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from clara_jax.data.schemas import (
  DataError,
  Malformed,
  Row,
  parse_rows,
  place_of,
  require_one_question,
)


class StageRows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """What the three have in common.

  Args:
    paths: JSONL files (.gz allowed).
    malformed: counts bad rows.
    **kwargs: of `tfds.core.DatasetBuilder`: data_dir.
  """

  VERSION = tfds.core.Version("1.0.0")

  def __init__(
    self, *, paths: Sequence[str] = (), malformed: Malformed | None = None, **kwargs: Any
  ):
    self._paths, self._malformed = tuple(paths), Malformed() if malformed is None else malformed
    super().__init__(file_format="array_record", **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    texts = tfds.features.Sequence(tfds.features.Text())
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      features=tfds.features.FeaturesDict(
        {
          "identifier": tfds.features.Text(),
          "documents": texts,
          "document_ids": texts,
          "questions": texts,
          "answers": texts,
          "gold": tfds.features.Sequence(np.int32),
          "data_type": tfds.features.Text(),
          "is_question_list": np.bool_,
        }
      ),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    del dl_manager
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for path in self._paths:
      for row in parse_rows(path, self._malformed):
        try:
          self.check(row)
        except DataError as error:
          self._malformed.add(str(error), place_of(row))
          continue
        number += 1
        yield f"{path}:{number}", {f.name: getattr(row, f.name) for f in dataclasses.fields(Row)}

  def check(self, row: Row) -> None:
    """Refuses a row that this stage cannot use.

    Raises:
      DataError: naming the row.
    """


class Scp(StageRows):
  """SCP rows: one document with all its questions and answers, or a paraphrase of it."""

  def check(self, row: Row) -> None:
    """One document."""
    if len(row.documents) != 1:
      raise DataError(f"{row.identifier}: {len(row.documents)} documents, an SCP row has one")


class Instruct(StageRows):
  """Instruction rows: one question about several given documents."""

  def check(self, row: Row) -> None:
    """One question."""
    require_one_question(row)


class Joint(StageRows):
  """Rows of the joint and contrastive stages: one question and its candidate documents, with their
  ids in a memory store if there is one."""

  def check(self, row: Row) -> None:
    """One question, more than one candidate."""
    require_one_question(row)
    if len(row.documents) < 2:
      raise DataError(f"{row.identifier}: {len(row.documents)} candidate document, expected more")


BUILDERS: dict[str, type[StageRows]] = {"scp": Scp, "instruct": Instruct, "joint": Joint}
