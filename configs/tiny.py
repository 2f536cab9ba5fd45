"""A model of 0.9 M parameters for two cores; NAME is the stage, 'pretrain' included: `configs/tiny.py:scp`.

`pretrain` makes a base of the shape `fresh_model`, whose vocabulary is the tokenizer's (`--config.clara.model.vocab_size`); the other
stages take the shape of the base that they are given, whatever it is.
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config(stage: str = "pretrain") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.base = placeholder(str)
  config.init_from = placeholder(str)
  config.tokenizer = placeholder(str)
  config.clara = {
      "fresh_model": {
          "vocab_size": 1024, "width": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "mlp_dim": 384,
          "tie_embeddings": True, "initializer_range": 0.06,
      },
      "model": {
          "dtype": "float32", "param_dtype": "float32", "remat": "full", "vocab_multiple": 1, "logits_chunk": 0,
          "base_quantization": "none",
      },
      "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.0},
      "doc_max_length": 40, "compression_rate": 10, "query_max_length": 24, "decoder_max_length": 512, "top_k": 3,
      "temperature": 0.02, "masking": "algorithm1", "mse_weight": 0.1,
  }
  config.data = {
      "rows": (), "weights": (), "eval_rows": (), "batch_size": 32, "eval_batch_size": 64, "candidates": 20, "bucket": 32,
      "document_bucket": 16, "label_bucket": 8, "label_documents": False, "store": placeholder(str), "shards": 1, "length_window": 1,
      "workers": 0, "max_malformed": 0,
  }
  config.train = {
      "stage": stage, "steps": 1000, "learning_rate": 3e-3, "schedule": "cosine", "warmup_fraction": 0.03, "clip_norm": 1.0,
      "accumulate": 1, "seed": 0, "log_every": 50, "eval_every": 0, "checkpoint_every": 500, "keep_checkpoints": 2,
      "keep_best": placeholder(str),
  }
  config.mesh = {
      "preset": placeholder(str), "slice": placeholder(int), "data": placeholder(int), "fsdp": placeholder(int),
      "tensor": placeholder(int),
  }
  return config
