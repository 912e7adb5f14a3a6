"""Imported by a process from which ranks are forked: what each of them would take seconds for at its first use.

Nothing here computes: threads of a pool that the parent has started are missing in its children.
"""

import io

import torch
from matplotlib.figure import Figure

from skyrl import kernels
from skyrl.config.load import load_config
from skyrl.pretrained.load import build_on_meta
from skyrl.text.tokenizer import load_tokenizer

_CONFIG = load_config().model
build_on_meta(_CONFIG, load_tokenizer(_CONFIG), head="logits", dtype=torch.float32)
kernels.library()
Figure().savefig(io.BytesIO(), format="png")
