"""What `clara gradients` does: its results in a directory, and one page of all of them."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from clara_jax.config import ConfigError
from clara_jax.data.schemas import Row
from clara_jax.gradients import pages
from clara_jax.gradients.audit import VARIED, Setting, audit_generator, audit_setting
from clara_jax.gradients.compare import compare
from clara_jax.gradients.variants import AUDITED, TRAINED, parse_all
from clara_jax.interop.checkpoints import Checkpoint
from clara_jax.reproduction.experiments import Sizes

INSTANCES = 16


def run_audit(out: str, names: Sequence[str] = AUDITED, draws: int = 1000, varied: Sequence[str] = tuple(VARIED)) -> dict[str, Any]:
  """Every estimator in `Setting()` and with one thing varied at a time, into OUT/audit.json; settings that are there are not done again.

  Raises:
    ConfigError: an unknown estimator, or OUT has an audit of others.
  """
  variants = parse_all(names)
  _make(out)
  path, start = os.path.join(out, "audit.json"), time.monotonic()
  told = {"names": [v.name for v in variants], "draws": draws, "instances": INSTANCES}
  found = _read(path) or {**told, "seconds": 0.0, "settings": []}
  if {k: found[k] for k in told} != told:
    raise ConfigError(f"{path}: is an audit of {', '.join(found['names'])} with {found['draws']} draws; name another --out")
  before = found["seconds"]
  wanted = [(None, Setting())] + [(factor, dataclasses.replace(Setting(), **{factor: value})) for factor in varied
                                  for value in VARIED[factor]]
  for number, (factor, setting) in enumerate(wanted, 1):
    entry = {"varies": factor, "setting": dataclasses.asdict(setting)}
    if any({k: e[k] for k in entry} == entry for e in found["settings"]):
      continue
    same = next((e["estimators"] for e in found["settings"] if e["setting"] == entry["setting"]), None)
    found["settings"].append(entry | {"estimators": same or audit_setting(setting, variants, draws, INSTANCES)})
    found["seconds"] = round(before + time.monotonic() - start, 1)
    _write(path, found)
    print(f"gradients: setting {number} of {len(wanted)}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
  return {"settings": len(found["settings"]), "estimators": len(variants), "seconds": found["seconds"], **pages.write(out)}


def run_generator(out: str, checkpoint: Checkpoint, rows: Sequence[Row], names: Sequence[str] = AUDITED, n: int = 6, draws: int = 32
                  ) -> dict[str, Any]:
  """The audit with a checkpoint's generator, into OUT/generator.json; see `audit_generator`."""
  variants = parse_all(names)
  _make(out)
  start = time.monotonic()
  found = audit_generator(checkpoint, rows, variants, n=n, draws=draws)
  _write(os.path.join(out, "generator.json"), found | {"seconds": round(time.monotonic() - start, 1)})
  return {"rows": len(rows), "choices": found["choices"], "estimators": len(variants), "seconds": round(time.monotonic() - start, 1),
          **pages.write(out)}


def run_compare(out: str, workdir: str | None = None, names: Sequence[str] = TRAINED, seeds: int = 5, scale: float = 1.0,
                sizes: Sizes | None = None) -> dict[str, Any]:
  """Trainings side by side, into OUT/compare.json; see `compare`. They are kept in OUT/trainings, or in a workdir of `clara reproduce`."""
  variants = parse_all(names)
  _make(out)
  found = compare(workdir or os.path.join(out, "trainings"), variants, seeds, scale, sizes)
  _write(os.path.join(out, "compare.json"), found)
  return {"seeds": seeds, "estimators": len(variants), "seconds": found["seconds"], "against_algorithm1": found["against_algorithm1"],
          **pages.write(out)}


def _make(out: str) -> None:
  try:
    os.makedirs(out, exist_ok=True)
  except FileExistsError:
    raise ConfigError(f"--out {out}: is a file, expected a directory") from None


def _read(path: str) -> dict[str, Any] | None:
  if not os.path.exists(path):
    return None
  with open(path, encoding="utf-8") as file:
    return json.load(file)


def _write(path: str, value: dict[str, Any]) -> None:
  with open(f"{path}.part", "w", encoding="utf-8") as file:
    json.dump(value, file, indent=1)
  os.replace(f"{path}.part", path)
