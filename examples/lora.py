"""Train a LoRA adapter on a quantized model, then merge it into the codes.

python examples/lora.py MODEL OUT [STEPS]
"""

import sys
from pydoc_data import topics

import peft
import torch

import tqw
from tqw.source import find, load_float, load_tokenizer

MODEL, OUT = sys.argv[1:3]
STEPS = int(sys.argv[3]) if len(sys.argv) > 3 else 20

source = find(MODEL)
model, tokenizer = load_float(source), load_tokenizer(source)
report = tqw.quantize_model(model, tqw.QuantConfig(bits=4, group_size=32))
model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))

ids = torch.tensor(tokenizer(topics.topics["assignment"][:2000], add_special_tokens=False)["input_ids"])
batch = ids[: len(ids) // 64 * 64].view(-1, 64)[:8]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
for step in range(STEPS):
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, STEPS - 1):
        print(f"step {step}: loss {loss.item():.3f}")

merged = tqw.merge_lora(model)  # dequantize, add, quantize again: same format, same size
tqw.save(merged, OUT, report, tokenizer)
print(f"saved {OUT}")
