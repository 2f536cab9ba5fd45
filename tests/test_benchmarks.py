"""The speed benchmarks run, and their two sides compute the same; nothing is timed."""

import pathlib
import sys

import numpy as np
import pytest

from tests.conftest import shared

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def test_no_script_hides_a_module():
  """A script's folder comes first in its path: JAX has imported a benchmark for `compression`,
  which Python has since 3.14."""
  names = {path.stem for path in BENCHMARKS.rglob("*.py")}
  assert not names & (sys.stdlib_module_names | {"compression", "annotationlib"})


@pytest.fixture(scope="module")
def speed(monkeypatch_module):
  monkeypatch_module.syspath_prepend(str(BENCHMARKS))
  import speed

  monkeypatch_module.setattr(speed, "WIDTH", 64)
  monkeypatch_module.setattr(speed, "BATCHES", 1)
  monkeypatch_module.setattr(speed, "REPEATS", 1)
  monkeypatch_module.setattr(speed, "NEW_TOKENS", 4)
  monkeypatch_module.setattr(speed.clara_config, "__defaults__", (1, 32, 8))
  return speed


@pytest.fixture(scope="module")
def monkeypatch_module():
  with pytest.MonkeyPatch.context() as patch:
    yield patch


@pytest.fixture(scope="module")
def scratch(speed, tmp_path_factory):
  folder = tmp_path_factory.mktemp("speed")
  speed.prepare(shared("data", "squad"), folder)
  return folder


@pytest.mark.parametrize(
  "task, ours",
  [
    ("instruct_step", "jax"),
    ("joint_step", "jax-store"),
    ("joint_step", "jax"),
    ("compress", "jax"),
    ("answer", "jax"),
    ("answer", "jax-merged"),
    ("retrieve", "jax"),
  ],
)
def test_both_sides_compute_the_same(speed, scratch, task, ours):
  mine, other = (speed.side(name, task, scratch, 2) for name in (ours, "torch"))
  np.testing.assert_allclose(mine["check"], other["check"], rtol=1e-4)
  assert mine["samples"] == other["samples"] and len(mine["seconds"]) == 2


def test_growth_is_drawn(monkeypatch_module, tmp_path):
  monkeypatch_module.syspath_prepend(str(BENCHMARKS))
  import growth

  monkeypatch_module.setattr(growth, "REPEATS", 1)
  point = {
    "value": 64,
    **growth.measure("joint", length=32, ratio=8, layers=1, candidates=5, from_store=True),
  }
  assert point["seconds"] > 0
  report = {
    title: {kind: [point] for kind in kinds} for title, (_, _, kinds) in growth.SWEEPS.items()
  }
  growth.draw(report, str(tmp_path / "growth.svg"))
  assert (tmp_path / "growth.svg").read_text().count("<svg") == 1
