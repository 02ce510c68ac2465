"""One graph, no breaks: the quantized product is one opaque op to torch.compile.

python examples/torch_compile.py MODEL [BACKEND]       BACKEND: inductor (needs a C++ compiler), aot_eager, ...
"""

import sys

import torch

import tqw
from tqw.source import find, load_float

MODEL = sys.argv[1]
BACKEND = sys.argv[2] if len(sys.argv) > 2 else "inductor"

model = load_float(find(MODEL))
tqw.quantize_model(model, tqw.QuantConfig(bits=4, group_size=32))
compiled = torch.compile(model, fullgraph=True, backend=BACKEND)

ids = torch.arange(3, 20)[None]
with torch.no_grad():
    eager, graph = model(ids, use_cache=False).logits, compiled(ids, use_cache=False).logits
print(f"largest difference to eager: {(eager - graph).abs().max():.2e}")
assert torch.allclose(eager, graph, rtol=1e-3, atol=1e-3)
