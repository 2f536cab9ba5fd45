"""Which file format for memory tokens: ArrayRecord, or Zarr through TensorStore? Plain .npy files
are the yardstick.

    python benchmarks/store_formats.py --scratch DIR

Writes the same bfloat16 memory tokens in each format and reads them back: batches of 640 random
documents (32 questions with 20 candidates) and everything in order. Files are in the page cache, so
that formats are compared and not disks. Prints one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import time

import ml_dtypes
import numpy as np
import tensorstore as ts
from array_record.python import array_record_module

SHARD = 4096
BATCH, BATCHES = 640, 15
SHAPES = {"small (3 x 128)": (3, 128, 40_960), "7B, ratio 32 (8 x 4096)": (8, 4096, 8_192)}
BF16 = np.dtype(ml_dtypes.bfloat16)


class Npy:
  """Memory-mapped, no checksums."""

  def __init__(self, folder, shape, options):
    self._folder, self._shape, self._shards = folder, shape, {}

  def write(self, shard, values):
    np.save(f"{self._folder}/{shard}.npy", values.view(np.uint16))

  def _open(self, shard):
    if shard not in self._shards:
      self._shards[shard] = np.load(f"{self._folder}/{shard}.npy", mmap_mode="r").view(BF16)
    return self._shards[shard]

  def read(self, shard, rows, out):
    out[:] = self._open(shard)[rows]

  def scan(self, shard):
    return np.array(self._open(shard))


class ArrayRecord(Npy):
  """One record a document."""

  def __init__(self, folder, shape, options):
    super().__init__(folder, shape, options)
    self._options = options.replace("8K", str(max(1, 8192 // (2 * shape[0] * shape[1]))))

  def write(self, shard, values):
    writer = array_record_module.ArrayRecordWriter(f"{self._folder}/{shard}", self._options)
    for value in values:
      writer.write(value.tobytes())
    writer.close()

  def _open(self, shard):
    if shard not in self._shards:
      self._shards[shard] = array_record_module.ArrayRecordReader(f"{self._folder}/{shard}")
    return self._shards[shard]

  def read(self, shard, rows, out):
    for i, record in enumerate(self._open(shard).read(rows.tolist())):
      out[i] = np.frombuffer(record, BF16).reshape(self._shape)

  def scan(self, shard):
    return np.frombuffer(b"".join(self._open(shard).read_all()), BF16).reshape(-1, *self._shape)


class Zarr(Npy):
  """Zarr 3, one shard a file, inner chunks of some documents, CRC-32C over each."""

  def __init__(self, folder, shape, options):
    super().__init__(folder, shape, options)
    chunk, compress = options
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    codecs += [{"name": "zstd", "configuration": {"level": 3}}] if compress else []
    self._spec = {
      "driver": "zarr3",
      "kvstore": {"driver": "file", "path": folder},
      "metadata": {
        "data_type": "bfloat16",
        "shape": [0, *shape],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD, *shape]}},
        "codecs": [
          {
            "name": "sharding_indexed",
            "configuration": {
              "chunk_shape": [chunk, *shape],
              "codecs": [*codecs, {"name": "crc32c"}],
            },
          }
        ],
      },
    }
    self._array = None

  def write(self, shard, values):
    if self._array is None:
      self._array = ts.open(self._spec, create=True, open=True).result()
    self._array = self._array.resize(
      exclusive_max=[(shard + 1) * SHARD, *self._shape], expand_only=True
    ).result()
    self._array[shard * SHARD : (shard + 1) * SHARD].write(values).result()

  def read(self, shard, rows, out):
    out[:] = self._array[shard * SHARD + rows].read().result()

  def scan(self, shard):
    return self._array[shard * SHARD : (shard + 1) * SHARD].read().result()


FORMATS = {
  "npy": (Npy, None),
  "ArrayRecord": (ArrayRecord, "group_size:1,uncompressed"),
  "ArrayRecord, 16 a group": (ArrayRecord, "group_size:16,uncompressed"),
  "ArrayRecord, zstd": (ArrayRecord, "group_size:1,zstd:3"),
  "ArrayRecord, 8 KB a group, zstd": (ArrayRecord, "group_size:8K,zstd:3"),
  "Zarr": (Zarr, (1, False)),
  "Zarr, 16 a chunk": (Zarr, (16, False)),
  "Zarr, zstd": (Zarr, (1, True)),
}


def measure(kind, options, shape, documents, folder):
  """documents/s written, milliseconds a random batch, MB/s in order, bytes a document beyond the
  tokens' own."""
  rng = np.random.default_rng(0)
  shards = documents // SHARD
  values = [rng.normal(size=(SHARD, *shape)).astype(BF16) for _ in range(shards)]
  store = kind(folder, shape, options)
  start = time.perf_counter()
  for shard, value in enumerate(values):
    store.write(shard, value)
  written = documents / (time.perf_counter() - start)
  size = sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(folder) for f in files)
  out = np.empty((BATCH, *shape), BF16)
  seconds = []
  for _ in range(BATCHES):
    rows = rng.integers(0, documents, BATCH)
    begun = time.perf_counter()
    for shard in range(shards):
      here = np.flatnonzero(rows // SHARD == shard)
      part = np.empty((len(here), *shape), BF16)
      store.read(shard, rows[here] % SHARD, part)
      out[here] = part
    seconds.append(time.perf_counter() - begun)
    assert all((out[i] == values[r // SHARD][r % SHARD]).all() for i, r in enumerate(rows))
  start = time.perf_counter()
  for shard in range(shards):
    assert (store.scan(shard)[-1] == values[shard][-1]).all()
  scanned = documents * values[0][0].nbytes / (time.perf_counter() - start)
  return {
    "written_documents_per_second": round(written),
    "random_batch_ms": round(1e3 * statistics.median(seconds), 2),
    "scan_mb_per_second": round(scanned / 1e6),
    "extra_bytes": round(size / documents - values[0][0].nbytes, 1),
  }


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--scratch", required=True, metavar="DIR")
  scratch = parser.parse_args().scratch
  report = {}
  for name, (m, d, documents) in SHAPES.items():
    report[name] = {}
    for label, (kind, options) in FORMATS.items():
      folder = os.path.join(scratch, "formats")
      shutil.rmtree(folder, ignore_errors=True)
      os.makedirs(folder)
      report[name][label] = measure(kind, options, (m, d), documents, folder)
      shutil.rmtree(folder)
  print(json.dumps(report, indent=2))


if __name__ == "__main__":
  main()
