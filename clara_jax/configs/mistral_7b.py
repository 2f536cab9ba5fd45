"""Mistral-7B-Instruct-v0.2: configs/clara.py with its shape written out, so that a step can be
compiled where the model is not (`launch/aot.py`). NAME is the stage: `configs/mistral_7b.py:joint`.
A base of another shape is refused; configs/clara.py takes any.

    clara train --config configs/mistral_7b.py:scp --config.base=DIR --config.data.rows='("scp.jsonl.gz",)' --workdir runs/scp

What a step takes at ratio 16, compiled ahead of time (`launch/aot.py`; docs/pods.md has all
ratios): GiB of a v5e chip's 16, and seconds that a step takes at least; with attention=xla. With
splash, the default on TPU, on 8 chips: scp 9.1, 8.3 s; joint 10.6, 2.8 s.

    stage      8 chips (fsdp 8)             32 chips (fsdp 32)          256 chips (data x fsdp 32 x tensor)
    scp        13.7, 14.6 s  accumulate=4   12.1, 6.7 s                 1.7, 0.3 s  preset=pod tensor=2
    instruct    9.2, 18.2 s  accumulate=8    7.6, 7.4 s  accumulate=2   1.9, 0.4 s  preset=pod tensor=2
    joint      10.0, 4.7 s                   2.2, 2.1 s                 0.3, 0.2 s  preset=pod tensor=8
"""  # noqa: E501

import ml_collections

from clara_jax.configs import clara


def get_config(stage: str = "scp") -> ml_collections.ConfigDict:
  config = clara.get_config(stage)
  config.clara.model.update(
    {
      "vocab_size": 32_000,
      "width": 4096,
      "num_layers": 32,
      "num_heads": 32,
      "num_kv_heads": 8,
      "head_dim": 128,
      "mlp_dim": 14_336,
      "rope_theta": 1e6,
      "norm_eps": 1e-5,
      "dtype": "bfloat16",
      "param_dtype": "bfloat16",
    }
  )
  return config
