"""A Hugging Face model, a GGUF file, a PEFT adapter or a checkpoint of the released code becomes a
clara_jax checkpoint.

    python conversion/import_hf.py SRC DST [--base DIR] [--verify]

The same as `clara convert SRC DST --to clara`.
"""

import sys

from clara_jax.cli.main import main

if __name__ == "__main__":
  sys.exit(main(["convert", *sys.argv[1:], "--to", "clara"]))
