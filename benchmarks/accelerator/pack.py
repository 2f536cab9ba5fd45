"""What has to travel to a machine without a network, in two parts of less than 60 MiB
(benchmarks/accelerator/README.md).

    python benchmarks/accelerator/pack.py --data DIR --model F.gguf --out .pack

PART1: wheels of what the machine lacks, the data, the first half of the model;
PART2: the rest of the model. The project itself travels as the working tree. Prints the parts'
sizes.
"""

import argparse
import gzip
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tarfile

LIMIT = 60 * 2**20
# What a machine with JAX for CUDA, Flax, Optax, Orbax, transformers, PyTorch and PEFT lacks; each
# is asked for with --no-deps.
WHEELS = (
  "grain",
  "portpicker",
  "array_record",
  "ml_collections",
  "jaxtyping",
  "wadler_lindig",
  "gguf",
  "bm25s",
  "importlib_resources",
  "zipp",
  "more-itertools",
)
PASSAGES = 12_000  # of Wikipedia's: as many as are told again


def main() -> None:
  """Exit status 1 where a part is too large."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--data",
    type=pathlib.Path,
    required=True,
    metavar="DIR",
    help="with squad/, nq/, multihop/, wiki/",
  )
  parser.add_argument("--model", type=pathlib.Path, required=True, metavar="F.gguf")
  parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
  parser.add_argument("--python", default="3.12", help="of the machine; default 3.12")
  parser.add_argument("--no-wheels", action="store_true", help="the machine lacks nothing")
  options = parser.parse_args()
  shutil.rmtree(options.out, ignore_errors=True)
  parts = [options.out / name for name in ("part1", "part2")]
  for part in parts:
    part.mkdir(parents=True)
  _archive(parts[0] / "data.tar.xz", _data(options.data, options.out / "data"), "data")
  shutil.rmtree(options.out / "data")
  if not options.no_wheels:
    wheels = options.out / "wheels"
    download(wheels, options.python)
    _archive(parts[0] / "wheels.tar.xz", wheels, "wheels")
    shutil.rmtree(wheels)
  model = options.model.read_bytes()
  first = max(0, min(len(model), (len(model) + _size(parts[0])) // 2 - _size(parts[0])))
  for number, (part, content) in enumerate(
    zip(parts, (model[:first], model[first:]), strict=True), 1
  ):
    (part / f"model.gguf.{number}-of-2").write_bytes(content)
  sizes = {
    part.name: {
      "bytes": _size(part),
      "files": {f.name: f.stat().st_size for f in sorted(part.iterdir())},
    }
    for part in parts
  }
  print(json.dumps({"limit": LIMIT, **sizes}, indent=2))
  too_large = [name for name, size in sizes.items() if size["bytes"] >= LIMIT]
  if too_large:
    print(f"pack: {', '.join(too_large)}: {LIMIT} bytes or more", file=sys.stderr)
  sys.exit(bool(too_large))


def download(directory: pathlib.Path, python: str) -> None:
  """Wheels for Linux on x86-64 and that Python."""
  platforms = [f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 31, 34, 35)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
  ]
  for name in WHEELS:
    command = [
      sys.executable,
      "-m",
      "pip",
      "download",
      "-q",
      "--disable-pip-version-check",
      "--no-deps",
      "--only-binary=:all:",
      "--python-version",
      python,
      "--implementation",
      "cp",
      *(f"--platform={p}" for p in platforms),
      "-d",
      str(directory),
      name,
    ]
    if subprocess.run(command, stderr=subprocess.PIPE, text=True).returncode:
      print(
        f"pack: no wheel of {name} for Python {python}; the machine has to have it", file=sys.stderr
      )


def _data(source: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
  """What prepare.py reads, uncompressed for the archive, of Wikipedia's passages a sample."""
  names = ("squad/paragraphs", "squad/qa", "nq/nq_passage_qa", "multihop/hotpotqa", "wiki/passages")
  for name in names:
    with gzip.open(source / f"{name}.jsonl.gz", "rb") as file:
      lines = file.readlines()
    if name.startswith("wiki"):
      lines = random.Random(0).sample(lines, min(PASSAGES, len(lines)))
    target = to / f"{name}.jsonl.gz"
    target.parent.mkdir(parents=True, exist_ok=True)
    # prepare.py reads .gz; the archive compresses better
    with gzip.open(target, "wb", compresslevel=0) as file:
      file.writelines(lines)
  return to


def _archive(path: pathlib.Path, folder: pathlib.Path, name: str) -> None:
  with tarfile.open(path, "w:xz") as tar:
    tar.add(folder, name)


def _size(folder: pathlib.Path) -> int:
  return sum(f.stat().st_size for f in folder.iterdir())


if __name__ == "__main__":
  main()
