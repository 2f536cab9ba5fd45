"""Meshes, processes, interruptions: the same numbers on any number of devices and hosts, and after
any stop."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from clara_jax.data import records
from clara_jax.data.schemas import write_rows
from clara_jax.testing import tiny
from tests.helpers import free_port

ROOT = pathlib.Path(__file__).parents[1]
MESHES = {
  "one": {"preset": "chip"},
  "data": {"data": 8},
  "fsdp": {"preset": "host"},
  "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
  "tensor": {"data": 2, "tensor": 4},
}
STAGES = ("pretrain", "scp", "instruct", "joint", "contrastive")
# The mesh that has everything, two processes and one kill; CLARA_ALL_MESHES=1 tries all meshes,
# four processes and three kills, in ten minutes more.
ALL = bool(os.environ.get("CLARA_ALL_MESHES"))
SOME = MESHES if ALL else {name: MESHES[name] for name in ("one", "mixed")}
PROCESSES, KILLS = (4, 3) if ALL else (2, 1)
GOLDEN = ROOT / "tests" / "collectives.json"


def start(job, devices, *who, **popen):
  environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
  return subprocess.Popen(
    [sys.executable, "-m", "clara_jax.testing.pod_worker", json.dumps(job), *map(str, who)],
    env=environment,
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **popen,
  )


def finish(process, timeout=400):
  out, err = process.communicate(timeout=timeout)
  assert process.returncode == 0, err[-3000:]
  return json.loads(next(line for line in out.splitlines() if line.startswith("REPORT"))[6:])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("rows")
  paths = {}
  for stage in STAGES:
    path = folder / f"{stage}.jsonl"
    write_rows(tiny.raw_rows(stage), str(path))
    paths[stage] = str(path)
  for kind in ("scp", "joint"):
    paths[f"{kind} records"] = records.build(kind, [paths[kind]], str(folder), files=4).directory
  return paths


# 'instruct' has the loss of 'scp', and 'contrastive' a part of 'joint'.
@pytest.mark.parametrize("stage", STAGES if ALL else ("pretrain", "scp", "joint"))
def test_every_mesh_gives_the_losses_of_one_device(files, stage):
  job = {
    "stage": stage,
    "rows": [files[stage]],
    "train": {"steps": 20},
    "runs": [{"mesh": mesh} for mesh in SOME.values()],
  }
  runs = dict(zip(SOME, finish(start(job, 8)), strict=True))
  expected = list(runs["one"]["losses"].values())
  assert len(expected) == 20 and expected[-1] != expected[0]
  for name, run in runs.items():
    np.testing.assert_allclose(list(run["losses"].values()), expected, rtol=1e-5, err_msg=name)
  for name, ways in (("data", 1), ("fsdp", 8), ("mixed", 4), ("tensor", 4)):
    for leaf, (whole, shard) in runs[name]["divided"].items() if name in runs else ():
      share = np.prod(whole) / np.prod(shard)
      if leaf.endswith("['kernel']") or leaf.endswith("['a']") or leaf.endswith("['b']"):
        assert share == ways, (name, leaf, whole, shard)


@pytest.fixture(scope="module", params=["scp", "joint"] if ALL else ["joint"])
def collectives(request):
  """(stage, what the compiled step of each mesh sends)."""
  job = {
    "stage": request.param,
    "rows": [],
    "action": "collectives",
    "runs": [{"mesh": mesh} for mesh in MESHES.values()],
  }
  return request.param, dict(zip(MESHES, finish(start(job, 8)), strict=True))


def test_collectives(collectives):
  """The compiled step sends what it has to, and never gathers logits."""
  _, programs = collectives
  assert all(not program["gathered_logits"] for program in programs.values())
  counts = {name: program["counts"] for name, program in programs.items()}
  assert counts["one"] == {}
  assert set(counts["data"]) <= {"all-reduce", "all-gather"} and counts["data"]["all-reduce"] >= 1
  assert counts["fsdp"]["all-gather"] >= 7  # the weights of a layer, at least
  assert counts["tensor"]["all-reduce"] > counts["data"]["all-reduce"]


def test_collectives_are_those_of_before(collectives):
  stage, programs = collectives
  golden = json.loads(GOLDEN.read_text())
  if golden["jax"] != jax.__version__:
    pytest.skip(f"{GOLDEN.name} is of JAX {golden['jax']}; another compiler may send otherwise")
  assert {name: program["counts"] for name, program in programs.items()} == golden[stage]


def test_several_processes_are_one_and_any_other_number_goes_on(files, tmp_path):
  job = {
    "stage": "scp",
    "rows": [files["scp records"]],
    "data": {"shards": 4, "length_window": 2},
    "train": {"steps": 6, "checkpoint_every": 3},
  }
  one = start({**job, "runs": [{"mesh": {"preset": "host"}}]}, 4)
  (straight,) = finish(one)
  assert len(straight["files"]) == 4
  port, work = free_port(), str(tmp_path / "several")
  runs = [{"mesh": {"preset": "host"}, "workdir": work, "stop_at": 3}]
  processes = [
    start({**job, "runs": runs}, 4 // PROCESSES, f"localhost:{port}", PROCESSES, i)
    for i in range(PROCESSES)
  ]
  several = [finish(p)[0] for p in processes]
  share = 4 // PROCESSES
  for i, run in enumerate(several):
    assert run["files"] == [
      f"scp-train.array_record-{f:05}-of-00004" for f in range(i * share, (i + 1) * share)
    ]
    for step, loss in run["losses"].items():
      assert loss == pytest.approx(straight["losses"][step], rel=1e-5)
    leaf, shard = run["divided"]["base['layers']['mlp']['up']['kernel']"]
    assert np.prod(leaf) == 4 * np.prod(shard)
  assert [sorted(sum((run["ids"][s] for run in several), [])) for s in "123"] == [
    sorted(straight["ids"][s]) for s in "123"
  ]
  done = several
  if ALL:  # the same run goes on with two processes
    port = free_port()
    processes = [
      start(
        {**job, "runs": [{"mesh": {"preset": "host"}, "workdir": work, "stop_at": 4}]},
        1,
        f"localhost:{port}",
        2,
        i,
      )
      for i in range(2)
    ]
    done = [finish(p)[0] for p in processes]
  # And then with one, on another mesh.
  (last,) = finish(
    start({**job, "runs": [{"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "workdir": work}]}, 8)
  )
  assert list(last["losses"]) == (["5", "6"] if ALL else ["4", "5", "6"])
  for run in (done[0], last):
    for step, loss in run["losses"].items():
      assert loss == pytest.approx(straight["losses"][step], rel=1e-5)
  np.testing.assert_allclose(last["digest"], straight["digest"], rtol=1e-5)


def test_a_killed_run_goes_on_as_if_nothing_had_been(files, tmp_path):
  job = {
    "stage": "contrastive",
    "rows": [files["joint records"]],
    "data": {"shards": 2, "length_window": 3},
    "train": {"steps": 24, "checkpoint_every": 4},
  }
  (straight,) = finish(start({**job, "runs": [{}]}, 1))
  log, work = tmp_path / "rows.jsonl", tmp_path / "run"
  run = {"workdir": str(work), "log": str(log)}
  rng = np.random.default_rng(0)
  for _ in range(KILLS):
    process = start({**job, "runs": [run]}, 1)
    before = log.read_text().count("\n") if log.exists() else 0
    while (
      process.poll() is None and (log.read_text().count("\n") if log.exists() else 0) < before + 6
    ):
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.05))
    process.kill()
    process.communicate()
  (last,) = finish(start({**job, "runs": [run]}, 1))
  seen = {step: ids for step, ids in map(json.loads, log.read_text().splitlines())}
  assert {str(s): ids for s, ids in seen.items()} == straight["ids"]
  assert last["digest"] == straight["digest"]
  starts = [json.loads(line) for line in (work / "starts.jsonl").read_text().splitlines()]
  assert len(starts) == KILLS + 1 and last["metrics"]["goodput"] < 1


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_ends_well(files, tmp_path, processes):
  """A signal to one process stops all of them at the same step, saved."""
  log, port = tmp_path / "rows.jsonl", free_port()
  job = {
    "stage": "contrastive",
    "rows": [files["joint"]],
    "train": {"steps": 100_000, "checkpoint_every": 100_000, "log_every": 50},
  }
  started = []
  for i in range(processes):
    run = {"workdir": str(tmp_path / "run"), **({"log": str(log)} if i == 0 else {})}
    started.append(
      start(
        {**job, "runs": [run]}, 1, *((f"localhost:{port}", processes, i) if processes > 1 else ())
      )
    )
  while not log.exists() or log.read_text().count("\n") < 10:
    assert all(p.poll() is None for p in started), [
      p.communicate()[1][-2000:] for p in started if p.poll() is not None
    ]
    time.sleep(0.05)
  signal_time = time.monotonic()
  started[-1].send_signal(signal.SIGTERM)
  runs = [finish(p)[0] for p in started]
  assert time.monotonic() - signal_time < 10
  assert len({run["stopped"] for run in runs}) == 1 and runs[0]["stopped"] == runs[0]["step"] >= 10
  assert (tmp_path / "run" / "checkpoints" / str(runs[0]["stopped"]) / "weights").exists()
