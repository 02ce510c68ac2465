"""Quantize a model into a directory, load it, let it speak.

python examples/quantize_and_generate.py [MODEL] [OUT]       MODEL: a directory, a hub id, a GGUF file or 'demo'
"""

import sys

import tqw
from tqw.source import find, load_tokenizer

MODEL, OUT = (*sys.argv[1:], *("demo", "tqw-4bit")[len(sys.argv) - 1 :])

report = tqw.quantize_pretrained(MODEL, OUT, tqw.QuantConfig(bits=4, group_size=64))
print(f"{report.bits_per_weight():.2f} bits per weight, scales included")

model, tokenizer = tqw.load(OUT), load_tokenizer(find(OUT))
prompt = tokenizer("Why is the sky blue?", return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
