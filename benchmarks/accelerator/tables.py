"""The JSON of run.py as tables of docs/performance.md and docs/real_language.md.

    python benchmarks/accelerator/tables.py DIR

DIR holds checks.json, speed-jax.json, speed-torch.json, language.json, or some of them.
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any


def main() -> None:
  """Prints Markdown."""
  if len(sys.argv) != 2:
    sys.exit("usage: tables.py DIR")
  directory = pathlib.Path(sys.argv[1])
  results = {
    name: json.loads(file.read_text())
    for name in ("checks", "speed-jax", "speed-torch", "train", "language")
    if (file := directory / f"{name}.json").exists()
  }
  if not results:
    sys.exit(f"{directory}: no results of run.py")
  print("\n".join(tables(results)))


def tables(results: dict[str, dict]) -> Iterator[str]:
  """Lines of all tables."""
  for name in ("checks", "speed-jax", "speed-torch", "train"):
    if name in results:
      about = results[name]
      yield (
        f"{name}: {about['device']}, {about['date']}, `{about['command']}`, "
        f"{', '.join(f'{k} {about[k]}' for k in ('jax', 'torch', 'transformers') if k in about)}"
        f"{' (smoke: no figure means anything)' if about.get('smoke') else ''}"
      )
  if "checks" in results:
    yield from ("", "| check | found | allowed | |", "|---|---|---|---|")
    for name, item in results["checks"]["items"].items():
      yield (
        f"| {name} | {_numbers(item.get('found', _why(item)))} | "
        f"{_numbers(item.get('allowed', ''))} | {_outcome(item)} |"
      )
  if "speed-jax" in results:
    yield from speed(results["speed-jax"], results.get("speed-torch", {"items": {}}))
  if "language" in results:
    yield from language(results["language"])


def speed(ours: dict, other: dict) -> Iterator[str]:
  """Both sides, with ratios."""
  yield from (
    "",
    "| | JAX, a second | tokens a second | first token, ms | MFU | memory bandwidth | PyTorch, a "
    "second | times PyTorch | "
    "compiling, s |",
    "|---|---|---|---|---|---|---|---|---|",
  )
  for name, item in ours["items"].items():
    if "seconds" not in item:
      yield f"| {name} | {_why(item)} | | | | | | | |"
      continue
    torch = other["items"].get(name, {})
    key = "tokens_per_second" if "tokens_per_second" in item else "per_second"
    ratio = f"{item[key] / torch[key]:.2f}" if torch.get(key) else ""
    first = f"{1e3 * item['time_to_first_token']:.1f}" if "time_to_first_token" in item else ""
    yield (
      f"| {name} | {_number(item['per_second'])} | {_number(item.get('tokens_per_second'))} | "
      f"{first} | {_share(item.get('mfu'))} | "
      f"{_share(item.get('bandwidth_share'))} | {_number(torch.get('per_second')) if torch else ''}"
      f"{_why(torch) if torch and 'seconds' not in torch else ''} | {ratio} | "
      f"{item['first_seconds'] - item['seconds']:.0f} |"
    )
  yield from ("", "| the paper's table, a batch of 4 | the paper, ms | here, ms |", "|---|---|---|")
  for name, ms in ours["paper_ms"].items():
    item = ours["items"].get(f"paper: {name}", {})
    yield (
      f"| {name} | {ms} | {1e3 * item['seconds']:.1f} |"
      if "seconds" in item
      else f"| {name} | {ms} | {_why(item)} |"
    )


def language(results: dict) -> Iterator[str]:
  """Trainings and tests of the recipe."""
  yield from (
    "",
    "| training | steps | batch | s | rows a second | MFU | first loss | last loss |",
    "|---|---|---|---|---|---|---|---|",
  )
  for name, item in results["trainings"].items():
    if "failed" in item:
      yield f"| {name} | {item['failed']} | | | | | | |"
      continue
    losses = [x["loss"] for x in item["losses"]]
    yield (
      f"| {name} | {item['steps']} | {item['batch_size']} | {item['seconds']:.0f} | "
      f"{_number(item['samples_per_second'])} | "
      f"{_share(item['mfu'])} | {losses[0]:.3f} | {losses[-1]:.3f} |"
    )
  yield from (
    "",
    "| test | EM | F1 | cover EM | recall@1 | recall@5 |",
    "|---|---|---|---|---|---|",
  )
  for name, item in results["tests"].items():
    cells = [_interval(item.get(k)) for k in ("em", "f1", "cover_em", "recall_at_1", "recall_at_5")]
    yield (
      f"| {name} | {' | '.join(cells)} |" if "em" in item else f"| {name} | {_why(item)} | | | | |"
    )


def _why(item: dict) -> str:
  return (
    f"failed: {item['failed'][:120]}"
    if "failed" in item
    else f"skipped: {item['skipped']}"
    if "skipped" in item
    else "not run"
  )


def _outcome(item: dict) -> str:
  return {True: "holds", False: "**does not hold**"}.get(item.get("passed"), "")


def _numbers(value: Any) -> str:
  return (
    ", ".join(f"{k} {v:.2g}" for k, v in value.items())
    if isinstance(value, dict)
    else (f"{value:.2g}" if isinstance(value, float) else str(value))
  )


def _number(value: float | None) -> str:
  return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _share(value: float | None) -> str:
  return "" if value is None else f"{value:.0%}"


def _interval(value: dict | None) -> str:
  return "" if value is None else f"{value['mean']:.3f} ({value['low']:.3f}-{value['high']:.3f})"


if __name__ == "__main__":
  main()
