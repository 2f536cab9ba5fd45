"""Run by tests/test_real.py, with mistral-common (and its numpy) before this environment's packages
on the path: Mistral's own tokenizer files as they lie beside a model, and the token ids of
Mistral's own library for conversations.

    python mistral_reference.py OUT < conversations.json
"""

import json
import pathlib
import shutil
import sys

import mistral_common
from mistral_common.protocol.instruct.messages import SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import PreTrainedTokenizerFast
from transformers.integrations.mistral.tokenizer import MistralConverter

FILES = {
  "v1": ("tokenizer.model.v1", "tokenizer.model"),
  "v3": ("mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model"),
  "tekken": ("tekken_240718.json", "tekken.json"),
}


def main() -> None:
  """Writes OUT/VERSION/ with a tokenizer and OUT/ids.json: {version: [ids of each
  conversation]}."""
  out, conversations = pathlib.Path(sys.argv[1]), json.load(sys.stdin)
  data, ids = pathlib.Path(mistral_common.__file__).parent / "data", {}
  for version, (name, plain) in FILES.items():
    reference = MistralTokenizer.from_file(str(data / name))
    ids[version] = [
      reference.encode_chat_completion(
        ChatCompletionRequest(messages=[SystemMessage(content=system), UserMessage(content=user)])
      ).tokens
      for system, user in conversations
    ]
    (out / version).mkdir(parents=True)
    shutil.copyfile(data / name, out / version / plain)
    (out / version / "config.json").write_text('{"model_type": "mistral"}')
    if version == "tekken":  # as tokenizer.json, which the hub's models have
      backend = MistralConverter(str(out / version / plain)).converted()
      PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
      ).save_pretrained(out / version)
  (out / "ids.json").write_text(json.dumps(ids))


if __name__ == "__main__":
  main()
