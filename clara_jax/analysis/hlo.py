"""What a compiled TPU program does, read from its text: collectives and memory traffic, loops as
often as they run.

`Compiled.cost_analysis()` counts the body of a loop once; layers are a loop, and XLA makes loops of
its own (windowed products of collectives). Here each instruction counts as often as its computation
is run.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_ITEM_BITS = {
  "pred": 8,
  "bf16": 16,
  "f16": 16,
  "f32": 32,
  "f64": 64,
  "s4": 4,
  "u4": 4,
  "s8": 8,
  "u8": 8,
  "s16": 16,
  "u16": 16,
  "s32": 32,
  "u32": 32,
  "s64": 64,
  "u64": 64,
}
_ARRAY = re.compile(r"\b(" + "|".join(_ITEM_BITS) + r")\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that move nothing: names for values, or the two ends of something that counts
# elsewhere.
_FREE = {
  "parameter",
  "get-tuple-element",
  "tuple",
  "bitcast",
  "constant",
  "while",
  "conditional",
  "call",
  "after-all",
  "partition-id",
  "replica-id",
  "iota",
  "copy-done",
  "opt-barrier",
}


@dataclasses.dataclass
class HloReport:
  """One run of a program on one chip.

  Attributes:
    collectives: how often each kind is run.
    interconnect_bytes: what the chip receives from others.
    memory_bytes: what is read from and written to the chip's main memory (on-chip vector memory is
      not counted).
  """

  collectives: dict[str, int]
  interconnect_bytes: float
  memory_bytes: float


@dataclasses.dataclass
class _Instruction:
  name: str
  shape: str
  opcode: str
  argument: str
  operands: list[str]
  attributes: str
  is_root: bool


def analyze(text: str) -> HloReport:
  """Reads `Compiled.as_text()`."""
  computations, entry = _parse(text)
  runs = _runs(computations, entry)
  counts: collections.Counter = collections.Counter()
  received = memory = 0.0
  overlapped: dict[tuple[str, str], tuple[int, float]] = {}
  fused = {
    c
    for body in computations.values()
    for i in body.values()
    if i.opcode == "fusion"
    for c in _called(i, "calls")
  }
  for name, body in computations.items():
    times = runs.get(name, 0)
    if not times or name in fused:
      continue
    for instruction in body.values():
      for collective in _collectives(instruction, computations):
        kind, moved = collective.opcode.removesuffix("-start"), _received(collective)
        channel = re.search(r"channel_id=(\d+)", collective.attributes)
        if collective is not instruction and channel:
          # It overlaps with products and is cut into several fusions, some in the products' loops:
          # it is run as often as the rarest.
          key = (kind, channel[1])
          overlapped[key] = min(overlapped.get(key, (times, moved)), (times, moved))
          continue
        counts[kind] += times
        received += times * moved
      memory += times * _traffic(instruction, body, computations)
  for (kind, _), (times, moved) in overlapped.items():
    counts[kind] += times
    received += times * moved
  return HloReport(dict(sorted(counts.items())), received, memory)


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
  computations: dict[str, dict[str, _Instruction]] = {}
  entry, body = "", None
  for line in text.splitlines():
    if line.endswith("{") and (line.startswith("%") or line.startswith("ENTRY")):
      name = _NAME.search(line)[1]
      body = computations[name] = {}
      if line.startswith("ENTRY"):
        entry = name
    elif line.startswith("}"):
      body = None
    elif body is not None and " = " in line:
      instruction = _instruction(line)
      body[instruction.name] = instruction
  return computations, entry


def _instruction(line: str) -> _Instruction:
  left, right = line.split(" = ", 1)
  if right.startswith("("):
    end = _matching(right, 0) + 1
  else:
    end = right.index(" ")
  shape, rest = right[:end], right[end:].lstrip()
  start = rest.index("(")
  stop = _matching(rest, start)
  argument = rest[start + 1 : stop]
  return _Instruction(
    _NAME.search(left)[1],
    shape,
    rest[:start],
    argument,
    _NAME.findall(argument),
    rest[stop + 1 :],
    "ROOT" in left,
  )


def _matching(text: str, start: int) -> int:
  depth = 0
  for position in range(start, len(text)):
    depth += (text[position] == "(") - (text[position] == ")")
    if not depth:
      return position
  raise ValueError(f"unbalanced: {text[:200]}")


def _called(instruction: _Instruction, *attributes: str) -> list[str]:
  names = []
  for attribute in attributes:
    if match := re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", instruction.attributes):
      names += _NAME.findall(match[1])
  return names


def _runs(computations: dict[str, dict[str, _Instruction]], entry: str) -> dict[str, int]:
  """How often each computation is run."""
  runs: collections.Counter = collections.Counter()

  def visit(name, times):
    runs[name] += times
    for instruction in computations[name].values():
      if instruction.opcode == "while":
        (condition,), (body,) = _called(instruction, "condition"), _called(instruction, "body")
        visit(body, times * _trips(condition, computations))
      elif instruction.opcode != "fusion":
        for other in _called(
          instruction,
          "calls",
          "called_computations",
          "branch_computations",
          "true_computation",
          "false_computation",
        ):
          visit(other, times)

  visit(entry, 1)
  return runs


def _trips(condition: str, computations: dict[str, dict[str, _Instruction]]) -> int:
  """Loops count from 0 to the constant that their condition compares with."""
  bounds = [1]
  for instruction in computations[condition].values():
    for other in _called(instruction, "calls"):
      bounds.append(_trips(other, computations))
  for instruction in computations[condition].values():
    if instruction.opcode == "constant" and instruction.argument.isdigit():
      bounds.append(int(instruction.argument))
  return max(bounds)


def _collectives(
  instruction: _Instruction, computations: dict[str, dict[str, _Instruction]]
) -> Iterator[_Instruction]:
  if instruction.opcode.removesuffix("-start") in _COLLECTIVES:
    yield instruction
  elif instruction.opcode == "fusion":
    for name in _called(instruction, "calls"):
      for inner in computations[name].values():
        yield from _collectives(inner, computations)


def _received(instruction: _Instruction) -> float:
  """Bytes that one chip receives, by the ring algorithms' lower bounds."""
  arrays = [_bytes(a) for a in _ARRAY.finditer(instruction.shape)]
  if instruction.opcode.endswith("-start"):  # (operand, result, …)
    arrays = arrays[1:2] or arrays
  size, n = sum(arrays), _group_size(instruction.attributes)
  kind = instruction.opcode.removesuffix("-start")
  return {
    "all-gather": size * (n - 1) / n,
    "all-reduce": 2 * size * (n - 1) / n,
    "reduce-scatter": size * (n - 1),
    "all-to-all": size * (n - 1) / n,
    "collective-permute": size,
  }[kind]


def _group_size(attributes: str) -> int:
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
    return math.prod(int(part or sizes[axis]) for axis, part in named)
  if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
    return int(match[2])
  if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return len(match[1].split(","))
  return 1


def _bytes(match: re.Match) -> float:
  sizes = [int(s) for s in match[2].split(",") if s]
  return math.prod(sizes) * _ITEM_BITS[match[1]] / 8


def _memory_bytes(shape: str) -> float:
  return sum(_bytes(a) for a in _ARRAY.finditer(shape) if "S(" not in (a[3] or ""))


def _traffic(
  instruction: _Instruction,
  body: dict[str, _Instruction],
  computations: dict[str, dict[str, _Instruction]],
) -> float:
  """Bytes of main memory that an instruction reads and writes; a slice counts, not what it is taken
  from."""
  if (
    instruction.opcode in _FREE
    or instruction.opcode.endswith("-done")
    or instruction.opcode.startswith("async-")
  ):
    return 0.0
  if instruction.opcode in ("dynamic-slice", "slice", "gather"):
    return 2 * _memory_bytes(instruction.shape)
  if instruction.opcode in ("dynamic-update-slice", "scatter"):
    return 2 * _memory_bytes(body[instruction.operands[1]].shape)
  operands = [body[o].shape for o in instruction.operands if o in body]
  if instruction.opcode != "fusion":
    written = instruction.shape if not instruction.opcode.endswith("-start") else ""
    return _memory_bytes(written) + sum(map(_memory_bytes, operands))
  inner = computations[_called(instruction, "calls")[0]]
  parameters = _parameters(inner)
  root = next(i for i in inner.values() if i.is_root)
  updated = _source(root.operands[0], inner) if root.opcode == "dynamic-update-slice" else None
  total = _memory_bytes(inner[root.operands[1]].shape if updated else instruction.shape)
  for parameter, shape in zip(parameters, operands, strict=True):
    if parameter.name == updated or not _memory_bytes(shape):
      continue
    slices = _slices(parameter.name, inner, computations)
    if slices:
      shape = " ".join(re.sub(r"S\(\d+\)", "", s) for s in slices)
    total += _memory_bytes(shape)
  return total


def _source(name: str, inner: dict[str, _Instruction]) -> str:
  while inner[name].opcode in ("bitcast", "copy") and inner[name].operands:
    name = inner[name].operands[0]
  return name


def _parameters(inner: dict[str, _Instruction]) -> list[_Instruction]:
  return sorted(
    (i for i in inner.values() if i.opcode == "parameter"), key=lambda i: int(i.argument)
  )


def _slices(
  name: str,
  inner: dict[str, _Instruction],
  computations: dict[str, dict[str, _Instruction]],
) -> list[str] | None:
  """Shapes of the slices that a fusion takes of one of its values, also in fusions within it; None
  where it reads the whole."""
  shapes: list[str] = []
  for use in _uses(name, inner):
    if use.opcode in ("dynamic-slice", "slice", "gather"):
      shapes.append(use.shape)
      continue
    if use.opcode != "fusion":
      return None
    nested = computations[_called(use, "calls")[0]]
    for parameter, operand in zip(_parameters(nested), use.operands, strict=True):
      if _source(operand, inner) == name:
        if (within := _slices(parameter.name, nested, computations)) is None:
          return None
        shapes += within
  return shapes


def _uses(name: str, inner: dict[str, _Instruction]) -> list[_Instruction]:
  uses = []
  for instruction in inner.values():
    if name in instruction.operands:
      uses += _uses(instruction.name, inner) if instruction.opcode == "bitcast" else [instruction]
  return uses
