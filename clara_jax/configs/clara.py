"""Any base, with the paper's hyper-parameters. NAME is the stage: `configs/clara.py:joint`.

    clara train --config configs/clara.py:scp --config.base=DIR --config.data.rows='("scp.jsonl.gz",)' --workdir runs/scp

Only what differs from the defaults stands here; `clara config configs/clara.py:scp` prints all
fields with their meaning. The model's shape is that of the base's config.json; a field of
`clara.model` that contradicts the base is refused. What a step takes on a pod:
configs/mistral_7b.py, docs/pods.md.
"""  # noqa: E501

import ml_collections

from clara_jax.config import config_dict


def get_config(stage: str = "scp") -> ml_collections.ConfigDict:
  joint = stage in ("joint", "contrastive")
  config = config_dict()
  config.clara.model.update({"remat": "full", "vocab_multiple": 128, "logits_chunk": 128})
  config.clara.decoder_max_length = 1024 if joint else 2048
  config.clara.top_k = 5 if stage != "scp" else 1
  config.data.update(
    {
      "batch_size": 32 if joint else 128,
      "bucket": 256,
      "document_bucket": 32,
      "label_bucket": 128,
      "shards": 8,
      "length_window": 8,
      "workers": 4,
    }
  )
  config.train.update({"stage": stage, "learning_rate": 5e-6 if joint else 1e-4})
  config.mesh.preset = "host"
  return config
