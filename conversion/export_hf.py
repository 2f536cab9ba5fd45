"""A clara_jax checkpoint leaves as a plain Hugging Face model, with a role merged into it if one is
named.

    python conversion/export_hf.py SRC DST [--role generator] [--to hf|peft|upstream] [--verify]

The same as `clara convert SRC DST --to hf`.
"""

import sys

from clara_jax.cli.main import main

if __name__ == "__main__":
  sys.exit(main(["convert", *sys.argv[1:], *([] if "--to" in sys.argv else ["--to", "hf"])]))
