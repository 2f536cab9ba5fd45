"""What is in a checkpoint of any kind: its configuration, its base, every tensor; nothing is
loaded.

    python conversion/inspect_checkpoint.py CKPT [--base DIR] [--allow-config FIELD] [--hash]
"""

import argparse
import math
import sys

from clara_jax.checkpoints import formats, lazy
from clara_jax.cli.output import configure_logging
from clara_jax.config import to_json
from clara_jax.errors import InputError


def main() -> int:
  """Prints; returns the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("checkpoint")
  parser.add_argument(
    "--base", help="the base, where the checkpoint's own record does not lead to it"
  )
  parser.add_argument(
    "--allow-config",
    action="append",
    default=[],
    metavar="FIELD",
    help="a field that is not known and changes nothing",
  )
  parser.add_argument(
    "--hash", action="store_true", help="read the whole base and compare its hash with the record"
  )
  options = parser.parse_args()
  configure_logging()
  try:
    opened = formats.open_checkpoint(options.checkpoint, options.base, allow=options.allow_config)
    print(f"kind    {opened.kind}\nstage   {opened.stage}\nbase    {opened.base or 'its own'}")
    print(f"sha256  {opened.base_sha256 or 'not recorded'}")
    if options.hash:
      print(f"        {opened.check_base()} (read)")
  except (InputError, OSError) as error:
    print(error, file=sys.stderr)
    return 2
  print(to_json(opened.config))
  for name, tree in {**opened.groups, "base": opened.plain_base}.items():
    total = 0
    print(f"\n{name}")
    for path, leaf in sorted(lazy.leaves({"": tree})):
      total += math.prod(leaf.shape)
      print(
        f"  {'/'.join(path[1:]) or name:<40} {leaf.dtype!s:<9} {'x'.join(map(str, leaf.shape))}"
      )
    print(f"  {total:,} parameters")
  return 0


if __name__ == "__main__":
  sys.exit(main())
