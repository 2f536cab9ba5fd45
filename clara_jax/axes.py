"""The axis legend used by every docstring and einsum of the project.

| letter | axis                                              |
|--------|---------------------------------------------------|
| B      | batch                                             |
| N      | candidate documents                               |
| K      | selected documents                                |
| L      | tokens of a document or query, memory tokens included |
| M      | memory tokens of a document                       |
| T      | decoder tokens                                    |
| S      | key/value slots that a query may see              |
| A      | label positions of a row (answer tokens)          |
| D      | model width                                       |
| F      | MLP width                                         |
| H      | attention heads                                   |
| G      | key/value heads                                   |
| P      | width of one head                                 |
| R      | LoRA rank                                         |
| V      | vocabulary                                        |
| Y      | layers                                            |

The constants below are the *logical* names that parameters and activations carry. `sharding.py`
maps them to mesh axes; nothing else does.
"""

from typing import TYPE_CHECKING

import jax
import numpy as np

# What shapes in annotations are of: Float[Array, "B N"] (jaxtyping, in the letters above). On the
# host they may be numpy's.
if TYPE_CHECKING:
  Array = jax.Array
else:
  Array = jax.Array | np.ndarray

BATCH = "batch"
LENGTH = "length"
WIDTH = "width"
MLP = "mlp"
HEADS = "heads"
KV_HEADS = "kv_heads"
RANK = "rank"
LORA = "lora"  # the other axis of an adapter's matrix, input or output
VOCAB = "vocab"
LAYERS = "layers"
MEMORY = "memory"

ALL = (BATCH, LENGTH, WIDTH, MLP, HEADS, KV_HEADS, RANK, LORA, VOCAB, LAYERS, MEMORY)
