"""Ctrl-C, at any moment of any command: status 130, no traceback, nothing lost."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from clara_jax.data.schemas import write_rows
from clara_jax.memory.store import MemoryStore
from clara_jax.retrieval import index as indices
from clara_jax.testing import tiny
from tests.helpers import free_port, question

ROOT = pathlib.Path(__file__).parents[1]
SECONDS = 9.0  # in which most commands have ended by themselves
MOMENTS = int(os.environ.get("CLARA_MOMENTS", 1))  # 10 of each: no failure, 2026-12-01


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("folder")
  tiny.write_checkpoint(str(path / "joint"), tiny.config(), tiny.weights())
  write_rows(tiny.raw_rows("joint"), str(path / "rows.jsonl"))
  write_rows(tiny.world().documents(test=True), str(path / "documents.jsonl"))
  command(path, "compress", path / "store").wait()
  indices.update(MemoryStore(str(path / "store")), "exact")
  return path


def command(path, name, store):
  checkpoint = ("--checkpoint", path / "joint")
  arguments = {
    "ask": (*checkpoint, "--store", path / "store", "--max-new-tokens", 4, question()),
    "lens": (*checkpoint, question()),
    "compress": (*checkpoint, "--documents", path / "documents.jsonl", "--store", store),
    "index": ("--store", path / "store", "--kind", "exact"),
    "evaluate": (*checkpoint, "--rows", path / "rows.jsonl", "--setting", "joint", "--limit", 4),
    "loss": (*checkpoint, "--stage", "joint", "--rows", path / "rows.jsonl"),
    "convert": (path / "joint", f"{store}-converted", "--to", "clara"),
    "config": ("mistral_7b:scp",),
    "serve": (*checkpoint, "--store", path / "store", "--port", free_port(), "--max-batch", 2),
  }[name]
  return subprocess.Popen(
    [sys.executable, "-m", "clara_jax", name, *map(str, arguments)],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"},
  )


@pytest.mark.parametrize(
  "name",
  ["ask", "lens", "compress", "index", "evaluate", "loss", "convert", "config", "serve"],
)
def test_ctrl_c(folder, tmp_path, name):
  chance = random.Random(name)
  for moment in range(MOMENTS):
    process = command(folder, name, tmp_path / f"store-{moment}")
    # Python itself needs a moment before any of our code runs.
    time.sleep(chance.uniform(0.5, SECONDS if name != "config" else 2.0))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130), (moment, process.returncode, err[-2000:])
    assert "Traceback" not in err and "Error" not in err, (moment, err[-3000:])
  if name == "compress":
    assert command(folder, name, tmp_path / "store-0").wait() == 0
    store = MemoryStore(str(tmp_path / "store-0"))
    assert store.verify()["documents"] == len(MemoryStore(str(folder / "store")))
