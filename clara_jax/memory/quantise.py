"""A store in another, smaller form."""

import dataclasses

import numpy as np

from clara_jax.memory import forms
from clara_jax.memory.store import BLOCK, MemoryStore, StoreError, read_manifest


def quantise(store: MemoryStore, directory: str, form: str, sub_width: int = 4, segment_size: int = BLOCK) -> MemoryStore:
  """Copies a store into another form.

  Args:
    store: the store.
    directory: of the new one.
    form: one of `forms.NAMES`; 'pq' learns its centres on a sample of the store.
    sub_width: dimensions that share a byte of 'pq'.
    segment_size: documents a segment.

  Raises:
    StoreError: the directory holds a store already.
    ConfigError: the form does not fit.
  """
  if read_manifest(directory) is not None:
    raise StoreError(f"{directory}: is a store already; choose another directory")
  manifest = dataclasses.replace(store.manifest, form=form, generation=0)
  codebook = None
  if form == "pq":
    count = forms.training_sample(manifest.num_memory_tokens, manifest.width)
    sample = np.sort(np.random.default_rng(0).permutation(store.rows)[:count])
    codebook = forms.learn_pq(store.memories(sample), sub_width)
  new = MemoryStore(directory, manifest, codebook=codebook)
  for rows, memories in store.blocks(segment_size):
    new.append(store.documents(rows), np.asarray(memories, np.float32))
  return new
