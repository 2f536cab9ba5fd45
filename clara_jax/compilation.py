"""Compiled programs that outlive their process."""

import os
import pathlib

import jax


def enable_compilation_cache() -> None:
  """Keeps compiled programs in `~/.cache/clara_jax/programs` (below `XDG_CACHE_HOME` where that is
  set), so that the next start of a 7 B server or run takes seconds. `JAX_COMPILATION_CACHE_DIR`
  names another place. Call it after `jax.distributed.initialize`.

  Programs for CPU are not kept: jaxlib 0.10 may crash when it reads them back.
  """
  if jax.config.jax_compilation_cache_dir or jax.default_backend() == "cpu":
    return
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home, "clara_jax", "programs")))
