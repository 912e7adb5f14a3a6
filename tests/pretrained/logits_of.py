"""Run by another Python with another transformers: what it reads of some folders, as one line of JSON for each.

usage: logits_of.py FOLDER...
"""

import json
import sys
from pathlib import Path

import torch
import transformers

IDS = [5, 17, 3, 90, 41, 8, 8, 60, 33, 2, 71, 19, 54, 23, 11, 7, 64, 29, 12, 80, 45, 6, 38, 90]


def read(folder):
    """What this transformers makes of a folder: logits of IDS, ids of a text, a templated chat, end tokens; of a family
    that came later, its name."""
    kind = json.loads((Path(folder) / "config.json").read_text())["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        return {"version": transformers.__version__, "unknown": kind}
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto", attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        # With a mask, which Llama 4 needed at first; with a cache where layers took the keys of others from it.
        ids, shared = torch.tensor([IDS]), hasattr(net.config, "num_kv_shared_layers")
        logits = net.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=shared).logits[0]
    return {
        "version": transformers.__version__,
        "dtype": str(net.dtype),
        "logits": logits.float().tolist(),
        "ids": tokenizer("1+2=3<|end|>")["input_ids"],
        "text": tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False),
        "end": [tokenizer.eos_token_id, net.generation_config.eos_token_id],
    }


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(json.dumps(read(path)))
