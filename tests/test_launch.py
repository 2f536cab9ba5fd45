"""The launch scripts: what they would run, and the local one for real."""

import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib

import pytest
import yaml

from clara_jax.cli import main as cli
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
    ("tpu_vm.sh", ["train", "--config", "c"], ["clara train --distributed --config c"]),
    ("tpu_vm.sh", ["down"], ["queued-resources delete run"]),
    (
      "gke.sh",
      ["clara", "train", "--workdir", "a b"],
      ["kind: JobSet", "clara train --workdir a\\ b --distributed &"],
    ),
  ],
)
def test_a_dry_run_says_what_would_be_run(name, arguments, expected):
  run = script(
    name,
    *arguments,
    DRY_RUN=1,
    NAME="run",
    PROJECT="project",
    SLICES=2,
    REPOSITORY="https://example.org/r",
  )
  assert run.returncode == 0, run.stderr
  for text in expected:
    assert text in run.stdout + run.stderr
  assert script(name).returncode == 2  # no arguments: the usage


def commands(page):
  """The commands of a page's code blocks, one a string."""
  text = (ROOT / "docs" / page).read_text()
  for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S):
    yield from filter(None, block.replace("\\\n", " ").split("\n"))


def test_every_command_of_pods_md_is_one(tmp_path):
  """Scripts in a dry run, `clara` by its parser and `clara config`, the rest by its first word."""
  tried = []
  for line in commands("pods.md"):
    words = shlex.split(line.replace(" …", ""), comments=True)
    variables = dict(w.split("=", 1) for w in itertools.takewhile(lambda w: "=" in w, words))
    words = words[len(variables) :]
    if words[:1] == ["sbatch"]:
      words = [w for w in words[1:] if not w.startswith("--nodes")]
    if words[:1] == ["export"]:
      continue
    tried.append(words[0])
    if words[0].startswith("launch/") and not words[0].endswith(".py"):
      extra = {"DRY_RUN": 1, "REPOSITORY": "https://example.org/r", "SPOT": "--spot"}
      run = script(words[0].split("/")[1], *words[1:], **variables, **extra)
      assert run.returncode == 0, (line, run.stderr)
      words = words[words.index("clara") :] if "clara" in words else words[1:]
      if words[0] == "train":
        words = ["clara", *words]
    if words[:2] == ["clara", "train"]:
      where = words.index("--config")
      elsewhere = ("--config.base=", "--config.init_from=")  # which the command reads
      overrides = [w for w in words if w.startswith("--config.") and not w.startswith(elsewhere)]
      assert cli.main(["config", words[where + 1], *overrides]) == 0, line
    if words[0] == "clara":
      cli.make_parser(words[1:]).parse_known_args(words[1:])
    elif words[0] == "python":
      assert (ROOT / words[1]).exists(), line
    else:
      assert words[0] in ("kubectl", "up", "install", "down", "python3", "gcloud"), line
  assert len(tried) >= 20


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


# What kubernetes-sigs/jobset publishes as the fields of a JobSet (v1alpha2); what is in `template`
# is Kubernetes' own, whose client has the schema.
JOBSET = {
  "": {"apiVersion", "kind", "metadata", "spec"},
  "spec": {
    *("replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend"),
    *("coordinator", "managedBy", "ttlSecondsAfterFinished"),
  },
  "failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
  "replicatedJob": {"name", "groupName", "replicas", "template", "dependsOn"},
}


def check(value, kind, where):
  """A value beside the type that Kubernetes' published schema gives it."""
  models = pytest.importorskip("kubernetes.client").models
  if kind.lower().startswith("list["):
    assert isinstance(value, list), where
    for i, item in enumerate(value):
      check(item, kind[5:-1], f"{where}[{i}]")
  elif kind.lower().startswith("dict"):
    inner = kind[5:-1].split(", ", 1)[1]
    for name, item in value.items():
      check(item, inner, f"{where}.{name}")
  elif hasattr(models, kind):
    model = getattr(models, kind)
    types = {model.attribute_map[name]: t for name, t in model.openapi_types.items()}
    for name, item in value.items():
      assert name in types, f"{where}.{name}: {kind} has {sorted(types)}"
      check(item, types[name], f"{where}.{name}")
  else:
    assert isinstance(value, {"str": str, "int": int, "bool": bool, "object": object}[kind]), where


def manifest(*arguments, **variables):
  run = script(
    "gke.sh", *arguments, DRY_RUN=1, NAME="run", REPOSITORY="https://example.org/r", **variables
  )
  assert run.returncode == 0, run.stderr
  return yaml.safe_load(run.stdout)


@pytest.mark.parametrize(
  "variables, slices, hosts, chips, accelerator",
  [
    ({"TPU": "v5e", "TOPOLOGY": "4x8"}, 1, 8, 4, "tpu-v5-lite-podslice"),
    ({"TPU": "v5e", "TOPOLOGY": "2x4", "SPOT": ""}, 1, 1, 8, "tpu-v5-lite-podslice"),
    ({"TPU": "v6e", "TOPOLOGY": "16x16", "SLICES": 2}, 2, 64, 4, "tpu-v6e-slice"),
    ({"TPU": "v5p", "TOPOLOGY": "2x2x4"}, 1, 4, 4, "tpu-v5p-slice"),
    ({"TPU": "tpu7x", "TOPOLOGY": "2x2x1"}, 1, 1, 4, "tpu7x"),
  ],
)
def test_a_job_set_is_what_its_schema_wants(variables, slices, hosts, chips, accelerator):
  made = manifest("clara", "train", **variables)
  assert set(made) <= JOBSET[""] and made["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert set(made["spec"]) <= JOBSET["spec"]
  assert set(made["spec"]["failurePolicy"]) <= JOBSET["failurePolicy"]
  check(made["metadata"], "V1ObjectMeta", "metadata")
  (job,) = made["spec"]["replicatedJobs"]
  assert set(job) <= JOBSET["replicatedJob"] and job["replicas"] == slices
  check(job["template"], "V1JobTemplateSpec", "template")
  spec = job["template"]["spec"]
  assert spec["parallelism"] == spec["completions"] == hosts
  pod = spec["template"]["spec"]
  assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == str(chips)
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
  assert ("cloud.google.com/gke-spot" in pod["nodeSelector"]) == (variables.get("SPOT") != "")


def test_a_server_on_kubernetes_is_what_the_schema_wants():
  deployment, service = yaml.safe_load_all((ROOT / "launch" / "serve.yaml").read_text())
  check(deployment, "V1Deployment", "deployment")
  check(service, "V1Service", "service")
  (container,) = deployment["spec"]["template"]["spec"]["containers"]
  options = cli.make_parser(container["args"]).parse_args(container["args"])
  assert options.port == container["ports"][0]["containerPort"] == 5004
  for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
    assert container[probe]["httpGet"] == {"path": "/healthz", "port": "http"}


def test_a_container_has_what_it_installs():
  text = (ROOT / "launch" / "Dockerfile").read_text()
  for line in re.findall(r"^COPY (.*)$", text, re.M):
    assert all((ROOT / name).exists() for name in line.split()[:-1]), line
  (extras,) = re.findall(r"\.\[([a-z,]+)\$", text)
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert {*extras.split(","), "gpu", "tpu"} <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
  "variables, message",
  [
    ({"TPU": "v9"}, "TPU=v9: expected v4"),
    ({"TOPOLOGY": "32"}, "such as 4x8"),
    ({"TOPOLOGY": "3x3"}, "do not fill machines of 4"),
    ({"SLICES": "two"}, "expected whole numbers"),
  ],
)
def test_a_wrong_variable_is_named(variables, message):
  run = script("gke.sh", "clara", "train", DRY_RUN=1, REPOSITORY="r", **variables)
  assert run.returncode == 2 and message in run.stderr


@pytest.mark.parametrize("ends, status", [("exit 0", 0), ("exit 3", 3), ("sleep 60", 143)])
def test_a_pod_that_is_stopped_has_not_finished(tmp_path, ends, status):
  """The container's script with stand-ins for git, pip and clara; the last one is told to stop,
  saves and ends well, as `clara train` does."""
  (args,) = manifest("clara", "train")["spec"]["replicatedJobs"][0]["template"]["spec"]["template"][
    "spec"
  ]["containers"][0]["args"]
  for name, text in {
    "git": "",
    "pip": "",
    "clara": f"trap 'touch {tmp_path}/saved; exit 0' TERM; touch {tmp_path}/runs; {ends} & wait $!",
  }.items():
    (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
    (tmp_path / name).chmod(0o755)
  pod = subprocess.Popen(
    ["bash", "-c", args.replace("&& cd /clara ", "")],
    env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
  )
  if status == 143:
    while not (tmp_path / "runs").exists():
      time.sleep(0.01)
    pod.send_signal(signal.SIGTERM)
  assert pod.wait(timeout=20) == status
  assert (tmp_path / "saved").exists() == (status == 143)
