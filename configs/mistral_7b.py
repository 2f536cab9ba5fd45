"""Mistral-7B-Instruct-v0.2 with the paper's hyper-parameters (SPEC §6). NAME is the stage: `configs/mistral_7b.py:joint`.

    clara train --config configs/mistral_7b.py:scp --config.base=DIR --config.data.rows='("scp.jsonl.gz",)' --workdir runs/scp

What a step takes at ratio 16, compiled ahead of time (`launch/aot.py`; docs/pods.md has all ratios): GiB of a v5e chip's 16, and seconds
that a step takes at least; with attention=xla. With splash, the default on TPU, on 8 chips: scp 9.1, 8.3 s; joint 10.6, 2.8 s.

    stage      8 chips (fsdp 8)             32 chips (fsdp 32)          256 chips (data x fsdp 32 x tensor)
    scp        13.7, 14.6 s  accumulate=4   12.1, 6.7 s                 1.7, 0.3 s  preset=pod tensor=2
    instruct    9.2, 18.2 s  accumulate=8    7.6, 7.4 s  accumulate=2   1.9, 0.4 s  preset=pod tensor=2
    joint      10.0, 4.7 s                   2.2, 2.1 s                 0.3, 0.2 s  preset=pod tensor=8
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config(stage: str = "scp") -> ml_collections.ConfigDict:
  joint = stage in ("joint", "contrastive")
  config = ml_collections.ConfigDict()
  config.base = placeholder(str)
  config.init_from = placeholder(str)
  config.clara = {
      "model": {
          "vocab_size": 32_000, "width": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128,
          "mlp_dim": 14_336, "rope_theta": 1e6, "norm_eps": 1e-5, "dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full",
          "attention": "auto", "vocab_multiple": 128, "logits_chunk": 128, "base_quantization": "none",
      },
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
