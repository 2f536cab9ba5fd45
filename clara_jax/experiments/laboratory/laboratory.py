"""What `clara gradients` does: its results in a directory, and one page of all of them."""

import dataclasses
import hashlib
import inspect
import json
import logging
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from clara_jax.checkpoints.formats import Checkpoint
from clara_jax.config import ConfigError
from clara_jax.data.schemas import Row
from clara_jax.experiments.claims.experiments import ExperimentSizes
from clara_jax.experiments.laboratory import pages
from clara_jax.experiments.laboratory.audit import (
  VARIED,
  AuditSetting,
  audit_generator,
  audit_setting,
)
from clara_jax.experiments.laboratory.compare import compare
from clara_jax.experiments.laboratory.variants import AUDITED, TRAINED, Variant, parse_all

log = logging.getLogger(__name__)

INSTANCES = 16


def run_audit(
  out: str, names: Sequence[str] = AUDITED, draws: int = 1000, varied: Sequence[str] = tuple(VARIED)
) -> dict[str, Any]:
  """Every estimator in `AuditSetting()` and with one thing varied at a time, into OUT/audit.json.
  What is there, of the same source, is not done again; the page shows these estimators.

  Raises:
    ConfigError: an unknown estimator, one that is trained with a schedule, or OUT has an audit of
      another number of draws.
  """
  variants = parse_all(names)
  if scheduled := [v.name for v in variants if v.train]:
    raise ConfigError(f"{scheduled[0]}: an audit has one temperature; schedules are for --train")
  _make(out)
  path, start = os.path.join(out, "audit.json"), time.monotonic()
  told = {"draws": draws, "instances": INSTANCES}
  found = _read(path) or {**told, "sources": {}, "seconds": 0.0, "settings": []}
  if {k: found[k] for k in told} != told:
    raise ConfigError(f"{path}: is an audit with {found['draws']} draws; name another --out")
  before, sources = found["seconds"], {v.name: _source(v) for v in variants}
  for name in [
    n for n in found["sources"] if sources.get(n, found["sources"][n]) != found["sources"][n]
  ]:
    for entry in found["settings"]:  # it was changed since
      entry["estimators"].pop(name, None)
  found |= {"names": list(sources), "sources": found["sources"] | sources}
  wanted = [(None, AuditSetting())] + [
    (factor, dataclasses.replace(AuditSetting(), **{factor: value}))
    for factor in varied
    for value in VARIED[factor]
  ]
  for number, (factor, setting) in enumerate(wanted, 1):
    entry = {"varies": factor, "setting": dataclasses.asdict(setting)}
    there = next((e for e in found["settings"] if {k: e[k] for k in entry} == entry), None)
    if there is None:
      same = next(
        (e["estimators"] for e in found["settings"] if e["setting"] == entry["setting"]), {}
      )
      found["settings"].append(there := entry | {"estimators": dict(same)})
    if not (missing := [v for v in variants if v.name not in there["estimators"]]):
      continue
    there["estimators"] |= audit_setting(setting, missing, draws, INSTANCES)
    found["seconds"] = round(before + time.monotonic() - start, 1)
    _write(path, found)
    log.info(f"gradients: setting {number} of {len(wanted)}, {time.monotonic() - start:.0f} s")
  return {
    "settings": len(found["settings"]),
    "estimators": len(variants),
    "seconds": found["seconds"],
    **pages.write(out),
  }


def run_generator(
  out: str,
  checkpoint: Checkpoint,
  rows: Sequence[Row],
  names: Sequence[str] = AUDITED,
  n: int = 6,
  draws: int = 32,
  told: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """The audit with a checkpoint's generator, into OUT/generator.json; see `audit_generator`.
  Estimators of an earlier one stay.

  Args:
    out, checkpoint, rows, names, n, draws: see `audit_generator`.
    told: what else the result tells, and a later start must agree in.

  Raises:
    ConfigError: OUT has an audit of another checkpoint, other rows, N or draws.
  """
  variants = parse_all(names)
  _make(out)
  path, start = os.path.join(out, "generator.json"), time.monotonic()
  of = {**(told or {}), "rows": len(rows), "n": n, "draws": draws}
  there = _read(path) or {**of, "estimators": {}, "seconds": 0.0}
  if {k: there.get(k) for k in of} != of:
    raise ConfigError(
      f"{path}: is an audit of {', '.join(f'{k} {there.get(k)}' for k in of)}; name another --out"
    )
  found = audit_generator(checkpoint, rows, variants, n=n, draws=draws)
  seconds = round(there["seconds"] + time.monotonic() - start, 1)
  _write(
    path,
    {**of, **found, "estimators": there["estimators"] | found["estimators"], "seconds": seconds},
  )
  return {
    "rows": len(rows),
    "choices": found["choices"],
    "estimators": len(variants),
    "seconds": seconds,
    **pages.write(out),
  }


def _source(variant: Variant) -> str:
  """A hash of the function's file: an edited estimator is another one."""
  file = inspect.getsourcefile(variant.estimator.function)
  text = pathlib.Path(file).read_bytes() if file else variant.name.encode()
  return hashlib.blake2b(text, digest_size=8).hexdigest()


def run_compare(
  out: str,
  workdir: str | None = None,
  names: Sequence[str] = TRAINED,
  seeds: int = 5,
  scale: float = 1.0,
  sizes: ExperimentSizes | None = None,
) -> dict[str, Any]:
  """Trainings side by side, into OUT/compare.json; see `compare`. They are kept in OUT/trainings,
  or in a workdir of `clara reproduce`."""
  variants = parse_all(names)
  _make(out)
  found = compare(workdir or os.path.join(out, "trainings"), variants, seeds, scale, sizes)
  _write(os.path.join(out, "compare.json"), found)
  return {
    "seeds": seeds,
    "estimators": len(variants),
    "seconds": found["seconds"],
    "against_algorithm1": found["against_algorithm1"],
    **pages.write(out),
  }


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
