"""Shared fixtures. Real data lives beside the repository; tests that need it skip where it is
missing."""

import logging
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # a mesh in every test
# Most of the time is compiling.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
  "--xla_cpu_parallel_codegen_split_count=1",
)

import hypothesis
import pytest
from jaxtyping import install_import_hook

# Shapes in annotations are checked while the tests trace.
install_import_hook(["clara_jax.ops", "clara_jax.model"], "beartype.beartype")

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")

# What `make test-real` fetches from the package registry.
REAL = pathlib.Path(
  os.environ.get("CLARA_REAL", pathlib.Path(__file__).resolve().parents[1] / ".real")
)
SHARED = pathlib.Path(
  os.environ.get("CLARA_SHARED", pathlib.Path(__file__).resolve().parents[2] / "shared")
)


def shared(*parts: str) -> pathlib.Path:
  """A path below the shared data folder; skips the test where it is missing."""
  path = SHARED.joinpath(*parts)
  if not path.exists():
    pytest.skip(f"{'/'.join(parts)} is not there: set CLARA_SHARED to the folder with data/")
  return path


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
  """The folder with the reference implementation's numbers."""
  return pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def answerer(tmp_path_factory):
  """Over a store of 20 documents; tests leave it as it is."""
  from clara_jax.data.schemas import Document
  from clara_jax.inference.answer import Answerer
  from clara_jax.inference.checkpoint import Checkpoint
  from clara_jax.inference.compress import compress_corpus
  from clara_jax.memory.store import MemoryStore
  from clara_jax.model import Clara
  from clara_jax.retrieval import index
  from clara_jax.testing import tiny

  folder = str(tmp_path_factory.mktemp("served"))
  documents = [Document(d["id"], d["text"], d["title"]) for d in tiny.world().documents(False)[:20]]
  compress_corpus(
    Checkpoint(Clara(tiny.config()), tiny.prompt_tokenizer(), tiny.weights()),
    documents,
    folder,
    bucket=64,
    progress=False,
  )
  store = MemoryStore(folder)
  return Answerer(
    Checkpoint(Clara(tiny.config()), tiny.prompt_tokenizer(), tiny.weights()),
    store,
    index=index.build(store, "exact"),
    max_new_tokens=6,
    stream_every=2,
  )


@pytest.fixture(autouse=True)
def plain_logging():
  """A command configures clara_jax's logger; other tests find it as it was."""
  logger = logging.getLogger("clara_jax")
  handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
  yield
  logger.handlers, logger.propagate = handlers, propagate
  logger.setLevel(level)


ESTIMATOR = """
import jax
from clara_jax.ops.estimators import Selection, weighted

def mine(scores, k, temperature, rng, scale: float = 1.0) -> Selection:
  indices = jax.lax.top_k(scores, k)[1]
  soft = jax.nn.softmax(scale * scores / temperature)
  return weighted(indices, jax.numpy.repeat(soft[:, None], k, axis=1))
"""


@pytest.fixture
def own_estimator(tmp_path, monkeypatch) -> str:
  """FILE.py:mine; the same function is the entry point 'mine' of a package, as pip would install
  it."""
  (tmp_path / "my_package.py").write_text(ESTIMATOR)
  info = tmp_path / "my_package-1.0.dist-info"
  info.mkdir()
  (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
  (info / "entry_points.txt").write_text("[clara_jax.estimators]\nmine = my_package:mine\n")
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / "file.py").write_text(ESTIMATOR)
  return f"{tmp_path}/file.py:mine"
