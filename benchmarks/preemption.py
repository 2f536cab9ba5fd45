"""A run that is killed again and again: does it end where a straight run ends?

    python benchmarks/preemption.py --kills 20

200 steps of a tiny model; SIGKILL at random moments, every third one while a step is being saved,
and each time the run is started again. The final parameters and the row ids of every step must
equal those of a straight run, to the bit. Prints one JSON object.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
STEPS, EVERY = 200, 5


def start(job: dict) -> subprocess.Popen:
  """A worker (`clara_jax/testing/pod_worker.py`)."""
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
  return subprocess.Popen(
    [sys.executable, "-m", "clara_jax.testing.pod_worker", json.dumps(job)],
    env=environment,
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def report(process: subprocess.Popen) -> dict:
  """What a worker says when it has ended well."""
  out, err = process.communicate()
  if process.returncode:
    raise SystemExit(err)
  return json.loads(next(line for line in out.splitlines() if line.startswith("REPORT"))[6:])[0]


def wait_for(process: subprocess.Popen, condition) -> bool:
  """Until the condition holds; False where the process ended before."""
  while process.poll() is None:
    if condition():
      return True
    time.sleep(0.001)
  return False


def main() -> None:
  """Prints the result; exit status 1 where something differs."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  rng, began = random.Random(options.seed), time.monotonic()
  folder = pathlib.Path(tempfile.mkdtemp())
  sys.path.insert(0, str(ROOT))
  from clara_jax.testing import tiny

  rows = folder / "rows.jsonl"
  rows.write_text("\n".join(map(json.dumps, tiny.raw_rows("contrastive"))))
  job = {
    "stage": "contrastive",
    "rows": [str(rows)],
    "data": {"shards": 2, "length_window": 3},
    "train": {"steps": STEPS, "checkpoint_every": EVERY, "log_every": 10},
  }
  straight = report(start({**job, "runs": [{}]}))

  log, work = folder / "rows-seen.jsonl", folder / "run"
  log.touch()
  run = {"workdir": str(work), "log": str(log)}
  kills, saving = [], 0
  for i in range(options.kills):
    # A moment of the run, in steps.
    target = min(STEPS - 3, (i + 1) * STEPS // (options.kills + 1) + rng.randint(-3, 3))
    process = start({**job, "runs": [run]})

    def last_step():
      lines = log.read_text().splitlines()
      return json.loads(lines[-1])[0] if lines and lines[-1].endswith("]]") else 0

    if not wait_for(process, lambda target=target: last_step() >= target):
      break
    if i % 3 == 0:
      wait_for(process, lambda: any("tmp" in p.name for p in (work / "checkpoints").iterdir()))
    else:
      time.sleep(rng.uniform(0, 0.2))
    process.kill()
    process.communicate()
    unfinished = [p.name for p in (work / "checkpoints").iterdir() if "tmp" in p.name]
    saving += bool(unfinished)
    kills.append(last_step())
    print(
      f"killed at step {kills[-1]}{' while saving' if unfinished else ''}",
      file=sys.stderr,
      flush=True,
    )
  last = report(start({**job, "runs": [run]}))
  seen = {str(step): ids for step, ids in map(json.loads, log.read_text().splitlines())}
  result = {
    "kills": len(kills),
    "during_a_save": saving,
    "steps": STEPS,
    "same_rows": seen == straight["ids"],
    "same_parameters": last["digest"] == straight["digest"],
    "seconds": round(time.monotonic() - began),
  }
  shutil.rmtree(folder)
  print(json.dumps(result))
  sys.exit(0 if result["same_rows"] and result["same_parameters"] else 1)


if __name__ == "__main__":
  main()
