"""Does a run fit, and how fast can it be? Compiles its step for a TPU topology, on a machine
without TPUs.

    python launch/aot.py --config configs/mistral_7b.py:scp --topology v5e:4x8              # compiled; needs the extra 'tpu' (libtpu)
    python launch/aot.py --config configs/mistral_7b.py:scp --gpus 8 --chip h100            # by analysis, nothing is compiled

The step, its shapes and its shardings are those of `clara train`; batches have the largest shapes
that the configuration allows. With `--program compress` (a pass over `--batch` documents) or
`answer` (as many questions, 32 tokens each) those of inference; `search` needs no configuration:

    python launch/aot.py --program search --vectors 33000000 --topology v5e:4x8             # and queries a second, at best

Overrides as in training: `--config.train.accumulate=4`. With --json one object: chips, mesh, fits, bytes_per_chip {arguments,
temporaries, output, total}, memory_per_chip, flops_per_step (all chips, recomputation included),
collectives {kind: how often they run}, interconnect_bytes_per_chip, memory_traffic_bytes_per_chip,
roofline_seconds {compute, memory, interconnect, step}, compile_seconds, remedies (what would make
it fit, where it does not), method ('compiled' or 'analysis'). Exit status: 0 it fits, 1 it does
not, 2 wrong usage.
"""  # noqa: E501

import argparse
import dataclasses
import importlib.util
import json
import os
import sys

# libtpu compiles; it looks for no TPU and may be loaded by several programs. Arrays live on the
# CPU.
os.environ.update(
  TPU_SKIP_MDS_QUERY="1",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",
  JAX_PLATFORMS="cpu",
  TF_CPP_MIN_LOG_LEVEL="2",
  ABSL_MIN_LOG_LEVEL="2",
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from clara_jax.analysis import cost
from clara_jax.batch import Tokens
from clara_jax.cli import arguments
from clara_jax.config import ConfigError
from clara_jax.data.pipeline import padded_length
from clara_jax.data.prompt_tokenizer import EXTRA_TOKENS
from clara_jax.inference.generate import Greedy
from clara_jax.ops.nearest import nearest, slots_needed
from clara_jax.sharding import make_mesh
from clara_jax.training import config_file
from clara_jax.training.program import Program


def main(argv: list[str] | None = None) -> int:
  """Prints the report; returns the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", metavar="FILE.py[:NAME]", help="not for search")
  where = parser.add_mutually_exclusive_group(required=True)
  where.add_argument("--topology", help="chip and shape: v5e:4x8, v5p:2x2x4, v6e:4x4")
  where.add_argument("--gpus", type=int, help="how many GPUs; by analysis")
  parser.add_argument("--program", choices=("train", *PROGRAMS, "search"), default="train")
  parser.add_argument(
    "--mesh",
    type=arguments.mesh_sizes,
    metavar="SIZES",
    help="tensor=8 or data=2,fsdp=4, as for clara ask; default: the configuration's",
  )
  parser.add_argument(
    "--batch",
    type=arguments.positive,
    help="of compress and answer; default: the configuration's data.batch_size; of search: "
    "questions at a time; default 1024",
  )
  search = parser.add_argument_group("--program search")
  search.add_argument("--vectors", type=arguments.positive, metavar="N", help="in the corpus")
  search.add_argument(
    "--dimensions", type=arguments.positive, default=512, help="of a vector; default 512"
  )
  search.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), default="int8")
  search.add_argument("--recall", type=float, default=1.0, help="below 1: approximately; default 1")
  search.add_argument("--top-k", type=arguments.positive, default=10, help="default 10")
  parser.add_argument(
    "--slices",
    type=int,
    default=1,
    help="how many such topologies, joined by the data center network",
  )
  parser.add_argument(
    "--chip", choices=sorted(cost.CHIPS), default="h100", help="of --gpus; default h100"
  )
  parser.add_argument("--json", action="store_true")
  options, overrides = parser.parse_known_args(argv)
  if options.program == "search":
    if options.config is not None:
      parser.error("--config: --program search has none; name --vectors and --dimensions")
    if not 0 < options.recall <= 1:
      parser.error(f"--recall {options.recall:g}: expected more than 0 and at most 1")
    return _search(parser, options, overrides)
  if options.config is None:
    parser.error("name --config")
  try:
    config = config_file.load_config(options.config, overrides)
    if options.mesh:
      config = dataclasses.replace(config, mesh=options.mesh)
    batch = options.batch or config.data.batch_size
    if options.topology:
      chip, devices = _topology(options.topology, options.slices)
    else:
      jax.config.update("jax_num_cpu_devices", options.gpus)
      chip, devices = cost.CHIPS[options.chip], jax.devices()
    if options.program != "train":  # only its weights are looked at
      data = dataclasses.replace(config.data, batch_size=len(devices), shards=1)
      config = dataclasses.replace(config, data=data)
    program = Program(config, 1000, make_mesh(config.mesh, devices))
  except ConfigError as error:
    print(f"aot: {error}", file=sys.stderr)
    return 2
  report = {
    "config": options.config,
    "topology": options.topology or f"{options.gpus} x {options.chip}",
    "chips": program.mesh.size,
    "mesh": dict(program.mesh.shape),
  }
  if options.program != "train":
    if not options.topology:
      parser.error(f"--program {options.program} needs --topology")
    report |= {
      "program": options.program,
      **cost.compiled(chip, program.mesh, *PROGRAMS[options.program](program, batch)),
      "remedies": [],
    }
  else:
    report |= (
      cost.compiled(chip, program.mesh, *cost.train_step(program))
      if options.topology
      else cost.analyzed(program, chip)
    )
    report["remedies"] = [] if report["fits"] else cost.remedies(program, chip)
  print(json.dumps(report) if options.json else _text(report))
  return 0 if report["fits"] else 1


def _search(parser, options, overrides) -> int:
  """The exact index's program over a corpus that is not there."""
  if options.vectors is None or not options.topology or overrides:
    parser.error("--program search: name --topology and --vectors, and no --config")
  try:
    chip, devices = _topology(options.topology, options.slices)
    mesh = make_mesh(options.mesh, devices)
  except ConfigError as error:
    print(f"aot: {error}", file=sys.stderr)
    return 2
  rows, queries = slots_needed(options.vectors, mesh.size), options.batch or 1024
  by_row = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  whole = NamedSharding(mesh, PartitionSpec())
  shapes = (
    jax.ShapeDtypeStruct((rows, options.dimensions), jnp.dtype(options.dtype), sharding=by_row),
    jax.ShapeDtypeStruct((rows,), np.float32, sharding=by_row),
    jax.ShapeDtypeStruct((queries, options.dimensions), np.float32, sharding=whole),
  )
  step = jax.jit(lambda v, s, q: nearest(v, s, q, options.top_k, options.recall))
  report = {
    "program": "search",
    "topology": options.topology,
    "chips": mesh.size,
    "mesh": dict(mesh.shape),
    "vectors": options.vectors,
    "dimensions": options.dimensions,
    "dtype": options.dtype,
    "recall": options.recall,
    **cost.compiled(chip, mesh, step, shapes),
    "remedies": [],
  }
  if "roofline_seconds" in report:
    report["queries_per_second_at_best"] = queries / report["roofline_seconds"]["step"]
  print(json.dumps(report) if options.json else _text(report))
  return 0 if report["fits"] else 1


def compress_step(program: Program, batch: int):
  """A pass of the compressor over documents of full length, and its arguments."""
  clara = program.config.clara
  return jax.jit(program.model.compress), (
    {g: program.weights_shapes(g) for g in ("base", "memory_embedding", "compressor")},
    _tokens(
      batch,
      clara.doc_max_length + EXTRA_TOKENS + clara.num_memory_tokens,
      program.config.data.document_bucket,
      program.batch_sharding,
    ),
  )


def answer_step(program: Program, batch: int):
  """Answers of NEW_TOKENS tokens from K documents each and questions of 64 tokens, and their
  arguments."""
  clara = program.config.clara
  slots = clara.top_k * (clara.num_memory_tokens + 1)
  memories = jax.ShapeDtypeStruct(
    (batch, clara.top_k, clara.num_memory_tokens, clara.model.width),
    clara.model.dtype,
    sharding=_whole(program),
  )
  return jax.jit(Greedy(program.model, NEW_TOKENS, end_ids=(2,), pad_id=0).__call__), (
    {g: program.weights_shapes(g) for g in ("base", "memory_embedding", "generator")},
    _tokens(batch, slots + 128, 128, _whole(program)),
    memories,
  )


def _whole(program):
  """As `clara ask` gives its questions to the devices: all to each."""
  return NamedSharding(program.mesh, PartitionSpec())


def _tokens(batch, length, bucket, sharding):
  ids, lengths = (batch, padded_length(length, bucket)), (batch,)
  return Tokens(
    *(jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding) for shape in (ids, lengths))
  )


NEW_TOKENS = 32
PROGRAMS = {"compress": compress_step, "answer": answer_step}


def _topology(name: str, slices: int):
  kind = name.split(":")[0]
  if kind not in cost.CHIPS:
    raise ConfigError(f"--topology {name}: unknown chip {kind!r}; known: v4, v5e, v5p, v6e, tpu7x")
  try:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices)
  except Exception as error:
    hint = (
      ""
      if importlib.util.find_spec("libtpu")
      else " (the compiler comes with pip install 'clara_jax[tpu]')"
    )
    raise ConfigError(
      f"--topology {name}: {str(error).splitlines()[0]}{hint}; shapes are those of Cloud TPU "
      f"slices, such as v5e:2x2, 2x4, "
      "4x4, 4x8, 8x8, 8x16, 16x16 or v5p:2x2x2, 2x2x4, 4x4x4 (tpu7x has two devices a chip)"
    ) from None
  return cost.CHIPS[kind], topology.devices


def _text(report: dict) -> str:
  gib = ", ".join(
    f"{name} {size / 2**30:.2f}" for name, size in report["bytes_per_chip"].items() if size
  )
  lines = [
    f"{report.get('config', report.get('program'))} on {report['topology']}: {report['chips']} "
    f"chips, mesh {report['mesh']} ({report['method']})",
    f"  {'fits' if report['fits'] else 'DOES NOT FIT'}: GiB per chip {gib} of "
    f"{report['memory_per_chip'] / 2**30:.2f}",
    *([f"  {report['reason']}"] if "reason" in report else []),
    f"  {report['flops_per_step']:.3g} FLOPs a step"
    + (
      f", compiled in {report['compile_seconds']:.0f} s" if report["method"] == "compiled" else ""
    ),
  ]
  if report["collectives"]:
    lines.append(
      f"  collectives {report['collectives']}, {report['interconnect_bytes_per_chip'] / 1e9:.1f} "
      f"GB received a chip"
    )
  if "roofline_seconds" in report:
    lines.append(
      "  at least, seconds: "
      + ", ".join(f"{k} {v:.3g}" for k, v in report["roofline_seconds"].items())
    )
  if "queries_per_second_at_best" in report:
    lines.append(f"  at best, queries a second: {report['queries_per_second_at_best']:.0f}")
  return "\n".join(lines + [f"  would fit with {remedy}" for remedy in report["remedies"]])


if __name__ == "__main__":
  sys.exit(main())
