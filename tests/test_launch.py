"""The launch scripts: what they would run, and the local one for real."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from clara_jax.testing import tiny
from clara_jax.training import trainer
from tests.helpers import free_port

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}


def script(name, *arguments, **variables):
  return subprocess.run(
    ["bash", str(ROOT / "launch" / name), *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=300,
    cwd=ROOT,
    env={**ENVIRONMENT, **{k: str(v) for k, v in variables.items()}},
  )


@pytest.mark.parametrize(
  "name, arguments, expected",
  [
    (
      "local.sh",
      ["clara", "train"],
      ["clara train --coordinator localhost:12321 --processes 2 --process 1"],
    ),
    (
      "slurm.sbatch",
      ["clara", "train", "--workdir", "a b"],
      ["srun --kill-on-bad-exit=1 clara train --workdir a\\ b --distributed"],
    ),
    (
      "tpu_vm.sh",
      ["up"],
      ["queued-resources create run --node-id run", "--accelerator-type v5litepod-32"],
    ),
    ("tpu_vm.sh", ["install"], ["--worker=all", "pip install -q -c constraints.txt"]),
    ("tpu_vm.sh", ["mount"], ["gcsfuse --implicit-dirs my-bucket /bucket"]),
    ("tpu_vm.sh", ["train", "--config", "c"], ["clara train --distributed --config c"]),
    ("tpu_vm.sh", ["down"], ["queued-resources delete run"]),
    (
      "gke_xpk.sh",
      ["clara", "train"],
      ["xpk workload create", "--num-slices 2", "clara train --distributed"],
    ),
  ],
)
def test_a_dry_run_says_what_would_be_run(name, arguments, expected):
  run = script(
    name, *arguments, DRY_RUN=1, NAME="run", PROJECT="project", SLICES=2, BUCKET="my-bucket"
  )
  assert run.returncode == 0, run.stderr
  for text in expected:
    assert text in run.stdout + run.stderr
  assert script(name).returncode == 2  # no arguments: the usage


def test_two_processes_on_this_machine(tmp_path):
  """As docs/pods.md says: the command of one process behind the script, with the same result."""
  rows = tmp_path / "rows.jsonl"
  rows.write_text("\n".join(map(json.dumps, tiny.raw_rows("scp"))))
  config = tiny.run_config("pretrain", steps=2)
  trainer.Trainer(
    config,
    tiny.prompt_tokenizer(),
    {},
    tiny.rows("pretrain"),
    workdir=str(tmp_path / "base"),
    progress=False,
  ).run()
  model = config.clara.model
  overrides = {
    "model.vocab_size": model.vocab_size,
    "model.width": model.width,
    "model.num_layers": model.num_layers,
    "model.num_heads": model.num_heads,
    "model.num_kv_heads": model.num_kv_heads,
    "model.head_dim": model.head_dim,
    "model.mlp_dim": model.mlp_dim,
    "model.initializer_range": model.initializer_range,
    "compression_rate": 20,
  }
  command = [
    "clara",
    "train",
    "--json",
    "--config",
    "configs/tiny.py:scp",
    f"--config.base={tmp_path / 'base'}",
    f'--config.data.rows=("{rows}",)',
    "--config.data.batch_size=8",
    "--config.data.shards=2",
    "--config.data.workers=1",
    "--config.train.steps=3",
    *(f"--config.clara.{name}={value}" for name, value in overrides.items()),
  ]
  together = script(
    "local.sh",
    *command,
    "--workdir",
    tmp_path / "two",
    PROCESSES=2,
    PORT=free_port(),
    LOGS=tmp_path / "logs",
  )
  assert together.returncode == 0, together.stderr[-3000:]
  alone = subprocess.run(
    [*command, "--workdir", str(tmp_path / "one")],
    capture_output=True,
    text=True,
    cwd=ROOT,
    timeout=300,
    env=ENVIRONMENT,
  )
  assert alone.returncode == 0, alone.stderr[-3000:]
  a, b = (json.loads(run.stdout) for run in (together, alone))
  assert a["step"] == b["step"] == 3 and a["loss"] == pytest.approx(b["loss"], rel=1e-5)
  assert "process 0 of 2: 1 of 2 devices" in together.stderr
