"""How a store encodes memory tokens: as they are, in eight bits, or product-quantized. A document
is a row of bytes.

| encoding   | bytes a document    |                                                              |
|------------|---------------------|--------------------------------------------------------------|
| `float32`  | 4 · M·D             |                                                              |
| `bfloat16` | 2 · M·D             |                                                              |
| `int8`     | M·D + 2 · M         | a float16 scale for each memory token                        |
| `pq`       | M·D / `sub_width`   | the nearest of 256 learned centers for each part of a vector |

Product quantization: Jégou, Douze and Schmid, 2011.
"""

import dataclasses
import io
from typing import Protocol

import ml_dtypes
import numpy as np

from clara_jax.config import ConfigError

NAMES = ("float32", "bfloat16", "int8", "pq")
CENTERS = 256
_TINY = 1e-6  # smaller scales are not float16 any more


class Codec(Protocol):
  """Memory tokens to bytes and back.

  Attributes:
    name: one of `NAMES`.
    nbytes: bytes a document.
  """

  name: str
  nbytes: int

  def encode(self, memories: np.ndarray) -> np.ndarray:
    """[n, M, D] float32 -> [n, nbytes] uint8."""

  def decode(self, codes: np.ndarray) -> np.ndarray:
    """[n, nbytes] uint8 -> [n, M, D], float32 or bfloat16."""

  def first(self, m: int) -> "Codec":
    """The codec of the first m memory tokens: its bytes are the first of this one's.

    Raises:
      ConfigError: they do not end with a byte.
    """


@dataclasses.dataclass(frozen=True)
class Plain:
  """Numbers as they are."""

  name: str
  num_memory_tokens: int
  width: int

  @property
  def _dtype(self) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, self.name, self.name))

  @property
  def nbytes(self) -> int:
    """Bytes a document."""
    return self.num_memory_tokens * self.width * self._dtype.itemsize

  def first(self, m: int) -> "Plain":
    """See `Codec`."""
    return dataclasses.replace(self, num_memory_tokens=m)

  def encode(self, memories: np.ndarray) -> np.ndarray:
    """See `Codec`."""
    return (
      np.ascontiguousarray(memories.astype(self._dtype)).reshape(len(memories), -1).view(np.uint8)
    )

  def decode(self, codes: np.ndarray) -> np.ndarray:
    """See `Codec`."""
    return (
      np.ascontiguousarray(codes).view(self._dtype).reshape(-1, self.num_memory_tokens, self.width)
    )


@dataclasses.dataclass(frozen=True)
class Int8:
  """Eight bits a number; the largest of each memory token is 127."""

  num_memory_tokens: int
  width: int
  name: str = "int8"

  @property
  def nbytes(self) -> int:
    """Bytes a document."""
    return self.num_memory_tokens * (self.width + 2)

  def first(self, m: int) -> "Int8":
    """See `Codec`."""
    return dataclasses.replace(self, num_memory_tokens=m)

  def encode(self, memories: np.ndarray) -> np.ndarray:
    """See `Codec`."""
    x = np.asarray(memories, np.float32)
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / 127, _TINY).astype(np.float16)
    numbers = np.clip(np.rint(x / scale.astype(np.float32)), -127, 127).astype(np.int8)
    return np.concatenate([numbers.view(np.uint8), scale.view(np.uint8)], -1).reshape(len(x), -1)

  def decode(self, codes: np.ndarray) -> np.ndarray:
    """See `Codec`."""
    parts = codes.reshape(len(codes), self.num_memory_tokens, self.width + 2)
    scale = np.ascontiguousarray(parts[..., self.width :]).view(np.float16).astype(np.float32)
    return parts[..., : self.width].view(np.int8) * scale


@dataclasses.dataclass(frozen=True)
class ProductQuantized:
  """codebook: [M·D / sub_width, 256, sub_width] float32."""

  num_memory_tokens: int
  width: int
  codebook: np.ndarray
  name: str = "pq"

  @property
  def nbytes(self) -> int:
    """Bytes a document."""
    return len(self.codebook)

  def first(self, m: int) -> "ProductQuantized":
    """See `Codec`."""
    sub_width = self.codebook.shape[2]
    if m * self.width % sub_width:
      raise ConfigError(
        f"memory tokens {m}: {m}·{self.width} is not a multiple of the store's sub-width "
        f"{sub_width}"
      )
    return dataclasses.replace(
      self, num_memory_tokens=m, codebook=self.codebook[: m * self.width // sub_width]
    )

  def encode(self, memories: np.ndarray) -> np.ndarray:
    """See `Codec`."""
    quantizer = _quantizer(self.num_memory_tokens * self.width, self.codebook.shape[2])
    _faiss().copy_array_to_vector(self.codebook.reshape(-1), quantizer.centroids)
    quantizer.sync_transposed_centroids()
    return quantizer.compute_codes(_flat(memories))

  def decode(self, codes: np.ndarray) -> np.ndarray:
    """See `Codec`."""
    return self.codebook[np.arange(len(self.codebook)), codes].reshape(
      len(codes), self.num_memory_tokens, self.width
    )

  def to_bytes(self) -> bytes:
    """The codebook as a .npy file."""
    file = io.BytesIO()
    np.save(file, self.codebook)
    return file.getvalue()


def learn_pq(memories: np.ndarray, sub_width: int) -> ProductQuantized:
  """Learns centers for every `sub_width` dimensions (extra `compact`: faiss).

  Args:
    memories: [n, M, D], a sample of the corpus.
    sub_width: dimensions that share a byte.

  Raises:
    ConfigError: M·D is not a multiple of sub_width, or there are fewer documents than centers.
  """
  n, m, d = memories.shape
  if sub_width < 1 or m * d % sub_width:
    raise ConfigError(f"sub_width={sub_width}: expected a divisor of M·D = {m}·{d}")
  if n < CENTERS:
    raise ConfigError(f"pq learns {CENTERS} centers and needs as many documents at least, got {n}")
  quantizer = _quantizer(m * d, sub_width)
  quantizer.train(_flat(memories))
  centers = (
    _faiss().vector_to_array(quantizer.centroids).reshape(m * d // sub_width, CENTERS, sub_width)
  )
  return ProductQuantized(m, d, np.ascontiguousarray(centers))


def training_sample(num_memory_tokens: int, width: int) -> int:
  """How many documents the centers are learned on: 256 for each center, or as many as fit 2 GiB,
  but never fewer than faiss wants."""
  return min(256 * CENTERS, max(39 * CENTERS, 2**29 // (num_memory_tokens * width)))


def make(name: str, num_memory_tokens: int, width: int, codebook: bytes | None = None) -> Codec:
  """A codec by its name; `codebook` is what `ProductQuantized.to_bytes` gave.

  Raises:
    ConfigError: no such encoding.
  """
  if name not in NAMES:
    raise ConfigError(f"encoding {name!r}: expected one of {list(NAMES)}")
  if name == "pq":
    if codebook is None:
      raise ConfigError("encoding 'pq' is learned from an existing store: clara store quantize")
    return ProductQuantized(num_memory_tokens, width, np.load(io.BytesIO(codebook)))
  return Int8(num_memory_tokens, width) if name == "int8" else Plain(name, num_memory_tokens, width)


def _flat(memories: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(memories, np.float32).reshape(len(memories), -1)


def _quantizer(dimensions: int, sub_width: int):
  return _faiss().ProductQuantizer(dimensions, dimensions // sub_width, 8)


def _faiss():
  try:
    import faiss
  except ImportError:
    raise ConfigError("this needs faiss: pip install 'clara_jax[compact]'") from None
  return faiss
