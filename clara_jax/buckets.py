"""What lies in a bucket (gs://…), as a copy on this machine's disk.

Rows, documents, working directories and our own checkpoints are read where they are. What libraries
read from a disk alone -- a Hugging Face model, a tokenizer, a memory store, ArrayRecord rows -- is
copied once to `$CLARA_CACHE` (default ~/.cache/clara_jax) and brought up to date whenever it is
opened: files that are as they were are not copied again. Credentials are gcsfs's own affair (extra
`gcs`).
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from clara_jax import io
from clara_jax.errors import InputError

AT_ONCE = 8
_STATE = "copied.json"


class BucketError(InputError):
  """A path in a bucket is not there, or cannot be read."""


def is_remote(path: Any) -> bool:
  """Whether a path is a URL."""
  return "://" in os.fspath(path)


def local_copy(path: str) -> str:
  """A directory on this machine's disk with the content of one in a bucket; a local one as it is.

  Raises:
    BucketError: there is nothing, or it cannot be read.
    ImportError: gcsfs is not installed.
  """
  if not is_remote(path):
    return path
  try:
    import fsspec

    files, root = fsspec.core.url_to_fs(path)
    files.invalidate_cache()
    found = files.find(root, detail=True)
  except OSError as error:
    raise BucketError(f"{path}: {error}") from None
  if not found:
    raise BucketError(f"{path}: there is nothing")
  top = pathlib.Path(os.environ.get("CLARA_CACHE", "~/.cache/clara_jax")).expanduser() / "buckets"
  folder = top / hashlib.sha256(path.rstrip("/").encode()).hexdigest()[:24]
  folder.mkdir(parents=True, exist_ok=True)
  lock = io.Lock(f"{folder}.lock", wait=True)
  try:
    _bring_up_to_date(folder, files, root.rstrip("/"), found)
  except OSError as error:
    raise BucketError(f"{path}: {error}") from None
  finally:
    lock.release()
  return str(folder / "files")


def _bring_up_to_date(folder: pathlib.Path, files: Any, root: str, found: dict[str, Any]) -> None:
  state = folder / _STATE
  try:
    before = io.parse_json(state.read_bytes())
  except (OSError, ValueError):
    before = {}
  now = {
    name[len(root) + 1 :]: [
      info["size"],
      *(str(info.get(key, "")) for key in ("generation", "etag", "mtime")),
    ]
    for name, info in found.items()
  }

  def copy(name: str) -> None:
    target = folder / "files" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    files.get_file(f"{root}/{name}", str(part))
    os.replace(part, target)

  changed = [
    name
    for name, version in now.items()
    if before.get(name) != version or not (folder / "files" / name).exists()
  ]
  for name in {*before, *now}:  # until it is copied it is not known
    if name in changed or name not in now:
      before.pop(name, None)
  io.write(state, json.dumps(before))
  with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
    list(pool.map(copy, changed))
  for file in list((folder / "files").rglob("*")):
    if file.is_file() and str(file.relative_to(folder / "files")) not in now:
      file.unlink()
  io.write(state, json.dumps(now))


@contextlib.contextmanager
def written(path: Any) -> Iterator[str]:
  """A local folder to write to; what is in it when the block ends is at `path`, also in a
  bucket."""
  if not is_remote(path):
    yield os.fspath(path)
    return
  from etils import epath

  with tempfile.TemporaryDirectory() as folder:
    yield folder
    for file in pathlib.Path(folder).rglob("*"):
      if file.is_file():
        target = epath.Path(path) / str(file.relative_to(folder))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())


class Appended:
  """A text in a bucket that grows: objects there are written as a whole, so that each `flush`
  writes all of it."""

  def __init__(self, path: Any):
    self._path = path
    self._text = path.read_text() if path.exists() else ""
    self._written = len(self._text)

  def write(self, text: str) -> None:
    self._text += text

  def flush(self) -> None:
    if len(self._text) > self._written:
      self._path.write_text(self._text)
      self._written = len(self._text)

  def close(self) -> None:
    self.flush()
