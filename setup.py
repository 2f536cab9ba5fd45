"""Packaging of clara_jax; tool settings are in pyproject.toml."""

import setuptools

QUICKSTART = ["matplotlib>=3.9", "scann>=1.4.2; platform_system == 'Linux'"]
# the latter is imported by the former, which does not say so
RECORDS = ["tensorflow-datasets>=4.9.9", "importlib_resources>=6.0"]
TENSORBOARD = ["tensorboardX>=2.6"]
INT8 = ["qwix>=0.1.8"]
COMPACT = ["faiss-cpu>=1.11"]
EVALUATE = ["bm25s>=0.2", "rouge-score>=0.1.2", "matplotlib>=3.9"]
SYNTHESIZE = ["aiohttp>=3.10", "rouge-score>=0.1.2", "matplotlib>=3.9", "sentencex>=1.0.20"]
BERTSCORE = ["bert-score>=0.3.13", "torch>=2.6"]
SERVE = [
  "starlette>=0.46",
  "uvicorn>=0.34",
  "pydantic>=2.10",
  "orjson>=3.10",
  "prometheus-client>=0.21",
]
GGUF = ["gguf>=0.17"]
# reads a tokenizer.model where there is no tokenizer.json
SENTENCEPIECE = ["sentencepiece>=0.2", "protobuf>=5"]
DENSE = ["sentence-transformers>=5.0"]  # clara candidates with a dense model; brings torch
TEST = [
  "pytest>=8.3",
  "pytest-xdist>=3.6",
  "chex>=0.1.90",
  "hypothesis>=6.100",
  "peft>=0.17",
  "httpx>=0.28",
  "playwright>=1.50",
  "libtpu; platform_system == 'Linux'",
]  # compiles TPU programs; no TPU is needed

setuptools.setup(
  name="clara_jax",
  version="0.1.0",
  description="CLaRa (arXiv 2511.18659) in JAX: retrieval and answers in one space of continuous "
  "memory tokens.",
  long_description=open("README.md", encoding="utf-8").read(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_namespace_packages(include=["clara_jax", "clara_jax.*"]),
  package_data={
    "clara_jax": [
      "py.typed",
      "experiments/quickstart/pretrained/*",
      "serving/page/*",
      "synthesis/prompts/*",
    ]
  },
  install_requires=[
    "absl-py>=2.1",
    "array_record>=0.7",
    "etils[epath]>=1.12",
    "flax>=0.12.8,<0.13",
    "grain>=0.2.18",
    "regex>=2024.5",
    "huggingface_hub>=1.0",
    "jax>=0.10,<0.13",
    "jinja2>=3.1",
    "markupsafe>=2.1",
    "ml-collections>=1.0",
    "ml-dtypes>=0.5",
    "numpy>=2.0",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12.8",
    "safetensors>=0.5",
    "tensorstore>=0.1.70",
    "tokenizers>=0.21",
    "transformers>=5.0",
  ],
  extras_require={
    "gpu": ["jax[cuda12]>=0.10,<0.13"],
    "tpu": ["jax[tpu]>=0.10,<0.13"],
    "quickstart": QUICKSTART,
    "scann": QUICKSTART[1:],
    "torch": ["torch>=2.6"],
    "records": RECORDS,
    "tensorboard": TENSORBOARD,
    "int8": INT8,
    "compact": COMPACT,
    "evaluate": EVALUATE,
    "synthesize": SYNTHESIZE,
    "bertscore": BERTSCORE,
    "dense": DENSE,
    "serve": SERVE,
    "gguf": GGUF,
    "sentencepiece": SENTENCEPIECE,
    "test": [
      *TEST,
      *QUICKSTART,
      *RECORDS,
      *TENSORBOARD,
      *INT8,
      *COMPACT,
      *EVALUATE,
      *BERTSCORE,
      *DENSE,
      *SYNTHESIZE,
      *SERVE,
      *GGUF,
      *SENTENCEPIECE,
      "torch>=2.6",
    ],
    "lint": ["ruff>=0.9"],
  },
  entry_points={"console_scripts": ["clara = clara_jax.cli.main:run"]},
)
