"""Rows as ArrayRecord files (`clara records`), and what `data.rows` names as shards of rows.

Reading a file's length costs nothing: it stands in the dataset's own record. A file is opened when
its first row is asked for.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from clara_jax import buckets
from clara_jax.config import ConfigError
from clara_jax.data.schemas import DataError, Malformed, Row, read_rows

log = logging.getLogger(__name__)

INFO = "dataset_info.json"


@dataclasses.dataclass(frozen=True)
class RecordsReport:
  """rows: written; malformed: skipped; files: how many; bytes: of all files."""

  rows: int
  malformed: int
  files: int
  bytes: int
  seconds: float
  directory: str


def build(
  kind: str, paths: Sequence[str], directory: str, files: int, max_malformed: int = 0
) -> RecordsReport:
  """Writes rows as ArrayRecord files.

  Args:
    kind: 'scp', 'instruct' or 'joint'.
    paths: JSONL files.
    directory: where the dataset goes, as DIRECTORY/KIND/VERSION.
    files: how many; at least `data.shards` of the runs that will read it.
    max_malformed: bad rows that are skipped.

  Raises:
    DataError: more malformed rows, or no rows.
  """
  tfds = _tfds()
  from clara_jax.data.builders.rows import BUILDERS

  start = time.monotonic()
  malformed = Malformed(max_malformed)
  builder = BUILDERS[kind](paths=paths, malformed=malformed, data_dir=directory)
  if builder.data_path.exists():
    raise DataError(f"{builder.data_path}: already exists; remove it or choose another directory")
  tfds.display_progress_bar(False)
  log.info(f"records: writing {builder.data_path}")
  try:
    with contextlib.redirect_stdout(sys.stderr):
      builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=files, try_download_gcs=False)
      )
  except AssertionError as error:  # how TFDS says that there are fewer rows than files
    if "number_of_shards" not in str(error):
      raise
    raise DataError(
      f"{', '.join(paths)}: there are fewer rows than --files {files}; choose fewer files"
    ) from None
  finally:
    # TFDS makes it, and nothing is downloaded
    shutil.rmtree(os.path.join(directory, "downloads"), ignore_errors=True)
  info = builder.info.splits["train"]
  return RecordsReport(
    info.num_examples,
    malformed.count,
    info.num_shards,
    int(info.num_bytes),
    time.monotonic() - start,
    os.fspath(builder.data_path),
  )


def is_dataset(path: str) -> bool:
  """Whether a path is a directory that `build` wrote."""
  return (epath.Path(path) / INFO).exists()


class Records(Sequence):
  """The rows of some files of a dataset."""

  def __init__(self, directory: str, files: Sequence[int]):
    splits = json.loads((epath.Path(directory) / INFO).read_text())["splits"]
    lengths = [int(n) for n in next(s for s in splits if s["name"] == "train")["shardLengths"]]
    self._directory, self._files = directory, list(files)
    self._ends = np.cumsum([lengths[f] for f in self._files]).tolist()
    self._open: dict[int, Any] = {}

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getstate__(self):  # files are opened again in worker processes
    return {**self.__dict__, "_open": {}}

  def __getitem__(self, index: int) -> Row:
    part = bisect.bisect_right(self._ends, index)
    if part not in self._open:
      builder = _tfds().builder_from_directory(self._directory)
      self._open[part] = builder.as_data_source(split=f"train[{self._files[part]}shard]")
    value = self._open[part][index - (self._ends[part - 1] if part else 0)]

    def texts(name):
      return tuple(t.decode() for t in value[name])

    return Row(
      texts("questions"),
      texts("answers"),
      texts("documents"),
      tuple(int(i) for i in value["gold"]),
      value["data_type"].decode(),
      value["identifier"].decode(),
      bool(value["is_question_list"]),
      texts("document_ids"),
    )


_EDGE = 1 << 16


def identity(paths: Sequence[str]) -> str:
  """A hash of what rows files hold, wherever they lie. Of the ArrayRecord files of a dataset, which
  may be large, it takes names, sizes, and the first and last 64 KiB."""
  digest = hashlib.sha256()
  for path in map(epath.Path, paths):
    if path.is_dir():
      for file in sorted(
        (f for f in path.iterdir() if "array_record" in f.name or f.name == INFO),
        key=lambda f: f.name,
      ):
        size = file.stat().length
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
          digest.update(opened.read(_EDGE))
          opened.seek(max(0, size - _EDGE))
          digest.update(opened.read(_EDGE))
    else:
      with path.open("rb") as opened:
        digest.update(hashlib.file_digest(opened, "sha256").digest())
  return digest.hexdigest()


def number_of_files(directory: str) -> int:
  """Files of a dataset."""
  splits = json.loads((epath.Path(directory) / INFO).read_text())["splits"]
  return len(next(s for s in splits if s["name"] == "train")["shardLengths"])


def open_sources(
  paths: Sequence[str], shards: int, max_malformed: int = 0, together: int = 1
) -> list[list[Sequence[Row]]]:
  """What `data.rows` names, each as that many shards of rows: ArrayRecord files are dealt out,
  JSONL is read into memory and dealt out, `together` rows at a time.

  Raises:
    DataError: a path is not there, a dataset has fewer files than shards, or there are more
      malformed rows than allowed.
  """
  malformed = Malformed(max_malformed)
  sources = []
  for path in paths:
    if is_dataset(path):
      path = buckets.local_copy(path)
      files = number_of_files(path)
      if files < shards:
        raise DataError(
          f"{path}: {files} files cannot be divided among data.shards={shards}; write it with "
          f"--files {shards} or more"
        )
      sources.append([Records(path, range(s, files, shards)) for s in range(shards)])
    elif epath.Path(path).is_dir():
      raise DataError(f"{path}: not a dataset of clara records (no {INFO})")
    else:
      sources.append(divide(read_rows([path], malformed), shards, together))
  return sources


def divide(rows: Sequence[Row], shards: int, together: int = 1) -> list[Sequence[Row]]:
  """Rows in memory, dealt out to that many shards, `together` at a time."""
  if together == 1:
    return [rows[s::shards] for s in range(shards)]
  rows = [*rows, *rows[: -len(rows) % together]]  # the last run is filled up with the first rows
  return [[rows[i] for i in range(len(rows)) if i // together % shards == s] for s in range(shards)]


def _tfds() -> Any:
  try:
    import tensorflow_datasets as tfds
  except ImportError:
    raise ConfigError(
      "ArrayRecord rows need tensorflow-datasets: pip install 'clara_jax[records]'"
    ) from None
  return tfds
