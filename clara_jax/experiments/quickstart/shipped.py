"""The finished stages that come with the package, one safetensors file each.

    python -m clara_jax.experiments.quickstart.shipped WORKDIR      # packs a finished from-scratch run into the package

The joint stage and its comparison without the query reasoner are not shipped: the default run
trains them in front of the user. Weights are rounded to bfloat16; optimizer states stay behind.
"""  # noqa: E501

import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from clara_jax.checkpoints import formats, huggingface, lazy, native
from clara_jax.checkpoints.workdir import Checkpointer
from clara_jax.data.prompt_tokenizer import PromptTokenizer

FOLDER = pathlib.Path(__file__).with_name("pretrained")
RECORD = "record.json"
WITH_WEIGHTS = ("pretrain", "scp", "instruct")
METRICS_ONLY = ("contrastive", "without_nested_dropout", "from_compressor")


def unpack(stages: str, prompt_tokenizer: PromptTokenizer) -> dict[str, Any] | None:
  """Writes the shipped stages as checkpoints STAGES/NAME, where there are none.

  Args:
    stages: the directory.
    prompt_tokenizer: of the generated world.

  Returns:
    Their record (recipe, seed, stages, measured seconds); None where the package ships nothing.
  """
  if not (FOLDER / RECORD).is_file():
    return None
  record = json.loads((FOLDER / RECORD).read_text(encoding="utf-8"))
  for name in record["stages"]:
    directory = pathlib.Path(stages) / name
    if directory.exists():
      continue
    directory.mkdir(parents=True)
    files = record["files"][name]
    (directory / "metrics.jsonl").write_text(
      "".join(json.dumps(line) + "\n" for line in files["metrics"]), encoding="utf-8"
    )
    if name in WITH_WEIGHTS:
      prompt_tokenizer.tokenizer.save_pretrained(str(directory / "tokenizer"))
      flat = load_file(FOLDER / f"{name}.safetensors")
      native.write_weights(
        str(directory),
        lazy.nest({tuple(path.split("/")): x.astype(np.float32) for path, x in flat.items()}),
        step=files["step"],
      )
    (directory / "config.json").write_text(json.dumps(files["config"], indent=2), encoding="utf-8")
  return {name: value for name, value in record.items() if name != "files"}


def pack(workdir: str, folder: pathlib.Path = FOLDER) -> int:
  """Packs the stages of a finished run; returns the bytes shipped."""
  folder.mkdir(exist_ok=True)
  files: dict[str, Any] = {}
  base_sha256 = None
  for name in (*WITH_WEIGHTS, *METRICS_ONLY):
    source = pathlib.Path(workdir) / "stages" / name
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    files[name] = {
      "config": config,
      "metrics": [
        json.loads(line)
        for line in (source / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
      ],
    }
    if name in METRICS_ONLY:
      continue
    checkpointer = Checkpointer(str(source), read_only=True)
    files[name]["step"] = checkpointer.latest_step()
    checkpointer.close()
    rounded = jax.tree.map(
      lambda x: np.asarray(lazy.read(x)).astype(jnp.bfloat16), native.open_weights(str(source))
    )
    if name == "pretrain":  # rounding made another base of it
      opened = formats.open_checkpoint(str(source))
      base_sha256 = huggingface.base_hash(
        jax.tree.map(
          lambda x: np.asarray(lazy.read(x)).astype(jnp.bfloat16).astype(np.float32),
          opened.plain_base,
        )
      )
    else:
      config["base_sha256"] = base_sha256
    save_file(
      {"/".join(path): np.ascontiguousarray(leaf) for path, leaf in lazy.leaves(rounded)},
      folder / f"{name}.safetensors",
    )
  report = json.loads((pathlib.Path(workdir) / "report.json").read_text(encoding="utf-8"))
  (folder / RECORD).write_text(
    json.dumps(
      {
        "recipe": "clara_jax/experiments/quickstart/recipe.py",
        "seed": report["seed"],
        "stages": [*WITH_WEIGHTS, *METRICS_ONLY],
        "seconds": report["seconds"],
        "files": files,
      }
    ),
    encoding="utf-8",
  )
  return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
  print(f"{pack(sys.argv[1]) / 2**20:.1f} MiB")
