"""What lies in a bucket (gs://…): read as a copy on this machine's disk, written object by object.

Rows, documents, working directories and our own checkpoints are read where they are. What libraries
read from a disk alone -- a Hugging Face model, a tokenizer, a memory store, ArrayRecord rows -- is
copied once to `$CLARA_CACHE` (default ~/.cache/clara_jax) and brought up to date whenever it is
opened: files that are as they were are not copied again.

A bucket has no locks, and an object is written whole or not at all. What a lock does on a disk is
done here by preconditions: an object is written if it is not there yet, or if it is the one that
was read (its *generation*). Credentials are the libraries' own affair (extra `gcs`: gcsfs reads,
google-cloud-storage writes).
"""

import base64
import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import pathlib
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clara_jax import io
from clara_jax.errors import InputError

log = logging.getLogger(__name__)

AT_ONCE = 8
_UPLOAD_SECONDS = 30.0
_STATE = "copied.json"


class BucketError(InputError):
  """A path in a bucket is not there, or cannot be read or written."""


class ConflictError(BucketError):
  """An object is not the one that was to be replaced: somebody else has written it."""


def is_remote(path: Any) -> bool:
  """Whether a path is a URL."""
  return "://" in os.fspath(path)


def absolute(path: str) -> str:
  """`os.path.abspath`, of what is no URL."""
  return path if is_remote(path) else os.path.abspath(path)


def relative(path: str, start: str) -> str:
  """How a file in folder `start` names a path: relative to it, so that both can be moved together;
  where one of them lies in a bucket, as it is."""
  if is_remote(path) or is_remote(start):
    return absolute(path)
  return os.path.relpath(os.path.abspath(path), os.path.abspath(start))


def copy_folder(path: str, owner: str = "") -> pathlib.Path:
  """Where `local_copy` puts its copy; there, perhaps empty."""
  top = pathlib.Path(os.environ.get("CLARA_CACHE", "~/.cache/clara_jax")).expanduser() / "buckets"
  name = hashlib.sha256(path.rstrip("/").encode()).hexdigest()[:24]
  folder = top / (f"{name}-{owner}" if owner else name) / "files"
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def local_copy(
  path: str, owner: str = "", without: Sequence[str] = (), may_be_new: bool = False
) -> str:
  """A directory on this machine's disk with the content of one in a bucket; a local one as it is.

  Args:
    path: of the directory.
    owner: who writes to the copy, which is then its own; what it has not yet uploaded goes.
    without: names of files that are not copied.
    may_be_new: whether there may be nothing.

  Raises:
    BucketError: there is nothing, or it cannot be read.
    ImportError: gcsfs is not installed.
  """
  if not is_remote(path):
    return path
  folder = copy_folder(path, owner).parent
  with io.Lock(f"{folder}.lock", wait=True):
    for last in (False, False, True):
      found: dict[str, Any] = {}
      try:
        import fsspec

        files, root = fsspec.core.url_to_fs(path)
        files.invalidate_cache()
        found = files.find(root, detail=True)
        if not (found or may_be_new):
          raise BucketError(f"{path}: there is nothing")
        wanted = {n: i for n, i in found.items() if n.rpartition("/")[2] not in without}
        _bring_up_to_date(folder, files, root.rstrip("/"), wanted)
        break
      except FileNotFoundError as error:  # removed since it was listed
        if last or not found:
          raise BucketError(f"{path}: {error}") from None
      except (OSError, *_http_errors()) as error:
        raise BucketError(f"{path}: {error}") from None
  return str(folder / "files")


def _http_errors() -> tuple[type[Exception], ...]:
  """What gcsfs raises when it has given up, beside OSError."""
  import gcsfs.retry

  return (gcsfs.retry.HttpError,)


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
    if name not in before and _is_copy(target, found[f"{root}/{name}"]):
      return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    files.get_file(f"{root}/{name}", str(part))
    os.replace(part, target)

  changed = [
    name
    for name, version in now.items()
    if before.get(name) != version or not _has_size(folder / "files" / name, version[0])
  ]
  for name in {*before, *now}:  # until it is copied it is not known
    if name in changed or name not in now:
      before.pop(name, None)
  io.write(state, json.dumps(before))
  with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
    list(pool.map(copy, changed))
  for file in list((folder / "files").rglob("*")):
    name = str(file.relative_to(folder / "files"))
    if file.is_file() and name not in now and not name.endswith(".lock"):
      file.unlink()
  io.write(state, json.dumps(now))


def _has_size(file: pathlib.Path, size: int) -> bool:
  try:
    return file.stat().st_size == size
  except FileNotFoundError:
    return False


def _is_copy(file: pathlib.Path, info: Mapping[str, Any]) -> bool:
  """Whether a file, uploaded from here perhaps, is what an object is."""
  if "md5Hash" not in info or not _has_size(file, info["size"]):
    return False
  with file.open("rb") as opened:
    digest = hashlib.file_digest(opened, "md5").digest()
  return base64.b64encode(digest).decode() == info["md5Hash"]


@contextlib.contextmanager
def written(path: Any) -> Iterator[str]:
  """A local folder to write to; what is in it when the block ends is at `path`, also in a
  bucket."""
  if not is_remote(path):
    yield os.fspath(path)
    return
  with tempfile.TemporaryDirectory() as folder:
    yield folder
    _Upwards(os.fspath(path), pathlib.Path(folder)).upload()


@contextlib.contextmanager
def mirrored(path: str, is_file: bool = False) -> Iterator[str]:
  """A local folder (or file) to go on writing to: it begins with what is at `path`, and what has
  changed is uploaded every half minute and when the block ends, however it ends.

  Raises:
    BucketError: what is there cannot be read, or another process has taken it over.
  """
  if not is_remote(path):
    yield path
    return
  top, _, name = path.rstrip("/").rpartition("/")
  with tempfile.TemporaryDirectory() as folder:
    up = _Upwards(top if is_file else path, pathlib.Path(folder), name if is_file else "")
    up.begin()
    stop = threading.Event()
    thread = threading.Thread(target=up.keep_up, args=(stop,), daemon=True)
    thread.start()
    try:
      yield os.path.join(folder, name) if is_file else folder
    finally:
      stop.set()
      thread.join()
      up.upload()


class _Upwards:
  """Files of a local folder on their way to a bucket."""

  def __init__(self, path: str, folder: pathlib.Path, only: str = ""):
    self._objects, self._folder, self._only = Objects(path), folder, only
    self._done: dict[str, tuple[int, int]] = {}  # size and time of what is uploaded
    self._generations: dict[str, int] = {}

  def begin(self) -> None:
    """Copies what is there."""
    for name, blob in self._objects.listed(self._only).items():
      if name.endswith(".lock") or self._only and name != self._only:
        continue
      target = self._folder / name
      target.parent.mkdir(parents=True, exist_ok=True)
      self._objects.read(name, target)
      self._done[name] = _state(target)
      self._generations[name] = int(blob.generation)

  def keep_up(self, stop: threading.Event) -> None:
    """Uploads what has changed, until it is told to stop."""
    while not stop.wait(_UPLOAD_SECONDS):
      try:
        self.upload()
      except (BucketError, OSError) as error:  # said again, and raised, at the end
        log.warning("%s", error)

  def upload(self) -> None:
    """What has changed since the last time; each file as far as it is written."""
    changed = {
      str(file.relative_to(self._folder)): _state(file)
      for file in sorted(self._folder.rglob("*"))
      if file.is_file() and not file.name.endswith((".lock", ".part"))
    }
    changed = {name: state for name, state in changed.items() if self._done.get(name) != state}

    def one(name: str) -> None:
      if name not in self._generations:
        self._generations[name] = self._objects.generation(name)
      self._generations[name] = self._objects.write(
        name, self._folder / name, self._generations[name]
      )
      self._done[name] = changed[name]

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
      list(pool.map(one, changed))


def _state(file: pathlib.Path) -> tuple[int, int]:
  status = file.stat()
  return status.st_size, status.st_mtime_ns


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


class Objects:
  """The objects below a path gs://BUCKET/PATH, written under preconditions. A request that fails is
  tried again; what was done though its answer was lost counts as done.

  Raises:
    BucketError: another kind of URL.
    ImportError: google-cloud-storage is not installed.
  """

  def __init__(self, path: str):
    scheme, _, rest = path.rstrip("/").partition("://")
    if scheme != "gs":
      raise BucketError(f"{path}: only gs:// is written to")
    from google.cloud import storage

    bucket, _, self._prefix = rest.partition("/")
    self.path = path.rstrip("/")
    self._bucket = storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "-")).bucket(
      bucket
    )

  def generation(self, name: str) -> int:
    """That of an object; 0 where there is none."""
    with self._errors(name):
      blob = self._bucket.get_blob(self._full(name))
    return int(blob.generation) if blob is not None else 0

  def write(self, name: str, content: bytes | pathlib.Path, generation: int) -> int:
    """Writes an object where that `generation` is (0: none is there); returns the new one.

    Raises:
      ConflictError: it is not; somebody else has written.
    """
    from google.api_core.exceptions import PreconditionFailed

    blob = self._bucket.blob(self._full(name))
    blob.metadata = {"clara-write": uuid.uuid4().hex}
    how: dict[str, Any] = {"if_generation_match": generation, "checksum": "crc32c"}
    with self._errors(name):
      try:
        if isinstance(content, bytes):
          blob.upload_from_string(content, **how)
        else:
          blob.upload_from_filename(str(content), **how)
      except PreconditionFailed:
        there = self._bucket.get_blob(self._full(name))
        if there is None or there.metadata != blob.metadata:
          raise ConflictError(f"{self.path}/{name}: somebody else has written it") from None
        blob = there  # by this call, whose first answer was lost
    return int(blob.generation)

  def read(self, name: str, target: pathlib.Path) -> None:
    """Copies an object to a file."""
    with self._errors(name):
      self._bucket.blob(self._full(name)).download_to_filename(str(target))

  def delete(self, name: str, generation: int) -> None:
    """Deletes an object, if it is there and is that one."""
    from google.api_core.exceptions import NotFound, PreconditionFailed

    with self._errors(name), contextlib.suppress(NotFound, PreconditionFailed):
      self._bucket.blob(self._full(name)).delete(if_generation_match=generation)

  def listed(self, below: str = "") -> dict[str, Any]:
    """Name -> metadata (`generation`, `size`, `updated`) of the objects below."""
    start = f"{self._prefix}/" if self._prefix else ""
    with self._errors(below):
      return {
        blob.name[len(start) :]: blob for blob in self._bucket.list_blobs(prefix=start + below)
      }

  def _full(self, name: str) -> str:
    return f"{self._prefix}/{name}" if self._prefix else name

  @contextlib.contextmanager
  def _errors(self, name: str) -> Iterator[None]:
    import requests
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    try:
      yield
    except (GoogleAPIError, GoogleAuthError, requests.RequestException, OSError) as error:
      raise BucketError(f"{self.path}/{name}: {error}") from None


class Claim:
  """What a lock is on a disk: an object that says who is at work. Who comes later takes it over,
  since nobody can tell whether the earlier one still lives; that one is refused at its next step.

  Args:
    path: of the object.
    what: is claimed, for the error.

  Raises:
    ConflictError: two claim at the same moment, and this is the second.
  """

  def __init__(self, path: str, what: str):
    folder, _, self._name = path.rpartition("/")
    self._objects, self._what = Objects(folder), what
    self._generation = self._objects.write(
      self._name, io.this_process().encode(), self._objects.generation(self._name)
    )

  def check(self) -> None:
    """Is it still this process's?

    Raises:
      ConflictError: another has taken it over.
    """
    if self._objects.generation(self._name) != self._generation:
      raise ConflictError(f"{self._objects.path}: another process has taken over {self._what}")

  def release(self) -> None:
    """Gives it back, if it is still this process's."""
    with contextlib.suppress(BucketError):
      self._objects.delete(self._name, self._generation)
