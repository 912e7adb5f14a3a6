"""Run by another Python with another transformers: what it reads of some folders, as one line of JSON for each.

usage: logits_of.py FOLDER...
"""

import json
import sys

import torch
import transformers

IDS = [5, 17, 3, 90, 41, 8, 8, 60, 33, 2, 71, 19, 54, 23, 11, 7, 64, 29, 12, 80, 45, 6, 38, 90]


def read(folder):
    """What this transformers makes of a folder: logits of IDS, ids of a text, a templated chat, end tokens."""
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto", attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = net.eval()(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
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
