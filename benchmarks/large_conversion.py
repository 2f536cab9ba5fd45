"""A Mistral-7B-shaped checkpoint of random bf16 weights to ours and back, and onto eight virtual
devices.

    python benchmarks/large_conversion.py --scratch /tmp/large [--layers 32]

Needs three times the model's size (14.5 GB with 32 layers) on disk; everything is deleted at the
end. Prints one JSON object: seconds and peak resident memory of each way, the time of copying the
same files, whether the result is equal to the bit, and the host memory beyond the arrays themselves
when the model is loaded with an FSDP mesh. Page caches are dropped before each measurement where
that is allowed.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np

from clara_jax.checkpoints import families, huggingface
from clara_jax.checkpoints.tensors import TensorFiles, tensor_hash, write_tensors
from clara_jax.config import ModelConfig
from clara_jax.model import Clara, ClaraConfig

LOAD = """
import json, resource, sys, threading, time
import jax
from clara_jax.checkpoints import formats, lazy
from clara_jax.config import MeshConfig
from clara_jax.model import Clara
from clara_jax.sharding import make_mesh, place, tree_shardings

def resident(field):
  with open("/proc/self/status") as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

opened = formats.open_checkpoint(sys.argv[1])
model = Clara(opened.config)
mesh = make_mesh(MeshConfig("host"))
shardings = dict(lazy.leaves(tree_shardings(jax.eval_shape(lambda: model.init_boxed(jax.random.key(0), ("base",))["base"]), mesh)))
jax.block_until_ready(place(jax.numpy.zeros((8,)), jax.sharding.SingleDeviceSharding(jax.devices()[0])))
before, start = resident("VmRSS"), time.monotonic()
arrays = {path: place(leaf, shardings[path]) for path, leaf in lazy.leaves(opened.weights["base"])}
size = sum(a.nbytes for a in arrays.values())
print(json.dumps({"seconds": time.monotonic() - start, "array_bytes": size, "peak_rss_bytes": resident("VmHWM"),
                  "rss_before_bytes": before, "beyond_arrays_bytes": resident("VmHWM") - size - before,
                  "beyond_arrays_and_nothing_else_bytes": resident("VmHWM") - size}))
"""  # noqa: E501


def write(directory: pathlib.Path, layers: int) -> int:
  """The random checkpoint; returns its bytes."""
  config = ModelConfig(
    vocab_size=32_000,
    width=4096,
    num_layers=layers,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14_336,
    rope_theta=1e6,
  )
  shapes = huggingface.leaf_shapes(Clara(ClaraConfig(config)), "base")

  class Shape:
    dtype = np.dtype(ml_dtypes.bfloat16)

    def __init__(self, shape):
      self.shape = shape

  def leaf(path, shape):
    # without CLaRa's special tokens
    return Shape(
      {
        ("embedding",): (config.vocab_size, config.width),
        ("head",): (config.width, config.vocab_size),
      }.get(path, shape)
    )

  tensors = huggingface.base_tensors(
    huggingface.lazy.nest({path: leaf(path, shape) for path, shape in shapes.items()})
  )
  rng = np.random.default_rng(0)
  shape_of = {t.name: t.shape for t in tensors}

  def bits(name):
    # Random bits with an exponent of about 2^-6: the values do not matter, their bits do.
    value = rng.integers(0, 1 << 16, shape_of[name], dtype=np.uint16)
    return ((value & 0x80FF) | 0x3C00).view(ml_dtypes.bfloat16)

  directory.mkdir(parents=True)
  write_tensors(str(directory), [(t.name, t.shape, t.dtype) for t in tensors], bits)
  (directory / "config.json").write_text(
    json.dumps(families.config_json(config, config.vocab_size, {}))
  )
  return sum(f.stat().st_size for f in directory.glob("*.safetensors"))


def drop_caches() -> bool:
  """Empties the page cache, where that is allowed."""
  os.sync()
  try:
    pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
    return True
  except OSError:
    return False


def timed(*command: str) -> tuple[float, str]:
  """Seconds of a command, its output written to disk included, and what it printed."""
  drop_caches()
  start = time.monotonic()
  done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
  os.sync()
  return time.monotonic() - start, done.stdout


def main() -> None:
  """Writes, copies, converts both ways, compares, loads; prints one JSON object."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--scratch", type=pathlib.Path, required=True)
  parser.add_argument("--layers", type=int, default=32)
  options = parser.parse_args()
  scratch = options.scratch
  if scratch.exists():
    parser.error(f"{scratch} already exists")
  report = {}
  try:
    report["bytes"] = write(scratch / "hf", options.layers)
    report["caches_dropped"] = drop_caches()
    report["copy_seconds"], _ = timed("cp", "-r", str(scratch / "hf"), str(scratch / "copy"))
    shutil.rmtree(scratch / "copy")
    convert = (sys.executable, "-m", "clara_jax", "convert", "--json")
    for name, source, target, to in (("in", "hf", "ours", "clara"), ("out", "ours", "back", "hf")):
      seconds, output = timed(*convert, str(scratch / source), str(scratch / target), "--to", to)
      report[name] = {
        "seconds": seconds,
        "times_copy": seconds / report["copy_seconds"],
        "peak_rss_bytes": json.loads(output)["peak_rss_bytes"],
      }
    one, two = TensorFiles(str(scratch / "hf")), TensorFiles(str(scratch / "back"))
    report["tensors"] = len(one)
    report["exact"] = set(one) == set(two) and all(
      tensor_hash(one.read(name)) == tensor_hash(two.read(name)) for name in one
    )
    shutil.rmtree(scratch / "back")
    os.environ |= {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    for name in ("hf", "ours"):
      report[f"load_{name}_fsdp_8"] = json.loads(
        timed(sys.executable, "-c", LOAD, str(scratch / name))[1]
      )
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  print(json.dumps(report, indent=2))


if __name__ == "__main__":
  main()
