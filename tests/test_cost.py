"""Does it fit, and how fast can it be: FLOPs, collectives and bytes against what can be counted by
hand."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from clara_jax.analysis import cost, flops, hlo
from clara_jax.config import MeshConfig
from clara_jax.sharding import make_mesh, mesh_sizes
from clara_jax.training import config_file
from clara_jax.training.program import Program

ROOT = pathlib.Path(__file__).parents[1]
# Beside the environment that users run in, where every command would look for a TPU.
LIBTPU = pathlib.Path(os.environ.get("CLARA_LIBTPU", "")) / "libtpu" / "libtpu.so"
needs_libtpu = pytest.mark.skipif(
  not LIBTPU.exists() and importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: make test does it, in VENV/libtpu",
)


@pytest.fixture(autouse=True)
def libtpu(monkeypatch):
  """JAX finds the compiler."""
  if LIBTPU.exists():
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(LIBTPU))


def aot(*arguments):
  run = subprocess.run(
    [sys.executable, "launch/aot.py", "--json", *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  return run.returncode, json.loads(run.stdout) if run.stdout else None, run.stderr


def test_flops_are_counted_as_often_as_they_run():
  x, w = jnp.zeros((4, 8)), jnp.zeros((5, 8, 8))

  def layer(x, w):
    return jnp.tanh(x @ w), None

  one = 2 * 4 * 8 * 8
  assert flops.count(lambda x, w: jax.lax.scan(layer, x, w)[0], x, w) == 5 * one
  loss = lambda x, w: jax.lax.scan(jax.checkpoint(layer), x, w)[0].sum()
  # Forward, again, two gradients.
  assert flops.count(jax.grad(loss, argnums=(0, 1)), x, w) == 5 * (one + one + 2 * one)
  assert flops.count(lambda x, w: (x @ w[0]).sum() * 0 + x.sum(), x, w) == one
  assert flops.count(lambda x, w: (x @ w[0], x)[1], x, w) == 0  # nobody needs it


def test_model_flops_leave_recomputation_out():
  """With full recomputation a product with frozen weights runs three times, the method needs two;
  one of attention four and three."""

  def program(stage, *overrides):
    return Program(
      dataclasses.replace(
        config_file.load_config(f"configs/mistral_7b.py:{stage}", overrides),
        mesh=MeshConfig("chip"),
      ),
      10,
    )

  scp, joint, contrastive = (
    program("scp"),
    *(program(s, "--config.data.store=S") for s in ("joint", "contrastive")),
  )
  assert 4 / 3 < cost.step_flops(scp) / cost.model_flops(scp, scp.batch_shapes()) < 3 / 2
  a, b = (cost.model_flops(p, p.batch_shapes()) for p in (joint, contrastive))
  # The contrastive stage reads questions only, of 288 tokens beside prompts of 1,024.
  assert b < 0.3 * a


def test_mesh_presets():
  sizes = lambda devices, slices=1, **fields: tuple(
    mesh_sizes(MeshConfig(**fields), devices, slices).values()
  )
  assert sizes(8) == (1, 8, 1, 1)
  assert sizes(1, preset="chip") == (1, 1, 1, 1)
  assert sizes(8, preset="host") == (1, 1, 8, 1)
  assert sizes(256, preset="pod") == (1, 8, 32, 1)
  assert sizes(256, preset="pod", tensor=2) == (1, 4, 32, 2)
  assert sizes(512, 2, preset="slices") == (2, 1, 256, 1)


@needs_libtpu
def test_a_tpu_program_is_read_right():
  from jax.experimental import topologies

  os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
  devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
  mesh = make_mesh(MeshConfig(), devices)
  rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

  def step(x, w):
    def body(carry, w):
      return jnp.tanh(carry @ w), (carry @ w).sum(0)

    return jax.lax.scan(body, x, w)

  x = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=rows)
  w = jax.ShapeDtypeStruct((7, 512, 512), jnp.float32, sharding=whole)
  text = jax.jit(step, out_shardings=(rows, whole)).lower(x, w).compile().as_text()
  report = hlo.analyze(text)
  # One sum over the rows in each of seven layers, or one of all seven after the loop.
  assert report.collectives["all-reduce"] in (1, 7)
  assert report.interconnect_bytes == pytest.approx(7 * 2 * 512 * 4 * 3 / 4, rel=0.01)
  # Every layer's weights are read once.
  assert 7 * 512 * 512 * 4 <= report.memory_bytes < 4 * 7 * 512 * 512 * 4


@needs_libtpu
def test_slices_are_joined_by_data_parallelism_alone():
  from jax.experimental import topologies

  os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x2", num_slices=2
  ).devices
  mesh = make_mesh(MeshConfig("slices"), devices)
  assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 4, "tensor": 1}
  assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]


@needs_libtpu
def test_the_real_step_compiles_for_a_topology():
  status, report, err = aot(
    "--config", "configs/tiny.py:joint", "--topology", "v5e:2x4", "--config.mesh.preset=host"
  )
  assert status == 0, err[-2000:]
  assert report["chips"] == 8 and report["mesh"]["fsdp"] == 8 and report["fits"]
  assert set(report["bytes_per_chip"]) >= {"arguments", "temporaries", "output", "total"}
  assert report["collectives"]["all-gather"] > 4 and report["flops_per_step"] > 1e9
  assert report["roofline_seconds"]["step"] == max(report["roofline_seconds"].values()) > 0
  assert report["compile_seconds"] > 0


def test_gpus_by_analysis_and_what_would_make_it_fit():
  status, report, _ = aot("--config", "configs/mistral_7b.py:scp", "--gpus", 8, "--chip", "h100")
  assert (status, report["method"], report["fits"], report["remedies"]) == (0, "analysis", True, [])
  # 7.24e9 weights in bfloat16 and their share of 8; adapters and optimizer: 84e6 floats three
  # times.
  expected = (7.242e9 * 2 + 84e6 * 12) / 8
  assert report["bytes_per_chip"]["arguments"] == pytest.approx(expected, rel=0.03)
  assert np.isclose(report["flops_per_step"], 3 * 2 * 7.0e9 * 128 * (2048 + 288), rtol=0.1)
  status, report, _ = aot("--config", "configs/mistral_7b.py:scp", "--gpus", 2, "--chip", "a100")
  assert (
    status == 1
    and not report["fits"]
    and any("config.train.accumulate=" in r for r in report["remedies"])
  )


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config", "configs/tiny.py:scp", "--topology", "v9:2x2"], "unknown chip 'v9'"),
    (["--config", "configs/tiny.py:scp", "--gpus", "6"], "does not divide over the 6 parts"),
    (
      ["--config", "configs/tiny.py:scp", "--gpus", "4", "--config.mesh.tensor=4"],
      "num_kv_heads=2 does not divide",
    ),
    (
      [
        "--config",
        "configs/mistral_7b.py:scp",
        "--gpus",
        "4",
        "--config.mesh.fsdp=4",
        "--config.mesh.tensor=1",
        "--config.clara.model.width=3070",
      ],
      "of size 3070 does not divide over the 4 devices of mesh axis",
    ),
  ],
)
def test_bad_layouts_are_named(arguments, message):
  status, report, err = aot(*arguments)
  assert status == 2 and report is None and message in err and len(err.strip().splitlines()) == 1
