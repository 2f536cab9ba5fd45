"""A model of 0.9 M parameters for two cores; NAME is the stage, 'pretrain' included: `configs/tiny.py:scp`.

The vocabulary is the tokenizer's: give `--config.clara.model.vocab_size`.
"""

import ml_collections


def get_config(stage: str = "pretrain") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.base = ml_collections.config_dict.placeholder(str)
  config.init_from = ml_collections.config_dict.placeholder(str)
  config.tokenizer = ml_collections.config_dict.placeholder(str)
  config.clara = {
      "model": {
          "vocab_size": 1024, "width": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "mlp_dim": 384,
          "tie_embeddings": True, "initializer_range": 0.06, "dtype": "float32", "param_dtype": "float32", "remat": "full",
      },
      "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.0},
      "doc_max_length": 40, "compression_rate": 10, "query_max_length": 24, "decoder_max_length": 512, "top_k": 3,
  }
  config.data = {
      "rows": (), "eval_rows": (), "batch_size": 32, "eval_batch_size": 64, "candidates": 20, "bucket": 32,
      "label_documents": False, "store": ml_collections.config_dict.placeholder(str),
  }
  config.train = {
      "stage": stage, "steps": 1000, "learning_rate": 3e-3, "schedule": "cosine", "warmup_fraction": 0.03, "clip_norm": 1.0,
      "seed": 0, "log_every": 50, "eval_every": 0, "checkpoint_every": 500,
  }
  config.mesh = ml_collections.ConfigDict()
  return config
