"""SmolLM2-135M-Instruct on real text (examples/smollm2): configs/clara.py with the recipe's sizes.
NAME is the stage:

    clara train --config configs/smollm2.py:scp --config.base=smollm2/hf --config.data.rows='("rows/scp.jsonl",)' --workdir runs/scp

One checkpoint for ratios 4, 8, 16, 32 and 64: documents of 256 tokens become 64 memory tokens, of
which the first 4, 8, 16 or 32 are enough. `full_text` is the ceiling: LoRA of the same size that
reads the documents themselves.
"""  # noqa: E501

import ml_collections

from clara_jax.configs import clara

STEPS = {"scp": 4000, "instruct": 1000, "joint": 800, "contrastive": 800, "full_text": 1000}
RATES = {"scp": 1e-3, "instruct": 4e-4, "joint": 4e-4, "contrastive": 4e-4, "full_text": 4e-4}


def get_config(stage: str = "scp") -> ml_collections.ConfigDict:
  config = clara.get_config(stage)
  given = stage in ("scp", "instruct")
  config.clara.update(
    {
      "compression_rate": 4,
      "query_max_length": 64,
      "decoder_max_length": 1536 if stage == "full_text" else 896,
      "nested_memory": (4, 8, 16, 32, 64),
    }
  )
  config.clara.model.update({"vocab_multiple": 1, "logits_chunk": 0, "remat": "none"})
  # Three roles in bfloat16: 11 MB.
  config.clara.lora.update({"rank": 6, "alpha": 24.0, "dropout": 0.05})
  # Four rows of one paragraph share its compression: two or three questions, their list, the
  # paragraph told again.
  config.data.update(
    {
      "batch_size": 64,
      "share_documents": 4 if given else 1,
      "shards": 1,
      "length_window": 16,
      "bucket": 128,
      "document_bucket": 64,
      "label_bucket": 64,
      "workers": 0,
    }
  )
  config.train.update(
    {
      "steps": STEPS.get(stage, 1000),
      "learning_rate": RATES.get(stage, 4e-4),
      "log_every": 20,
      "eval_every": 0,
    }
  )
  if stage == "joint":
    config.train.learning_rate_factors = {"generator": 0.1}
  config.mesh.preset = None
  return config
