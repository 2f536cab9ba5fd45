"""A model of 0.9 M parameters for two cores; NAME is the stage, 'pretrain' included:
`configs/tiny.py:scp`.

`pretrain` makes a base of the shape `fresh_model`, whose vocabulary is the tokenizer's
(`--config.clara.model.vocab_size`); the other stages take the shape of the base that they are
given, whatever it is.
"""

import ml_collections

from clara_jax.config import config_dict


def get_config(stage: str = "pretrain") -> ml_collections.ConfigDict:
  config = config_dict()
  config.clara.fresh_model = {
    "vocab_size": 1024,
    "width": 128,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "mlp_dim": 384,
    "tie_embeddings": True,
    "initializer_range": 0.06,
  }
  config.clara.model.update({"dtype": "float32", "param_dtype": "float32", "remat": "full"})
  config.clara.lora.dropout = 0.0
  config.clara.update(
    {
      "doc_max_length": 40,
      "compression_rate": 10,
      "query_max_length": 24,
      "decoder_max_length": 512,
      "top_k": 3,
    }
  )
  config.data.update({"eval_batch_size": 64, "bucket": 32})
  config.train.update({"stage": stage, "steps": 1000, "learning_rate": 3e-3, "log_every": 50})
  return config
