"""Files that can be relied upon: whole or not there, with checksums, and locked while somebody
writes.

Nothing here waits for the disk (fsync): what is promised holds when processes end, however they
end, not when the power does.
"""

import concurrent.futures
import contextlib
import datetime
import errno
import fcntl
import gzip
import hashlib
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

_SUM = '"sum": "'
_SUM_LENGTH = 16


class DamagedError(ValueError):
  """A line is not what was written."""


class LockedError(OSError):
  """Somebody else holds a lock; the message says who."""


def write(file: Any, content: bytes | str) -> None:
  """Writes a file (a path of `pathlib` or `epath`) beside its name and renames it: it is there as a
  whole, or as it was before."""
  content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
  part = file.parent / f"{file.name}.{uuid.uuid4().hex}.part"
  try:
    part.write_bytes(content)
    part.replace(file)
  except BaseException:
    with contextlib.suppress(OSError):
      part.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def rewriting(path: str, *, compress: bool = False) -> Iterator[IO[bytes]]:
  """A file to write to, beside its name; it has its name when the block ends well."""
  part = f"{path}.part"
  try:
    with gzip.open(part, "wb") if compress else open(part, "wb") as file:
      yield file
    os.replace(part, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(part)
    raise


def json_line(value: Any) -> bytes:
  """A value as a line of a JSONL file."""
  return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def checksum(file: Any) -> str:
  """SHA-256 of a file."""
  with file.open("rb") as opened:
    return hashlib.file_digest(opened, "sha256").hexdigest()


SUMS = "checksums.json"


def seal_folder(folder: Any, but: Sequence[str] = ()) -> None:
  """Writes FOLDER/checksums.json, with the checksums of all files below, `but` for those of some
  names."""
  paths = [f for f in files(folder) if f.name not in (SUMS, *but)]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    sums = dict(
      zip(
        [os.path.relpath(str(f), str(folder)) for f in paths],
        pool.map(checksum, paths),
        strict=True,
      )
    )
  write(folder / SUMS, sealed(sums))


def files(folder: Any) -> Iterator[Any]:
  """All files below a folder (a path of `pathlib` or `epath`)."""
  for file in sorted(folder.iterdir(), key=str):
    if file.is_dir():
      yield from files(file)
    else:
      yield file


def damage(folder: Any, below: str = "") -> str | None:
  """What is wrong with a folder that was sealed, or with a folder below it: 'FILE is missing', say.
  None where it is whole, or was never sealed."""
  try:
    sums = unsealed((folder / SUMS).read_bytes())
  except FileNotFoundError:
    return None
  except (ValueError, OSError) as error:
    return f"{folder / SUMS} {error}"

  def one(name):
    try:
      return (
        None
        if checksum(folder / name) == sums[name]
        else f"{folder / name} is damaged (its checksum does not fit)"
      )
    except FileNotFoundError:
      return f"{folder / name} is missing"
    except OSError as error:
      return f"{folder / name}: {error.strerror}"

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return next(
      (
        problem
        for problem in pool.map(one, [name for name in sums if name.startswith(below)])
        if problem
      ),
      None,
    )


def parse_json(text: str | bytes) -> Any:
  """`json.loads` for what others wrote: whatever is wrong with it is one kind of error.

  Raises:
    ValueError: saying what; also for brackets nested too deep, numbers too long, and bytes that are
      no UTF-8.
  """
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f"not valid JSON: {error}") from None
  except UnicodeDecodeError as error:
    raise ValueError(f"not UTF-8 text: {error}") from None
  except RecursionError:
    raise ValueError("not valid JSON: brackets are nested too deep") from None
  except ValueError:  # Python reads no integer of more than 4300 digits
    raise ValueError("not valid JSON: a number has too many digits") from None


# ---- lines of JSON, each with its own checksum ---------------------------------------------------


def sealed(value: Mapping[str, Any]) -> bytes:
  """A JSON object as one line, its checksum as its last field."""
  text = json.dumps(dict(value), ensure_ascii=False).encode("utf-8", "replace")
  comma = b", " if len(text) > 2 else b""
  return text[:-1] + comma + f'{_SUM}{_digest(text)}"}}\n'.encode()


def unsealed(line: bytes) -> dict[str, Any]:
  """What `sealed` was given.

  Raises:
    DamagedError: the line has no checksum, or another.
  """
  line = line.rstrip(b"\n")
  end = len(line) - len(_SUM) - _SUM_LENGTH - 2
  if end < 1 or line[end : end + len(_SUM)] != _SUM.encode():
    raise DamagedError("has no checksum at its end")
  text = line[:end].removesuffix(b", ") + b"}"
  if line[end + len(_SUM) :] != f'{_digest(text)}"}}'.encode():
    raise DamagedError("its checksum does not fit")
  return parse_json(text)


def is_sealed(line: bytes) -> bool:
  """Whether a line ends with a checksum, right or wrong."""
  line = line.rstrip(b"\n")
  return line[-len(_SUM) - _SUM_LENGTH - 2 :].startswith(_SUM.encode())


def _digest(text: bytes) -> str:
  return hashlib.blake2b(text, digest_size=_SUM_LENGTH // 2).hexdigest()


def append(descriptor: int, data: bytes) -> None:
  """Appends to a file that was opened with O_APPEND, all or nothing: what a full disk cut is cut
  back."""
  end = os.fstat(descriptor).st_size
  rest = memoryview(data)
  try:
    while rest:
      rest = rest[os.write(descriptor, rest) :]
  except BaseException:
    os.ftruncate(descriptor, end)
    raise


def cut_back(path: str) -> None:
  """Removes the line at a file's end that a kill has cut."""
  with open(path, "rb+") as file:
    end = file.seek(0, os.SEEK_END)
    while end:
      start = max(0, end - 65536)
      file.seek(start)
      if (newline := file.read(end - start).rfind(b"\n")) >= 0:
        end = start + newline + 1
        break
      end = start
    file.truncate(end)


# ---- locks ---------------------------------------------------------------------------------------


_SOMEBODY = "another process"


def this_process() -> str:
  """This process, for those who wait for it."""
  since = datetime.datetime.now().isoformat(" ", "seconds")
  command = " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])[:120]
  return f"process {os.getpid()} on {socket.gethostname()}, since {since}: {command}\n"


class Lock:
  """A lock on a file, held until it is released or its process ends, however it ends. It works
  among the processes of one machine, and among machines where their common file system has flock.

  Args:
    path: of the file; it says who holds it and is left there.
    shared: whether others may hold it, too, if they also share it.
    wait: until it can be had.

  Raises:
    LockedError: another holds it; says who.
  """

  def __init__(self, path: Any, shared: bool = False, wait: bool = False):
    self.path, self._shared, self._process = os.fspath(path), shared, os.getpid()
    self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      self._take((fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
      os.close(self._descriptor)
      self._descriptor = -1
      raise
    if not shared:
      self._tell()

  def _take(self, how: int) -> None:
    for pause in (0.02, 0.1, None):
      try:
        return fcntl.flock(self._descriptor, how)
      except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
          raise
        if pause is None or _owner(self._descriptor) != _SOMEBODY:
          raise LockedError(_owner(self._descriptor)) from None
        time.sleep(pause)  # who holds it does not say so: it may be `holder`, for a moment

  def _tell(self) -> None:
    os.ftruncate(self._descriptor, 0)
    os.pwrite(self._descriptor, this_process().encode("utf-8", "replace"), 0)

  def release(self) -> None:
    """Lets others have it."""
    if self._descriptor >= 0:
      if os.getpid() == self._process:
        with contextlib.suppress(OSError):
          if not self._shared:
            os.ftruncate(self._descriptor, 0)
          # Also for a child that was forked meanwhile and holds the file open.
          fcntl.flock(self._descriptor, fcntl.LOCK_UN)
      os.close(self._descriptor)
      self._descriptor = -1

  def __enter__(self) -> "Lock":
    return self

  def __exit__(self, *_: Any) -> None:
    self.release()

  def __del__(self):
    if getattr(self, "_descriptor", -1) >= 0:
      os.close(self._descriptor)


def holder(path: Any) -> str | None:
  """Who holds the lock on a file, None where nobody does."""
  try:
    descriptor = os.open(os.fspath(path), os.O_RDONLY)
  except FileNotFoundError:
    return None
  try:
    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return None
  except OSError:
    return _owner(descriptor)
  finally:
    os.close(descriptor)


def _owner(descriptor: int) -> str:
  return os.pread(descriptor, 400, 0).decode("utf-8", "replace").strip() or _SOMEBODY
