"""What a training step needs of a machine: bytes on each chip, FLOPs, traffic, and the step time
that these allow.

`compiled` asks XLA, for TPU topologies that need not be there. `analyzed` adds up what the method
needs, for any accelerator; its temporaries are an estimate. Used by `launch/aot.py` and, for the
model FLOPs utilization, by the trainer.
"""

import contextlib
import dataclasses
import functools
import math
import re
import time
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from clara_jax import sharding
from clara_jax.analysis import flops, hlo
from clara_jax.config import RunConfig, from_config_dict


class StageProgram(Protocol):
  """A stage on a mesh, as `training/program.py` makes it."""

  config: RunConfig
  mesh: Mesh
  stage: Any
  trained: tuple[str, ...]
  step: Any
  batch_sharding: jax.sharding.Sharding

  def replaced(self, config: RunConfig) -> "StageProgram":
    """The same mesh with another configuration."""

  def context(self) -> contextlib.AbstractContextManager[None]:
    """Where traced calls know the mesh."""

  def weights_shapes(self, group: str) -> Any:
    """A group's shapes, with their shardings, as the three functions below."""

  def state_shapes(self) -> Any: ...

  def frozen_shapes(self) -> Any: ...

  def batch_shapes(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peaks of one accelerator, from its maker's data sheet.

  Attributes:
    flops: bfloat16, a second.
    memory: bytes.
    memory_bandwidth: bytes a second.
    interconnect: bytes a second that it can receive from its neighbors over all links.
    kinds: how `jax.Device.device_kind` names it.
  """

  flops: float
  memory: float
  memory_bandwidth: float
  interconnect: float
  kinds: tuple[str, ...]


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: "key specifications", per chip; nvidia.com: H100
# SXM, H200 SXM, A100 80 GB (NVLink, one way).
CHIPS = {
  "v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9, ("TPU v4",)),
  "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, ("TPU v5 lite", "TPU v5e")),
  "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, ("TPU v5", "TPU v5p")),
  "v6e": Chip(918e12, 32 * 2**30, 1640e9, 448e9, ("TPU v6 lite", "TPU v6e")),
  # One of the two devices of a chip.
  "tpu7x": Chip(1153.5e12, 96 * 2**30, 3690e9, 300e9, ("TPU7x",)),
  "a100": Chip(312e12, 80e9, 2039e9, 300e9, ("NVIDIA A100-SXM4-80GB",)),
  "h100": Chip(989e12, 80e9, 3350e9, 450e9, ("NVIDIA H100 80GB HBM3",)),
  "h200": Chip(989e12, 141e9, 4800e9, 450e9, ("NVIDIA H200",)),
}


def chip_of(device: jax.Device) -> Chip | None:
  """The peaks of a device; None where they are not known (a CPU)."""
  return next((chip for chip in CHIPS.values() if device.device_kind in chip.kinds), None)


def step_flops(program: StageProgram) -> float:
  """FLOPs of the largest step over all chips, recomputation included (hardware FLOPs)."""
  with program.context():
    return flops.count(
      program.step, program.state_shapes(), program.frozen_shapes(), program.batch_shapes()
    )


def model_flops(program: StageProgram, batch: Any) -> float:
  """FLOPs over all chips that a step of these shapes needs by the method: the numerator of the
  model FLOPs utilization.

  Counted as `step_flops`, with no recomputation. Frozen weights have no gradient of their own.
  Padding counts as tokens.

  Args:
    program: the stage.
    batch: arrays or shapes.
  """
  config = program.config
  model = dataclasses.replace(config.clara.model, remat="none", logits_chunk=0, attention="grouped")
  bare = program.replaced(
    dataclasses.replace(config, clara=dataclasses.replace(config.clara, model=model))
  )
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=program.batch_sharding), batch
  )
  with bare.context():
    return flops.count(bare.step, bare.state_shapes(), bare.frozen_shapes(), shapes)


def shard_bytes(tree: Any) -> int:
  """Bytes that one device holds of a tree of `jax.ShapeDtypeStruct`s with shardings."""

  def leaf(x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      return 16
    return math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize

  return sum(leaf(x) for x in jax.tree.leaves(tree))


def temporary_bytes(program: StageProgram) -> int:
  """An estimate of what one chip holds beside the arguments, at the peak of the largest step:
  saved activations, the largest layer at work, gathered weights, gradients, and the logits of
  one chunk."""
  config = program.config
  clara, model, mesh = config.clara, config.clara.model, program.mesh.shape
  batch = program.batch_shapes()
  item, tensor = np.dtype(jax.numpy.dtype(model.dtype)).itemsize, mesh["tensor"]
  rows = (
    config.data.batch_size
    // config.train.accumulate
    // (mesh["slice"] * mesh["data"] * mesh["fsdp"])
  )
  layer = (
    model.width * (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    + 3 * model.width * model.mlp_dim
  )

  def at_work(texts, length):
    scores = (
      0
      if model.attention in ("cudnn", "splash")
      else 2.5 * 4 * texts * model.num_heads / tensor * length**2
    )
    return scores + texts * length * item * (4 * model.mlp_dim / tensor + 6 * model.width)

  def saved(texts, length):
    return (
      model.num_layers * texts * length * model.width * item
      if model.remat == "full"
      else (model.num_layers * at_work(texts, length))
    )

  t = batch.prompt.tokens.ids.shape[-1]
  total, peak = saved(rows, t), at_work(rows, t)
  for tokens in (batch.documents, batch.question):
    if tokens is None:
      continue
    texts, length = (
      rows * math.prod(tokens.ids.shape[:-1]) // config.data.batch_size,
      tokens.ids.shape[-1],
    )
    trains = tokens is batch.question or program.stage.data == "given"
    total += saved(texts, length) if trains else 0
    peak = max(peak, at_work(texts, length))
  gathered = 2 * layer * item / tensor if mesh["fsdp"] > 1 else 0
  chunk = min(model.logits_chunk or batch.prompt.labels.shape[1], batch.prompt.labels.shape[1])
  logits = (
    2 * 4 * rows * chunk * clara.vocab_size / tensor
    + 2 * clara.vocab_size * model.width * item / tensor
  )
  # XLA holds copies of its own: a fifth more, against compiled TPU programs (docs/pods.md).
  return int(
    1.2 * (total + peak + gathered + logits + shard_bytes(program.state_shapes().trainable))
  )


def roofline(
  chip: Chip, chips: int, flops_per_step: float, memory_bytes: float, interconnect_bytes: float
) -> dict[str, float]:
  """Seconds that a step takes at least: the compute, the main memory, the interconnect, and the
  largest of them."""
  seconds = {
    "compute": flops_per_step / chips / chip.flops,
    "memory": memory_bytes / chip.memory_bandwidth,
    "interconnect": interconnect_bytes / chip.interconnect,
  }
  return {**seconds, "step": max(seconds.values())}


def train_step(program: StageProgram) -> tuple[Any, tuple[Any, ...]]:
  """The step, and the shapes of its arguments."""
  return program.step, (program.state_shapes(), program.frozen_shapes(), program.batch_shapes())


def compiled(chip: Chip, mesh: Mesh, step: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
  """Compiles a step for a mesh and reads the result; see `launch/aot.py` for the fields."""
  with sharding.context(mesh):
    start = time.monotonic()
    report: dict[str, Any] = {"method": "compiled", "flops_per_step": flops.count(step, *arguments)}
    try:
      executable = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      # Main memory: XLA says how much it would take. On-chip vector memory ("vmem"): one fusion of
      # the step is too large for it.
      used = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", str(error))
      total = (
        int(float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[used[2]]) if used else None
      )
      reason = next(
        (line for line in str(error).splitlines() if line.startswith("Ran out of memory")),
        str(error).splitlines()[0],
      )
      return report | {
        "fits": False,
        "reason": reason[:200],
        "collectives": None,
        "compile_seconds": time.monotonic() - start,
        "bytes_per_chip": {
          "arguments": shard_bytes(arguments),
          "temporaries": None,
          "output": None,
          "total": total,
        },
        "memory_per_chip": int(chip.memory),
      }
    seconds = time.monotonic() - start
  memory = executable.memory_analysis()
  output = memory.output_size_in_bytes - memory.alias_size_in_bytes
  total = (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + output
    + memory.generated_code_size_in_bytes
  )
  hlo_report = hlo.analyze(executable.as_text())
  return report | {
    "fits": total <= chip.memory,
    "bytes_per_chip": {
      "arguments": memory.argument_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
      "output": output,
      "code": memory.generated_code_size_in_bytes,
      "total": total,
    },
    "memory_per_chip": int(chip.memory),
    "collectives": hlo_report.collectives,
    "interconnect_bytes_per_chip": int(hlo_report.interconnect_bytes),
    "memory_traffic_bytes_per_chip": int(hlo_report.memory_bytes),
    "roofline_seconds": roofline(
      chip,
      mesh.size,
      report["flops_per_step"],
      hlo_report.memory_bytes,
      hlo_report.interconnect_bytes,
    ),
    "compile_seconds": seconds,
  }


def analyzed(program: StageProgram, chip: Chip) -> dict[str, Any]:
  """The same by analysis, nothing compiled: arguments and FLOPs exact, temporaries estimated,
  traffic a lower bound of what the method moves (each pass gathers and reads the frozen weights
  once)."""
  mesh = program.mesh.shape
  arguments = (program.state_shapes(), program.frozen_shapes(), program.batch_shapes())
  temporaries = temporary_bytes(program)
  held = shard_bytes(arguments)
  base = shard_bytes(program.weights_shapes("base")) * mesh["fsdp"]
  passes = 3 * program.config.train.accumulate * (2 if program.stage.data != "text" else 1)
  gathered = passes * base * (mesh["fsdp"] - 1) / mesh["fsdp"]
  total_flops = step_flops(program)
  return {
    "method": "analysis",
    "flops_per_step": total_flops,
    "fits": held + temporaries <= chip.memory,
    "bytes_per_chip": {
      "arguments": held,
      "temporaries": temporaries,
      "output": 0,
      "total": held + temporaries,
    },
    "memory_per_chip": int(chip.memory),
    "collectives": None,
    "interconnect_bytes_per_chip": int(gathered),
    "memory_traffic_bytes_per_chip": int(passes * base),
    "roofline_seconds": roofline(chip, program.mesh.size, total_flops, passes * base, gathered),
    "compile_seconds": 0.0,
  }


def remedies(program: StageProgram, chip: Chip) -> list[str]:
  """What would make a step fit, by analysis: the changes of one field that do, else all of them
  together."""
  config = program.config
  rows = config.data.batch_size // (program.mesh.size // program.mesh.shape["tensor"])
  micro = [
    f"config.train.accumulate={a}"
    for a in range(config.train.accumulate + 1, rows + 1)
    if rows % a == 0
  ]
  others = []
  if "base" not in program.trained and config.clara.model.base_quantization == "none":
    others.append("config.clara.model.base_quantization=int8")
  if program.stage.data == "candidates" and not config.data.store:
    others.append("config.data.store=DIR")

  def needed(*changes: str) -> float:
    values = dataclasses.asdict(config)
    for change in changes:
      path, value = change.removeprefix("config.").split("=")
      *groups, field = path.split(".")
      functools.reduce(dict.__getitem__, groups, values)[field] = (
        int(value) if value.isdigit() else value
      )
    other = program.replaced(from_config_dict(RunConfig, values))
    return shard_bytes(
      (other.state_shapes(), other.frozen_shapes(), other.batch_shapes())
    ) + temporary_bytes(other)

  def enough(*changes: str) -> str | None:
    size = needed(*changes)
    return (
      f"{' and '.join(changes)}: about {size / 2**30:.1f} GiB"
      if size <= 0.95 * chip.memory
      else None
    )

  alone = [text for change in [*micro, *others] if (text := enough(change))][:3]
  together = [
    text for changes in [[*micro[-1:], *others]] if len(changes) > 1 and (text := enough(*changes))
  ]
  return alone or together or ["more chips in config.mesh.fsdp, or a larger config.mesh.tensor"]
