"""The house: imports run downward only, torch and ScaNN stay in their rooms; the mesh refuses what
it cannot place."""

import ast
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.sharding import PartitionSpec

import clara_jax
from clara_jax import axes
from clara_jax.compilation import enable_compilation_cache
from clara_jax.config import ConfigError, MeshConfig, from_config_dict
from clara_jax.model import Clara
from clara_jax.sharding import make_mesh, spec, tree_shardings
from clara_jax.testing import tiny

ROOT = pathlib.Path(clara_jax.__file__).parent
FLOORS = [
  {"errors", "axes", "io", "former"},
  {"config", "batch", "buckets"},
  {"extensions", "reports"},
  {"data"},
  {"ops", "documents"},
  {"nn"},
  {"model", "sharding", "distributed", "compilation", "workers"},
  {"memory", "analysis"},
  {"retrieval"},
  {"inference"},
  {"checkpoints", "configs"},
  {"training"},
  {"evaluation"},
  {"synthesis"},
  {"serving"},
  {"experiments"},
  {"cli", "testing"},
  {"__main__", "__init__"},
]
# On one floor, rooms may import each other only where it is said here.
SAME_FLOOR: set[tuple[str, str]] = set()


def floor(room):
  return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      yield node.module or "", [a.name for a in node.names]
    elif isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, []


def test_imports_run_downward():
  for path in ROOT.rglob("*.py"):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module, names in imports(path):
      if module.split(".")[0] != "clara_jax":
        continue
      others = [module.split(".")[1]] if "." in module else names
      for other in others:
        if other == room or other == "__version__":
          continue
        allowed = floor(other) < floor(room) or (room, other) in SAME_FLOOR
        assert allowed, f"{path.relative_to(ROOT)} imports {other}"
    if room == "data":
      assert all(not m.startswith("jax") for m, _ in imports(path)), path


@pytest.mark.parametrize(
  "library, room", [("torch", ("checkpoints", "testing")), ("scann", "retrieval/scann.py")]
)
def test_heavy_libraries_stay_in_their_rooms(library, room):
  for path in ROOT.rglob("*.py"):
    if any(m.split(".")[0] == library for m, _ in imports(path)):
      assert str(path.relative_to(ROOT)).startswith(room)


def test_the_core_needs_neither_torch_nor_tensorflow():
  code = (
    "import sys; sys.modules.update(dict.fromkeys(('torch', 'tensorflow', 'scann', "
    "'matplotlib'))); "
    "import clara_jax.cli.main, clara_jax.experiments.quickstart, clara_jax.training.run"
  )
  subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_parameter_has_a_place():
  model = Clara(tiny.config())
  boxed = jax.eval_shape(lambda: model.init_boxed(jax.random.key(0)))
  shardings = tree_shardings(boxed, make_mesh())
  assert set(shardings) == {"base", "memory_embedding", "compressor", "query_reasoner", "generator"}
  assert shardings["base"]["layers"]["mlp"]["up"]["kernel"].spec == PartitionSpec(
    None, "fsdp", "tensor"
  )
  assert shardings["generator"]["layers"]["mlp"]["up"]["a"].spec == PartitionSpec(
    None, ("fsdp", "tensor"), None
  )


def test_unknown_and_colliding_axes():
  with pytest.raises(ConfigError, match="base/x: unknown logical axis 'wdith'"):
    spec(("wdith",), "base/x")
  with pytest.raises(
    ConfigError, match="base/x: axes 'mlp' and 'heads' are both on mesh axis 'tensor'"
  ):
    spec((axes.MLP, axes.HEADS), "base/x")
  with pytest.raises(ConfigError, match="mesh.model: unknown field"):
    from_config_dict(MeshConfig, {"model": 2}, "mesh")
  with pytest.raises(ConfigError, match="does not fit 2 devices"):
    make_mesh(MeshConfig(data=7))


def test_compiled_programs_are_kept_for_accelerators(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  before = jax.config.jax_compilation_cache_dir
  try:
    jax.config.update("jax_compilation_cache_dir", None)
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None  # a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "clara_jax" / "programs")
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
