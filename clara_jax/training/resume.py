"""May a run start, or go on, in a directory? It is locked, and compared with the run that was
there."""

import os

import jax
import numpy as np
from etils import epath

from clara_jax import buckets, distributed, io
from clara_jax.checkpoints.workdir import CheckpointError, claim, write_config
from clara_jax.config import RunConfig
from clara_jax.data import records
from clara_jax.memory.store import MemoryStore, fingerprint
from clara_jax.model import Weights


def admit(
  workdir: str, config: RunConfig, init_weights: Weights, base_sha256: str | None
) -> io.Lock | buckets.Claim | None:
  """Locks the directory, compares the run with the one that was there, and records it; one process
  does it for all.

  Raises:
    CheckpointError: another run is at work, or this is not the run that was there.
  """
  lock = problem = None
  if distributed.is_main():
    try:
      lock = claim(workdir)
      write_config(workdir, config, base_sha256, inputs=_inputs(config, init_weights, base_sha256))
    except Exception as error:  # whatever it is, the others must not wait
      problem = error
  if distributed.maximum(np.array(problem is not None)):
    if lock is not None:
      lock.release()
    raise problem or CheckpointError(f"{workdir}: process 0 refuses to go on there")
  return lock


def check_claim(lock: io.Lock | buckets.Claim | None) -> None:
  """Is a directory in a bucket still this run's? All processes ask at once; the main one holds it.

  Raises:
    CheckpointError: another run has taken it over.
  """
  problem = None
  if isinstance(lock, buckets.Claim):
    try:
      lock.check()
    except buckets.BucketError as error:
      problem = CheckpointError(str(error))
  if distributed.maximum(np.array(problem is not None)):
    raise problem or CheckpointError("the main process no longer has the working directory")


def _inputs(config: RunConfig, init_weights: Weights, base_sha256: str | None) -> dict[str, str]:
  """Hashes of what the run reads, by field of its configuration."""

  def whole(leaf):
    return (
      leaf if isinstance(leaf, (np.ndarray, jax.Array)) else leaf[(slice(None),) * len(leaf.shape)]
    )

  start = {
    group: jax.tree.map(whole, tree)
    for group, tree in init_weights.items()
    if group != "base" or not base_sha256
  }
  hashes = {"init_from": fingerprint(start, sorted(start))} if start else {}
  for name, code in (("train.stage", config.train.stage), ("estimator", config.estimator or "")):
    if ".py:" in code:  # code of the user's is known by its content
      hashes[name] = io.checksum(epath.Path(code.rpartition(":")[0]))
  data = config.data
  for name, paths in (("data.rows", data.rows), ("data.eval_rows", data.eval_rows)):
    if paths and all(
      "://" in path or os.path.isfile(path) or os.path.isdir(path) for path in paths
    ):
      hashes[name] = records.identity(paths)
  if data.store:
    store = MemoryStore(data.store)
    hashes["data.store"] = (
      store.identity() if data.retrieve == "store" else store.manifest.compressor
    )
  return hashes
