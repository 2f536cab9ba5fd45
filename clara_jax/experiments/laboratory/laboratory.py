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

from clara_jax import io
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
  parameters = {"draws": draws, "instances": INSTANCES}
  report = _read(path) or {**parameters, "sources": {}, "seconds": 0.0, "settings": []}
  if {k: report[k] for k in parameters} != parameters:
    raise ConfigError(f"{path}: is an audit with {report['draws']} draws; name another --out")
  before, sources = report["seconds"], {v.name: _source(v) for v in variants}
  for name in [
    n for n in report["sources"] if sources.get(n, report["sources"][n]) != report["sources"][n]
  ]:
    for entry in report["settings"]:  # it was changed since
      entry["estimators"].pop(name, None)
  report |= {"names": list(sources), "sources": report["sources"] | sources}
  settings = [(None, AuditSetting())] + [
    (factor, dataclasses.replace(AuditSetting(), **{factor: value}))
    for factor in varied
    for value in VARIED[factor]
  ]
  for number, (factor, setting) in enumerate(settings, 1):
    entry = {"varies": factor, "setting": dataclasses.asdict(setting)}
    record = next((e for e in report["settings"] if {k: e[k] for k in entry} == entry), None)
    if record is None:
      same = next(
        (e["estimators"] for e in report["settings"] if e["setting"] == entry["setting"]), {}
      )
      report["settings"].append(record := entry | {"estimators": dict(same)})
    if not (missing := [v for v in variants if v.name not in record["estimators"]]):
      continue
    record["estimators"] |= audit_setting(setting, missing, draws, INSTANCES)
    report["seconds"] = round(before + time.monotonic() - start, 1)
    _write(path, report)
    log.info(f"gradients: setting {number} of {len(settings)}, {time.monotonic() - start:.0f} s")
  return {
    "settings": len(report["settings"]),
    "estimators": len(variants),
    "seconds": report["seconds"],
    **pages.write(out),
  }


def run_generator(
  out: str,
  checkpoint: Checkpoint,
  rows: Sequence[Row],
  names: Sequence[str] = AUDITED,
  n: int = 6,
  draws: int = 32,
  source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """The audit with a checkpoint's generator, into OUT/generator.json; see `audit_generator`.
  Estimators of an earlier one stay.

  Args:
    out, checkpoint, rows, names, n, draws: see `audit_generator`.
    source: what else the result tells, and a later start must agree in.

  Raises:
    ConfigError: OUT has an audit of another checkpoint, other rows, N or draws.
  """
  variants = parse_all(names)
  _make(out)
  path, start = os.path.join(out, "generator.json"), time.monotonic()
  of = {**(source or {}), "rows": len(rows), "n": n, "draws": draws}
  stored = _read(path) or {**of, "estimators": {}, "seconds": 0.0}
  if {k: stored.get(k) for k in of} != of:
    raise ConfigError(
      f"{path}: is an audit of {', '.join(f'{k} {stored.get(k)}' for k in of)}; name another --out"
    )
  report = audit_generator(checkpoint, rows, variants, n=n, draws=draws)
  seconds = round(stored["seconds"] + time.monotonic() - start, 1)
  _write(
    path,
    {**of, **report, "estimators": stored["estimators"] | report["estimators"], "seconds": seconds},
  )
  return {
    "rows": len(rows),
    "choices": report["choices"],
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
  report = compare(workdir or os.path.join(out, "trainings"), variants, seeds, scale, sizes)
  _write(os.path.join(out, "compare.json"), report)
  return {
    "seeds": seeds,
    "estimators": len(variants),
    "seconds": report["seconds"],
    "against_algorithm1": report["against_algorithm1"],
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
  io.write(pathlib.Path(path), json.dumps(value, indent=1))
