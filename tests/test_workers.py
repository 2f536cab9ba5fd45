"""Workers that come and go: a real Ray on this machine, whose workers are killed."""

import argparse
import json
import os
import pathlib
import signal
import threading
import time

import pytest

ray = pytest.importorskip("ray")

from clara_jax.cli import compress as compress_command  # noqa: E402
from clara_jax.cli import main as cli  # noqa: E402
from clara_jax.data.schemas import Document, read_documents, write_rows  # noqa: E402
from clara_jax.inference.compress import compress_corpus_with  # noqa: E402
from clara_jax.memory.store import MemoryStore  # noqa: E402
from clara_jax.testing import tiny  # noqa: E402
from clara_jax.workers import Pool  # noqa: E402
from tests.helpers import refused  # noqa: E402

COUNT = int(os.environ.get("CLARA_RAY_DOCUMENTS", 800))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("ray")
  tiny.write_checkpoint(str(path / "joint"), tiny.config(), tiny.weights())
  pages = tiny.world().documents(test=False)
  write_rows(
    [{**pages[n % len(pages)], "id": f"d{n}"} for n in range(COUNT)], str(path / "documents.jsonl")
  )
  return path


def options(command, *arguments):
  parser = argparse.ArgumentParser()
  command.add_arguments(parser)
  parsed = parser.parse_args([str(a) for a in arguments])
  parsed.command = command.__name__.rpartition(".")[2]
  return parsed


def files(store):
  return {str(f.relative_to(store)): f.read_bytes() for f in store.rglob("*") if f.is_file()}


def pid(actor):
  return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


def test_killed_workers_leave_the_store_of_a_straight_run(folder):
  arguments = ("--checkpoint", folder / "joint", "--documents", folder / "documents.jsonl")
  straight = [*arguments, "--store", folder / "straight", "--shard-size", 50]
  start = time.monotonic()
  assert cli.main(["compress", *map(str, straight)]) == 0
  seconds = {"straight": time.monotonic() - start}
  made_of = {"options": options(compress_command, *arguments, "--store", "unused")}
  kills = []
  with Pool("local", compress_command.make_compressor, made_of, 2) as pool:

    def kill():
      """The first worker, twice, between segments."""
      for segments in (2, 6):
        while len(list((folder / "store").glob("segments-0/0*"))) < segments:
          time.sleep(0.01)
        kills.append(pid(pool._actors[0]))
        os.kill(kills[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    start = time.monotonic()
    report = compress_corpus_with(
      pool, read_documents(str(folder / "documents.jsonl")), str(folder / "store"), shard_size=50
    )
    seconds["ray"] = time.monotonic() - start
    killer.join()
  assert len(set(kills)) == 2
  assert report.documents == COUNT and report.skipped == 0
  assert [d.id for d in MemoryStore(str(folder / "store")).documents()] == [
    f"d{n}" for n in range(COUNT)
  ]
  assert files(folder / "store") == files(folder / "straight")
  print({name: round(COUNT / s, 1) for name, s in seconds.items()})  # documents a second


def test_what_is_wrong_with_a_worker_is_said_once(folder, tmp_path):
  command = ("compress", "--ray", "local", "--ray-workers", 1, "--store", tmp_path / "store")
  said = refused(
    *command, "--checkpoint", tmp_path / "none", "--documents", folder / "documents.jsonl"
  )
  assert "no such checkpoint" in said
  given = ("--checkpoint", folder / "joint", "--documents", folder / "documents.jsonl")
  said = refused(
    "compress", "--ray", "local", *given, "--ray-workers", 99, "--store", tmp_path / "s"
  )
  assert "--ray-workers 99: the cluster has room for" in said
  assert "leave --processes" in refused(*command, *given, "--processes", 2)
  assert "--ray localhost:1: " in refused(*command, *given, "--ray", "localhost:1")


def test_replies_by_workers_are_those_of_one(folder, tmp_path, capsys):
  from clara_jax.experiments.quickstart.recipe import Sizes
  from clara_jax.experiments.world import World

  pages = World(Sizes().world).documents(test=True, limit=12)
  write_rows([Document(**d).__dict__ for d in pages], str(tmp_path / "documents.jsonl"))
  command = ["synthesize", "--documents", str(tmp_path / "documents.jsonl"), "--rounds", "2"]
  command += ["--endpoint", "offline", "--in-flight", "4", "--json"]
  reports = {}
  for name, how in (("one", []), ("ray", ["--ray", "local", "--ray-workers", "2"])):
    assert cli.main([*command, "--out", str(tmp_path / name), *how]) == 0
    reports[name] = json.loads(capsys.readouterr().out)
  assert reports["one"]["accepted"] == reports["ray"]["accepted"] > 0
  assert reports["one"]["tokens"] == reports["ray"]["tokens"]
  rows = [
    sorted(next(pathlib.Path(tmp_path / name).glob("rows-*.jsonl")).read_text().splitlines())
    for name in ("one", "ray")
  ]
  assert rows[0] == rows[1]
  said = refused(*command[:-1], "--out", tmp_path / "server", "--endpoint", "http://x/v1")
  assert "--model" in said
  said = refused(
    *(*command[:-1], "--out", tmp_path / "server", "--model", "m"),
    *("--endpoint", "http://x/v1", "--ray", "local"),
  )
  assert "need no workers" in said
