"""Any base, with the paper's hyper-parameters (SPEC §6). NAME is the stage: `configs/clara.py:joint`.

    clara train --config configs/clara.py:scp --config.base=DIR --config.data.rows='("scp.jsonl.gz",)' --workdir runs/scp

The model's shape is that of the base's config.json; `clara.model` names only how it is run. A field of it that contradicts the base is
refused. What a step takes on a pod: configs/mistral_7b.py, docs/pods.md.
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config(stage: str = "scp") -> ml_collections.ConfigDict:
  joint = stage in ("joint", "contrastive")
  config = ml_collections.ConfigDict()
  config.base = placeholder(str)
  config.init_from = placeholder(str)
  config.clara = {
      "model": {"remat": "full", "attention": "auto", "vocab_multiple": 128, "logits_chunk": 128, "base_quantization": "none"},
      "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.1},
      "doc_max_length": 256, "compression_rate": 32, "query_max_length": 256,
      "decoder_max_length": 1024 if joint else 2048,
      "top_k": 5 if stage != "scp" else 1, "temperature": 0.02, "masking": "algorithm1", "mse_weight": 0.1,
  }
  config.data = {
      "rows": (), "weights": (), "eval_rows": (), "batch_size": 32 if joint else 128, "eval_batch_size": 32, "candidates": 20,
      "bucket": 256, "document_bucket": 32, "label_bucket": 128, "store": placeholder(str), "shards": 8, "length_window": 8,
      "workers": 4, "max_malformed": 0,
  }
  config.train = {
      "stage": stage, "epochs": 1.0, "steps": placeholder(int), "learning_rate": 5e-6 if joint else 1e-4, "schedule": "cosine",
      "warmup_fraction": 0.03, "clip_norm": 1.0, "accumulate": 1, "seed": 0, "log_every": 20, "eval_every": 0, "checkpoint_every": 500,
      "keep_checkpoints": 2, "keep_best": placeholder(str),
  }
  config.mesh = {
      "preset": "host", "slice": placeholder(int), "data": placeholder(int), "fsdp": placeholder(int), "tensor": placeholder(int),
  }
  return config
