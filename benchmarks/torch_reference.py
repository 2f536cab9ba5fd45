"""CLaRa in PyTorch, written plainly with transformers and PEFT: the other side of `speed.py` and of
`accelerator/`.

It does the work that the released code does (its faults in results are left out): documents are
padded to their full length and queries to 1,027 tokens, every pass ends in the vocabulary head over
all positions, a joint step compresses all its candidates, the top-k is dense, and answers come from
`model.generate`.
"""

import torch
from peft import LoraConfig, get_peft_model

QUERY_TOKENS = 1027  # the released code pads questions to so many, memory tokens not counted


class Reference:
  """The three roles as adapters of one model.

  Args:
    model: of transformers, with the special tokens in its vocabulary.
    adapters: role -> {name: tensor} of PEFT tensors; None: fresh ones.
    rank, alpha, dropout: of the adapters.
    memory_ids: [M] ids of the memory tokens.
  """

  def __init__(self, model, adapters, rank, alpha, memory_ids, dropout=0.0):
    config = LoraConfig(
      r=rank,
      lora_alpha=alpha,
      lora_dropout=dropout,
      task_type="CAUSAL_LM",
      target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    # In the model's type, as ours.
    self.model = get_peft_model(
      model, config, adapter_name="compressor", autocast_adapter_dtype=False
    )
    for role in ("query_reasoner", "generator"):
      self.model.add_adapter(role, config, autocast_adapter_dtype=False)
    state = self.model.state_dict()
    for role, tensors in (adapters or {}).items():
      for name, tensor in tensors.items():
        state[
          name.replace("lora_A.", f"lora_A.{role}.").replace("lora_B.", f"lora_B.{role}.")
        ].copy_(torch.from_numpy(tensor))
    self.memory_ids = torch.tensor(memory_ids, device=model.device)
    self.embed = self.model.get_input_embeddings()

  def parameters(self, *roles):
    """Sets which adapters train and returns their parameters."""
    for name, parameter in self.model.named_parameters():
      parameter.requires_grad_("lora_" in name and any(f".{role}." in name for role in roles))
    return [p for p in self.model.parameters() if p.requires_grad]

  def _pass(self, role, **inputs):
    self.model.set_adapter(role)
    # PEFT lets only the active adapter train; all that were chosen do.
    for parameter, requires_grad in self._trained:
      parameter.requires_grad_(requires_grad)
    return self.model(**inputs, output_hidden_states=True, use_cache=False)

  def training(self, *roles):
    """Chooses what trains; returns its optimizer."""
    chosen = self.parameters(*roles)
    self._trained = [(p, p.requires_grad) for p in self.model.parameters()]
    return torch.optim.AdamW(chosen, lr=1e-4), chosen

  def encode(self, role, ids, mask):
    """Left-padded texts with memory tokens at the end -> (memory tokens [B, M, D], hidden
    states)."""
    hidden = self._pass(role, input_ids=ids, attention_mask=mask).hidden_states[-1]
    return hidden[:, -len(self.memory_ids) :], hidden

  def splice(self, ids, memories):
    """Prompt embeddings with the memory slots filled: memories [B, K, M, D]."""
    x = self.embed(ids).clone()
    slots = torch.isin(ids, self.memory_ids)
    x[slots] = memories.reshape(-1, memories.shape[-1]).to(x.dtype)
    return x

  def cross_entropy(self, ids, mask, labels, memories):
    """Over label tokens; the logits of all positions are formed."""
    logits = self._pass(
      "generator", inputs_embeds=self.splice(ids, memories), attention_mask=mask
    ).logits
    return torch.nn.functional.cross_entropy(
      logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100
    )

  def given_documents_loss(self, batch):
    """scp and instruct: CE + 0.1 MSE."""
    memories, hidden = self.encode("compressor", batch["documents"], batch["document_mask"])
    m = len(self.memory_ids)
    real = batch["document_mask"].clone()
    real[:, -m:] = 0
    means = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    mse = torch.nn.functional.mse_loss(means, memories.mean(1))
    shape = (batch["prompt"].shape[0], -1, m, memories.shape[-1])
    return (
      self.cross_entropy(
        batch["prompt"], batch["prompt_mask"], batch["labels"], memories.reshape(shape)
      )
      + 0.1 * mse
    )

  def joint_loss(self, batch, k, temperature=0.02, memories=None):
    """Compresses every candidate (or takes memories [B, N, M, D]), scores, selects by the dense
    straight-through matrix (Algorithm 1)."""
    b = batch["prompt"].shape[0]
    if memories is None:
      with torch.no_grad():
        memories, _ = self.encode("compressor", batch["documents"], batch["document_mask"])
      memories = memories.reshape(b, -1, *memories.shape[1:])
    query, _ = self.encode("query_reasoner", batch["question"], batch["question_mask"])
    flat = memories.flatten(2)
    scores = torch.nn.functional.cosine_similarity(
      query.flatten(1)[:, None].float(), flat.float(), dim=-1
    )
    hard, soft, taken = [], [], torch.zeros_like(scores)
    for index in scores.topk(k, dim=-1).indices.T:
      soft.append(torch.softmax(scores / temperature + torch.log(1 - taken + 1e-8), dim=-1))
      hard.append(torch.nn.functional.one_hot(index, scores.shape[1]).float())
      taken = taken + hard[-1]
    hard, soft = torch.stack(hard, 1), torch.stack(soft, 1)
    selected = torch.einsum(
      "bkn,bnd->bkd", (hard + soft - soft.detach()).to(flat.dtype), flat
    ).reshape(b, k, *memories.shape[2:])
    return self.cross_entropy(batch["prompt"], batch["prompt_mask"], batch["labels"], selected)

  def step(self, optimizer, parameters, loss):
    """One update."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return float(loss.detach())

  def compress(self, ids, mask):
    """Memory tokens, no gradient."""
    with torch.no_grad():
      return self.encode("compressor", ids, mask)[0]

  def answer(self, ids, mask, memories, new_tokens):
    """Greedy answers of exactly that many tokens."""
    self.model.set_adapter("generator")
    with torch.no_grad():
      return self.model.generate(
        inputs_embeds=self.splice(ids, memories),
        attention_mask=mask,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
      )
