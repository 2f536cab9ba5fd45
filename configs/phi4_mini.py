"""Phi-4-mini-instruct (3.8 B; shapes and rotary factors of its config.json) with the paper's hyper-parameters (SPEC §6). NAME is the
stage: `configs/phi4_mini.py:joint`.

    clara train --config configs/phi4_mini.py:scp --config.base=DIR --config.data.rows='("scp.jsonl.gz",)' --workdir runs/scp

Its projections are fused: over a `tensor` axis XLA moves parts of them between chips, fsdp does not.
"""

import ml_collections
from ml_collections.config_dict import placeholder

LONG_FACTOR = (
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898, 2.735880826,
    3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318,
    9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418,
    28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77)


def get_config(stage: str = "scp") -> ml_collections.ConfigDict:
  joint = stage in ("joint", "contrastive")
  config = ml_collections.ConfigDict()
  config.base = placeholder(str)
  config.init_from = placeholder(str)
  config.clara = {
      "model": {
          "vocab_size": 200_064, "width": 3072, "num_layers": 32, "num_heads": 24, "num_kv_heads": 8, "head_dim": 128, "mlp_dim": 8192,
          "rope_theta": 1e4, "rotary_fraction": 0.75,
          "rope_scaling": {"kind": "longrope", "factor": 32.0, "original_max_positions": 4096, "short_factor": (1.0,) * 48,
                           "long_factor": LONG_FACTOR},
          "fused_projections": True, "norm_eps": 1e-5, "sliding_window": 262_144, "tie_embeddings": True, "max_positions": 131_072,
          "dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full", "vocab_multiple": 128, "logits_chunk": 128,
          "attention": "auto", "base_quantization": "none",
      },
      "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.1},
      "doc_max_length": 256, "compression_rate": 32, "query_max_length": 256, "decoder_max_length": 1024 if joint else 2048,
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
