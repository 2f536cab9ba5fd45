"""Puts a finished from-scratch run into the package: `python -m clara_jax.quickstart.ship WORKDIR`.

The joint stage and its comparison without the query reasoner are not shipped: the default run trains them before one's eyes.
Weights are rounded to bfloat16 and stored as float32, which compresses to half; optimizer states stay behind.
"""

import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp

from clara_jax.interop import checkpoints, hf
from clara_jax.training.checkpoint import Checkpointer

WITH_WEIGHTS = ("pretrain", "scp", "instruct")
METRICS_ONLY = ("contrastive", "without_nested_dropout", "from_compressor")


def ship(workdir: str, package: pathlib.Path) -> int:
  """Copies the stages' configurations, metrics and weights; returns the bytes shipped."""
  shutil.rmtree(package, ignore_errors=True)
  base_sha256 = None
  for name in (*WITH_WEIGHTS, *METRICS_ONLY):
    source, target = pathlib.Path(workdir) / "stages" / name, package / "stages" / name
    target.mkdir(parents=True)
    for file in ("config.json", "metrics.jsonl"):
      shutil.copy(source / file, target / file)
    if name in METRICS_ONLY:
      continue
    shutil.copytree(source / "tokenizer", target / "tokenizer")
    checkpointer = Checkpointer(str(source), read_only=True)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), checkpointer.weights())
    step = checkpointer.latest_step()
    checkpointer.close()
    writer = Checkpointer(str(target))
    writer.save_weights(step, rounded)
    writer.close()
    # Rounding made another base of it.
    if name == "pretrain":
      base_sha256 = hf.base_hash(checkpoints.open_checkpoint(str(target)).plain_base)
    else:
      record = json.loads((target / "config.json").read_text())
      (target / "config.json").write_text(json.dumps({**record, "base_sha256": base_sha256}, indent=2))
  for file in package.rglob("commit_success.txt"):
    file.write_text("Checkpoint commit was successful")  # Orbax wrote the path of this machine
  report = json.loads((pathlib.Path(workdir) / "report.json").read_text())
  (package / "record.json").write_text(json.dumps({"recipe": "clara_jax/quickstart/recipe.py", "seed": report["seed"],
                                                   "stages": [*WITH_WEIGHTS, *METRICS_ONLY], "seconds": report["seconds"]},
                                                  indent=2))
  return sum(f.stat().st_size for f in package.rglob("*") if f.is_file())


if __name__ == "__main__":
  size = ship(sys.argv[1], pathlib.Path(__file__).resolve().parents[1] / "pretrained")
  print(f"{size / 2**20:.1f} MiB")
