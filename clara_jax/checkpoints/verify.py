"""`clara convert --verify`: reload what was written, compare every tensor, and run both sides on
the same tokens.

What other libraries read is run by them where they are installed (transformers, peft); everything
else by our own reader.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from clara_jax.batch import Tokens
from clara_jax.checkpoints import formats, huggingface, lazy
from clara_jax.checkpoints.formats import LazyCheckpoint, merged_base
from clara_jax.checkpoints.keymap import KeyMapError, lora_name, lora_place
from clara_jax.checkpoints.tensors import TensorFiles, tensor_hash, tree_hash
from clara_jax.config import ROLES
from clara_jax.model import Clara

FILE = "parity.json"
_LENGTH = 12


def verify(opened: LazyCheckpoint, directory: str, to: str, role: str | None) -> dict[str, Any]:
  """Compares a conversion with its source; writes parity.json into it.

  Args:
    opened: the source.
    directory: what was written.
    to: its format.
    role: that was asked for.

  Returns:
    tensors_compared, exact (all of them to the bit), max_abs_tensor_difference,
    max_abs_logit_difference and, where there are roles, max_abs_memory_difference and
    max_abs_score_difference; by whom it was reloaded; hash and versions.

  Raises:
    KeyMapError: a tensor is missing on one side.
  """
  report: dict[str, Any] = {}
  if to == "hf":
    wrote = TensorFiles(directory)
    expected = huggingface.base_tensors(merged_base(opened, role))
    report |= compare_tensors(expected, {name: wrote[name] for name in wrote})
    report |= _run_merged(opened, directory, role)
  else:
    base = opened.base or (
      opened.directory if opened.plain_base is not None and to != "clara" else None
    )
    roles = [role] if role else [r for r in ROLES if r in opened.groups]
    again = formats.open_checkpoint(directory, base)
    expected, wrote = [], {}
    for name in roles:
      expected += [
        t._replace(name=f"{name}/{t.name}")
        for t in lazy.named_tensors(opened.groups[name], lora_name, lora_place)
      ]
      wrote |= {
        f"{name}/{t.name}": t for t in lazy.named_tensors(again.groups[name], lora_name, lora_place)
      }
    if roles:
      expected.append(_whole("memory_embedding", opened.groups["memory_embedding"]))
      wrote["memory_embedding"] = _whole("memory_embedding", again.groups["memory_embedding"])
    ours, theirs = (
      huggingface.base_tensors(_read_rows(x) if roles else x.plain_base) for x in (opened, again)
    )
    expected += ours
    wrote |= {t.name: t for t in theirs}
    report |= compare_tensors(expected, wrote)
    report |= _run_roles(opened, again, roles)
    if (
      to == "peft"
      and importlib.util.find_spec("peft")
      and importlib.util.find_spec("torch")
      and opened.base
      and (
        os.path.exists(os.path.join(opened.base, "model.safetensors.index.json"))
        or os.path.exists(os.path.join(opened.base, "model.safetensors"))
      )
    ):
      report |= _run_peft(opened, directory, roles, role is not None)
  other = {"hf": "transformers", "peft": "peft"}.get(to)
  if other and other not in report["reloaded_by"]:
    missing = [name for name in ("torch", other) if not importlib.util.find_spec(name)]
    report["not_checked"] = (
      f"by {other}: {' and '.join(missing)} not installed"
      if missing
      else f"by {other}: the base is no Hugging Face directory; convert it with --to hf first"
    )
  report["versions"] = {
    name: importlib.metadata.version(name)
    for name in ("jax", "flax", "safetensors", *report["reloaded_by"])
    if name != "clara_jax"
  }
  with open(os.path.join(directory, FILE), "w", encoding="utf-8") as file:
    json.dump(report, file, indent=2)
  return report


def _read_rows(opened: LazyCheckpoint) -> dict[str, Any]:
  """The base, but for what nobody reads: the rows and columns of the memory tokens, in whose place
  `memory_embedding` stands."""
  first, last = opened.config.model.vocab_size, opened.config.vocab_size
  base = dict(opened.weights["base"])
  for name, axis in (("embedding", 0), ("head", 1)):
    if name in base:
      whole = (slice(None), slice(None))
      tail = base[name][
        (slice(first, last), *whole[1:]) if axis == 0 else (*whole[:1], slice(first, last))
      ].copy()
      tail[
        (slice(opened.config.num_memory_tokens),)
        if axis == 0
        else (slice(None), slice(opened.config.num_memory_tokens))
      ] = 0
      base[name] = lazy.Rows(base[name], first, tail, axis)
  return base


def compare_tensors(expected: list[lazy.Named], wrote: dict[str, Any]) -> dict[str, Any]:
  """Every tensor of both sides; see `verify`."""
  names = {t.name for t in expected}
  if names != set(wrote):
    name = sorted(names ^ set(wrote))[0]
    raise KeyMapError(
      f"{name}: {'was not written' if name in names else 'was written, but is not in the source'}"
    )
  worst, exact, hashes = 0.0, True, {}
  for tensor in expected:
    a, other = tensor.read(), wrote[tensor.name]
    b = other.read() if isinstance(other, lazy.Named) else lazy.read(other)
    hashes[tensor.name] = tensor_hash(b)
    if tensor_hash(a) != hashes[tensor.name]:
      exact = False
      if a.shape != b.shape:
        raise KeyMapError(f"{tensor.name}: expected the shape {a.shape}, got {b.shape}")
      worst = max(worst, float(np.abs(a.astype(np.float32) - b.astype(np.float32)).max()))
  return {
    "tensors_compared": len(expected),
    "exact": exact,
    "max_abs_tensor_difference": worst,
    "sha256": tree_hash(hashes),
  }


def _whole(name: str, leaf: Any) -> lazy.Named:
  return lazy.Named(name, tuple(leaf.shape), np.dtype(leaf.dtype), lambda: lazy.read(leaf))


def _ids(opened: LazyCheckpoint) -> np.ndarray:
  return np.random.default_rng(0).integers(0, opened.config.model.vocab_size, (2, _LENGTH))


def _outputs(opened: LazyCheckpoint, roles: list[str], ids: np.ndarray) -> dict[str, np.ndarray]:
  """Logits of the base and of each role, memory tokens and scores, on fixed random tokens, computed
  in float32."""
  opened = dataclasses.replace(opened, config=formats.with_dtype(opened.config, "float32"))
  model, weights = Clara(opened.config), formats.on_device(opened)
  weights.setdefault(
    "memory_embedding", jnp.zeros((opened.config.num_memory_tokens, opened.config.model.width))
  )
  ids = jnp.asarray(ids)
  outputs = {}
  for role in roles or [None]:
    hidden, _ = model.hidden(weights, role, model.embed(weights, ids))
    outputs[f"logits/{role or 'base'}"] = np.asarray(model.logits(weights, hidden))
  if "compressor" in roles:
    memory = opened.config.model.vocab_size + jnp.arange(opened.config.num_memory_tokens)
    texts = jnp.concatenate([ids, jnp.broadcast_to(memory, (2, len(memory)))], axis=1)
    tokens = Tokens(texts, jnp.full((2,), texts.shape[1]))
    memories = model.compress(weights, tokens)
    outputs["memories"] = np.asarray(memories, np.float32)
    if "query_reasoner" in roles:
      outputs["scores"] = np.asarray(
        model.score(
          model.encode_query(weights, tokens), jnp.broadcast_to(memories, (2, *memories.shape))
        )
      )
  return outputs


def _run_roles(opened: LazyCheckpoint, again: LazyCheckpoint, roles: list[str]) -> dict[str, Any]:
  a, b = (_outputs(side, roles, _ids(opened)) for side in (opened, again))
  largest = {
    name: float(np.abs(a[name].astype(np.float32) - b[name].astype(np.float32)).max()) for name in a
  }
  report = {
    "max_abs_logit_difference": max(v for k, v in largest.items() if k.startswith("logits")),
    "reloaded_by": ["clara_jax"],
  }
  for name, field in (
    ("memories", "max_abs_memory_difference"),
    ("scores", "max_abs_score_difference"),
  ):
    if name in largest:
      report[field] = largest[name]
  return report


def _run_merged(opened: LazyCheckpoint, directory: str, role: str | None) -> dict[str, Any]:
  again = formats.open_checkpoint(directory)
  words = again.config.model.vocab_size
  mine = _outputs(again, [], _ids(opened))["logits/base"][..., :words]
  report: dict[str, Any] = {}
  if importlib.util.find_spec("torch"):
    import transformers

    theirs, by = (
      _torch_logits(transformers.AutoModelForCausalLM.from_pretrained(directory), _ids(opened)),
      "transformers",
    )
    report["max_abs_logit_difference"] = float(np.abs(mine - theirs[..., :words]).max())
  else:
    by = "clara_jax"
    report["max_abs_logit_difference"] = float(
      np.abs(
        mine
        - _outputs(
          dataclasses.replace(again, plain_base=merged_base(opened, role)), [], _ids(opened)
        )["logits/base"][..., :words]
      ).max()
    )
  # What rounding W + A B to the base's type costs; where the head is tied, it has the MEM rows too,
  # the adapter has not.
  if role:
    words = opened.config.model.vocab_size
    unmerged = _outputs(opened, [role], _ids(opened))[f"logits/{role}"]
    report["max_abs_logit_difference_unmerged"] = float(
      np.abs(mine[..., :words] - unmerged[..., :words]).max()
    )
  return {**report, "reloaded_by": [by]}


def _run_peft(
  opened: LazyCheckpoint, directory: str, roles: list[str], single: bool
) -> dict[str, Any]:
  import peft
  import transformers

  worst = 0.0
  ours = _outputs(opened, roles, _ids(opened))
  for role in roles:
    base = transformers.AutoModelForCausalLM.from_pretrained(opened.base, dtype="float32")
    model = peft.PeftModel.from_pretrained(
      base, directory if single else os.path.join(directory, role)
    )
    theirs = _torch_logits(model, _ids(opened))
    # Without CLaRa's tokens here and what fills the base up there.
    words = min(opened.config.model.vocab_size, theirs.shape[-1])
    worst = max(
      worst, float(np.abs(ours[f"logits/{role}"][..., :words] - theirs[..., :words]).max())
    )
  return {"max_abs_logit_difference": worst, "reloaded_by": ["clara_jax", "peft"]}


def _torch_logits(model: Any, ids: np.ndarray) -> np.ndarray:
  import torch

  with torch.no_grad():
    return (
      model.float()
      .eval()(torch.tensor(ids), attention_mask=torch.ones(ids.shape, dtype=torch.long))
      .logits.float()
      .numpy()
    )
