"""One part of what an accelerator is asked, within its time (benchmarks/accelerator/README.md).

    python benchmarks/accelerator/run.py --unpack PART                     # what pack.py packed, to WORK
    python benchmarks/accelerator/run.py --part checks|speed|train --seconds S --out DIR [--smoke]

Writes DIR/PART.json (of `speed`, one file for JAX and one for PyTorch) after every item, so that
what is stopped keeps what it has. An item that fails is written down, and the next one goes on.
`--smoke` runs every line with tiny shapes on any device.
"""  # noqa: E501

import argparse
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NEEDED = (
  "jax",
  "flax",
  "optax",
  "orbax",
  "jaxtyping",
  "grain",
  "array_record",
  "ml_collections",
  "etils",
  "transformers",
  "tokenizers",
  "safetensors",
  "torch",
  "peft",
  "bm25s",
  "gguf",
  "pytest",
  "chex",
  "cloudpickle",
  "portpicker",
  "psutil",
  "yaml",
  "jinja2",
)
SIDES = {"checks": ("checks",), "speed": ("speed-jax", "speed-torch"), "train": ("train",)}
TORCH_SHARE = 0.4  # of the time for `speed`
# The programs of `train` are small: compiled in seconds rather than tuned for a minute each.
QUICK = "--xla_gpu_autotune_level=0"


class Results:
  """A JSON file that is whole after every item.

  Args:
    path: of the file.
    about: what stands in it beside the items.
  """

  def __init__(self, path: pathlib.Path, about: dict[str, Any]):
    self._path, self.values = path, {**about, "items": {}}
    self.write()

  def write(self) -> None:
    """Writes what there is."""
    part = self._path.with_name(f"{self._path.name}.part")
    part.write_text(json.dumps(self.values, indent=2))
    part.replace(self._path)

  def item(self, name: str, make: Callable[[], dict[str, Any]], end: float, needs: float) -> None:
    """Makes one item, unless fewer seconds than it needs are left."""
    if time.monotonic() + needs > end:
      self.values["items"][name] = {
        "skipped": f"{end - time.monotonic():.0f} s were left, expected {needs:.0f}"
      }
      return self.write()
    start = time.monotonic()
    try:
      result = make()
    except Exception as error:  # the next item goes on
      result = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:600]}
    self.values["items"][name] = {**result, "took_seconds": round(time.monotonic() - start, 2)}
    self.write()
    print(f"{name}: {json.dumps(self.values['items'][name])[:300]}", file=sys.stderr, flush=True)


def machine(side: str) -> dict[str, Any]:
  """The device, and versions."""
  about = {
    "missing": [name for name in NEEDED if importlib.util.find_spec(name) is None],
    "date": time.strftime("%Y-%m-%d"),
    "command": " ".join(sys.argv),
    "python": platform.python_version(),
    "cores": os.cpu_count(),
  }
  if side == "speed-torch":
    import torch
    import transformers

    kind = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return about | {
      "device": kind,
      "torch": torch.__version__,
      "transformers": transformers.__version__,
    }
  import jax

  return about | {
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "backend": jax.default_backend(),
  }


def one(side: str, options: argparse.Namespace) -> None:
  """One side of a part, in this process."""
  sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent), str(ROOT / "examples" / "smollm2")]
  if side == "train" and not options.smoke:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
  out = Results(
    pathlib.Path(options.out) / f"{side}.json", machine(side) | {"smoke": options.smoke}
  )
  if side == "checks":
    import checks

    checks.run(
      out,
      options.golden,
      options.seconds,
      options.smoke,
    )
  elif side == "train":
    import language

    language.run(out, options)
  else:
    import speed_shapes

    speed_shapes.run(out, side.removeprefix("speed-"), options.seconds, options.smoke)


def all_sides(options: argparse.Namespace) -> int:
  """Each side in a process of its own, which is stopped when its time is over."""
  pathlib.Path(options.out).mkdir(parents=True, exist_ok=True)
  share = {"speed-jax": 1 - TORCH_SHARE, "speed-torch": TORCH_SHARE}
  environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
  if options.part == "checks":  # two processes on one card: a run that is killed, and this one
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if not options.smoke:  # what is compared to the bit was compiled twice
      environment["XLA_FLAGS"] = (
        f"{environment.get('XLA_FLAGS', '')} {QUICK} --xla_gpu_deterministic_ops=true".strip()
      )
  else:
    environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.92"
  status = 0
  for side in SIDES[options.part]:
    seconds = options.seconds * share.get(side, 1)
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--seconds", str(seconds)]
    try:
      status |= subprocess.run(command, env=environment, timeout=seconds + 20).returncode
    except subprocess.TimeoutExpired:
      print(
        f"{side}: stopped after {seconds + 20:.0f} s; what it has is in {options.out}/{side}.json",
        file=sys.stderr,
        flush=True,
      )
  return status


def unpack(part: str, work: str) -> None:
  """Archives of a part to `work`; wheels are installed to work/site, a model that is whole is
  joined."""
  to = pathlib.Path(work)
  to.mkdir(parents=True, exist_ok=True)
  for archive in sorted(pathlib.Path(part).glob("*.tar.xz")):
    with tarfile.open(archive) as tar:
      tar.extractall(to, filter="data")
  for piece in pathlib.Path(part).glob("model.gguf.*"):
    (to / piece.name).write_bytes(piece.read_bytes())
  pieces = sorted(to.glob("model.gguf.*"))
  if pieces and len(pieces) == int(pieces[0].name.rpartition("-of-")[2]):
    with open(to / "model.gguf", "wb") as whole:
      for piece in pieces:
        whole.write(piece.read_bytes())
  wheels = [str(w) for w in sorted((to / "wheels").glob("*.whl"))]
  if wheels and not (to / "site").exists():
    subprocess.run(
      [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--no-cache-dir",
        "--target",
        str(to / "site"),
        *wheels,
      ],
      check=True,
    )
  print(f"{to}: {', '.join(sorted(p.name for p in to.iterdir()))}", file=sys.stderr)


def main() -> None:
  """Exit status 0 where every side ended by itself."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--part", choices=SIDES)
  parser.add_argument("--seconds", type=float, default=120)
  parser.add_argument("--out", metavar="DIR", default="accelerator")
  parser.add_argument("--smoke", action="store_true", help="tiny shapes; no figure means anything")
  parser.add_argument(
    "--work",
    metavar="WORK",
    default="/tmp/clara",
    help="where --unpack puts things; default /tmp/clara",
  )
  parser.add_argument("--unpack", metavar="PART", help="a directory of pack.py")
  parser.add_argument(
    "--golden", type=pathlib.Path, default=ROOT / "tests" / "golden", metavar="DIR"
  )
  parser.add_argument(
    "--base",
    metavar="DIR",
    help="of train: a Hugging Face directory; default: made of WORK/model.gguf",
  )
  parser.add_argument(
    "--rows", metavar="DIR", help="of train: what prepare.py wrote; default: made of WORK/data"
  )
  parser.add_argument("--side", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.unpack:
    unpack(options.unpack, options.work)
    return
  if not options.part:
    parser.error("name --part or --unpack")
  if options.side:
    one(options.side, options)
    return
  sys.exit(all_sides(options))


if __name__ == "__main__":
  main()
