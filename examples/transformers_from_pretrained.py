"""transformers loads a float model and quantizes it on the way in, saves it, and loads it again.

python examples/transformers_from_pretrained.py FLOAT_DIR OUT
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import tqw  # makes the format known to transformers

FLOAT, OUT = sys.argv[1:]

config = tqw.TransformersConfig(bits=4)
model = AutoModelForCausalLM.from_pretrained(FLOAT, quantization_config=config)
model.save_pretrained(OUT)
again = AutoModelForCausalLM.from_pretrained(OUT)

ids = torch.arange(3, 20)[None]
with torch.no_grad():
    assert torch.equal(model(ids).logits, again(ids).logits)  # bit for bit
print(f"{model.get_memory_footprint() / 1e6:.1f} MB")
