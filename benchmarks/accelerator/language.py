"""The recipe on real text (examples/smollm2) within the time, and its adapters in files that come
back."""

import argparse
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import Any

# What fits a card, in few shapes: every shape and every number of memory tokens is a program to
# compile. On a smoke run sizes at which programs compile in seconds.
FULL = [
  "--config.data.batch_size=64",
  "--config.data.workers=6",
  "--config.clara.nested_memory=(4, 16, 64)",
  "--config.clara.model.remat=full",
  "--config.data.bucket=512",
  "--config.data.document_bucket=384",
  "--config.data.label_bucket=384",
  "--config.data.length_window=1",
]
SMOKE = [
  "--config.data.batch_size=4",
  "--config.data.share_documents=2",
  "--config.data.length_window=1",
  "--config.data.bucket=128",
  "--config.clara.doc_max_length=64",
  "--config.clara.compression_rate=16",
  "--config.clara.nested_memory=(4,)",
  "--config.data.candidates=6",
  "--config.clara.top_k=2",
  "--config.clara.decoder_max_length=768",
  "--config.data.label_bucket=128",
  "--config.clara.model.dtype=float32",
  "--config.clara.model.param_dtype=float32",
  "--config.data.document_bucket=128",
]
LARGEST = 15 * 2**20  # of a file that comes back


def run(out: Any, options: argparse.Namespace) -> None:
  """Prepares what is missing, trains, tests, packs the adapters."""
  import recipe

  from clara_jax.compilation import enable_compilation_cache

  enable_compilation_cache()
  start, work = time.monotonic(), pathlib.Path(options.work)
  on_cpu = {**os.environ, "JAX_PLATFORMS": "cpu"}  # this process has the card
  root = pathlib.Path(__file__).resolve().parents[2]
  end = start + options.seconds

  def prepared() -> dict[str, Any]:
    base, rows = work / "base", work / "rows"
    if not options.base and not base.exists():
      subprocess.run(
        [
          sys.executable,
          "-m",
          "clara_jax",
          "convert",
          str(work / "model.gguf"),
          str(base),
          "--to",
          "hf",
        ],
        check=True,
        cwd=root,
        env=on_cpu,
      )
    if not options.rows and not rows.exists():
      subprocess.run(
        [
          sys.executable,
          str(root / "examples" / "smollm2" / "prepare.py"),
          "--data",
          str(work / "data"),
          "--out",
          str(rows),
        ],
        check=True,
        cwd=root,
        env=on_cpu,
      )
    return {}

  out.item("prepared", prepared, end, needs=0)
  runs = tempfile.mkdtemp(prefix="runs-", dir=work if work.exists() else None)
  experiment = recipe.Recipe(
    options.base or str(work / "base"),
    options.rows or str(work / "rows"),
    runs,
    str(pathlib.Path(options.out) / "language.json"),
    SMOKE if options.smoke else FULL,
    limit=24 if options.smoke else None,
    evaluate=4 if options.smoke else None,
    batch_size=4 if options.smoke else 100,
  )
  tests = recipe.TESTS
  if options.smoke:  # every setting once, and the checkpoint that lacks a generator
    tests = tuple(
      {
        test[3]: test for test in tests if test[2] != "hotpotqa" and test[1] != "joint_softmax"
      }.values()
    )
    tests += tuple(test for test in recipe.TESTS if test[1] == "contrastive" and test not in tests)

  seconds, steps = (None, 2) if options.smoke else (end - time.monotonic(), None)

  def trained(*only: str, tests: tuple = ()) -> dict[str, Any]:
    experiment.run(seconds, steps, only, tests=tests, end=end)
    return {
      "trainings": len(experiment.found["trainings"]),
      "tests": len(experiment.found["tests"]),
    }

  # What has to come back first.
  out.item("scp, instruct, joint", lambda: trained("scp", "instruct", "joint"), end, needs=0)
  out.item(
    "adapters", lambda: adapters(pathlib.Path(runs), pathlib.Path(options.out)), end + 60, needs=0
  )
  out.item("all trainings and tests", lambda: trained(tests=tests), end, needs=0)


def adapters(runs: pathlib.Path, to: pathlib.Path) -> dict[str, Any]:
  """The joint run's roles (or of what there is) as PEFT adapters, a tar file each."""
  from clara_jax.checkpoints.convert import convert

  last = next(name for name in ("joint", "instruct", "scp") if (runs / name / "finished").exists())
  convert(str(runs / last), str(runs / "peft"), "peft")
  sizes = {}
  for role in sorted((runs / "peft").iterdir()):
    if not role.is_dir():
      continue
    file = to / f"{last}-{role.name}.tar.xz"
    with tarfile.open(file, "w:xz", preset=1) as tar:
      tar.add(role, role.name)
    sizes[file.name] = file.stat().st_size
    if sizes[file.name] > LARGEST:
      raise ValueError(f"{file.name} has {sizes[file.name]} bytes, at most {LARGEST} come back")
  return {"of": last, "bytes": sizes}
