"""CLaRa (arXiv 2511.18659) in JAX: retrieval and answers in one space of continuous memory tokens."""

__version__ = "0.1.0"
