"""Round trips to the bit, hostile input, and the key map as a bijection."""

import json
import os
import pickle
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clara_jax.checkpoints import formats, huggingface, keymap, lazy
from clara_jax.checkpoints.convert import convert
from clara_jax.checkpoints.tensors import TensorFiles
from clara_jax.checkpoints.workdir import CheckpointError
from clara_jax.cli import main as cli
from clara_jax.config import MeshConfig
from clara_jax.data.schemas import write_rows
from clara_jax.sharding import make_mesh, place, tree_shardings

torch = pytest.importorskip("torch")

ERRORS = (CheckpointError, keymap.KeyMapError, ValueError)


@pytest.fixture
def upstream(golden, tmp_path):
  """A writable copy of an upstream checkpoint and its base."""
  for name in ("ckpt_stage2", "tiny_mistral"):
    shutil.copytree(golden / name, tmp_path / name, copy_function=shutil.copyfile)
    os.chmod(tmp_path / name, 0o755)
  return tmp_path / "ckpt_stage2"


def pth(directory):
  return {
    name: torch.load(directory / name, weights_only=True)
    for name in ("adapters.pth", "decoder_first_last_layers.pth")
  }


def flatten(tree, prefix=""):
  for key, value in tree.items():
    yield from (
      flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else [(prefix + key, value)]
    )


@pytest.mark.parametrize("stage", ["stage1", "stage1_2", "stage2"])
def test_upstream_to_ours_and_back(golden, tmp_path, stage):
  source = golden / f"ckpt_{stage}"
  report = convert(str(source), str(tmp_path / "ours"), "clara", verify=True)
  assert report.verify["exact"] and report.verify["max_abs_logit_difference"] == 0
  back = convert(str(tmp_path / "ours"), str(tmp_path / "back"), "upstream", verify=True)
  assert back.verify["exact"]
  before, after = pth(source), pth(tmp_path / "back")
  # Adapters that were created fresh carried the embedding and the head too; on export these have
  # their own file alone.
  expected = {k: v for k, v in flatten(before) if "lora" in k or k.startswith("decoder")}
  late = {
    k.rpartition("/")[2]: v
    for k, v in flatten(before)
    if k.startswith("adapters") and "lora" not in k
  }
  got = dict(flatten(after))
  assert set(expected) == set(got)
  for name, value in expected.items():
    value = late.get(name.rpartition("/")[2], value)
    assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


def test_losses_and_scores_survive_the_round_trip(golden, tmp_path, capsys):
  inputs = json.loads((golden / "inputs.json").read_text())
  convert(str(golden / "ckpt_stage2"), str(tmp_path / "ours"), "clara")
  convert(str(tmp_path / "ours"), str(tmp_path / "back"), "upstream")
  rows = tmp_path / "rows.jsonl"
  write_rows(
    (
      {"question": q, "answer": a, "docs": d}
      for q, a, d in zip(
        inputs["STAGE2_QUESTIONS"], inputs["STAGE2_ANSWERS"], inputs["POOL"], strict=True
      )
    ),
    str(rows),
  )
  reports = []
  for checkpoint in (golden / "ckpt_stage2", tmp_path / "ours", tmp_path / "back"):
    assert (
      cli.main(
        [
          "loss",
          "--checkpoint",
          str(checkpoint),
          "--base",
          str(golden / "tiny_mistral"),
          "--stage",
          "joint",
          "--rows",
          str(rows),
          "--dtype",
          "float32",
          "--json",
        ]
      )
      == 0
    )
    reports.append(json.loads(capsys.readouterr().out))
  assert reports[0] == reports[1] == reports[2]
  assert reports[0]["loss"] == pytest.approx(
    float(np.load(golden / "stage2.npz")["loss"]), abs=1e-5
  )


def test_peft_round_trip(golden, tmp_path):
  convert(str(golden / "ckpt_stage2"), str(tmp_path / "peft"), "peft", verify=True)
  convert(str(tmp_path / "peft"), str(tmp_path / "ours"), "clara", verify=True)
  convert(str(tmp_path / "ours"), str(tmp_path / "again"), "peft", verify=True)
  for role in ("compressor", "query_reasoner", "generator"):
    for file in (
      "adapter_model.safetensors",
      "clara_special_tokens.safetensors",
      "adapter_config.json",
    ):
      a, b = ((tmp_path / side / role / file).read_bytes() for side in ("peft", "again"))
      assert a == b, (role, file)


def test_a_base_of_ours_is_sharded_from_disk(golden, tmp_path):
  """Each device's shard is read by its own index; the result equals the plain one, from safetensors
  and from our store."""
  convert(str(golden / "tiny_mistral"), str(tmp_path / "ours"), "clara")
  mesh = make_mesh(MeshConfig("host"))
  opened = formats.open_checkpoint(str(golden / "ckpt_stage2"), str(golden / "tiny_mistral"))
  shardings = tree_shardings(
    jax.eval_shape(
      lambda: huggingface.Clara(opened.config).init_boxed(jax.random.key(0), ("base",))["base"]
    ),
    mesh,
  )
  plain = opened.weights["base"]
  ours = formats.open_checkpoint(str(golden / "ckpt_stage2"), str(tmp_path / "ours")).weights[
    "base"
  ]
  stored, sharding_of = dict(lazy.leaves(ours)), dict(lazy.leaves(shardings))
  for path, leaf in lazy.leaves(plain):
    a, b = (place(x, sharding_of[path]) for x in (leaf, stored[path]))
    np.testing.assert_array_equal(
      np.asarray(a, np.float32), lazy.read(leaf).astype(np.float32), err_msg=str(path)
    )
    np.testing.assert_array_equal(
      np.asarray(a, np.float32), np.asarray(b, np.float32), err_msg=str(path)
    )
  kernel = place(
    plain["layers"]["mlp"]["gate"]["kernel"], shardings["layers"]["mlp"]["gate"]["kernel"]
  )
  assert kernel.addressable_shards[0].data.shape[1] * len(jax.devices()) == kernel.shape[1]


# ---- hostile input -------------------------------------------------------------------------------


def refused(capsys, destination, *arguments):
  """The one line that `clara convert` prints; nothing stands at the destination."""
  assert cli.main(["convert", *map(str, arguments)]) == 2
  assert (
    not destination.exists()
    and not destination.with_name(destination.name + ".unfinished").exists()
  )
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith("clara convert: ")
  return error


class Payload:
  """Would create a file if it were unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), "w")


def test_a_pickle_that_runs_code(upstream, tmp_path, capsys):
  with open(upstream / "adapters.pth", "wb") as file:
    pickle.dump({"encoder_adapter": Payload(tmp_path / "owned")}, file)
  assert "adapters.pth" in refused(
    capsys, tmp_path / "out", upstream, tmp_path / "out", "--to", "clara"
  )
  torch.save({"encoder_adapter": Payload(tmp_path / "owned")}, upstream / "adapters.pth")
  assert "adapters.pth" in refused(
    capsys, tmp_path / "out", upstream, tmp_path / "out", "--to", "clara"
  )
  assert not (tmp_path / "owned").exists()


def test_a_truncated_file(upstream, tmp_path, capsys):
  file = tmp_path / "tiny_mistral" / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-1000])
  assert "model.safetensors" in refused(
    capsys, tmp_path / "out", upstream, tmp_path / "out", "--to", "clara"
  )


def sharded(tmp_path):
  import transformers

  folder = tmp_path / "sharded"
  transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tiny_mistral").save_pretrained(
    folder, max_shard_size="200KB"
  )
  return folder, json.loads((folder / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize(
  "harm, message",
  [
    (
      lambda folder, index: os.remove(folder / sorted(set(index["weight_map"].values()))[0]),
      "named by .* but not there",
    ),
    (
      lambda folder, index: index["weight_map"].pop("model.norm.weight"),
      "model.norm.weight is in a file, but not named",
    ),
    (
      lambda folder, index: index["weight_map"].update(
        {"model.norm.weight": "../tiny_mistral/model.safetensors"}
      ),
      "leaves the directory",
    ),
    (
      lambda folder, index: index["weight_map"].update(
        {"extra": sorted(index["weight_map"].values())[0]}
      ),
      "extra is named",
    ),
    (
      lambda folder, index: shutil.copy(
        folder / sorted(index["weight_map"].values())[0],
        folder / "model-99999-of-99999.safetensors",
      ),
      "does not name",
    ),
  ],
)
def test_an_index_that_lies(upstream, tmp_path, harm, message):
  folder, index = sharded(tmp_path)
  TensorFiles(str(folder))
  harm(folder, index)
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(keymap.KeyMapError, match=message):
    convert(str(folder), str(tmp_path / "out"), "clara")
  assert not (tmp_path / "out").exists()


def rewrite(file, change):
  from safetensors.torch import load_file, save_file

  tensors = load_file(file)
  change(tensors)
  save_file(
    {k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()},
    file,
    metadata={"format": "pt"},
  )


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda t: t["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 4), float("nan")),
      "layers.1.mlp.up_proj.weight holds NaN",
    ),
    (
      lambda t: t.pop("model.layers.2.self_attn.q_proj.weight"),
      "1 tensors missing, first layers/attention/q/kernel, layer 2",
    ),
    (
      lambda t: t.update(
        {"model.layers.7.self_attn.q_proj.weight": t["model.layers.2.self_attn.q_proj.weight"]}
      ),
      "only 3 layers",
    ),
    (
      lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t["model.norm.weight"]}),
      "this model has no layers/attention/q/bias",
    ),
    (
      lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1]}),
      "expected shape .64,., got .63,.",
    ),
    (
      lambda t: t.update({"transformer.h.0": t["model.norm.weight"]}),
      "transformer.h.0: not a known tensor",
    ),
  ],
)
def test_bad_tensors_of_a_base(upstream, tmp_path, capsys, change, message):
  base = tmp_path / "tiny_mistral"
  rewrite(base / "model.safetensors", change)
  import re

  assert re.search(
    message, refused(capsys, tmp_path / "out", base, tmp_path / "out", "--to", "clara")
  )


def test_nan_in_an_adapter(upstream, tmp_path, capsys):
  adapters = torch.load(upstream / "adapters.pth", weights_only=True)
  name = next(k for k in adapters["encoder_adapter"] if "lora_A" in k)
  adapters["encoder_adapter"][name][0, 0] = float("inf")
  torch.save(adapters, upstream / "adapters.pth")
  assert name in refused(capsys, tmp_path / "out", upstream, tmp_path / "out", "--to", "clara")


def test_a_swapped_adapter(upstream, tmp_path, capsys):
  """The A and B of a layer exchanged, and another layer's projection in its place: shapes give it
  away."""
  adapters = torch.load(upstream / "adapters.pth", weights_only=True)
  one, two = (
    "model.layers.0.mlp.up_proj.lora_A.weight",
    "model.layers.0.mlp.down_proj.lora_A.weight",
  )
  role = adapters["decoder_adapter"]
  role[one], role[two] = role[two], role[one]
  torch.save(adapters, upstream / "adapters.pth")
  assert "lora_A" in refused(capsys, tmp_path / "out", upstream, tmp_path / "out", "--to", "clara")
  torch.save({**adapters, "other_adapter": role}, upstream / "adapters.pth")
  assert "other_adapter" in refused(
    capsys, tmp_path / "out", upstream, tmp_path / "out", "--to", "clara"
  )


def test_a_peft_role_in_the_wrong_place(golden, tmp_path, capsys):
  convert(str(golden / "ckpt_stage2"), str(tmp_path / "peft"), "peft")
  os.rename(tmp_path / "peft" / "compressor", tmp_path / "x")
  os.rename(tmp_path / "peft" / "generator", tmp_path / "peft" / "compressor")
  os.rename(tmp_path / "x", tmp_path / "peft" / "generator")
  assert "is the role 'generator'" in refused(
    capsys,
    tmp_path / "out",
    tmp_path / "peft",
    tmp_path / "out",
    "--to",
    "clara",
    "--base",
    golden / "tiny_mistral",
  )


def test_a_wrong_base(upstream, tmp_path, capsys):
  convert(str(upstream), str(tmp_path / "ours"), "clara")
  rewrite(
    tmp_path / "tiny_mistral" / "model.safetensors", lambda t: t["model.norm.weight"].add_(0.5)
  )
  error = refused(capsys, tmp_path / "out", tmp_path / "ours", tmp_path / "out", "--to", "upstream")
  assert "wrong base" in error


def test_a_vocabulary_that_does_not_match(upstream, tmp_path, capsys):
  base = tmp_path / "tiny_mistral"
  config = json.loads((base / "config.json").read_text())
  (base / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
  assert "embed_tokens" in refused(
    capsys, tmp_path / "out", upstream, tmp_path / "out", "--to", "clara"
  )


def test_a_destination_that_is_there_is_left_alone(golden, tmp_path, capsys):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("kept")
  assert (
    cli.main(["convert", str(golden / "ckpt_stage2"), str(tmp_path / "out"), "--to", "clara"]) == 2
  )
  assert "already exists" in capsys.readouterr().err
  assert (tmp_path / "out" / "mine").read_text() == "kept"


# ---- the key map ---------------------------------------------------------------------------------

NAMES = [*keymap._OUTSIDE, *keymap._BASE_LAYER, *keymap._LORA_LAYER]


@given(st.sampled_from(NAMES), st.integers(0, 200))
def test_names_are_a_bijection(name, layer):
  outside, lora = name in keymap._OUTSIDE, name in keymap._LORA_LAYER
  full = name if outside else f"model.layers.{layer}.{name}"
  spot = (keymap.lora_place if lora else keymap.base_place)(full)
  assert (keymap.lora_name if lora else keymap.base_name)(spot.path, spot.layer) == full


def test_no_two_names_share_a_place():
  for table in (keymap._BASE_LAYER, keymap._LORA_LAYER, keymap._OUTSIDE):
    assert len({path for path, _ in table.values()}) == len(table)


@given(st.text(alphabet="model.layers0123456789_selfattnqkvproj.weightbiasloraAB", max_size=60))
def test_unknown_names_always_raise(name):
  for place_of, name_of in (
    (keymap.base_place, keymap.base_name),
    (keymap.lora_place, keymap.lora_name),
  ):
    try:
      spot = place_of(name)
    except keymap.KeyMapError:
      continue
    assert name_of(spot.path, spot.layer) == name


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 3)), max_size=8))
def test_coverage_is_exact(places):
  expected = {(("layers", n), i) for n in "ab" for i in range(2)}
  given_places = [keymap.Place(("layers", n), i, False) for n, i in places]
  if sorted((p.path, p.layer) for p in given_places) == sorted(expected):
    keymap.check_coverage(given_places, expected, "x")
  else:
    with pytest.raises(keymap.KeyMapError):
      keymap.check_coverage(given_places, expected, "x")


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 6), st.booleans(), st.data())
def test_lazy_leaves_slice_like_arrays(count, rows, columns, transpose, data):
  rng = np.random.default_rng(0)
  tensors = [rng.normal(size=(rows, columns)).astype(np.float32) for _ in range(count)]
  leaf = lazy.Layers(tensors, transpose)
  whole = np.stack([t.T if transpose else t for t in tensors])
  assert leaf.shape == whole.shape

  def cut(n):
    first = data.draw(st.integers(0, n - 1))
    return slice(first, data.draw(st.integers(first + 1, n)))

  index = tuple(cut(n) for n in whole.shape)
  np.testing.assert_array_equal(leaf[index], whole[index])
  extended = lazy.Rows(tensors[0], rows, tensors[-1][:1], 0)
  table = np.concatenate([tensors[0], tensors[-1][:1]])
  index = (cut(rows + 1), cut(columns))
  np.testing.assert_array_equal(extended[index], table[index])
